"""Numbers a cell, from the cell table as it lies on disk; the count matrix is streamed."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cellquilt.core.errors import CellquiltError
from cellquilt.core.transforms import apply
from cellquilt.report.view import View

if TYPE_CHECKING:
    import pandas as pd

_ENTRIES = 4_000_000  # of the count matrix in memory at a time
_ROWS = 65_536


@dataclass
class Cells:
    """What QC and report need to know of every cell.

    Attributes
    ----------
    ids
        (n,) str, in the order of the table.
    xy_um
        (n, 2) float64 centroids in µm.
    area_um2
        (n,) float64.
    passes_qc
        (n,) bool.
    qc_reason
        (n,) str; empty for cells that pass.
    transcripts
        (n,) int64 counted transcripts.
    genes
        (n,) int64 genes with a count.
    gene_names
        (g,) str.
    gene_totals
        (g,) int64 counts a gene.
    intensities
        One row a cell, one column a channel; None if channels were not measured.
    """

    ids: np.ndarray
    xy_um: np.ndarray
    area_um2: np.ndarray
    passes_qc: np.ndarray
    qc_reason: np.ndarray
    transcripts: np.ndarray
    genes: np.ndarray
    gene_names: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=str))
    gene_totals: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    intensities: "pd.DataFrame | None" = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_counts(self) -> bool:
        """Whether transcripts could be counted at all."""
        return len(self.gene_names) > 0


def read_cells(view: View) -> Cells:
    """Read the cells of a sample: from its table, else from the outlines alone, else none.

    Parameters
    ----------
    view
        The sample's stores.

    Returns
    -------
    Cells

    Raises
    ------
    CellquiltError
        ``table-unreadable``.
    """
    element = view.find("tables", "table")
    if element is None:
        return _from_outlines(view)
    try:
        return _from_table(element)
    except Exception as error:  # whatever zarr and anndata raise on damaged files
        raise CellquiltError(
            "table-unreadable", f"{element} cannot be read: {type(error).__name__}: {error}", "run `aggregate` again"
        ) from error


def _from_table(element: Any) -> Cells:
    import zarr
    from anndata.io import read_elem

    group: Any = zarr.open_group(str(element), mode="r")
    obs: Any = read_elem(group["obs"])
    obsm = group["obsm"]
    spatial = np.asarray(read_elem(obsm["spatial"]), dtype=np.float64)
    transcripts, genes, gene_totals = count_sums(group["X"])
    n = len(obs)
    panel: Any = read_elem(group["var"])
    passes = obs["passes_qc"].to_numpy().astype(bool) if "passes_qc" in obs else np.ones(n, dtype=bool)
    reason = obs["qc_reason"].astype(str).to_numpy() if "qc_reason" in obs else np.full(n, "")
    area = obs["area_um2"].to_numpy().astype(np.float64) if "area_um2" in obs else np.full(n, np.nan)
    return Cells(
        ids=obs.index.to_numpy().astype(str),
        xy_um=spatial[:, :2] if n else np.zeros((0, 2)),
        area_um2=area,
        passes_qc=passes,
        qc_reason=np.where(passes, "", reason),
        transcripts=transcripts,
        genes=genes,
        gene_names=panel.index.to_numpy().astype(str),
        gene_totals=gene_totals,
        intensities=read_elem(obsm["intensities"]) if "intensities" in obsm else None,
    )


def _from_outlines(view: View) -> Cells:
    import shapely

    shapes = view.shapes("cell_boundaries")
    if shapes is None:
        ids, xy, area = np.zeros(0, dtype=str), np.zeros((0, 2)), np.zeros(0)
    else:
        centroids = shapely.get_coordinates(shapely.centroid(shapes.geometry)).reshape(-1, 2)
        to_um = shapes.transforms.get("microns", np.eye(3))
        ids, xy = shapes.ids, apply(to_um, centroids)
        area = shapely.area(shapes.geometry) * abs(np.linalg.det(to_um[:2, :2]))
    zeros = np.zeros(len(ids), dtype=np.int64)
    return Cells(ids, xy, area, np.ones(len(ids), dtype=bool), np.full(len(ids), ""), zeros, zeros.copy())


def count_sums(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row sums, non-zero entries a row and column sums of a count matrix on disk.

    Parameters
    ----------
    matrix
        AnnData's Zarr group of a CSR matrix, or a dense Zarr array. Read in pieces, never whole.

    Returns
    -------
    row_sums, row_nonzero : numpy.ndarray
        (n,) int64.
    column_sums : numpy.ndarray
        (g,) int64.
    """
    if matrix.attrs.get("encoding-type") != "csr_matrix":
        return _dense_sums(matrix)
    n_rows, n_columns = (int(length) for length in matrix.attrs["shape"])
    starts = np.asarray(matrix["indptr"][:], dtype=np.int64)
    # Running totals at the ends of rows; their differences are the rows' sums.
    sums, nonzero = np.zeros(n_rows + 1, dtype=np.int64), np.zeros(n_rows + 1, dtype=np.int64)
    columns = np.zeros(n_columns, dtype=np.int64)
    total, present = 0, 0
    for first in range(0, int(starts[-1]), _ENTRIES):
        last = min(first + _ENTRIES, int(starts[-1]))
        data = np.asarray(matrix["data"][first:last], dtype=np.int64)
        indices = np.asarray(matrix["indices"][first:last])
        columns += np.bincount(indices, weights=data, minlength=n_columns).astype(np.int64)
        low, high = np.searchsorted(starts, [first, last], side="right")
        ends = starts[low:high] - first - 1
        running, running_nonzero = np.cumsum(data) + total, np.cumsum(data != 0) + present
        sums[low:high], nonzero[low:high] = running[ends], running_nonzero[ends]
        total, present = int(running[-1]), int(running_nonzero[-1])
    return np.diff(sums), np.diff(nonzero), columns


def _dense_sums(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n_rows, n_columns = matrix.shape
    sums, nonzero = np.zeros(n_rows, dtype=np.int64), np.zeros(n_rows, dtype=np.int64)
    columns = np.zeros(n_columns, dtype=np.int64)
    for first in range(0, n_rows, _ROWS):
        block = np.asarray(matrix[first : first + _ROWS])
        sums[first : first + _ROWS] = block.sum(axis=1)
        nonzero[first : first + _ROWS] = np.count_nonzero(block, axis=1)
        columns += block.sum(axis=0).astype(np.int64)
    return sums, nonzero, columns
