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

    // Parameters and sheet, checked before anything starts: one map a slide,
    // [id: 'liver_1', method: 'cellpose', path: /data/liver_1, transcripts: [], …, settings: [convert: '{"z": "max"}', …]]
    slides = Inputs.slides(params, projectDir, workflow.launchDir)
    settings = slides.collectEntries { slide -> [slide.id, slide.settings] } // id → stage → JSON
    methods = slides.collectEntries { slide -> [slide.id, slide.method] } // id → 'cellpose3' | 'generic' | 'vendor'

    // One item a slide: [[id: 'liver_1'], machine's folder or image, transcript table or []]
    slides_ch = channel.fromList(slides).map { slide -> [[id: slide.id], slide.path, slide.transcripts] }

    if (params.preview) {
        PREVIEW_SLIDES(slides_ch, settings)
    }
    else {
        SLIDE_TO_CELLS(slides_ch, settings, methods)
        COHORT(SLIDE_TO_CELLS.out.reports, slides.collect { slide -> slide.id })
    }

    workflow.onComplete = {
        Inputs.summary(workflow, params.outdir)
    }
}
