"""Bins to cells: which cell does each square of the grid belong to, and what do the counts of its bins add up to?

A bin belongs to one cell at most: that in which its centre lies, by the same rule as transcripts (of cells that overlap
there the one whose centroid is nearest, then the first); or, by the rule ``overlap``, that which covers most of it. So
nothing is counted twice, and the sums of all cells and of the bins outside are the slide's.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.aggregation.counts import Counts
from cellquilt.core.bins import Bins
from cellquilt.core.errors import CellquiltError
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, apply, length_scale
from cellquilt.geometry.coverage import largest_shares
from cellquilt.geometry.expand import expand_labels
from cellquilt.geometry.locate import PolygonIndex
from cellquilt.geometry.outlines import Outlines
from cellquilt.geometry.polygons import Rings

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_PLACES = 1 << 20  # of the grid that are located together
_NOT_SQUARE = 0.01  # by which the sides of a bin may differ
_BYTES_AN_ENTRY = 48  # of the counts, while a block is read and added up


def count_bins(
    bins: Bins,
    cells: Outlines,
    *,
    rule: str = "centre",
    expand_um: float = 0.0,
    memory_mb: int = 1500,
    threads: int = 1,
) -> tuple[Counts, NDArray[np.int32]]:
    """Add up the counts of the bins in each cell.

    Parameters
    ----------
    bins
        The slide's bins.
    cells
        The cells' outlines.
    rule
        ``centre`` or ``overlap``.
    expand_um
        Bins in no cell go to the nearest one within this distance (µm), from centre to centre of bins.
    memory_mb
        An eighth of it bounds the counts that are read at a time.
    threads
        Threads that locate bins.

    Returns
    -------
    counts : Counts
        Genes are in the table's order; ``columns`` has ``n_bins`` and ``bins_area_um2`` of each cell; ``qc`` has
        ``n_bins``, ``n_bins_in_cells``, ``n_transcripts`` (the sum of all counts), ``n_assigned``, ``n_counted`` (of
        those in cells) and ``share_assigned`` (None where there are none).
    owners : numpy.ndarray
        (rows, columns) int32, number of the cell from 1 on at each place of the grid, 0 for none.

    Raises
    ------
    CellquiltError
        ``bins-no-common-system`` if no coordinate system has both bins and cells; ``bins-not-squares``;
        ``pixel-size-unknown`` if the cells have no map to microns; what reading the bins refuses.
    """
    to_cells = grid_to_cells(bins.transforms, cells.transforms)
    if MICRONS not in cells.transforms:
        raise CellquiltError(
            "pixel-size-unknown", "the cells have no map to microns", "give pixel_size_um in the sample sheet"
        )
    bin_um = length_scale(cells.transforms[MICRONS] @ to_cells)
    owners = assign_grid(bins.shape, cells.rings(), to_cells, rule=rule, threads=threads)
    if expand_um > 0:
        owners = expand_labels(owners, expand_um / bin_um)
    cell = owners[bins.row, bins.column] - 1
    entries = memory_mb * 1_000_000 // 8 // _BYTES_AN_ENTRY
    total = 0

    def blocks() -> Iterable[tuple[int, "csr_matrix"]]:
        nonlocal total
        for start, block in bins.counts(entries):
            total += int(block.data.sum(dtype=np.int64))
            yield start, block

    matrix = sum_bins(blocks(), cell, len(cells), len(bins.genes))
    assigned = int(matrix.data.sum(dtype=np.int64))
    n_bins = np.bincount(cell[cell >= 0], minlength=len(cells))
    qc = {
        "bin_size_um": bin_um,
        "n_bins": len(bins),
        "n_bins_in_cells": int(n_bins.sum()),
        "n_transcripts": total,
        "n_assigned": assigned,
        "n_counted": assigned,
        "share_assigned": assigned / total if total else None,
    }
    columns = {"n_bins": n_bins.astype(np.int32), "bins_area_um2": n_bins * bin_um**2}
    counts = Counts(matrix, bins.genes, np.zeros(len(cells), dtype=np.int64), qc=qc, columns=columns)
    return counts, owners


def grid_to_cells(bins: dict[str, Affine], cells: dict[str, Affine]) -> Affine:
    """(3, 3) map from the grid of bins to the cells' own coordinates.

    Parameters
    ----------
    bins, cells
        Coordinate system → (3, 3) map from the grid, and from the cells' coordinates.
    """
    common = [name for name in (GLOBAL, MICRONS, *sorted(bins)) if name in bins and name in cells]
    if not common:
        raise CellquiltError(
            "bins-no-common-system",
            f"bins are known in the coordinate systems {', '.join(sorted(bins))}, cells in {', '.join(sorted(cells))}",
            "set a transformation of the bins to one of the cells' systems (spatialdata's set_transformation)",
        )
    matrix = np.linalg.inv(cells[common[0]]) @ bins[common[0]]
    sides = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    if not 0 < sides[0] <= sides[1] * (1 + _NOT_SQUARE):
        raise CellquiltError(
            "bins-not-squares",
            f"the maps of bins and cells make bins of {sides[0]:g} × {sides[1]:g} of the cells' units",
            "bins must be squares: check the bins' transformation",
        )
    return matrix


def assign_grid(
    shape: tuple[int, int], cells: Rings, to_cells: Affine, *, rule: str = "centre", threads: int = 1
) -> NDArray[np.int32]:
    """The cell of each square of a grid.

    Parameters
    ----------
    shape
        (rows, columns) of the grid.
    cells
        The cells' outlines.
    to_cells
        (3, 3) map from the grid to the outlines' coordinates.
    rule
        ``centre``: the cell that a square's centre lies in. ``overlap``: the one that covers most of it, if no smaller
        a part of it lies in no cell.
    threads
        Threads that locate centres.

    Returns
    -------
    numpy.ndarray
        (rows, columns) int32, number of the cell from 1 on, 0 for none.
    """
    if rule == "overlap":
        to_grid = np.linalg.inv(to_cells)
        return largest_shares(
            Rings(apply(to_grid, cells.coords), cells.ring_offsets, cells.polygon_offsets, cells.exterior), shape
        )
    index = PolygonIndex(cells)
    owners = np.empty(shape, dtype=np.int32)
    rows = max(_PLACES // max(shape[1], 1), 1)
    columns = np.arange(shape[1]) + 0.5
    for start in range(0, shape[0], rows):
        part = owners[start : start + rows]
        y = np.repeat(np.arange(start, start + len(part)) + 0.5, shape[1])
        found = index.locate_columns(np.tile(columns, len(part)), y, matrix=to_cells, threads=threads)
        part[:] = found.reshape(part.shape) + 1
    return owners


def sum_bins(
    blocks: Iterable[tuple[int, "csr_matrix"]], cell: NDArray[np.integer], n_cells: int, n_genes: int
) -> "csr_matrix":
    """Add up the rows of a matrix by cell.

    Parameters
    ----------
    blocks
        The matrix, some rows at a time: the first row's number, and (m, n_genes) int32 of it.
    cell
        (n,) row of each row's cell, -1 for none.
    n_cells, n_genes
        Shape of the result.

    Returns
    -------
    scipy.sparse.csr_matrix
        (n_cells, n_genes) int32 with sorted indices and no stored zeros.
    """
    from scipy.sparse import csr_matrix

    # Sums of blocks, of which each is more than twice as large as the next: none is added up more than log2 times.
    sums: list[Any] = []
    for start, block in blocks:
        here = cell[start : start + block.shape[0]]
        inside = np.flatnonzero(here >= 0)
        if inside.size == 0:
            continue
        ones = np.ones(inside.size, dtype=np.int32)
        sums.append(csr_matrix((ones, (here[inside], inside)), shape=(n_cells, block.shape[0])) @ block)
        while len(sums) > 1 and 2 * sums[-1].nnz >= sums[-2].nnz:
            sums.append(sums.pop() + sums.pop())
    while len(sums) > 1:
        sums.append(sums.pop() + sums.pop())
    total = sums[0] if sums else csr_matrix((n_cells, n_genes), dtype=np.int32)
    total.sum_duplicates()
    total.eliminate_zeros()
    return total.astype(np.int32, copy=False)
