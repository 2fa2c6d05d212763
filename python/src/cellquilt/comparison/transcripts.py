"""Transcripts in the cells of several segmentations, counted in one pass.

What is kept grows with the number of different (cell, gene) and (cell, cell) pairs, not with the number of transcripts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellquilt.aggregation.counts import PairCounts, pair_keys
from cellquilt.comparison.cells import Segmentation
from cellquilt.core.assignment import NOT_SEGMENTED
from cellquilt.core.genes import GeneNames
from cellquilt.core.points import bools, floats, require_columns
from cellquilt.geometry.locate import PolygonIndex
from cellquilt.simulate.scores import adjusted_rand, mutual_best

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

#: Share of a cell's area that is its core; the rest is its ring.
CORE_SHARE = 0.5


@dataclass(frozen=True)
class CellCounts:
    """What a slide's transcripts add up to in the cells of one method.

    Attributes
    ----------
    core, ring
        (n_cells, n_genes) int32 CSR: counted transcripts (no controls, of passing quality) in the core of each cell,
        and in the rest of it.
    outlined
        (n_cells, n_genes) int32 CSR: counted transcripts in the outline of each cell; None where these are what is
        assigned.
    n_inside, n_assigned_inside
        Transcripts inside the image, and how many of them are in a cell; controls and low quality included.
    control_rate_in_cells, control_rate_outside
        Share of controls among transcripts of passing quality in cells; inside the image but in no cell. NaN where
        there are none, or where the slide has no controls.
    """

    core: "csr_matrix"
    ring: "csr_matrix"
    outlined: "csr_matrix | None"
    n_inside: int
    n_assigned_inside: int
    control_rate_in_cells: float
    control_rate_outside: float

    @property
    def counts(self) -> "csr_matrix":
        """(n_cells, n_genes) int32 CSR of the whole cells."""
        return self.core + self.ring

    @property
    def share_assigned(self) -> float:
        """Of the transcripts inside the image; NaN where there are none."""
        return self.n_assigned_inside / self.n_inside if self.n_inside else float("nan")


@dataclass(frozen=True)
class Contingency:
    """How the transcripts of a slide lie in the cells of two segmentations.

    Attributes
    ----------
    a, b
        (m,) int64 cell in one and in the other, -1 for none; every pair once, sorted.
    counts
        (m,) int64 transcripts in both; all transcripts of the slide add up.
    """

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    counts: NDArray[np.int64]


def contingency(a: NDArray[np.integer], b: NDArray[np.integer]) -> Contingency:
    """The contingency of two assignments in memory.

    Parameters
    ----------
    a, b
        (n,) cell of every transcript, -1 for none.
    """
    pairs = PairCounts()
    pairs.add(pair_keys(np.asarray(a, dtype=np.int64) + 1, np.asarray(b, dtype=np.int64) + 1))
    return _contingency(pairs)


def _contingency(pairs: PairCounts) -> Contingency:
    keys, counts = pairs.total()
    return Contingency((keys >> 32) - 1, (keys & 0xFFFFFFFF) - 1, counts.astype(np.int64))


def assignment_agreement(table: Contingency) -> float:
    """Share of transcripts that two methods treat alike.

    Cells are matched one to one, each with the cell of the other method that it shares most transcripts with if that
    holds both ways. Alike are transcripts in two cells that match, and those in no cell of either.

    Returns
    -------
    float
        0..1; NaN where there are no transcripts.
    """
    total = int(table.counts.sum())
    if total == 0:
        return float("nan")
    both = (table.a >= 0) & (table.b >= 0)
    a, b, counts = table.a[both], table.b[both], table.counts[both]
    sizes = int(a.max(initial=-1)) + 1, int(b.max(initial=-1)) + 1
    matched = counts[mutual_best(a, b, counts, *sizes)].sum()
    neither = table.counts[(table.a < 0) & (table.b < 0)].sum()
    return float(matched + neither) / total


def assignment_ari(table: Contingency) -> float:
    """Adjusted Rand index of two assignments (Hubert and Arabie, J. Classification 1985).

    A transcript in no cell is a group of its own. 1: the same cells; 0: no more alike than by chance.

    Returns
    -------
    float
        NaN where there are fewer than two transcripts.
    """
    if table.counts.sum() < 2:
        return float("nan")
    return adjusted_rand(table.a, table.b, table.counts, table.a < 0, table.b < 0)


def in_core(
    index: PolygonIndex,
    centroids: NDArray[np.float64],
    xy: NDArray[np.float64],
    cell: NDArray[np.int64],
    threads: int = 1,
) -> NDArray[np.bool_]:
    """Whether points lie in the core of their cell: its outline drawn smaller around its centroid.

    Parameters
    ----------
    index
        The outlines, which do not overlap.
    centroids
        (n_cells, 2) float64.
    xy
        (n, 2) float64 points.
    cell
        (n,) int64 cell of each point.
    threads
        Threads that locate points.

    Returns
    -------
    numpy.ndarray
        (n,) bool. A point that is in its cell by assignment but not in its outline is in no core.

    Notes
    -----
    The outline shrunk to a share s of the area holds a point if the outline itself holds the point moved away from the
    centroid by 1/√s: so that no second set of outlines is made, and a core is exactly `CORE_SHARE` of its cell.
    """
    middle = centroids[cell]
    return index.locate(middle + (xy - middle) / np.sqrt(CORE_SHARE), threads=threads) == cell


class TranscriptTally:
    """Count the transcripts of a slide in the cells of several segmentations, batch by batch.

    Parameters
    ----------
    segmentations
        The methods.
    truth
        The true cells, where they are known; only compared with, not counted in.
    threads
        Threads that locate points.
    memory_mb
        Memory for counts, which all share.
    """

    def __init__(
        self,
        segmentations: Sequence[Segmentation],
        truth: Segmentation | None = None,
        threads: int = 1,
        memory_mb: int = 1500,
    ) -> None:
        self.genes = GeneNames()
        self.n_countable = 0
        self._segmentations = [*segmentations, *([] if truth is None else [truth])]
        self._n_methods, self._threads = len(segmentations), threads
        self._indices: dict[int, PolygonIndex] = {}
        pairs = list(combinations(range(len(self._segmentations)), 2))
        by_genes = [k for k, segmentation in enumerate(segmentations) if segmentation.by_genes]
        each_mb = memory_mb // max(2 * len(segmentations) + len(by_genes) + len(pairs), 1)
        self._core = [PairCounts(each_mb) for _ in segmentations]
        self._ring = [PairCounts(each_mb) for _ in segmentations]
        self._outlined = {k: PairCounts(each_mb) for k in by_genes}
        self._sums = np.zeros((len(segmentations), 5), dtype=np.int64)
        self._n_inside = self._n_control = 0
        self._totals = np.zeros(0, dtype=np.int64)
        self._pairs = {pair: PairCounts(each_mb) for pair in pairs}

    def add(self, batch: pa.Table, cells: Sequence[NDArray[np.integer] | None]) -> tuple[NDArray, NDArray, NDArray]:
        """Count one batch.

        Parameters
        ----------
        batch
            Columns ``x, y`` (µm), ``gene``, ``is_control`` and, if there are any, ``passes_qv`` and ``inside`` (in the
            image).
        cells
            One entry a method, and one for the truth if there is one: (n,) the cell of each transcript, -1 for none,
            `NOT_SEGMENTED` (`core.assignment`) for the outline that it lies in; None for all of them.

        Returns
        -------
        x, y : numpy.ndarray
            (m,) float64 µm of the transcripts that may be counted.
        gene : numpy.ndarray
            (m,) int64 their codes in `genes`.

        Raises
        ------
        CellquiltError
            ``points-column-missing`` or ``gene-missing``.
        """
        require_columns(batch, ("x", "y", "gene", "is_control"))
        if len(cells) != len(self._segmentations):
            raise ValueError(f"{len(cells)} assignments for {len(self._segmentations)} segmentations")
        n = batch.num_rows
        xy = np.column_stack([floats(batch, "x"), floats(batch, "y")])
        control = bools(batch, "is_control")
        passes = bools(batch, "passes_qv") if "passes_qv" in batch.column_names else np.ones(n, dtype=bool)
        inside = bools(batch, "inside") if "inside" in batch.column_names else np.isfinite(xy).all(axis=1)
        gene = self.genes.encode(batch.column("gene"), control)
        counted = passes & ~control
        self._count_genes(gene[counted])
        self._n_inside += int(np.count_nonzero(inside))
        self._n_control += int(np.count_nonzero(control))
        found = [self._cells(k, xy, given) for k, given in enumerate(cells)]
        for k, cell in enumerate(found[: self._n_methods]):
            assigned = cell >= 0
            outside = inside & ~assigned & passes
            held = assigned & passes
            self._sums[k] += [
                np.count_nonzero(assigned & inside),
                np.count_nonzero(held),
                np.count_nonzero(held & control),
                np.count_nonzero(outside),
                np.count_nonzero(outside & control),
            ]
            rows = np.flatnonzero(assigned & counted)
            middle = self._segmentations[k].centroids_um
            core = in_core(self._index(k), middle, xy[rows], cell[rows], self._threads)
            keys = pair_keys(cell[rows], gene[rows])
            self._core[k].add(keys[core])
            self._ring[k].add(keys[~core])
            if k in self._outlined:
                around = self._index(k).locate(xy, threads=self._threads)
                rows = np.flatnonzero((around >= 0) & counted)
                self._outlined[k].add(pair_keys(around[rows], gene[rows]))
        for (i, j), pairs in self._pairs.items():
            pairs.add(pair_keys(found[i] + 1, found[j] + 1))
        rows = np.flatnonzero(counted)
        return xy[rows, 0], xy[rows, 1], gene[rows]

    def _index(self, k: int) -> PolygonIndex:
        if k not in self._indices:
            self._indices[k] = PolygonIndex(self._segmentations[k].rings)
        return self._indices[k]

    def _cells(self, k: int, xy: NDArray[np.float64], given: NDArray[np.integer] | None) -> NDArray[np.int64]:
        if given is None:
            return self._index(k).locate(xy, threads=self._threads)
        cell = np.asarray(given, dtype=np.int64)
        n = len(self._segmentations[k])
        if cell.shape != (len(xy),) or (cell.size and not NOT_SEGMENTED <= cell.min() <= cell.max() < n):
            raise ValueError(f"{self._segmentations[k].name}: expected {len(xy)} cells from -1 to {n - 1}")
        rest = np.flatnonzero(cell == NOT_SEGMENTED)
        if rest.size:
            cell = cell.copy()
            cell[rest] = self._index(k).locate(xy[rest], threads=self._threads)
        return cell

    def _count_genes(self, gene: NDArray[np.int64]) -> None:
        counts = np.bincount(gene, minlength=self._totals.size)
        counts[: self._totals.size] += self._totals
        self._totals = counts
        self.n_countable += gene.size

    def panel(self) -> tuple[list[str], NDArray[np.int32], NDArray[np.float64]]:
        """Names of the genes, sorted; the column of each gene code; and each gene's share of all counted transcripts.

        Controls have no column (-1).
        """
        names, column = self.genes.sorted_columns()
        shares = np.zeros(len(names))
        codes = np.flatnonzero(column[: self._totals.size] >= 0)
        shares[column[codes]] = self._totals[codes]
        return names, column, shares / max(self.n_countable, 1)

    def counts(self, k: int) -> CellCounts:
        """The counts of method number k."""
        names, column, _ = self.panel()
        n = len(self._segmentations[k])
        inside, held, control, outside, control_outside = self._sums[k].tolist()
        known = self._n_control > 0
        return CellCounts(
            self._core[k].matrix(n, column, len(names)),
            self._ring[k].matrix(n, column, len(names)),
            self._outlined[k].matrix(n, column, len(names)) if k in self._outlined else None,
            self._n_inside,
            inside,
            control / held if held and known else float("nan"),
            control_outside / outside if outside and known else float("nan"),
        )

    def contingency(self, i: int, j: int) -> Contingency:
        """The contingency of methods number i and j, i < j; the truth counts as the last one."""
        return _contingency(self._pairs[i, j])
