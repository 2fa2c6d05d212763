process SEGMENT_STARDIST {
    tag "${group.id}:${group.method}:${bundle.baseName}"
    label params.stardist_gpu ? 'process_gpu' : 'process_medium'
    label 'env_stardist'
    memory { Resources.memory(task, settings, bundle) }
    time { Resources.time(task, settings, bundle) }

    input:
    tuple val(group), val(settings), path(bundle), path(weights, stageAs: 'weights/*')

    output:
    tuple val(group), path("${bundle.baseName}.cells.parquet", arity: '1'), emit: cells
    path 'versions.yml', topic: versions

    script:
    def model = weights ? "--weights ${weights}" : ''
    """
    segment.py stardist ${bundle} --output ${bundle.baseName}.cells.parquet ${model} --settings '${settings}'
    """

    stub:
    """
    touch ${bundle.baseName}.cells.parquet versions.yml
    """
}
