process DOMAINS_ANNOTATE {
    tag "${meta.id}"
    label 'process_medium'
    label 'env_core'
    memory { Resources.memory(task, settings, table) }
    time { Resources.time(task, settings, table) }
    publishDir path: { "${params.outdir}/${meta.id}" }, mode: params.publish_dir_mode, saveAs: { name -> name == 'versions.yml' ? null : name }

    input:
    tuple val(meta), val(settings), path(table, stageAs: 'table/*'), path(domains), path(graph)

    output:
    tuple val(meta), path("${meta.id}.{h5ad,zarr}", arity: '1'), path('qc.json', arity: '1'), emit: table
    path 'versions.yml', topic: versions

    script:
    def kind = table.name.toLowerCase().endsWith('.h5ad') ? 'h5ad' : 'zarr'
    """
    domains_annotate.py ${table} --domains ${domains} --graph ${graph} --sample ${meta.id} --output ${meta.id}.${kind} --qc qc.json --settings '${settings}'
    """

    stub:
    def kind = table.name.toLowerCase().endsWith('.h5ad') ? 'h5ad' : 'zarr'
    """
    touch ${meta.id}.${kind} qc.json versions.yml
    """
}
