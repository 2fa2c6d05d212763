process AGGREGATE {
    tag "${meta.id}:${meta.method}"
    label 'process_medium'
    label 'env_core'
    memory { Resources.memory(task, settings, [raw, cells]) }
    time { Resources.time(task, settings, [raw, cells]) }

    input:
    tuple val(meta), val(settings), path(raw), path(cells), val(compared)

    output:
    tuple val(meta), path("${meta.id}.table.zarr", type: 'dir', arity: '1'), emit: store
    path 'versions.yml', topic: versions

    script:
    def name = compared ? "--name ${meta.method}" : ''
    """
    aggregate.py ${raw} --cells ${cells} ${name} --output ${meta.id}.table.zarr --settings '${settings}'
    """

    stub:
    """
    mkdir ${meta.id}.table.zarr
    touch versions.yml
    """
}
