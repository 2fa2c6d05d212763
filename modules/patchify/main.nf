process PATCHIFY {
    tag "${meta.id}:${meta.method}"
    label 'process_medium'
    label 'env_core'
    memory { Resources.memory(task, settings, raw) }
    time { Resources.time(task, settings, raw) }

    input:
    tuple val(meta), val(settings), path(raw), path(tissue), path(weights, stageAs: 'weights/*')

    output:
    tuple val(meta), path('bundles/bundle_*.zarr', type: 'dir', arity: '1..*'), emit: bundles
    tuple val(meta), path("${meta.id}.patches.zarr", type: 'dir', arity: '1') , emit: store
    path 'versions.yml', topic: versions

    script:
    def model = weights ? "--weights ${weights}" : ''
    """
    patchify.py ${raw} --tissue ${tissue} --bundles bundles --output ${meta.id}.patches.zarr ${model} --settings '${settings}'
    """

    stub:
    """
    mkdir -p ${meta.id}.patches.zarr bundles/bundle_000.zarr bundles/bundle_001.zarr
    touch versions.yml
    """
}
