process STATS_COHORT {
    label 'process_low'
    label 'env_core'
    memory { Resources.memory(task, '', []) }
    time { Resources.time(task, '', []) }
    publishDir path: { "${params.outdir}/cohort" }, mode: params.publish_dir_mode, saveAs: { name -> name == 'versions.yml' ? null : name }

    input:
    val columns
    path folders, stageAs: 'slides/?'

    output:
    path 'stats/*.csv', arity: '1..*', emit: tables
    path 'spatial.html', arity: '1'  , emit: report
    path 'versions.yml', topic: versions

    script:
    def given = columns.collect { option, column -> "--${option} ${column}" }.join(' ')
    """
    stats_cohort.py ${folders} ${given} --output stats --html spatial.html
    """

    stub:
    """
    mkdir stats
    touch stats/spatial.csv spatial.html versions.yml
    """
}
