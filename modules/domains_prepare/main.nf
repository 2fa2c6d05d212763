process DOMAINS_PREPARE {
    tag "${meta.id}"
    label params.domains_gpu && params.domains_image_model ? 'process_gpu' : 'process_medium'
    label params.domains_image_model ? 'env_domains' : 'env_core'
    memory { Resources.memory(task, settings, [table, slide]) }
    time { Resources.time(task, settings, [table, slide]) }

    input:
    // The rest only where an image is looked at: the store with the slide's images, an aligned image and its matrix, and the
    // network's weights.
    tuple val(meta), val(settings), path(table, stageAs: 'table/*'), val(may_refuse), path(slide, stageAs: 'slide/*'),
        path(he_image, stageAs: 'he_image/*'), path(he_matrix, stageAs: 'he_matrix/*'), path(weights, stageAs: 'weights/*')

    output:
    // One of the two: the cells, or why there is nothing to find domains from.
    tuple val(meta), path("${meta.id}.graph.zarr", type: 'dir'), emit: graph, optional: true
    tuple val(meta), path("${meta.id}.refusal.json")           , emit: refusal, optional: true
    path 'versions.yml', topic: versions

    script:
    def refusal = may_refuse ? "--refusal ${meta.id}.refusal.json" : ''
    def image = [['slide', slide], ['he-image', he_image], ['he-matrix', he_matrix], ['image-weights', weights]]
        .findAll { given -> given[1] }
        .collect { option, file -> "--${option} ${file}" }
        .join(' ')
    """
    domains_prepare.py ${table} --sample ${meta.id} ${refusal} ${image} --output ${meta.id}.graph.zarr --settings '${settings}'
    """

    stub:
    """
    mkdir ${meta.id}.graph.zarr
    touch versions.yml
    """
}
