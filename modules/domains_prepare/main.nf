process DOMAINS_PREPARE {
    tag "${meta.id}"
    label 'process_medium'
    label 'env_core'

    input:
    tuple val(meta), val(settings), path(table, stageAs: 'table/*'), val(may_refuse)

    output:
    // One of the two: the cells, or why there is nothing to find domains from.
    tuple val(meta), path("${meta.id}.graph.zarr", type: 'dir'), emit: graph, optional: true
    tuple val(meta), path("${meta.id}.refusal.json")           , emit: refusal, optional: true

    script:
    def refusal = may_refuse ? "--refusal ${meta.id}.refusal.json" : ''
    """
    domains_prepare.py ${table} --sample ${meta.id} ${refusal} --output ${meta.id}.graph.zarr --settings '${settings}'
    """

    stub:
    """
    mkdir ${meta.id}.graph.zarr
    """
}
