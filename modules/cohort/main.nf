process SAMPLES {
    label 'process_single'
    label 'env_core'
    publishDir path: { params.outdir }, mode: params.publish_dir_mode

    input:
    val samples
    path qcs, stageAs: 'qc/?.json'

    output:
    path 'samples.tsv', emit: table

    script:
    """
    samples.py ${qcs} --samples ${samples.join(',')} --output samples.tsv
    """

    stub:
    """
    touch samples.tsv
    """
}
