// A miniature of the pipeline around lib/Inputs.groovy: paths of any name are staged, and samples fail in several ways.
// nextflow run tests/pipeline/stage_inputs -lib lib --input sheet.csv --outdir results --repository .
process CONVERT {
    tag "${meta.id}"
    errorStrategy { task.exitStatus == 137 && task.attempt < 2 ? 'retry' : 'ignore' }

    input:
    tuple val(meta), val(settings), path(slide, stageAs: 'slide/*')

    output:
    tuple val(meta), path('content.txt'), path('settings.json')

    script:
    """
    cat ${slide} > content.txt
    echo '${settings}' > settings.json
    case "\$(cat content.txt)" in
        mistaken) echo 'CELLQUILT_ERROR {"code": "no-image", "message": "no image in /data/lab 1/x/slide.tif", "hint": "look there"}' >&2; exit 1 ;;
        killed) exit 137 ;;
        unlucky) if [ ${task.attempt} = 1 ]; then exit 137; fi ;;
        broken) echo 'Segmentation fault' >&2; exit 139 ;;
    esac
    """
}

process REPORT {
    tag "${meta.id}"
    publishDir "${params.outdir}/${meta.id}", mode: 'copy'

    input:
    tuple val(meta), path(content), path(settings)

    output:
    tuple path(content), path(settings)

    script:
    """
    true
    """
}

workflow {
    main:
    slides = Inputs.slides(params.findAll { entry -> entry.key != 'repository' }, file(params.repository), workflow.launchDir)
    Run.begin(params, slides.collectEntries { slide -> [slide.id, slide] }, workflow)
    slides_ch = channel.fromList(slides).map { slide -> [[id: slide.id], slide.settings.convert, slide.path] }
    REPORT(CONVERT(slides_ch))

    workflow.onComplete = {
        println(Run.summary(workflow))
    }
}
