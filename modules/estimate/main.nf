process ESTIMATE {
    label 'process_single'
    label 'env_core'
    memory { Resources.memory(task, '', []) }
    time { Resources.time(task, '', []) }
    publishDir path: { "${params.outdir}/pipeline_info" }, mode: params.publish_dir_mode

    input:
    val request // {"sheet": "/data/sheet.csv", "expand_um": 3, …}
    path slides, stageAs: 'slides/?/*' // so that containers see them where the sheet says that they lie
    path prices, stageAs: 'prices/*'

    output:
    path 'estimate.json', emit: estimate
    stdout emit: table

    script:
    def offers = prices ? "--prices ${prices}" : ''
    """
    estimate.py ${offers} --settings '${request}' --json-output estimate.json
    """

    stub:
    """
    touch estimate.json
    """
}
