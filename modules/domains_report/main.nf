process DOMAINS_REPORT {
    label 'process_medium'
    label 'env_domains'
    memory { Resources.memory(task, '', tables) }
    time { Resources.time(task, '', tables) }
    publishDir path: { "${params.outdir}/cohort" }, mode: params.publish_dir_mode, saveAs: { name -> name == 'versions.yml' ? null : name }

    input:
    val columns
    path tables
    path about
    path model

    output:
    path 'report.html', arity: '1'   , emit: report
    path 'stats/*.csv', arity: '1..*', emit: tables
    path 'versions.yml', topic: versions

    script:
    def given = columns.collect { option, column -> "--${option} ${column}" }.join(' ')
    """
    domains_report.py ${tables} ${given} --model ${model} --about ${about} --tables-output stats --output report.html
    """

    stub:
    """
    mkdir stats
    touch stats/proportions.csv report.html versions.yml
    """
}
