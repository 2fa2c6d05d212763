process EXPORT {
    tag "${meta.id}"
    label 'process_low'
    label 'env_core'
    memory { Resources.memory(task, settings, store) }
    time { Resources.time(task, settings, store) }
    publishDir path: { "${params.outdir}/${meta.id}" }, mode: params.publish_dir_mode, saveAs: { name -> name == 'versions.yml' ? null : name }

    input:
    tuple val(meta), val(settings), path(store)

    output:
    tuple val(meta), path('exports', type: 'dir', arity: '1'), emit: files
    path 'versions.yml', topic: versions

    script:
    """
    export.py ${store} --output exports --settings '${settings}'
    """

    stub:
    """
    mkdir exports
    touch versions.yml
    """
}
