#!/usr/bin/env nextflow

include { SLIDE_TO_CELLS } from './subworkflows/slide_to_cells'
include { PREVIEW_SLIDES } from './subworkflows/preview_slides'
include { SPLIT_REGIONS  } from './subworkflows/split_regions'
include { CELL_TYPES     } from './subworkflows/cell_types'
include { DOMAINS        } from './subworkflows/domains'
include { PUBLISH_SLIDES } from './subworkflows/publish_slides'
include { COHORT         } from './subworkflows/cohort'
include { ESTIMATE       } from './modules/estimate'

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
    Disk.check(slides.values().findAll { slide -> !slide.parent }, params, workflow)
    if (!params.estimate) {
        Run.begin(params, slides, workflow)
    }

    // One item a slide: [[id: 'liver_1'], machine's folder or image, transcript table or [], prior cells or [], regions or []]
    slides_ch = channel
        .fromList(slides.findAll { _id, slide -> !slide.is_table && !slide.parent }.values())
        .map { slide -> [[id: slide.id], slide.path, slide.transcripts, slide.prior_cells, slide.regions] }
    // Cells that were found elsewhere: [[id: 'liver_2'], cells.h5ad]
    tables_ch = channel
        .fromList(slides.findAll { _id, slide -> slide.is_table }.values())
        .map { slide -> [[id: slide.id], slide.path] }

    if (params.estimate) {
        // The slides are there to be looked into, nothing else starts.
        def files = slides.values().collectMany { slide -> [slide.path, slide.transcripts, slide.prior_cells].findAll() }
        def prices = slides.values().first().prices
        ESTIMATE(Resources.request(params, projectDir, workflow.launchDir), files, prices).table.view { text -> text.trim() }
    }
    else if (params.preview) {
        PREVIEW_SLIDES(slides_ch, slides)
    }
    else {
        whole = SLIDE_TO_CELLS(slides_ch, slides)
        // From here on a slide's regions are slides, too; what is found of cells is found in them alone.
        cells = SPLIT_REGIONS(whole.parts, whole.tables, whole.compared, slides)
        // One item a slide, as soon as the whole cohort's domains are known, or at once if none are wanted.
        domains_ch = cells.parts.map { meta, _parts -> [meta, [], []] }
        (about_ch, model_ch) = [channel.empty(), channel.empty()]
        if (params.domains != 'none') {
            with_raw_ch = cells.tables
                .join(cells.parts.map { meta, parts -> [meta, parts[0]] })
                .mix(tables_ch.map { meta, table -> [meta, table, []] })
            found = DOMAINS(with_raw_ch, slides, params.domains)
            (domains_ch, about_ch, model_ch) = [found.domains.mix(cells.split.map { meta, _columns -> [meta, [], []] }), found.about, found.model]
        }
        columns_ch = CELL_TYPES(cells.tables, slides).columns.mix(cells.split)
        published = PUBLISH_SLIDES(cells.parts, cells.compared, tables_ch, domains_ch, columns_ch, slides)
        COHORT(published.qcs, published.with_domains, published.measured, about_ch, model_ch, slides)
    }

    // What made the results, as every task says of itself.
    channel.topic('versions').map { file -> file.text }.unique().collect().subscribe { texts -> Run.versions(texts) }

    workflow.onComplete = {
        if (!params.estimate) {
            def summary = Run.summary(workflow)
            println(summary)
            if (params.email_on_fail && !workflow.success) {
                sendMail(to: params.email_on_fail, subject: "cellquilt: a run failed (${workflow.runName})", body: summary)
            }
        }
    }
}
