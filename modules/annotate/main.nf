process ANNOTATE {
    tag "${meta.id}"
    label 'process_medium'
    label 'env_domains'
    memory { Resources.memory(task, settings, [table, reference]) }
    time { Resources.time(task, settings, [table, reference]) }

    input:
    tuple val(meta), val(settings), path(table), path(markers, stageAs: 'markers/*'), path(reference, stageAs: 'reference/*')

    output:
    tuple val(meta), path("${meta.id}.types.parquet", arity: '1'), emit: columns
    path 'versions.yml', topic: versions

    script:
    def by = markers ? "markers ${table} --annotate-markers ${markers}" : "transfer ${table} --annotate-reference ${reference}"
    """
    annotate.py ${by} --output ${meta.id}.types.parquet --allow-none --settings '${settings}'
    """

    stub:
    """
    touch ${meta.id}.types.parquet versions.yml
    """
}
