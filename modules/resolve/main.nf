process RESOLVE {
    tag "${meta.id}:${meta.method}"
    label 'process_medium'
    label 'env_core'
    memory { Resources.memory(task, settings, [raw, patch_cells]) }
    time { Resources.time(task, settings, [raw, patch_cells]) }

    input:
    tuple val(meta), val(settings), path(raw), path(patch_cells)

    output:
    tuple val(meta), path("${meta.id}.cells.zarr", type: 'dir', arity: '1'), emit: store
    path 'versions.yml', topic: versions

    script:
    """
    resolve.py ${raw} ${patch_cells} --output ${meta.id}.cells.zarr --settings '${settings}'
    """

    stub:
    """
    mkdir ${meta.id}.cells.zarr
    touch versions.yml
    """
}
