include { SAMPLES        } from '../modules/cohort'
include { DOMAINS_REPORT } from '../modules/domains_report'
include { STATS_COHORT   } from '../modules/stats_cohort'

/*
 * What the whole cohort has in common: one table with a row a sample, failed ones included, what its domains say, and how
 * its cells lie in space.
 */
workflow COHORT {
    take:
    qcs_ch // [meta, qc.json]
    tables_ch // [meta, liver_1.zarr or cells.h5ad]: those with domains
    stats_ch // [meta, stats]: a slide's spatial statistics
    about_ch // domains.json
    model_ch // the model's folder
    slides // id → [metadata: column → value, …]

    main:
    // All that came through, in the order of their names; an empty list if none did, so that the table is made all the same.
    in_order_ch = qcs_ch
        .toSortedList { a, b -> a[0].id <=> b[0].id }
        .map { found -> found.collect { qc -> qc[1] } }
    table = SAMPLES(slides.keySet().toList(), in_order_ch).table

    // Conditions are compared, within batches, where the sheet says them of all slides.
    def columns = ['condition', 'batch']
        .findAll { column -> slides.values().every { slide -> slide.metadata[column] } }
        .collectEntries { column -> ["${column}-key", column] }
    report = DOMAINS_REPORT(
        columns,
        tables_ch
            .toSortedList { a, b -> a[0].id <=> b[0].id }
            .filter { found -> found }
            .map { found -> found.collect { item -> item[1] } },
        about_ch,
        model_ch,
    ).report

    STATS_COHORT(
        columns,
        stats_ch
            .toSortedList { a, b -> a[0].id <=> b[0].id }
            .filter { found -> found }
            .map { found -> found.collect { item -> item[1] } },
    )

    emit:
    table
    report
}
