process EXPLORER {
    tag "${meta.id}"
    label 'process_low'
    label 'env_core'
    memory { Resources.memory(task, settings, store) }
    time { Resources.time(task, settings, store) }
    publishDir path: { "${params.outdir}/${meta.id}" }, mode: params.publish_dir_mode, saveAs: { name -> name == 'versions.yml' ? null : name }

    input:
    tuple val(meta), val(settings), path(store)

    output:
    tuple val(meta), path('explorer', type: 'dir', arity: '1'), emit: folder
    path 'versions.yml', topic: versions

    script:
    """
    explorer.py ${store} --output explorer --settings '${settings}'
    """

    stub:
    """
    mkdir explorer
    touch explorer/experiment.xenium
    touch versions.yml
    """
}
