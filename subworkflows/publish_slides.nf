include { ASSEMBLE         } from '../modules/assemble'
include { COMPARE          } from '../modules/compare'
include { REPORT           } from '../modules/report'
include { EXPORT           } from '../modules/export'
include { EXPLORER         } from '../modules/explorer'
include { STATS            } from '../modules/stats'
include { DOMAINS_ANNOTATE } from '../modules/domains_annotate'

/*
 * One published SpatialData store and one report a slide: ASSEMBLE puts together what the tasks before it added. Of a table
 * of cells that was made elsewhere, a copy with its domains.
 */
workflow PUBLISH_SLIDES {
    take:
    parts_ch // [[id: 'liver_1'], [liver_1.raw.zarr, …, liver_1.table.zarr]]
    compared_ch // [meta, [liver_1.table.zarr, …]]: tables of the methods compared with the chosen one
    tables_ch // [meta, cells.h5ad]: made elsewhere
    domains_ch // [meta, liver_1.domains.parquet or why there are none (JSON) or [], liver_1.graph.zarr or []]
    columns_ch // [meta, [liver_1.clusters.parquet, liver_1.types.parquet]]: what else is known of the cells
    slides // id → [methods: ['cellpose+proseg', 'vendor'], settings: stage → JSON of what it depends on, …]

    main:
    // A slide without domains, clusters or types, whatever became of them, is published without them.
    store_ch = ASSEMBLE(
        parts_ch
            .join(compared_ch, remainder: true)
            .filter { _meta, parts, _compared -> parts }
            .join(domains_ch, remainder: true)
            .filter { found -> found[1] }
            .map { found ->
                def (meta, parts, compared, domains, graph) = found
                [meta, parts, compared ?: [], domains ?: [], graph ?: []]
            }
            .join(columns_ch, remainder: true)
            .filter { found -> found[1] }
            .map { meta, parts, compared, domains, graph, columns ->
                [meta, slides[meta.id].settings.report, parts, compared, domains, graph, columns ?: [], slides[meta.id].qc_thresholds]
            }
    ).store // [meta, liver_1.zarr, qc.json]
    // With --cleanup: the transcripts of the raw store, which the published one has with their cells.
    parts_ch
        .join(store_ch)
        .filter { params.cleanup }
        .filter { meta, _parts, _store, _qc -> !slides[meta.id].regions } // SPLIT may still read it
        .subscribe { _meta, parts, _store, _qc -> Disk.empty(parts[0].resolve('points')) }

    annotated_ch = DOMAINS_ANNOTATE(
        tables_ch
            .join(domains_ch)
            .map { meta, table, domains, graph -> [meta, slides[meta.id].settings.domains_annotate, table, domains, graph] }
    ).table // [meta, cells.h5ad, qc.json]

    to_compare_ch = store_ch.branch { meta, _store, _qc ->
        several: slides[meta.id].methods.size() > 1
        one: true
    }
    comparison_ch = COMPARE(
        to_compare_ch.several.map { meta, store, _qc ->
            def slide = slides[meta.id]
            [meta, slide.settings.compare, store, slide.truth, slide.compare_markers, slide.compare_reference]
        }
    ).comparison.mix(to_compare_ch.one.map { meta, _store, _qc -> [meta, []] }) // [meta, comparison.json or []]

    // Cells in space: of slides, and of tables once they have their domains.
    to_measure_ch = store_ch.mix(annotated_ch).filter { params.stats }
    measured = STATS(to_measure_ch.map { meta, cells, _qc -> [meta, slides[meta.id].settings.stats, cells] }).stats // [meta, stats]
    space_ch = measured
        .filter { meta, _stats -> !slides[meta.id].is_table }
        .mix(store_ch.filter { !params.stats }.map { meta, _store, _qc -> [meta, []] })

    // A comparison, or statistics, that fail leave the report without them.
    reports = REPORT(
        store_ch
            .join(comparison_ch, remainder: true)
            .join(space_ch, remainder: true)
            .map { meta, store, qc, comparison, stats ->
                [meta, slides[meta.id].settings.report, store, qc, slides[meta.id].truth, comparison ?: [], stats ?: []]
            }
    ).report // [meta, qc.json, report.html]

    EXPORT(
        store_ch
            .filter { meta, _store, _qc -> slides[meta.id].exports }
            .map { meta, store, _qc -> [meta, slides[meta.id].settings.export, store] }
    )

    EXPLORER(
        store_ch
            .filter { meta, _store, _qc -> slides[meta.id].explorer }
            .map { meta, store, _qc -> [meta, slides[meta.id].settings.explorer, store] }
    )

    with_domains = store_ch
        .join(domains_ch.filter { _meta, _domains, graph -> graph })
        .map { meta, store, _qc, _domains, _graph -> [meta, store] }
        .mix(annotated_ch.map { meta, table, _qc -> [meta, table] })

    qcs = reports.map { meta, qc, _report -> [meta, qc] }.mix(annotated_ch.map { meta, _table, qc -> [meta, qc] })

    emit:
    qcs // [meta, qc.json]
    with_domains // [meta, liver_1.zarr or cells.h5ad]
    measured // [meta, stats]: the folder of a slide's spatial statistics
}
