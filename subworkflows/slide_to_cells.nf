include { CONVERT              } from '../modules/convert'
include { IMAGE_TO_CELLS       } from './image_to_cells'
include { TRANSCRIPTS_TO_CELLS } from './transcripts_to_cells'
include { AGGREGATE            } from '../modules/aggregate'
include { ASSEMBLE             } from '../modules/assemble'
include { REPORT               } from '../modules/report'

/*
 * From the machine's files to one published SpatialData store and one report a slide.
 * No task writes into what it was given: each emits only what it adds, and ASSEMBLE puts it together.
 */
workflow SLIDE_TO_CELLS {
    take:
    slides_ch // [meta, machine's folder or image, transcript table or []]
    slides // id → [method: 'cellpose3', molecules: 'proseg', settings: stage → JSON of what the stage depends on, …]
    thresholds // file with the limits of the QC verdict, or []

    main:
    raw_ch = CONVERT(
        slides_ch.map { meta, slide, transcripts -> [meta, slides[meta.id].settings.convert, slide, transcripts] }
    ).store // [meta, liver_1.raw.zarr]

    // A method for the image, one for the transcripts, or both: then the cells of the first are the prior of the second.
    with_image_ch = raw_ch.filter { meta, _raw -> slides[meta.id].method }
    without_image_ch = raw_ch.filter { meta, _raw -> !slides[meta.id].method }
    IMAGE_TO_CELLS(with_image_ch, slides)

    first_ch = raw_ch
        .join(IMAGE_TO_CELLS.out.cells.mix(without_image_ch.map { meta, _raw -> [meta, []] }))
        .branch { meta, _raw, _cells ->
            prior: slides[meta.id].molecules
            final_cells: true
        } // [meta, liver_1.raw.zarr, liver_1.cells.zarr or []]
    TRANSCRIPTS_TO_CELLS(first_ch.prior, slides)

    cells_ch = first_ch.final_cells
        .map { meta, _raw, cells -> [meta, cells] }
        .mix(TRANSCRIPTS_TO_CELLS.out.cells) // [meta, liver_1.cells.zarr or liver_1.molecules.zarr]
    table_ch = AGGREGATE(
        raw_ch.join(cells_ch).map { meta, raw, cells -> [meta, slides[meta.id].settings.aggregate, raw, cells] }
    ).store // [meta, liver_1.table.zarr]

    // [meta, [liver_1.raw.zarr, liver_1.tissue.zarr, liver_1.patches.zarr, liver_1.cells.zarr, liver_1.table.zarr]]: where
    // two have an element of one name, the later one counts.
    parts_ch = raw_ch
        .join(IMAGE_TO_CELLS.out.parts.mix(without_image_ch.map { meta, _raw -> [meta, []] }))
        .join(TRANSCRIPTS_TO_CELLS.out.parts.mix(first_ch.final_cells.map { meta, _raw, _cells -> [meta, []] }))
        .join(cells_ch)
        .join(table_ch)
        .map { meta, raw, of_image, of_transcripts, cells, table -> [meta, [raw] + of_image + of_transcripts + [cells, table]] }
    store_ch = ASSEMBLE(
        parts_ch.map { meta, parts -> [meta, slides[meta.id].settings.report, parts, thresholds] }
    ).store // [meta, liver_1.zarr, qc.json]

    reports = REPORT(
        store_ch.map { meta, store, qc -> [meta, slides[meta.id].settings.report, store, qc, slides[meta.id].truth] }
    ).report // [meta, qc.json, report.html]

    emit:
    reports
}
