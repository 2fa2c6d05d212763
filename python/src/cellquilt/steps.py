"""Steps on SpatialData objects that have no module of their own: patches, aggregation and comparison."""

from pathlib import Path
from typing import TYPE_CHECKING

from cellquilt.notebook import (
    add_columns,
    add_delta,
    keyword_settings,
    prior_store,
    recall,
    remember,
    scratch,
    store_of,
    table_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData

    from cellquilt.comparison.methods import ComparisonTable


def make_image_patches(
    sdata: "SpatialData",
    patch_width: int | None = None,
    patch_overlap: int | None = None,
    *,
    patch_width_um: float | None = None,
    patch_overlap_um: float | None = None,
    normalize: str | None = None,
    seed: int | None = None,
) -> None:
    """Cut the image into overlapping patches: the shapes element ``image_patches``.

    Optional: a segmentation does it by itself, with the defaults. What is said here holds for later segmentations.

    Parameters
    ----------
    sdata
        The slide.
    patch_width, patch_overlap
        Width and overlap in pixels.
    patch_width_um, patch_overlap_um
        The same in µm. Default: 2048 pixels, overlapping by four expected cell diameters.
    normalize
        ``field``, ``global`` or ``none``; see the parameters.
    seed
        Seed of everything that samples.

    Raises
    ------
    CellquiltError
        ``overlap-too-small`` and others if the patches cannot serve.
    """
    from cellquilt.segment.stages import patchify_image

    given = keyword_settings(
        "patch",
        {
            "patch_width_px": patch_width,
            "patch_overlap_px": patch_overlap,
            "patch_width_um": patch_width_um,
            "patch_overlap_um": patch_overlap_um,
            "normalize": normalize,
            "seed": seed,
        },
    )
    with scratch() as folder:
        patchify_image(store_of(sdata), settings=recall(sdata, given), output=folder / "patches.zarr")
        add_delta(sdata, folder / "patches.zarr")
    remember(sdata, given)


def make_transcript_patches(
    sdata: "SpatialData",
    patch_width: float | None = None,
    patch_overlap: float | None = None,
    prior_shapes_key: str | None = None,
    *,
    transcripts_per_patch: int | None = None,
    patch_width_um: float | None = None,
    patch_overlap_um: float | None = None,
    min_transcripts_per_patch: int | None = None,
    patches_per_task: int | None = None,
    prior: str | None = None,
    prior_unassigned: "Sequence[str | int] | str | int | None" = None,
    unassigned_value: "Sequence[str | int] | str | int | None" = None,
    min_points_per_patch: int | None = None,
) -> None:
    """Cut the transcripts into overlapping patches: the shapes element ``transcripts_patches``.

    Optional: a segmentation does it by itself, with the defaults. What is said here holds for later segmentations.

    Parameters
    ----------
    sdata
        The slide.
    patch_width, patch_width_um
        Width in µm; 0 or -1 makes one patch. Default: patches of about equal numbers of transcripts, or what the method
        can hold.
    patch_overlap, patch_overlap_um
        Overlap in µm.
    transcripts_per_patch
        Most transcripts in a patch.
    min_transcripts_per_patch, min_points_per_patch
        Patches with fewer are sparse: joined to a neighbour where patches are of one width, and else named.
    patches_per_task
        Patches that are segmented in one go.
    prior, prior_shapes_key
        Where prior cells are from: ``auto``, ``none``, a shapes or labels element, a column of the transcripts, or the
        path of a label image.
    prior_unassigned, unassigned_value
        Value or values of a column that mean that a transcript is in no cell.

    Raises
    ------
    CellquiltError
        ``prior-unknown`` and others if the patches cannot serve.
    """
    from cellquilt.segment.stages import patchify_transcripts

    none = unassigned_value if prior_unassigned is None else prior_unassigned
    if isinstance(none, str | int):
        none = [none]
    given = keyword_settings(
        "transcripts",
        {
            "transcripts_per_patch": transcripts_per_patch,
            "patch_width_um": patch_width if patch_width_um is None else patch_width_um,
            "patch_overlap_um": patch_overlap if patch_overlap_um is None else patch_overlap_um,
            "min_transcripts_per_patch": (
                min_points_per_patch if min_transcripts_per_patch is None else min_transcripts_per_patch
            ),
            "patches_per_task": patches_per_task,
            "prior": prior_shapes_key if prior is None else prior,
            "prior_unassigned": None if none is None else [str(value) for value in none],
        },
    )
    with scratch() as folder:
        settings = recall(sdata, given)
        cells = prior_store(sdata, settings["prior"], folder)
        patchify_transcripts(store_of(sdata), settings=settings, cells=cells, output=folder / "patches.zarr")
        add_delta(sdata, folder / "patches.zarr")
    remember(sdata, given)


def aggregate(
    sdata: "SpatialData",
    *,
    average_intensities: bool | None = None,
    count_z: str | None = None,
    bins_key: str | None = None,
    bins_rule: str | None = None,
    bins_expand_um: float | None = None,
    min_transcripts: int | None = None,
    min_cell_area_um2: float | None = None,
    max_cell_area_um2: float | None = None,
    drop_failed: bool | None = None,
) -> None:
    """Count transcripts and measure channels in cells: the table ``table``, and ``cell_id`` of each transcript.

    Of bins, the labels ``bins_cells`` say which cell each belongs to.

    Parameters
    ----------
    sdata
        A slide with ``cell_boundaries``.
    average_intensities
        Measure mean, minimum and maximum of every channel in every cell (default yes).
    count_z
        ``all`` planes' transcripts, or those of the ``same`` plane that was segmented.
    bins_key
        Table of bins to count instead of transcripts (docs/bins.md); default: ``bins``, where there are no transcripts.
    bins_rule
        The cell of a bin: ``centre``, the one that its centre lies in, or ``overlap``, the one that covers most of it.
    bins_expand_um
        Bins in no cell are counted in the nearest one within this distance (µm).
    min_transcripts, min_cell_area_um2, max_cell_area_um2
        Cells outside fail QC: they are marked in ``passes_qc`` and ``qc_reason``.
    drop_failed
        Remove them instead.

    Raises
    ------
    CellquiltError
        ``element-missing`` if there are no cells yet.
    """
    from cellquilt.aggregation.stage import aggregate_slide

    given = keyword_settings(
        "aggregate",
        {
            "average_intensities": average_intensities,
            "count_z": count_z,
            "bins_key": bins_key,
            "bins_rule": bins_rule,
            "bins_expand_um": bins_expand_um,
            "min_transcripts": min_transcripts,
            "min_cell_area_um2": min_cell_area_um2,
            "max_cell_area_um2": max_cell_area_um2,
            "drop_failed": drop_failed,
        },
    )
    with scratch() as folder:
        aggregate_slide(store_of(sdata), settings=recall(sdata, given), output=folder / "table.zarr")
        add_delta(sdata, folder / "table.zarr")


def compare(
    sdata: "SpatialData",
    methods: "Sequence[str] | str | None" = None,
    markers: "str | Path | None" = None,
    reference: "str | Path | None" = None,
    *,
    truth: "str | Path | None" = None,
    overwrite: bool = False,
) -> "ComparisonTable":
    """Compare methods with the one whose cells are ``cell_boundaries``: tables ``table_<method>``, and their measures.

    A method that has not been compared yet is run first, as the pipeline's ``--compare`` does it: from the machine's
    output, with what earlier steps were told. It leaves ``<method>_boundaries`` and ``table_<method>`` (``+`` is ``_``
    in these names).

    Parameters
    ----------
    sdata
        A slide with ``cell_boundaries``.
    methods
        Names of methods, such as ``vendor``, or of chains, such as ``cellpose+proseg``; a list, or by commas. Default:
        those that were compared before.
    markers
        File of pairs of genes that no cell expresses together (CSV with the columns ``gene_a, gene_b``). Default:
        found on the slide.
    reference
        Mean expression of cell types (CSV or h5ad) to take such pairs from, without `markers`.
    truth
        Folder with the truth of a simulated slide.
    overwrite
        Run methods that were compared before once more.

    Returns
    -------
    ComparisonTable
        One number a method for every measure, ``to_frame()`` as a table; docs/compare.md says what they mean.

    Raises
    ------
    CellquiltError
        ``element-missing`` without cells, ``methods-too-few`` where there is nothing to compare them with, and what a
        method or a file of markers raises.
    """
    from cellquilt.aggregation.stage import aggregate_slide
    from cellquilt.comparison.stores import compare_stores, markers_of, method_of, methods_in
    from cellquilt.core.errors import CellquiltError
    from cellquilt.core.store import Store
    from cellquilt.segmentation import cells_by

    names = methods.split(",") if isinstance(methods, str) else methods
    keywords = {
        "methods": None if names is None else list(names),
        "markers": None if markers is None else str(markers),
        "reference": None if reference is None else str(reference),
    }
    settings = recall(sdata, keyword_settings("compare", keywords))
    store = Store(store_of(sdata))
    store.element("shapes", "cell_boundaries")
    markers_of(settings)  # a file that cannot be read is told before anything is run
    asked, before = settings["compare"] or [], () if overwrite else tuple(store.compared)
    for name in asked:
        if name == method_of(store) or name in before:
            continue
        with scratch() as folder:
            cells = cells_by(store.path, name, settings, folder)
            aggregate_slide(store.path, settings=settings, cells=cells, name=name, output=folder / "table.zarr")
            add_delta(sdata, folder / "table.zarr")
    sources = methods_in(store.path, asked)
    if len(sources) < 2:
        raise CellquiltError(
            "methods-too-few", f"{sources[0].name} alone is nothing to compare", "name other methods, such as vendor"
        )
    return compare_stores(sources, settings=settings, truth=None if truth is None else Path(truth))


def cluster(
    data: "SpatialData | AnnData",
    *,
    resolution: float | None = None,
    n_neighbors: int | None = None,
    n_pcs: int | None = None,
    n_top_genes: int | None = None,
    n_markers: int | None = None,
    seed: int | None = None,
    kind: str | None = None,
) -> None:
    """Cluster the cells of a slide: ``obs["cluster"]``, and ``uns["cluster_markers"]``.

    Logarithms of counts over their total (or scaled intensities of channels), PCA, nearest neighbours, Leiden; by
    scanpy. Cells that fail QC are in no cluster.

    Parameters
    ----------
    data
        A slide, or its table; the table gets the columns, and that of the store behind a slide.
    resolution
        More, more clusters (default 1).
    n_neighbors, n_pcs
        Most similar cells that a cell is joined to (default 15), and principal components (at most; default 50).
    n_top_genes
        Most variable genes to look at. Default: all of a panel of up to 5000, else 3000.
    n_markers
        Markers of a cluster to list (default 10).
    seed
        The same seed gives the same clusters.
    kind
        What X holds: ``counts``, ``log1p`` or ``protein``. Default: by the values.

    Raises
    ------
    CellquiltError
        ``too-few-cells``, ``genes-missing``.
    """
    import pandas as pd

    from cellquilt.aggregation.columns import CellColumns
    from cellquilt.celltypes.clusters import CLUSTER, MARKERS, find_clusters
    from cellquilt.core.record import versions
    from cellquilt.core.settings import Settings

    given = {
        "resolution": resolution, "n_neighbors": n_neighbors, "n_pcs": n_pcs, "n_top_genes": n_top_genes,
        "n_markers": n_markers, "seed": seed,
    }  # fmt: skip
    settings = Settings(keyword_settings("cluster", given))
    values = {name: settings[f"cluster_{name}"] for name in given}
    cells = table_of(data)
    clusters, found = find_clusters(cells, kind=kind, **values)
    columns = pd.DataFrame({CLUSTER: clusters}, index=cells.obs_names)
    parameters = {f"cluster_{name}": value for name, value in values.items()}
    add_columns(data, CellColumns("", "cluster", columns, {MARKERS: found}, parameters, versions=versions()))


def split_regions(
    sdata: "SpatialData",
    regions: "str | Path",
    output: "str | Path",
    *,
    unit: str | None = None,
    overwrite: bool = False,
) -> "dict[str, SpatialData]":
    """Split a slide into its regions: a store each, as if it had been a slide of its own; see docs/regions.md.

    Parameters
    ----------
    sdata
        A slide with a table; it is not changed.
    regions
        GeoJSON of polygons with names, as QuPath or Xenium Explorer writes them.
    output
        Folder to make, with ``<slide>_<region>.slide.zarr`` of each.
    unit
        ``px`` of the main image (default), or ``um``.
    overwrite
        Replace what stands there.

    Returns
    -------
    dict
        Name of the region's slide → the slide.

    Raises
    ------
    CellquiltError
        ``regions-…`` if a region has no name or another one's, is no polygon, overlaps another, or lies outside.
    """
    import spatialdata

    from cellquilt.aggregation.split import SUFFIX, split_slide

    settings = recall(sdata, keyword_settings("regions", {"unit": unit}))
    stores = split_slide([store_of(sdata)], Path(output), settings=settings, regions=Path(regions), overwrite=overwrite)
    return {store.name.removesuffix(SUFFIX): spatialdata.read_zarr(store) for store in stores}
