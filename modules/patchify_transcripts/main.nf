process PATCHIFY_TRANSCRIPTS {
    tag "${meta.id}:${meta.method}"
    label 'process_medium'
    label 'env_core'
    memory { Resources.memory(task, settings, [raw, prior]) }
    time { Resources.time(task, settings, [raw, prior]) }

    input:
    tuple val(meta), val(method), val(settings), path(raw), path(prior), path(labels, stageAs: 'labels/*'), path(config, stageAs: 'config/*')

    output:
    tuple val(meta), path('bundles/bundle_*.zarr', type: 'dir', arity: '1..*')           , emit: bundles
    tuple val(meta), path("${meta.id}.transcript_patches.zarr", type: 'dir', arity: '1') , emit: store
    path 'versions.yml', topic: versions

    script:
    def files = [cells: prior, prior: labels, 'baysor-config': config].findAll { _name, file -> file }.collect { name, file -> "--${name} ${file}" }.join(' ')
    """
    patchify_transcripts.py ${raw} --method ${method} ${files} --bundles bundles --output ${meta.id}.transcript_patches.zarr --settings '${settings}'
    """

    stub:
    """
    mkdir -p ${meta.id}.transcript_patches.zarr bundles/bundle_000.zarr bundles/bundle_001.zarr
    touch versions.yml
    """
}
