process SAMPLES {
    label 'process_single'
    label 'env_core'
    memory { Resources.memory(task, '', []) }
    time { Resources.time(task, '', []) }
    publishDir path: { params.outdir }, mode: params.publish_dir_mode, pattern: 'samples.tsv'
    publishDir path: { "${params.outdir}/pipeline_info" }, mode: params.publish_dir_mode, pattern: 'checksums.tsv'
    publishDir path: { "${params.outdir}/multiqc" }, mode: params.publish_dir_mode, pattern: '*_mqc.*'

    input:
    val samples
    path qcs, stageAs: 'qc/?.json'

    output:
    path 'samples.tsv', emit: table
    path 'checksums.tsv', emit: checksums
    path '*_mqc.tsv', emit: multiqc
    path 'versions.yml', topic: versions

    script:
    """
    samples.py ${qcs} --samples ${samples.join(',')} --output samples.tsv --checksums checksums.tsv --multiqc .
    """

    stub:
    """
    touch samples.tsv checksums.tsv cellquilt_samples_mqc.tsv versions.yml
    """
}
