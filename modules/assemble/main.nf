process ASSEMBLE {
    tag "${meta.id}"
    label 'process_low'
    label 'env_core'
    memory { Resources.memory(task, settings, [parts, compared]) }
    time { Resources.time(task, settings, [parts, compared]) }
    publishDir path: { "${params.outdir}/${meta.id}" }, mode: Disk.publishMode(params), saveAs: { name -> name == 'versions.yml' ? null : name }

    input:
    tuple val(meta), val(settings), path(parts), path(compared, stageAs: 'compared/?/*'), path(domains), path(graph), path(columns), path(thresholds, stageAs: 'thresholds/*')

    output:
    tuple val(meta), path("${meta.id}.zarr", type: 'dir', arity: '1'), path('qc.json', arity: '1'), emit: store
    path 'versions.yml', topic: versions

    script:
    def limits = thresholds ? "--qc-thresholds ${thresholds}" : ''
    def niches = [domains: domains, graph: graph].findAll { _name, file -> file }.collect { name, file -> "--${name} ${file}" }.join(' ')
    def more = (columns instanceof List ? columns : [columns]).collect { file -> "--columns ${file}" }.join(' ')
    """
    assemble.py ${parts} ${compared} ${niches} ${more} --output ${meta.id}.zarr --qc qc.json ${limits} --settings '${settings}'
    """

    stub:
    """
    mkdir ${meta.id}.zarr
    touch qc.json versions.yml
    """
}
