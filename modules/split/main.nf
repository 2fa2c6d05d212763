process SPLIT {
    tag "${meta.id}"
    label 'process_low'
    label 'env_core'
    memory { Resources.memory(task, settings, parts) }
    time { Resources.time(task, settings, parts) }

    input:
    tuple val(meta), val(settings), path(parts), val(samples)

    output:
    tuple val(meta), path('split/*.slide.zarr', type: 'dir', arity: '1..*'), emit: stores
    tuple val(meta), path("${meta.id}.regions.parquet", arity: '1')         , emit: columns
    path 'versions.yml', topic: versions

    script:
    """
    split.py ${parts} --output split --columns ${meta.id}.regions.parquet --settings '${settings}'
    """

    stub:
    """
    mkdir -p ${samples.collect { sample -> "split/${sample}.slide.zarr" }.join(' ')}
    touch ${meta.id}.regions.parquet versions.yml
    """
}
