include { SAMPLES } from '../modules/cohort'

/*
 * What the whole cohort has in common: for now one table with a row a sample, failed ones included.
 */
workflow COHORT {
    take:
    reports_ch // [meta, qc.json, report.html]
    samples // names of all samples of the sheet

    main:
    // All that came through, in the order of their names; an empty list if none did, so that the table is made all the same.
    qcs_ch = reports_ch
        .toSortedList { a, b -> a[0].id <=> b[0].id }
        .map { reports -> reports.collect { report -> report[1] } }
    table = SAMPLES(samples, qcs_ch).table

    emit:
    table
}
