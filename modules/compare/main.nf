process COMPARE {
    tag "${meta.id}"
    label 'process_medium'
    label 'env_core'
    memory { Resources.memory(task, settings, store) }
    time { Resources.time(task, settings, store) }
    publishDir path: { "${params.outdir}/${meta.id}" }, mode: params.publish_dir_mode, saveAs: { name -> name == 'versions.yml' ? null : name }

    input:
    tuple val(meta), val(settings), path(store), path(truth, stageAs: 'truth/*'), path(markers, stageAs: 'markers/*'), path(reference, stageAs: 'reference/*')

    output:
    tuple val(meta), path('comparison.json', arity: '1'), emit: comparison
    tuple val(meta), path('comparison.tsv', arity: '1') , emit: table
    path 'versions.yml', topic: versions

    script:
    def known = truth ? "--truth ${truth}" : ''
    def pairs = markers ? "--compare-markers ${markers}" : ''
    def types = reference ? "--compare-reference ${reference}" : ''
    """
    compare.py ${store} --output comparison.json --output comparison.tsv ${known} ${pairs} ${types} --settings '${settings}'
    """

    stub:
    """
    touch comparison.json comparison.tsv versions.yml
    """
}
