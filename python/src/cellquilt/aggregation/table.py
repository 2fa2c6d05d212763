"""The cell table: one row a cell, as the published store holds it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.aggregation.channels import ChannelTable, Statistic
from cellquilt.aggregation.counts import Counts
from cellquilt.core.errors import CellquiltError
from cellquilt.core.shapes import ShapesTable
from cellquilt.core.transforms import MICRONS, apply
from cellquilt.geometry.outlines import Outlines
from cellquilt.geometry.polygons import Rings
from cellquilt.readers.tiff import unique_names

if TYPE_CHECKING:
    from anndata import AnnData

REGION_KEY = "region"
INSTANCE_KEY = "cell_id"
_OWN_COLUMNS = (
    *("cell_id", "sample", "region", "area_um2", "passes_qc", "qc_reason", "n_control"),
    *("n_bins", "bins_area_um2"),
)


@dataclass
class CellTable:
    """A cell table and what became of the cells.

    Attributes
    ----------
    adata
        The table.
    kept
        (n_cells given,) bool; all true unless failing cells are dropped. Filter the shapes by it, and assign the
        transcripts anew to the cells that are left, so that no transcript names a cell that is not there.
    failed
        Reason (several joined by ``;``) → number of cells that fail for it, whether dropped or kept; sorted by name.
    """

    adata: "AnnData"
    kept: NDArray[np.bool_]
    failed: dict[str, int] = field(default_factory=dict)


def build_table(
    sample: str,
    cells: ShapesTable | Outlines,
    counts: Counts | None = None,
    channels: ChannelTable | None = None,
    *,
    statistics: Sequence[Statistic] = ("mean",),
    metadata: Mapping[str, Any] | None = None,
    region: str = "cell_boundaries",
    min_transcripts: int = 0,
    min_area_um2: float = 0.0,
    max_area_um2: float | None = None,
    drop_failed: bool = False,
) -> CellTable:
    """Put counts, intensities and shapes together.

    Parameters
    ----------
    sample
        The sample's name.
    cells
        The cells, with ids and a map to microns; in memory or on disk.
    counts
        Transcripts of the same cells. Without, the matrix has no columns, and `min_transcripts` does not apply.
    channels
        Intensities of the same cells.
    statistics
        Which intensities to keep: ``mean`` goes to ``obsm["intensities"]``, ``min`` and ``max`` to
        ``obsm["intensities_min"]`` and ``obsm["intensities_max"]``.
    metadata
        Column → value, the same for all cells. A name that the table uses itself is stored as ``sheet_<name>``.
    region
        Name of the shapes element that the table annotates.
    min_transcripts
        Cells with fewer counted transcripts fail.
    min_area_um2, max_area_um2
        Cells smaller or larger than this (µm²) fail.
    drop_failed
        Remove cells that fail instead of marking them.

    Returns
    -------
    CellTable
        ``adata.X`` is int32 CSR; obs names are the cells' ids; obs has ``cell_id, sample, region, area_um2, passes_qc,
        qc_reason, n_control``, the counts' ``columns`` and the metadata; ``obsm["spatial"]`` the centroids in µm
        (n, 2); ``layers["expected"]`` the expected counts, if there are any (float32 CSR). It annotates `region` for
        spatialdata, unless it has no rows.

    Raises
    ------
    CellquiltError
        ``pixel-size-unknown`` if the shapes have no map to microns; ``cell-ids-not-unique``.
    ValueError
        If counts or intensities are of another number of cells.
    """
    _check_rows(cells, counts, channels)
    area, centroids = _area_and_centroids_um(cells)
    reasons = _reasons(area, counts, min_transcripts, min_area_um2, max_area_um2)
    passes = reasons == ""
    names, numbers = np.unique(reasons[~passes], return_counts=True)
    failed = {str(name): int(number) for name, number in zip(names, numbers, strict=True)}
    kept = passes.copy() if drop_failed else np.ones(len(cells), dtype=bool)
    adata = _anndata(
        sample, region, np.asarray(cells.ids, dtype=object)[kept], area[kept], centroids[kept], reasons[kept],
        _rows_of(counts, kept), _channels_of(channels, kept), statistics, metadata or {},
    )  # fmt: skip
    return CellTable(adata, kept, failed)


def table_numbers(adata: "AnnData") -> dict[str, Any]:
    """The numbers of `qc.json` that the cell table gives; medians are those of the cells that pass, None if none do."""
    passes = np.asarray(adata.obs["passes_qc"], dtype=bool)
    matrix: Any = adata.X
    matrix = matrix.tocsr()[passes]
    has_genes = matrix.shape[1] > 0
    return {
        "n_cells": int(adata.n_obs),
        "n_cells_pass": int(passes.sum()),
        "median_transcripts_per_cell": _median(np.asarray(matrix.sum(axis=1)).ravel()) if has_genes else None,
        "median_genes_per_cell": _median(np.diff(matrix.indptr)) if has_genes else None,
        "median_area_um2": _median(np.asarray(adata.obs["area_um2"], dtype=np.float64)[passes]),
    }


def _median(values: NDArray) -> float | None:
    return float(np.median(values)) if values.size else None


def _check_rows(cells: ShapesTable | Outlines, counts: Counts | None, channels: ChannelTable | None) -> None:
    n = len(cells)
    if counts is not None and counts.matrix.shape[0] != n:
        raise ValueError(f"counts of {counts.matrix.shape[0]} cells for {n} cells")
    if channels is not None and channels.mean.shape[0] != n:
        raise ValueError(f"intensities of {channels.mean.shape[0]} cells for {n} cells")
    ids, numbers = np.unique(np.asarray(cells.ids, dtype=str), return_counts=True)
    if (numbers > 1).any():
        raise CellquiltError(
            "cell-ids-not-unique",
            f"{int((numbers > 1).sum())} cell ids occur more than once, for example {ids[numbers > 1][0]!r}",
            "give every cell its own id",
        )


def _area_and_centroids_um(cells: ShapesTable | Outlines) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if MICRONS not in cells.transforms:
        raise CellquiltError(
            "pixel-size-unknown", "the cells have no map to microns", "give pixel_size_um in the sample sheet"
        )
    matrix = cells.transforms[MICRONS]
    if isinstance(cells, Outlines):
        areas, centroids = cells.traits.areas, cells.traits.centroids
    else:
        measured = Rings.from_shapely(cells.geometry).measures()
        areas, centroids = measured[:, 0], measured[:, 1:]
    return areas * abs(float(np.linalg.det(matrix[:2, :2]))), apply(matrix, centroids)


def _reasons(
    area: NDArray[np.float64],
    counts: Counts | None,
    min_transcripts: int,
    min_area_um2: float,
    max_area_um2: float | None,
) -> NDArray[np.object_]:
    """(n,) why each cell fails, '' if it passes."""
    tests = [("min_area_um2", area < min_area_um2)]
    if max_area_um2 is not None:
        tests.append(("max_area_um2", area > max_area_um2))
    if counts is not None:
        tests.append(("min_transcripts", np.asarray(counts.matrix.sum(axis=1)).ravel() < min_transcripts))
    # A handful of tests gives few combinations: name these once instead of joining strings cell by cell.
    code = np.zeros(area.size, dtype=np.int64)
    for bit, (_, failing) in enumerate(tests):
        code |= failing.astype(np.int64) << bit
    texts = [
        ";".join(name for bit, (name, _) in enumerate(tests) if combination >> bit & 1)
        for combination in range(1 << len(tests))
    ]
    return np.array(texts, dtype=object)[code]


def _rows_of(counts: Counts | None, kept: NDArray[np.bool_]) -> Counts | None:
    if counts is None or kept.all():  # a matrix is large: no copy of it without need
        return counts
    # Genes stay, also those that no cell is left with: the columns tell what was measured.
    rows = np.flatnonzero(kept)
    expected = None if counts.expected is None else counts.expected[rows]
    columns = {name: values[kept] for name, values in counts.columns.items()}
    return Counts(counts.matrix[rows], counts.genes, counts.n_control[kept], expected, counts.qc, columns)


def _channels_of(channels: ChannelTable | None, kept: NDArray[np.bool_]) -> ChannelTable | None:
    return channels if channels is None or kept.all() else channels.take(kept)


def _anndata(
    sample: str,
    region: str,
    ids: NDArray[np.object_],
    area: NDArray[np.float64],
    centroids: NDArray[np.float64],
    reasons: NDArray[np.object_],
    counts: Counts | None,
    channels: ChannelTable | None,
    statistics: Sequence[Statistic],
    metadata: Mapping[str, Any],
) -> "AnnData":
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    n = ids.size
    index = pd.Index(ids.astype(str).astype(object), dtype=object)

    def same(value: str) -> pd.Categorical:
        return pd.Categorical.from_codes(np.zeros(n, dtype=np.int8), categories=pd.Index([value], dtype=object))

    obs = pd.DataFrame(
        {
            "cell_id": index,
            "sample": same(sample),
            "region": same(region),
            "area_um2": area,
            "passes_qc": reasons == "",
            "qc_reason": pd.Categorical(reasons, categories=pd.Index(sorted({"", *reasons.tolist()}), dtype=object)),
            "n_control": np.zeros(n, dtype=np.int64) if counts is None else counts.n_control,
            **({} if counts is None else counts.columns),
        },
        index=index,
    )
    for name, value in metadata.items():
        column = _key(f"sheet_{name}" if name in _OWN_COLUMNS else str(name))
        obs[column] = same(value) if isinstance(value, str) else value
    genes = [] if counts is None else counts.genes
    # spatialdata wants the region's name in at least one row: a table without rows cannot annotate.
    annotation = {"region": region, "region_key": REGION_KEY, "instance_key": INSTANCE_KEY}
    adata = AnnData(
        X=csr_matrix((n, 0), dtype=np.int32) if counts is None else counts.matrix,
        obs=obs,
        var=pd.DataFrame(index=pd.Index(genes, dtype=object)),
        uns={"spatialdata_attrs": annotation} if n else {},
    )
    adata.var_names_make_unique()  # bins may come with two genes of one name
    adata.obsm["spatial"] = centroids
    if counts is not None and counts.expected is not None:
        adata.layers["expected"] = counts.expected
    if channels is not None:
        columns = unique_names([_key(name) for name in channels.channels])
        for statistic in statistics:
            key = "intensities" if statistic == "mean" else f"intensities_{statistic}"
            adata.obsm[key] = pd.DataFrame(getattr(channels, statistic), index=index, columns=columns)
    return adata


def _key(name: str) -> str:
    """A name as a column's key in a store: a slash would make a folder, and ``_index`` is anndata's own."""
    key = name.replace("/", "_")
    return "index" if key == "_index" else key
