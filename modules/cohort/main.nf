process SAMPLES {
    label 'process_single'
    label 'env_core'
    memory { Resources.memory(task, '', []) }
    time { Resources.time(task, '', []) }
    publishDir path: { params.outdir }, mode: params.publish_dir_mode, pattern: '*.tsv'
    publishDir path: { "${params.outdir}/pipeline_info" }, mode: params.publish_dir_mode, pattern: '*.yml'

    input:
    val samples
    path qcs, stageAs: 'qc/?.json'

    output:
    path 'samples.tsv', emit: table
    path 'versions.yml', emit: versions

    script:
    """
    samples.py ${qcs} --samples ${samples.join(',')} --output samples.tsv --versions versions.yml
    """

    stub:
    """
    touch samples.tsv versions.yml
    """
}
