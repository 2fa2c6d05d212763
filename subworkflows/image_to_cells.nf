include { TISSUE                                } from '../modules/tissue'
include { PATCHIFY                              } from '../modules/patchify'
include { SEGMENT_CELLPOSE                      } from '../modules/segment_cellpose'
include { SEGMENT_CELLPOSE as SEGMENT_CELLPOSE4 } from '../modules/segment_cellpose'
include { SEGMENT_GENERIC                       } from '../modules/segment_generic'
include { SEGMENT_STARDIST                      } from '../modules/segment_stardist'
include { RESOLVE                               } from '../modules/resolve'
include {
    SPREAD_BUNDLES ;
    GATHER_BUNDLES ;
    RELEASE_BUNDLES
} from './bundles'

/*
 * Nuclei and cells from the image, by every method that the slide wants, each once; or the machine's own cells, which need
 * no patches.
 */
workflow IMAGE_TO_CELLS {
    take:
    raw_ch // [[id: 'liver_1'], liver_1.raw.zarr]
    slides // id → [images: ['cellpose', …], by_method: method → [engine: 'cellpose3', settings: …, weights: …], settings: …]

    main:
    // One item a slide and method from here on: meta is [id: 'liver_1', method: 'cellpose'].
    def by_method = { meta, file -> slides[meta.id].images.collect { method -> [meta + [method: method], file] } }

    with_image_ch = raw_ch.filter { meta, _raw -> slides[meta.id].images }
    raw_by_way_ch = with_image_ch
        .flatMap(by_method)
        .branch { meta, _raw ->
            vendor: meta.method == 'vendor'
            patches: true
        } // [meta, liver_1.raw.zarr]

    // The tissue is the slide's, whatever the method.
    tissue_ch = TISSUE(
        with_image_ch
            .filter { meta, _raw -> slides[meta.id].images != ['vendor'] }
            .map { meta, raw -> [meta, slides[meta.id].settings.tissue, raw] }
    ).store.flatMap(by_method) // [meta, liver_1.tissue.zarr]

    raw_and_tissue_ch = raw_by_way_ch.patches.join(tissue_ch)
    PATCHIFY(
        raw_and_tissue_ch.map { meta, raw, tissue -> [meta, plan(slides, meta).settings.patchify, raw, tissue, plan(slides, meta).weights] }
    )

    // [group, settings, bundle_000.zarr, weights]
    bundles_ch = SPREAD_BUNDLES(PATCHIFY.out.bundles)
        .map { group, bundle -> [group, plan(slides, group).settings.segment, bundle, plan(slides, group).weights] }
        .branch { group, _settings, _bundle, _weights ->
            cellpose3: plan(slides, group).engine == 'cellpose3'
            cellpose4: plan(slides, group).engine == 'cellpose4'
            generic: plan(slides, group).engine == 'generic'
            stardist: plan(slides, group).engine == 'stardist'
        }

    SEGMENT_CELLPOSE(bundles_ch.cellpose3)
    SEGMENT_CELLPOSE4(bundles_ch.cellpose4)
    SEGMENT_GENERIC(bundles_ch.generic)
    SEGMENT_STARDIST(bundles_ch.stardist)

    patch_cells_ch = GATHER_BUNDLES(
        SEGMENT_CELLPOSE.out.cells.mix(SEGMENT_CELLPOSE4.out.cells, SEGMENT_GENERIC.out.cells, SEGMENT_STARDIST.out.cells)
    ) // [meta, [bundle_000.cells.parquet, …]]

    cells = RESOLVE(
        raw_by_way_ch.patches
            .join(patch_cells_ch)
            .mix(raw_by_way_ch.vendor.map { meta, raw -> [meta, raw, []] })
            .map { meta, raw, patch_cells -> [meta, plan(slides, meta).settings.resolve, raw, patch_cells] }
    ).store

    RELEASE_BUNDLES(PATCHIFY.out.bundles, cells)

    parts = raw_and_tissue_ch
        .join(PATCHIFY.out.store)
        .map { meta, _raw, tissue, patches -> [meta, [tissue, patches]] }
        .mix(raw_by_way_ch.vendor.map { meta, _raw -> [meta, []] })

    emit:
    cells // [[id: 'liver_1', method: 'cellpose'], liver_1.cells.zarr]
    parts // [[id: …, method: …], [liver_1.tissue.zarr, liver_1.patches.zarr]]: what else the published store gets from here
}

/** What a slide's method needs: [engine: 'cellpose3', settings: …, weights: …]. */
def plan(slides, meta) {
    return slides[meta.id].by_method[meta.method]
}
