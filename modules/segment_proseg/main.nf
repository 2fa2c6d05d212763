process SEGMENT_PROSEG {
    tag "${group.id}:${group.method}:${bundle.baseName}"
    label 'process_high'
    label 'env_proseg'

    input:
    tuple val(group), val(settings), path(bundle)

    output:
    tuple val(group), path("${bundle.baseName}.result", type: 'dir', arity: '1'), emit: cells

    script:
    """
    segment.py proseg ${bundle} --output ${bundle.baseName}.result --threads ${task.cpus} --settings '${settings}'
    """

    stub:
    """
    mkdir ${bundle.baseName}.result
    """
}
