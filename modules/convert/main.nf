process CONVERT {
    tag "${meta.id}"
    label 'process_medium'
    label 'env_core'
    memory { Resources.memory(task, settings, [slide, transcripts, prior, fullres]) }
    time { Resources.time(task, settings, [slide, transcripts, prior, fullres]) }

    input:
    tuple val(meta), val(settings), path(slide, stageAs: 'slide/*'), path(transcripts, stageAs: 'transcripts/*'), path(prior, stageAs: 'prior/*'), path(regions, stageAs: 'regions/*'), path(fullres, stageAs: 'fullres/*')

    output:
    tuple val(meta), path("${meta.id}.raw.zarr", type: 'dir', arity: '1'), emit: store
    path 'versions.yml', topic: versions

    script:
    def files = [transcripts: transcripts, 'prior-cells': prior, regions: regions, 'fullres-image': fullres].findAll { _name, file -> file }.collect { name, file -> "--${name} ${file}" }.join(' ')
    """
    convert.py ${slide ?: ''} ${files} --sample ${meta.id} --output ${meta.id}.raw.zarr --settings '${settings}'
    """

    stub:
    """
    mkdir ${meta.id}.raw.zarr
    touch versions.yml
    """
}
