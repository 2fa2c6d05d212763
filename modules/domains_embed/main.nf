process DOMAINS_EMBED {
    tag "${meta.id}"
    label 'process_medium'
    label 'env_domains'
    memory { Resources.memory(task, settings, graph) }
    time { Resources.time(task, settings, graph) }

    input:
    tuple val(meta), val(settings), path(graph)
    path model, stageAs: 'model'

    output:
    tuple val(meta), path("${meta.id}.latents.parquet", arity: '1'), emit: latents
    path 'versions.yml', topic: versions

    script:
    def weights = model ? "--weights ${model}" : ''
    """
    domains_embed.py ${graph} ${weights} --output ${meta.id}.latents.parquet --settings '${settings}'
    """

    stub:
    """
    touch ${meta.id}.latents.parquet versions.yml
    """
}
