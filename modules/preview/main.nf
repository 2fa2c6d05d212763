process PREVIEW {
    tag "${meta.id}"
    label 'process_medium'
    label 'env_cellpose3'
    memory { Resources.memory(task, settings, [raw, tissue]) }
    time { Resources.time(task, settings, [raw, tissue]) }
    publishDir path: { "${params.outdir}/${meta.id}" }, mode: params.publish_dir_mode, saveAs: { name -> name == 'versions.yml' ? null : name }

    input:
    tuple val(meta), val(settings), path(raw), path(tissue), path(weights, stageAs: 'weights/*')

    output:
    tuple val(meta), path('preview.html', arity: '1'), emit: page
    path 'versions.yml', topic: versions

    script:
    def model = weights ? "--weights ${weights}" : ''
    """
    preview.py ${raw} --tissue ${tissue} --output preview.html ${model} --settings '${settings}'
    """

    stub:
    """
    touch preview.html versions.yml
    """
}
