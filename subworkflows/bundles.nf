/*
 * The bundles of a slide's patches, one item each. The group key carries their number, so a slide goes on as soon as its own
 * bundles are back, whatever the other slides do.
 */
workflow SPREAD_BUNDLES {
    take:
    bundles_ch // [meta, [bundle_000.zarr, bundle_001.zarr, …]], or one bundle without a list

    main:
    bundle_ch = bundles_ch.flatMap { meta, bundles ->
        def all = bundles instanceof List ? bundles : [bundles]
        all.collect { bundle -> [groupKey(meta, all.size()), bundle] }
    }

    emit:
    bundle_ch // [groupKey(meta, number of bundles), bundle_000.zarr]
}

/*
 * With --cleanup: what lies in a slide's bundles is deleted once its cells are there.
 */
workflow RELEASE_BUNDLES {
    take:
    bundles_ch // [meta, [bundle_000.zarr, bundle_001.zarr, …]]
    cells_ch // [meta, liver_1.cells.zarr]

    main:
    bundles_ch
        .join(cells_ch)
        .filter { params.cleanup }
        .subscribe { _meta, bundles, _cells -> Disk.empty(bundles) }
}

/*
 * The results of a slide's bundles, brought together as soon as all of them are back, in the order of the patches.
 * A task that is given up leaves its group short: `remainder` hands it on all the same, so that its slide fails by name.
 */
workflow GATHER_BUNDLES {
    take:
    results_ch // [groupKey(meta, number of bundles), bundle_003.cells.parquet]

    main:
    gathered_ch = results_ch
        .groupTuple(remainder: true)
        .map { group, results -> [group.target, group.groupSize, results.sort { file -> file.name }] }
        .branch { _meta, n_bundles, results ->
            complete: results.size() == n_bundles
            failed: true
        }
    gathered_ch.failed.subscribe { meta, n_bundles, results ->
        log.error("${meta.id}: only ${results.size()} of ${n_bundles} bundles of patches came back; ${meta.method} fails")
    }
    complete_ch = gathered_ch.complete.map { meta, _n_bundles, results -> [meta, results] }

    emit:
    complete_ch // [meta, [bundle_000.cells.parquet, bundle_001.cells.parquet, …]]
}
