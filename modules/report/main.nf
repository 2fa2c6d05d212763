process REPORT {
    tag "${meta.id}"
    label 'process_low'
    label 'env_core'
    memory { Resources.memory(task, settings, store) }
    time { Resources.time(task, settings, store) }
    publishDir path: { "${params.outdir}/${meta.id}" }, mode: params.publish_dir_mode, pattern: 'report.html'

    input:
    tuple val(meta), val(settings), path(store), path(qc), path(truth, stageAs: 'truth/*'), path(comparison), path(stats)

    output:
    tuple val(meta), path(qc), path('report.html', arity: '1'), emit: report
    path 'versions.yml', topic: versions

    script:
    def known = truth ? "--truth ${truth}" : ''
    def methods = comparison ? "--comparison ${comparison}" : ''
    def space = stats ? "--stats ${stats}" : ''
    """
    report.py ${store} --qc ${qc} ${known} ${methods} ${space} --output report.html --settings '${settings}'
    """

    stub:
    """
    touch report.html versions.yml
    """
}
