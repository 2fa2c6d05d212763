process REPORT {
    tag "${meta.id}"
    label 'process_low'
    label 'env_core'

    input:
    tuple val(meta), val(settings), path(store), path(qc)

    output:
    tuple val(meta), path(qc), path('report.html', arity: '1'), emit: report

    script:
    """
    report.py ${store} --qc ${qc} --output report.html --settings '${settings}'
    """

    stub:
    """
    touch report.html
    """
}
