process DOMAINS_TRAIN {
    label params.domains_gpu && params.domains_recipe == 'published' ? 'process_gpu' : 'process_medium'
    label 'process_long'
    label 'env_domains'
    memory { Resources.memory(task, settings, graphs) }
    time { Resources.time(task, settings, graphs) }

    input:
    val settings
    path graphs
    path start, stageAs: 'start'

    output:
    path 'model', type: 'dir', arity: '1', emit: model
    path 'versions.yml', topic: versions

    script:
    def weights = start ? "--weights ${start}" : ''
    """
    domains_train.py ${graphs} ${weights} --output model --settings '${settings}'
    """

    stub:
    """
    mkdir model
    touch versions.yml
    """
}
