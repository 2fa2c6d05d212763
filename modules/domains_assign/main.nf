process DOMAINS_ASSIGN {
    label 'process_medium'
    label 'env_domains'
    memory { Resources.memory(task, settings, latents) }
    time { Resources.time(task, settings, latents) }
    publishDir path: { "${params.outdir}/cohort" }, mode: params.publish_dir_mode, saveAs: { name -> name == 'versions.yml' ? null : name }

    input:
    val settings
    path latents
    path model, stageAs: 'model'

    output:
    path 'domains/*.domains.parquet', arity: '1..*'     , emit: domains
    path 'domains/domains.json', arity: '1'             , emit: about
    path 'domains/model', type: 'dir', arity: '1'       , emit: model
    path 'versions.yml', topic: versions

    script:
    def weights = model ? "--weights ${model}" : ''
    """
    domains_assign.py ${latents} ${weights} --output domains --settings '${settings}'
    """

    stub:
    """
    mkdir -p domains/model
    touch domains/domains.json versions.yml
    for file in ${latents}; do touch domains/\$(basename \$file .latents.parquet).domains.parquet; done
    """
}
