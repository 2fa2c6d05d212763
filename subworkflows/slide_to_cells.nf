include { CONVERT                               } from '../modules/convert'
include { TISSUE                                } from '../modules/tissue'
include { PATCHIFY                              } from '../modules/patchify'
include { SEGMENT_CELLPOSE                      } from '../modules/segment_cellpose'
include { SEGMENT_CELLPOSE as SEGMENT_CELLPOSE4 } from '../modules/segment_cellpose'
include { SEGMENT_GENERIC                       } from '../modules/segment_generic'
include { RESOLVE                               } from '../modules/resolve'
include { AGGREGATE                             } from '../modules/aggregate'
include { ASSEMBLE                              } from '../modules/assemble'
include { REPORT                                } from '../modules/report'

/*
 * From the machine's files to one published SpatialData store and one report a slide.
 * No task writes into what it was given: each emits only what it adds, and ASSEMBLE puts it together.
 */
workflow SLIDE_TO_CELLS {
    take:
    slides_ch // [meta, machine's folder or image, transcript table or []]
    slides // id → [method: 'cellpose3', settings: stage → JSON of what the stage depends on, weights: file or [], …]
    thresholds // file with the limits of the QC verdict, or []

    main:
    raw_ch = CONVERT(
        slides_ch.map { meta, slide, transcripts -> [meta, slides[meta.id].settings.convert, slide, transcripts] }
    ).store // [meta, liver_1.raw.zarr]

    // The machine's own cells need no patches.
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

    // [meta, n bundles, [bundle_000.cells.parquet, bundle_001.cells.parquet, …]], in the order of the patches. A task
    // that is given up leaves its group short: `remainder` hands it on all the same, so that its slide fails by name.
    gathered_ch = SEGMENT_CELLPOSE.out.cells
        .mix(SEGMENT_CELLPOSE4.out.cells, SEGMENT_GENERIC.out.cells)
        .groupTuple(remainder: true)
        .map { group, cells -> [group.target, group.groupSize, cells.sort { file -> file.name }] }
        .branch { _meta, n_bundles, cells ->
            complete: cells.size() == n_bundles
            failed: true
        }
    gathered_ch.failed.subscribe { meta, n_bundles, cells ->
        log.error("${meta.id}: only ${cells.size()} of ${n_bundles} bundles of patches came back; the slide fails")
    }

    // [meta, liver_1.raw.zarr, its patches' cells or []]
    to_resolve_ch = raw_by_way_ch.patches
        .join(gathered_ch.complete.map { meta, _n_bundles, cells -> [meta, cells] })
        .mix(raw_by_way_ch.vendor.map { meta, raw -> [meta, raw, []] })
    cells_ch = RESOLVE(
        to_resolve_ch.map { meta, raw, cells -> [meta, slides[meta.id].settings.resolve, raw, cells] }
    ).store // [meta, liver_1.cells.zarr]

    table_ch = AGGREGATE(
        raw_ch.join(cells_ch).map { meta, raw, cells -> [meta, slides[meta.id].settings.aggregate, raw, cells] }
    ).store // [meta, liver_1.table.zarr]

    // [meta, [liver_1.raw.zarr, liver_1.tissue.zarr, liver_1.patches.zarr, liver_1.cells.zarr, liver_1.table.zarr]]: where
    // two have an element of one name, the later one counts.
    parts_ch = raw_by_way_ch.patches
        .join(tissue_ch)
        .join(patches_ch)
        .mix(raw_by_way_ch.vendor)
        .map { parts -> [parts[0], parts.drop(1)] }
        .join(cells_ch)
        .join(table_ch)
        .map { meta, parts, cells, table -> [meta, parts + [cells, table]] }
    store_ch = ASSEMBLE(
        parts_ch.map { meta, parts -> [meta, slides[meta.id].settings.report, parts, thresholds] }
    ).store // [meta, liver_1.zarr, qc.json]

    reports = REPORT(
        store_ch.map { meta, store, qc -> [meta, slides[meta.id].settings.report, store, qc, slides[meta.id].truth] }
    ).report // [meta, qc.json, report.html]

    emit:
    reports
}
