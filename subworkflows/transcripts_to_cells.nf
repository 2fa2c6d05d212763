include { PATCHIFY_TRANSCRIPTS            } from '../modules/patchify_transcripts'
include { SEGMENT_BAYSOR                  } from '../modules/segment_baysor'
include { SEGMENT_PROSEG                  } from '../modules/segment_proseg'
include { RESOLVE_TRANSCRIPTS             } from '../modules/resolve_transcripts'
include {
    SPREAD_BUNDLES ;
    GATHER_BUNDLES ;
    RELEASE_BUNDLES
} from './bundles'

/*
 * Cells from the transcripts, starting from the cells that another method found, or from those that the machine says.
 */
workflow TRANSCRIPTS_TO_CELLS {
    take:
    raw_ch // [[id: 'liver_1'], liver_1.raw.zarr]
    cells_ch // [[id: 'liver_1', method: 'cellpose'], liver_1.cells.zarr]: of all methods that a chain may start with
    slides // id → [methods: ['cellpose+proseg', …], by_method: method → [image: 'cellpose', molecules: 'proseg', settings: …]]

    main:
    // One item a slide and method from here on: meta is [id: 'liver_1', method: 'cellpose+proseg'].

    raw_by_method_ch = raw_ch.flatMap { meta, raw -> methods(slides, meta).collect { own -> [own, raw] } }
    prior_ch = cells_ch
        .flatMap { meta, cells -> methods(slides, meta).findAll { own -> plan(slides, own).image == meta.method }.collect { own -> [own, cells] } }
        .mix(raw_by_method_ch.filter { meta, _raw -> !plan(slides, meta).image }.map { meta, _raw -> [meta, []] })
    raw_and_prior_ch = raw_by_method_ch.join(prior_ch) // [meta, liver_1.raw.zarr, liver_1.cells.zarr or []]

    PATCHIFY_TRANSCRIPTS(
        raw_and_prior_ch.map { meta, raw, prior ->
            def slide = slides[meta.id]
            [meta, plan(slides, meta).molecules, plan(slides, meta).settings.patchify_transcripts, raw, prior, slide.prior, slide.baysor_config]
        }
    )

    // [group, settings, bundle_000.zarr]
    bundles_ch = SPREAD_BUNDLES(PATCHIFY_TRANSCRIPTS.out.bundles)
        .map { group, bundle -> [group, plan(slides, group).settings.segment_transcripts, bundle] }
        .branch { group, _settings, _bundle ->
            baysor: plan(slides, group).molecules == 'baysor'
            proseg: plan(slides, group).molecules == 'proseg'
        }

    SEGMENT_BAYSOR(bundles_ch.baysor)
    SEGMENT_PROSEG(bundles_ch.proseg)

    results_ch = GATHER_BUNDLES(
        SEGMENT_BAYSOR.out.cells.mix(SEGMENT_PROSEG.out.cells)
    ) // [meta, [bundle_000.result, …]]

    cells = RESOLVE_TRANSCRIPTS(
        raw_and_prior_ch.join(results_ch).map { meta, raw, prior, results ->
            [meta, plan(slides, meta).settings.resolve_transcripts, raw, prior, results]
        }
    ).store

    RELEASE_BUNDLES(PATCHIFY_TRANSCRIPTS.out.bundles, cells)

    parts = PATCHIFY_TRANSCRIPTS.out.store.map { meta, patches -> [meta, [patches]] }

    emit:
    cells // [[id: 'liver_1', method: 'cellpose+proseg'], liver_1.molecules.zarr]
    parts // [[id: …, method: …], [liver_1.transcript_patches.zarr]]: what else the published store gets from here
}

/** What a slide's method needs: [image: 'cellpose', molecules: 'proseg', settings: …]. */
def plan(slides, meta) {
    return slides[meta.id].by_method[meta.method]
}

/** One meta for each of the slide's methods that segments transcripts. */
def methods(slides, meta) {
    return slides[meta.id].methods.collect { method -> meta + [method: method] }.findAll { own -> plan(slides, own).molecules }
}
