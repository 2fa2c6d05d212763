process STATS {
    tag "${meta.id}"
    label 'process_medium'
    label 'env_core'
    memory { Resources.memory(task, settings, store) }
    time { Resources.time(task, settings, store) }
    publishDir path: { "${params.outdir}/${meta.id}" }, mode: params.publish_dir_mode, saveAs: { name -> name == 'versions.yml' ? null : name }

    input:
    tuple val(meta), val(settings), path(store)

    output:
    tuple val(meta), path('stats', type: 'dir', arity: '1'), emit: stats
    path 'versions.yml', topic: versions

    script:
    """
    stats.py ${store} --output stats --settings '${settings}'
    """

    stub:
    """
    mkdir stats
    touch stats/about.json versions.yml
    """
}
