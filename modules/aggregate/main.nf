process AGGREGATE {
    tag "${meta.id}"
    label 'process_medium'
    label 'env_core'

    input:
    tuple val(meta), val(settings), path(raw), path(cells)

    output:
    tuple val(meta), path("${meta.id}.table.zarr", type: 'dir', arity: '1'), emit: store

    script:
    """
    aggregate.py ${raw} --cells ${cells} --output ${meta.id}.table.zarr --settings '${settings}'
    """

    stub:
    """
    mkdir ${meta.id}.table.zarr
    """
}
