process RESOLVE_TRANSCRIPTS {
    tag "${meta.id}:${meta.method}"
    label 'process_medium'
    label 'env_core'
    memory { Resources.memory(task, settings, [raw, prior, results]) }
    time { Resources.time(task, settings, [raw, prior, results]) }

    input:
    tuple val(meta), val(settings), path(raw), path(prior), path(results)

    output:
    tuple val(meta), path("${meta.id}.molecules.zarr", type: 'dir', arity: '1'), emit: store
    path 'versions.yml', topic: versions

    script:
    def cells = prior ? "--prior ${prior}" : ''
    """
    resolve.py ${raw} ${results} ${cells} --output ${meta.id}.molecules.zarr --settings '${settings}'
    """

    stub:
    """
    mkdir ${meta.id}.molecules.zarr
    touch versions.yml
    """
}
