include { CLUSTER  } from '../modules/cluster'
include { ANNOTATE } from '../modules/annotate'

/*
 * Clusters and types of each slide's cells, of those slides that want them. What fails leaves its slide without.
 */
workflow CELL_TYPES {
    take:
    tables_ch // [[id: 'liver_1'], liver_1.table.zarr]
    slides // id → [clusters: …, annotates: …, annotate_markers: file or [], annotate_reference: file or [], settings: …]

    main:
    CLUSTER(
        tables_ch
            .filter { meta, _table -> slides[meta.id].clusters }
            .map { meta, table -> [meta, slides[meta.id].settings.cluster, table] }
    )
    ANNOTATE(
        tables_ch
            .filter { meta, _table -> slides[meta.id].annotates }
            .map { meta, table ->
                def slide = slides[meta.id]
                [meta, slide.settings.annotate, table, slide.annotate_markers, slide.annotate_reference]
            }
    )

    // A slide goes on as soon as it has what it wants; `remainder` lets one go on that never gets it.
    none_ch = tables_ch.map { meta, _table -> [meta, []] }
    columns = tables_ch
        .join(CLUSTER.out.columns.mix(none_ch.filter { meta, _none -> !slides[meta.id].clusters }), remainder: true)
        .join(ANNOTATE.out.columns.mix(none_ch.filter { meta, _none -> !slides[meta.id].annotates }), remainder: true)
        .map { meta, _table, clusters, types -> [meta, [clusters, types].findAll { file -> file }] }

    emit:
    columns // [meta, [liver_1.clusters.parquet, liver_1.types.parquet]], or fewer
}
