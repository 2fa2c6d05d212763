"""Compile all numerical kernels once, so that no task has to: numba keeps what it has compiled beside the sources."""

from pathlib import Path

from cellquilt.core.settings import Settings


def compile_kernels(folder: Path) -> Path:
    """Take a tiny simulated slide through every step in this process.

    Parameters
    ----------
    folder
        Where to write it.

    Returns
    -------
    pathlib.Path
        A bundle of patches for Cellpose, for an environment that has it to segment.
    """
    from cellquilt.aggregation.stage import aggregate_slide
    from cellquilt.readers import convert_slide
    from cellquilt.resolve.stage import resolve_slide
    from cellquilt.segment.stages import find_tissue, patchify_image, segment_source
    from cellquilt.simulate import cell_tables, simulate, truth_scores
    from cellquilt.spatial.summary import slide_statistics

    simulate(folder / "simulated", width_px=320)
    source = folder / "simulated" / "slide_0"
    settings = Settings(segmentation="generic", generic_diameter_um=8, patch_width_px=128)
    store = convert_slide(
        source / "image.ome.tif",
        technology="ome_tif",
        transcripts=source / "transcripts.parquet",
        output=folder / "slide.zarr",
        settings=settings,
    )
    find_tissue(store, settings=settings)
    segment_source(store, method="generic", settings=settings)
    resolve_slide(store, settings=settings)
    aggregate_slide(store, settings=settings)
    truth_scores(store, source / "truth")
    (cells,) = cell_tables(1, 200, n_domains=3, thin_layers=0, rare_niches=0)
    slide_statistics(cells, "cell_type", "domain_true", n_permutations=1)
    (bundle,) = patchify_image(
        store, settings=Settings(), bundles=folder / "bundles", output=folder / "slide.patches.zarr"
    )
    return bundle
