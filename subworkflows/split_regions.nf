include { SPLIT } from '../modules/split'

/*
 * Slides whose sheet names regions, split into one slide each. The whole slide is published, too: it has what lies in no
 * region.
 */
workflow SPLIT_REGIONS {
    take:
    parts_ch // [[id: 'liver_1'], [liver_1.raw.zarr, …, liver_1.table.zarr]]
    tables_ch // [meta, liver_1.table.zarr]
    compared_ch // [meta, [liver_1.table.zarr, …]]
    slides // id → [parent: id of the slide that it is a region of, regions: file or [], settings: stage → JSON of what it depends on, …]

    main:
    SPLIT(
        parts_ch
            .filter { meta, _parts -> slides[meta.id].regions }
            .map { meta, parts ->
                def samples = slides.values().findAll { slide -> slide.parent == meta.id }.collect { slide -> slide.id }
                [meta, slides[meta.id].settings.split, parts, samples]
            }
    )
    region_ch = SPLIT.out.stores
        .flatMap { _meta, stores -> stores instanceof List ? stores : [stores] }
        .map { store -> [[id: store.name - '.slide.zarr'], store] } // [[id: 'liver_1_A'], liver_1_A.slide.zarr]

    parts = parts_ch.mix(region_ch.map { meta, store -> [meta, [store]] })
    tables = tables_ch.filter { meta, _table -> !slides[meta.id].regions }.mix(region_ch)
    compared = compared_ch.mix(region_ch.map { meta, _store -> [meta, []] })
    split = SPLIT.out.columns.map { meta, columns -> [meta, [columns]] }

    emit:
    parts // of whole slides and of regions, [meta, [liver_1_A.slide.zarr]]
    tables // of regions, and of slides that have none
    compared // [meta, [liver_1.table.zarr, …]]
    split // of slides with regions: [meta, [liver_1.regions.parquet]]
}
