include { PATCHIFY_TRANSCRIPTS } from '../modules/patchify_transcripts'
include { SEGMENT_BAYSOR       } from '../modules/segment_baysor'
include { SEGMENT_PROSEG       } from '../modules/segment_proseg'
include { RESOLVE_TRANSCRIPTS  } from '../modules/resolve_transcripts'
include { GATHER_BUNDLES       } from './gather_bundles'

/*
 * Cells from the transcripts, starting from the cells that another method found, or from those that the machine says.
 */
workflow TRANSCRIPTS_TO_CELLS {
    take:
    raw_and_prior_ch // [meta, liver_1.raw.zarr, liver_1.cells.zarr or []]
    slides // id → [molecules: 'proseg', settings: stage → JSON of what the stage depends on, …]

    main:
    PATCHIFY_TRANSCRIPTS(
        raw_and_prior_ch.map { meta, raw, prior ->
            [meta, slides[meta.id].molecules, slides[meta.id].settings.patchify_transcripts, raw, prior]
        }
    )

    // One item a bundle of patches: [group, settings, bundle_000.zarr]; see IMAGE_TO_CELLS.
    bundles_ch = PATCHIFY_TRANSCRIPTS.out.bundles
        .flatMap { meta, bundles ->
            def all = bundles instanceof List ? bundles : [bundles]
            all.collect { bundle -> [groupKey(meta, all.size()), slides[meta.id].settings.segment_transcripts, bundle] }
        }
        .branch { group, _settings, _bundle ->
            baysor: slides[group.id].molecules == 'baysor'
            proseg: slides[group.id].molecules == 'proseg'
        }

    SEGMENT_BAYSOR(bundles_ch.baysor)
    SEGMENT_PROSEG(bundles_ch.proseg)

    results_ch = GATHER_BUNDLES(
        SEGMENT_BAYSOR.out.cells.mix(SEGMENT_PROSEG.out.cells)
    ) // [meta, [bundle_000.result, …]]

    cells = RESOLVE_TRANSCRIPTS(
        raw_and_prior_ch.join(results_ch).map { meta, raw, prior, results ->
            [meta, slides[meta.id].settings.resolve_transcripts, raw, prior, results]
        }
    ).store

    parts = PATCHIFY_TRANSCRIPTS.out.store.map { meta, patches -> [meta, [patches]] }

    emit:
    cells // [meta, liver_1.molecules.zarr]
    parts // [meta, [liver_1.transcript_patches.zarr]]: what else the published store gets from here
}
