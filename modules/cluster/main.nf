process CLUSTER {
    tag "${meta.id}"
    label 'process_medium'
    label 'env_domains'
    memory { Resources.memory(task, settings, table) }
    time { Resources.time(task, settings, table) }
    publishDir path: { "${params.outdir}/${meta.id}" }, mode: params.publish_dir_mode, pattern: 'cluster_markers.tsv'

    input:
    tuple val(meta), val(settings), path(table)

    output:
    tuple val(meta), path("${meta.id}.clusters.parquet", arity: '1'), emit: columns
    path 'cluster_markers.tsv', arity: '1'                          , emit: markers
    path 'versions.yml', topic: versions

    script:
    """
    cluster.py ${table} --output ${meta.id}.clusters.parquet --markers cluster_markers.tsv --allow-none --settings '${settings}'
    """

    stub:
    """
    touch ${meta.id}.clusters.parquet cluster_markers.tsv versions.yml
    """
}
