#!/usr/bin/env nextflow

include { SLIDE_TO_CELLS } from './subworkflows/slide_to_cells'
include { PREVIEW_SLIDES } from './subworkflows/preview_slides'
include { COHORT         } from './subworkflows/cohort'

workflow {
    main:
    if (params.help || params.help_full) {
        println(Inputs.help(projectDir, params.help_full))
        exit(0)
    }

    // Parameters and sheet, checked before anything starts. By name of the sample, in the order of the sheet:
    // liver_1: [path: /data/liver_1, transcripts: [], truth: [], settings: [convert: '{"z": "max", …}', tissue: …, …],
    //           methods: ['cellpose', 'vendor'], images: ['cellpose', 'vendor'],
    //           by_method: [cellpose: [engine: 'cellpose3', weights: [], settings: [resolve: '{"expand_um": …}', …]], …]]
    slides = Inputs.slides(params, projectDir, workflow.launchDir).collectEntries { slide -> [slide.id, slide] }

    // One item a slide: [[id: 'liver_1'], machine's folder or image, transcript table or [], prior cells or []]
    slides_ch = channel.fromList(slides.collect { id, slide -> [[id: id], slide.path, slide.transcripts, slide.prior_cells] })

    if (params.preview) {
        PREVIEW_SLIDES(slides_ch, slides)
    }
    else {
        SLIDE_TO_CELLS(slides_ch, slides)
        COHORT(SLIDE_TO_CELLS.out.reports, slides.keySet().toList())
    }

    workflow.onComplete = {
        Inputs.summary(workflow, params.outdir)
    }
}
