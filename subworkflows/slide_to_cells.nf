include { CONVERT              } from '../modules/convert'
include { IMAGE_TO_CELLS       } from './image_to_cells'
include { TRANSCRIPTS_TO_CELLS } from './transcripts_to_cells'
include { AGGREGATE            } from '../modules/aggregate'

/*
 * From the machine's files to cells and a table of them, by every method that a slide wants.
 * No task writes into what it was given: each emits only what it adds.
 */
workflow SLIDE_TO_CELLS {
    take:
    slides_ch // [[id: 'liver_1'], machine's folder or image, transcript table or [], prior cells or [], regions or []]
    slides // id → [methods: ['cellpose+proseg', 'vendor'], by_method: …, settings: stage → JSON of what it depends on, …]

    main:
    def of_slide = { meta, files -> [meta.subMap(['id']), files] }

    raw_ch = CONVERT(
        slides_ch.map { meta, slide, transcripts, prior, regions ->
            [meta, slides[meta.id].settings.convert, slide, transcripts, prior, regions, slides[meta.id].fullres_image]
        }
    ).store // [meta, liver_1.raw.zarr]

    // By methods for the image, for the transcripts, or by chains of both: the cells of the first are the second's prior.
    IMAGE_TO_CELLS(raw_ch, slides)
    TRANSCRIPTS_TO_CELLS(raw_ch, IMAGE_TO_CELLS.out.cells, slides)
    cells_ch = IMAGE_TO_CELLS.out.cells
        .filter { meta, _cells -> meta.method in slides[meta.id].methods }
        .mix(TRANSCRIPTS_TO_CELLS.out.cells) // [[id: 'liver_1', method: 'cellpose+proseg'], liver_1.molecules.zarr]

    table_ch = AGGREGATE(
        raw_ch
            .flatMap { meta, raw -> slides[meta.id].methods.collect { method -> [meta + [method: method], raw] } }
            .join(cells_ch)
            .map { meta, raw, cells -> [meta, slides[meta.id].settings.aggregate, raw, cells, meta.method != chosen(slides, meta)] }
    ).store.branch { meta, _table ->
        chosen: meta.method == chosen(slides, meta)
        compared: true
    } // [[id: 'liver_1', method: 'vendor'], liver_1.table.zarr]

    // The chosen method's: [meta, [liver_1.raw.zarr, liver_1.tissue.zarr, liver_1.patches.zarr, liver_1.cells.zarr,
    // liver_1.table.zarr]]. Where two have an element of one name, the later one counts.
    none_ch = raw_ch.map { meta, _raw -> [meta, []] }
    parts = raw_ch
        .join(
            IMAGE_TO_CELLS.out.parts
                .filter { meta, _parts -> meta.method == slides[meta.id].by_method[chosen(slides, meta)].image }
                .map(of_slide)
                .mix(none_ch.filter { meta, _none -> !slides[meta.id].by_method[chosen(slides, meta)].image })
        )
        .join(
            TRANSCRIPTS_TO_CELLS.out.parts
                .filter { meta, _parts -> meta.method == chosen(slides, meta) }
                .map(of_slide)
                .mix(none_ch.filter { meta, _none -> !slides[meta.id].by_method[chosen(slides, meta)].molecules })
        )
        .join(cells_ch.filter { meta, _cells -> meta.method == chosen(slides, meta) }.map(of_slide))
        .join(table_ch.chosen.map(of_slide))
        .map { meta, raw, of_image, of_transcripts, cells, table -> [meta, [raw] + of_image + of_transcripts + [cells, table]] }

    // The tables of the methods compared with it, in the order of the methods. One that fails leaves its group short, or
    // altogether without members: `remainder` lets the slide go on without it.
    compared = table_ch.compared
        .map { meta, table -> [groupKey(meta.subMap(['id']), slides[meta.id].methods.size() - 1), [meta.method, table]] }
        .groupTuple(remainder: true)
        .map { group, tables ->
            [group.target, tables.sort { found -> slides[group.target.id].methods.indexOf(found[0]) }.collect { found -> found[1] }]
        }
        .mix(none_ch.filter { meta, _none -> slides[meta.id].methods.size() == 1 }) // [meta, [liver_1.table.zarr, …]]

    tables = table_ch.chosen.map(of_slide)

    emit:
    tables // [meta, liver_1.table.zarr]
    parts // [meta, [liver_1.raw.zarr, …, liver_1.table.zarr]]
    compared // [meta, [liver_1.table.zarr, …]]
}

/** The method whose cells the slide's table is of. */
def chosen(slides, meta) {
    return slides[meta.id].methods[0]
}
