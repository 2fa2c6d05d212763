process TISSUE {
    tag "${meta.id}"
    label 'process_low'
    label 'env_core'
    memory { Resources.memory(task, settings, raw) }
    time { Resources.time(task, settings, raw) }

    input:
    tuple val(meta), val(settings), path(raw)

    output:
    tuple val(meta), path("${meta.id}.tissue.zarr", type: 'dir', arity: '1'), emit: store
    path 'versions.yml', topic: versions

    script:
    """
    tissue.py ${raw} --output ${meta.id}.tissue.zarr --settings '${settings}'
    """

    stub:
    """
    mkdir ${meta.id}.tissue.zarr
    touch versions.yml
    """
}
