include { TISSUE                                } from '../modules/tissue'
include { PATCHIFY                              } from '../modules/patchify'
include { SEGMENT_CELLPOSE                      } from '../modules/segment_cellpose'
include { SEGMENT_CELLPOSE as SEGMENT_CELLPOSE4 } from '../modules/segment_cellpose'
include { SEGMENT_GENERIC                       } from '../modules/segment_generic'
include { RESOLVE                               } from '../modules/resolve'
include { GATHER_BUNDLES                        } from './gather_bundles'

/*
 * Nuclei and cells from the image; or the machine's own cells, which need no patches.
 */
workflow IMAGE_TO_CELLS {
    take:
    raw_ch // [meta, liver_1.raw.zarr]
    slides // id → [method: 'cellpose3', settings: stage → JSON of what the stage depends on, weights: file or [], …]

    main:
    raw_by_way_ch = raw_ch.branch { meta, _raw ->
        vendor: slides[meta.id].method == 'vendor'
        patches: true
    }

    tissue_ch = TISSUE(
        raw_by_way_ch.patches.map { meta, raw -> [meta, slides[meta.id].settings.tissue, raw] }
    ).store // [meta, liver_1.tissue.zarr]

    PATCHIFY(
        raw_by_way_ch.patches.join(tissue_ch).map { meta, raw, tissue ->
            [meta, slides[meta.id].settings.patchify, raw, tissue, slides[meta.id].weights]
        }
    )
    patches_ch = PATCHIFY.out.store // [meta, liver_1.patches.zarr]

    // One item a bundle of patches: [group, settings, bundle_000.zarr, weights]. The group key carries the number of
    // bundles, so a slide goes on as soon as its own bundles are back, whatever the other slides do.
    bundles_ch = PATCHIFY.out.bundles
        .flatMap { meta, bundles ->
            def all = bundles instanceof List ? bundles : [bundles]
            def slide = slides[meta.id]
            all.collect { bundle -> [groupKey(meta, all.size()), slide.settings.segment, bundle, slide.weights] }
        }
        .branch { group, _settings, _bundle, _weights ->
            cellpose3: slides[group.id].method == 'cellpose3'
            cellpose4: slides[group.id].method == 'cellpose4'
            generic: slides[group.id].method == 'generic'
        }

    SEGMENT_CELLPOSE(bundles_ch.cellpose3)
    SEGMENT_CELLPOSE4(bundles_ch.cellpose4)
    SEGMENT_GENERIC(bundles_ch.generic)

    patch_cells_ch = GATHER_BUNDLES(
        SEGMENT_CELLPOSE.out.cells.mix(SEGMENT_CELLPOSE4.out.cells, SEGMENT_GENERIC.out.cells)
    ) // [meta, [bundle_000.cells.parquet, …]]

    cells = RESOLVE(
        raw_by_way_ch.patches
            .join(patch_cells_ch)
            .mix(raw_by_way_ch.vendor.map { meta, raw -> [meta, raw, []] })
            .map { meta, raw, patch_cells -> [meta, slides[meta.id].settings.resolve, raw, patch_cells] }
    ).store

    parts = tissue_ch
        .join(patches_ch)
        .map { meta, tissue, patches -> [meta, [tissue, patches]] }
        .mix(raw_by_way_ch.vendor.map { meta, _raw -> [meta, []] })

    emit:
    cells // [meta, liver_1.cells.zarr]
    parts // [meta, [liver_1.tissue.zarr, liver_1.patches.zarr]]: what else the published store gets from here
}
