process SEGMENT_BAYSOR {
    tag "${group.id}:${group.method}:${bundle.baseName}"
    label 'process_high'
    label 'env_baysor'
    memory { Resources.memory(task, settings, bundle) }
    time { Resources.time(task, settings, bundle) }

    input:
    tuple val(group), val(settings), path(bundle)

    output:
    tuple val(group), path("${bundle.baseName}.result", type: 'dir', arity: '1'), emit: cells
    path 'versions.yml', topic: versions

    script:
    """
    segment.py baysor ${bundle} --output ${bundle.baseName}.result --threads ${task.cpus} --settings '${settings}'
    """

    stub:
    """
    mkdir ${bundle.baseName}.result
    touch versions.yml
    """
}
