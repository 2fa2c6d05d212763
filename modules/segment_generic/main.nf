process SEGMENT_GENERIC {
    tag "${group.id}:${group.method}:${bundle.baseName}"
    label 'process_medium'
    label 'env_core'
    memory { Resources.memory(task, settings, bundle) }
    time { Resources.time(task, settings, bundle) }

    input:
    tuple val(group), val(settings), path(bundle), path(weights, stageAs: 'weights/*')

    output:
    tuple val(group), path("${bundle.baseName}.cells.parquet", arity: '1'), emit: cells
    path 'versions.yml', topic: versions

    script:
    """
    segment.py generic ${bundle} --output ${bundle.baseName}.cells.parquet --settings '${settings}'
    """

    stub:
    """
    touch ${bundle.baseName}.cells.parquet versions.yml
    """
}
