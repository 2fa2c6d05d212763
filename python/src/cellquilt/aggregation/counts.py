"""Transcripts to cells: exact counts and the assignment of every transcript, streamed batch by batch.

A transcript is in at most one cell. It is *counted* (adds one to the matrix) if it is in a cell, is no control and
passes the machine's quality threshold. So the row sums of the matrix are, cell by cell, the numbers of counted
transcripts whose `cell_id` is that cell.
"""

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from cellquilt.core.assignment import NOT_SEGMENTED
from cellquilt.core.errors import CellquiltError
from cellquilt.core.genes import GeneNames
from cellquilt.core.points import bools, floats, require_columns
from cellquilt.core.transforms import Affine
from cellquilt.geometry.locate import PolygonIndex
from cellquilt.geometry.polygons import offsets_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_GENE_BITS = 32
_NO_PLANE = np.iinfo(np.int32).min


@dataclass
class Assignment:
    """Where the transcripts of one batch lie.

    Attributes
    ----------
    cell
        (n,) int64 row of the cell, -1 for none.
    in_nucleus
        (n,) bool, inside a nucleus' outline.
    """

    cell: NDArray[np.int64]
    in_nucleus: NDArray[np.bool_]


@dataclass
class Counts:
    """What a slide's transcripts add up to.

    Attributes
    ----------
    matrix
        (n_cells, n_genes) int32 CSR with sorted indices and no stored zeros.
    genes
        Names of the columns, sorted: all genes that occur as something else than a control, counted or not; of bins
        those of their table, in its order.
    n_control
        (n_cells,) int64, controls in each cell that pass the quality threshold.
    expected
        (n_cells, n_genes) float32 CSR of expected counts, where the segmentation method has them.
    qc
        Numbers for `qc.json`; see `TranscriptCounter`.
    columns
        Name → (n_cells,) further columns of the cell table.
    """

    matrix: "csr_matrix"
    genes: list[str]
    n_control: NDArray[np.int64]
    expected: "csr_matrix | None" = None
    qc: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, NDArray] = field(default_factory=dict)


class TranscriptCounter:
    """Assign and count transcripts batch by batch.

    Parameters
    ----------
    cells
        Index of the cells' outlines.
    to_cells
        (3, 3) map from the transcripts' x, y to the outlines' coordinates.
    n_cells
        Rows of the matrix. Default: one a polygon.
    cell_of_polygon
        (n_polygons,) row of each polygon's cell, where a cell has several outlines (one a plane). Default: polygon i
        is cell i.
    nuclei
        Index of the nuclei's outlines, in the same coordinates.
    planes
        Only transcripts of these planes are assigned (``count_z = same``); the others keep no cell. Default: all.
    image_shape
        (height, width) of the image, to tell the transcripts inside it.
    to_image
        (3, 3) map from the transcripts' x, y to the image's pixels. Default: `to_cells`.
    assignment
        Transcript ids of a batch → (n,) int64 row of each one's cell, `NO_CELL` or, where only the outlines tell,
        `NOT_SEGMENTED` (`core.assignment`): what the segmentation method says wins over the outlines.
    threads
        Threads that locate points.
    memory_mb
        Memory for counts; see `PairCounts`.

    Notes
    -----
    Besides, it takes the outlines and their index (see `PolygonIndex`), and 8 bytes a cell.

    The numbers in ``Counts.qc`` are: ``n_transcripts`` all rows; ``n_inside_image``; ``n_assigned`` rows in a cell,
    controls and low quality included; ``n_in_nucleus``; ``n_counted``; ``n_control`` all control rows;
    ``n_control_in_cells`` and ``n_control_outside`` passing controls in cells, and outside cells but inside the image;
    ``control_rate_in_cells`` and ``control_rate_outside`` the share of controls among the passing rows there (None
    where there are no rows); ``share_assigned`` and ``share_assigned_by_z`` (plane → share) assigned rows among the
    rows inside the image (None where there are none). Without `image_shape` all rows with finite coordinates count as
    inside.
    """

    def __init__(
        self,
        cells: PolygonIndex,
        to_cells: Affine,
        *,
        n_cells: int | None = None,
        cell_of_polygon: ArrayLike | None = None,
        nuclei: PolygonIndex | None = None,
        planes: Collection[int] | None = None,
        image_shape: tuple[int, int] | None = None,
        to_image: Affine | None = None,
        assignment: Callable[[NDArray[np.uint64]], NDArray[np.int64]] | None = None,
        threads: int = 1,
        memory_mb: int = 1500,
    ) -> None:
        self.n_cells = cells.n_polygons if n_cells is None else n_cells
        self._cells, self._nuclei, self._threads = cells, nuclei, threads
        self._to_cells = np.ascontiguousarray(to_cells, dtype=np.float64)
        self._owner = None if cell_of_polygon is None else np.asarray(cell_of_polygon, dtype=np.int64)
        if self._owner is not None and (
            self._owner.shape != (cells.n_polygons,)
            or (self._owner.size and not 0 <= self._owner.min() <= self._owner.max() < self.n_cells)
        ):
            raise ValueError(f"cell_of_polygon must hold a row below {self.n_cells} for {cells.n_polygons} polygons")
        self._assignment = assignment
        self._planes = None if planes is None else np.array(sorted(planes), dtype=np.int64)
        self._image_shape = image_shape
        self._to_image = self._to_cells if to_image is None else np.ascontiguousarray(to_image, dtype=np.float64)
        self._genes = GeneNames()
        self._pairs = PairCounts(memory_mb)
        self._n_control = np.zeros(self.n_cells, dtype=np.int64)
        self._totals = np.zeros(len(_TOTALS), dtype=np.int64)
        self._by_plane: dict[int, NDArray[np.int64]] = {}

    def add(self, batch: pa.Table) -> Assignment:
        """Assign and count one batch.

        Parameters
        ----------
        batch
            Columns ``x, y, gene, is_control`` and, if there are any, ``passes_qv`` and ``z_plane``; others are left
            alone.

        Raises
        ------
        CellquiltError
            ``points-column-missing``, ``gene-missing`` if a row that is no control has no gene, and
            ``z-plane-missing`` where planes are asked for and not known.
        """
        require_columns(batch, ("x", "y", "gene", "is_control"))
        x, y = floats(batch, "x"), floats(batch, "y")
        is_control = bools(batch, "is_control")
        passes = bools(batch, "passes_qv") if "passes_qv" in batch.column_names else np.ones(x.size, dtype=bool)
        plane = _plane_column(batch)
        if plane is None and (self._planes is not None or self._cells.has_planes):
            raise CellquiltError(
                "z-plane-missing",
                "the transcripts have no column z_plane, but only those of certain planes are to be counted",
                "set count_z to all",
            )
        gene = self._genes.encode(batch.column("gene"), is_control)
        cell = self._cell(batch, x, y, plane)
        nucleus = np.full(x.size, -1, dtype=np.int64)
        if self._nuclei is not None:
            nucleus = self._locate(self._nuclei, x, y, plane)
        inside = _inside(x, y, self._to_image, *(self._image_shape or (-1, -1)))
        keys = np.empty(x.size, dtype=np.int64)
        n_keys = _tally(cell, nucleus, gene, is_control, passes, inside, self._n_control, self._totals, keys)
        self._pairs.add(keys[:n_keys])
        if plane is not None:
            self._tally_planes(plane, inside, cell >= 0)
        return Assignment(cell, nucleus >= 0)

    def _cell(
        self, batch: pa.Table, x: NDArray[np.float64], y: NDArray[np.float64], plane: NDArray[np.int64] | None
    ) -> NDArray[np.int64]:
        """Row of each transcript's cell: where the method says nothing, that of the outline it lies in."""
        if self._assignment is None:
            return self._cell_around(x, y, plane)
        require_columns(batch, ("transcript_id",))
        cell = self._assignment(batch.column("transcript_id").to_numpy().astype(np.uint64, copy=False))
        rest = np.flatnonzero(cell == NOT_SEGMENTED)
        cell[rest] = self._cell_around(x[rest], y[rest], None if plane is None else plane[rest])
        if self._planes is not None and plane is not None:
            cell[~np.isin(plane, self._planes)] = -1
        return cell

    def _cell_around(
        self, x: NDArray[np.float64], y: NDArray[np.float64], plane: NDArray[np.int64] | None
    ) -> NDArray[np.int64]:
        cell = self._locate(self._cells, x, y, plane)
        if self._owner is not None:
            cell = np.where(cell >= 0, self._owner[cell], -1) if self._owner.size else cell
        return cell

    def _locate(
        self, index: PolygonIndex, x: NDArray[np.float64], y: NDArray[np.float64], plane: NDArray[np.int64] | None
    ) -> NDArray[np.int64]:
        found = index.locate_columns(x, y, plane, matrix=self._to_cells, threads=self._threads)
        if self._planes is not None and plane is not None:
            found[~np.isin(plane, self._planes)] = -1
        return found

    def _tally_planes(self, plane: NDArray[np.int64], inside: NDArray[np.bool_], assigned: NDArray[np.bool_]) -> None:
        if plane.size == 0:
            return
        low, high = int(plane.min()), int(plane.max())
        if low == _NO_PLANE or high - low > 10_000:  # far apart: number them
            values, plane = np.unique(plane, return_inverse=True)
        else:
            values, plane = np.arange(low, high + 1), plane - low
        counts = np.zeros((values.size, 3), dtype=np.int64)
        _count_planes(plane, inside, assigned, counts)
        for value, count in zip(values.tolist(), counts, strict=True):
            if count[2]:
                self._by_plane[value] = self._by_plane.get(value, 0) + count[:2]

    def finish(self) -> Counts:
        """The counts of all batches so far."""
        names, column = self._genes.sorted_columns()
        matrix = self._pairs.matrix(self.n_cells, column, len(names))
        return Counts(matrix, names, self._n_control.copy(), qc=self._qc())

    def _qc(self) -> dict[str, Any]:
        t = dict(zip(_TOTALS, self._totals.tolist(), strict=True))
        shares = {plane: _share(n[1], n[0]) for plane, n in sorted(self._by_plane.items()) if plane != _NO_PLANE}
        return {
            "n_transcripts": t["rows"],
            "n_inside_image": t["inside"],
            "n_assigned": t["assigned"],
            "n_in_nucleus": t["in_nucleus"],
            "n_counted": t["counted"],
            "n_control": t["control"],
            "n_control_in_cells": t["control_in_cells"],
            "n_control_outside": t["control_outside"],
            "control_rate_in_cells": _share(t["control_in_cells"], t["passing_in_cells"]),
            "control_rate_outside": _share(t["control_outside"], t["passing_outside"]),
            "share_assigned": _share(t["assigned_inside"], t["inside"]),
            "share_assigned_by_z": shares,
        }


def count_transcripts(batches: Iterable[pa.Table], counter: TranscriptCounter) -> Counts:
    """Count all batches where the assignment itself is not needed; see `TranscriptCounter`."""
    for batch in batches:
        counter.add(batch)
    return counter.finish()


def points_with_cells(
    batches: Iterable[pa.Table], counter: TranscriptCounter, cell_ids: ArrayLike
) -> Iterator[pa.Table]:
    """Count batches and pass them on with the columns that the published points have.

    Parameters
    ----------
    batches
        As `TranscriptCounter.add` takes them.
    counter
        Counts them on the way; call its `finish` when the batches are through.
    cell_ids
        (n_cells,) names of the matrix' rows.

    Yields
    ------
    pyarrow.Table
        The batch, in the same order, with ``cell_id`` (string, null where in no cell) and ``in_nucleus`` (bool). The
        machine's own columns of these names are kept as ``vendor_cell_id`` and ``vendor_in_nucleus``.
    """
    ids = pa.array(np.asarray(cell_ids, dtype=object), type=pa.string())
    if len(ids) != counter.n_cells:
        raise ValueError(f"{len(ids)} cell ids for {counter.n_cells} cells")
    for batch in batches:
        assignment = counter.add(batch)
        names = [f"vendor_{name}" if name in ("cell_id", "in_nucleus") else name for name in batch.column_names]
        row = pa.array(assignment.cell, mask=assignment.cell < 0)
        yield (
            batch.rename_columns(names)
            .append_column(pa.field("cell_id", pa.string()), ids.take(row))
            .append_column("in_nucleus", pa.array(assignment.in_nucleus))
        )


class PairCounts:
    """How often each key, a pair of numbers, occurred, however many there are.

    Keys are gathered until there are so many that counting them at once pays: that gives a sorted run of different
    keys and their counts. Runs that have no room are kept in a scratch file, and put together some rows at a time.

    Parameters
    ----------
    memory_mb
        Memory for all of it: an eighth each is for gathering and counting keys, for runs, for merging these, and for
        the result.
    """

    def __init__(self, memory_mb: int = 1500) -> None:
        self._share = memory_mb * 1_000_000 // 8
        self._gathered = np.empty(max(self._share // _BYTES_A_GATHERED_KEY, 1 << 16), dtype=np.int64)
        self._n_gathered = 0
        self._runs: list[_Run] = []

    def add(self, keys: NDArray[np.int64]) -> None:
        """Count one batch of keys, (n,) int64 in any order."""
        done = 0
        while done < keys.size:
            n = min(self._gathered.size - self._n_gathered, keys.size - done)
            self._gathered[self._n_gathered : self._n_gathered + n] = keys[done : done + n]
            self._n_gathered, done = self._n_gathered + n, done + n
            if self._n_gathered == self._gathered.size:
                self._count()

    def _count(self) -> None:
        """Make a run of what was gathered."""
        keys = self._gathered[: self._n_gathered]
        if keys.size == 0:
            return
        starts = _row_starts(keys)
        run = _run_lengths(np.sort(keys) if starts is None else _sorted_by_row(keys, starts))
        self._n_gathered = 0
        held = sum(12 * other.n for other in self._runs if not other.on_disk)
        self._runs.append(_Run(*run, on_disk=held + 12 * run[0].size > self._share))

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        """Different keys and their counts, sorted: block after block, each of whole rows."""
        self._count()
        samples = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *(run.sample for run in self._runs)]))
        at_once = min(self._share // _BYTES_A_MERGED_KEY, _MERGED_AT_ONCE)
        step = max(at_once // _SAMPLED - len(self._runs), 1)
        ends = np.unique(samples[step::step] >> _GENE_BITS << _GENE_BITS)
        starts = [0] * len(self._runs)
        for end in [*ends.tolist(), None]:
            stops = [run.n if end is None else run.find(end) for run in self._runs]
            parts = [run.part(*cut) for run, *cut in zip(self._runs, starts, stops, strict=True)]
            yield reduce(lambda one, other: _merge(*one, *other), parts, _NO_KEYS)
            starts = stops

    def total(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Sorted keys and their counts, all at once."""
        keys, counts = zip(_NO_KEYS, *self.blocks(), strict=True)
        return np.concatenate(keys), np.concatenate(counts)

    def matrix(self, n_rows: int, column: NDArray[np.integer], n_columns: int) -> "csr_matrix":
        """The counts as a matrix, where a key is ``pair_keys(row, code)``.

        Parameters
        ----------
        n_rows, n_columns
            Its shape.
        column
            Column of each code.

        Returns
        -------
        scipy.sparse.csr_matrix
            int32, with sorted indices and no stored zeros. It takes 8 bytes for each entry; if that is more than an
            eighth of the memory, the entries lie in a scratch file that is gone with the matrix, and only those that
            are looked at are read.
        """
        from scipy.sparse import csr_matrix

        self._count()
        most = sum(run.n for run in self._runs)
        unheld = 8 * most > self._share
        indices, values = (_Column(most, on_disk=unheld) for _ in range(2))
        row_sizes = np.zeros(n_rows, dtype=np.int64)
        for keys, counts in self.blocks():
            if not keys.size:
                continue
            first, last = int(keys[0]) >> _GENE_BITS, (int(keys[-1]) >> _GENE_BITS) + 1
            codes = _split(keys, row_sizes)
            part = csr_matrix((counts, column[codes], offsets_of(row_sizes[first:last])), dtype=np.int32)
            part.sort_indices()
            indices.append(part.indices)
            values.append(part.data)
        entries = (values.finish(), indices.finish(), offsets_of(row_sizes))
        matrix = csr_matrix(entries, shape=(n_rows, n_columns), dtype=np.int32)
        matrix.has_canonical_format = True  # known; looking for it reads all of it
        return matrix


_NO_KEYS = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32))
#: Bytes that a key takes while those gathered are counted, and while runs are merged.
_BYTES_A_GATHERED_KEY, _BYTES_A_MERGED_KEY = 32, 64
#: At most so many keys are merged at once: more take longer to find room for.
_MERGED_AT_ONCE = 1 << 19
#: Every so manieth key of a run is kept in memory, to know where the others are.
_SAMPLED = 1024


class _Run:
    """Sorted keys and their counts, in memory or in a scratch file."""

    def __init__(self, keys: NDArray[np.int64], counts: NDArray[np.int32], *, on_disk: bool) -> None:
        self.n, self.on_disk, self.sample = keys.size, on_disk, keys[::_SAMPLED].copy()
        self._columns = [_Column(keys.size, on_disk=on_disk, values=values) for values in (keys, counts)]

    def part(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Some of them."""
        keys, counts = self._columns
        return keys.read(start, stop), counts.read(start, stop)

    def find(self, key: int) -> int:
        """How many keys are smaller."""
        start = max(int(np.searchsorted(self.sample, key)) - 1, 0) * _SAMPLED
        return start + int(np.searchsorted(self._columns[0].read(start, min(start + _SAMPLED, self.n)), key))


class _Column:
    """Numbers one after the other, in memory or in a scratch file.

    Parameters
    ----------
    most
        At most so many of them.
    on_disk
        Whether they are in a file.
    values
        The first ones, whose type all have. Default: none yet, of int32.
    """

    def __init__(self, most: int, *, on_disk: bool, values: NDArray[Any] | None = None) -> None:
        self._kind = np.dtype(np.int32) if values is None else values.dtype
        self._file = tempfile.TemporaryFile() if on_disk else None  # noqa: SIM115 - it lives as long as this
        self._array, self._n = np.empty(0, self._kind), 0
        if values is not None and not on_disk:
            self._array, self._n = values, values.size
        elif not on_disk:
            self._array = np.empty(most, self._kind)
        elif values is not None:
            self.append(values)

    def append(self, values: NDArray[Any]) -> None:
        """Add some."""
        if self._file is None:
            self._array[self._n : self._n + values.size] = values
        else:
            self._file.write(np.ascontiguousarray(values, dtype=self._kind))
        self._n += values.size

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Some of them."""
        if self._file is None:
            return self._array[start:stop]
        self._file.seek(start * self._kind.itemsize)
        return np.frombuffer(self._file.read((stop - start) * self._kind.itemsize), self._kind)

    def finish(self) -> NDArray[Any]:
        """All of them: those in a file are read when they are looked at."""
        if self._file is None or not self._n:
            return self._array[: self._n]
        self._file.flush()
        return np.memmap(self._file, self._kind, "c", shape=(self._n,))


def pair_keys(row: NDArray[np.int64], code: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row and code (below 2^32) in one number, for `PairCounts`."""
    return (row << _GENE_BITS) | code


_TOTALS = (
    "rows",
    "inside",
    "assigned",
    "assigned_inside",
    "in_nucleus",
    "counted",
    "control",
    "control_in_cells",
    "control_outside",
    "passing_in_cells",
    "passing_outside",
)


@numba.njit(cache=True, nogil=True)
def _tally(cell, nucleus, gene, is_control, passes, inside, n_control, totals, keys):
    """Add one batch to the totals; fills `keys` with (cell, gene) of the counted rows and returns how many."""
    n = 0
    n_inside = assigned = assigned_inside = in_nucleus = control = 0
    control_in = control_out = passing_in = passing_out = 0
    for i in range(cell.size):
        in_cell = cell[i] >= 0
        n_inside += inside[i]
        assigned += in_cell
        assigned_inside += in_cell and inside[i]
        in_nucleus += nucleus[i] >= 0
        control += is_control[i]
        if not passes[i]:
            continue
        if in_cell:
            passing_in += 1
            if is_control[i]:
                control_in += 1
                n_control[cell[i]] += 1
            else:
                keys[n] = (cell[i] << _GENE_BITS) | gene[i]
                n += 1
        elif inside[i]:
            passing_out += 1
            control_out += is_control[i]
    totals[0] += cell.size
    totals[1] += n_inside
    totals[2] += assigned
    totals[3] += assigned_inside
    totals[4] += in_nucleus
    totals[5] += n
    totals[6] += control
    totals[7] += control_in
    totals[8] += control_out
    totals[9] += passing_in
    totals[10] += passing_out
    return n


@numba.njit(cache=True, nogil=True)
def _count_planes(plane, inside, assigned, counts):
    """Rows inside the image, rows of these in a cell, and all rows of each plane."""
    for i in range(plane.size):
        counts[plane[i], 0] += inside[i]
        counts[plane[i], 1] += inside[i] and assigned[i]
        counts[plane[i], 2] += 1


@numba.njit(cache=True, nogil=True)
def _inside(x, y, matrix, height, width):
    """Which points lie in the image; all finite ones where its size is not known (negative)."""
    out = np.empty(x.size, dtype=np.bool_)
    for i in range(x.size):
        px = matrix[0, 0] * x[i] + matrix[0, 1] * y[i] + matrix[0, 2]
        py = matrix[1, 0] * x[i] + matrix[1, 1] * y[i] + matrix[1, 2]
        if height < 0:
            out[i] = np.isfinite(px) and np.isfinite(py)
        else:
            out[i] = 0 <= px < width and 0 <= py < height
    return out


#: Most keys of one row that are put in order one by one.
_SHORT_ROW = 128


def _row_starts(keys: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Where the keys of each row begin when sorted; None if they are not best sorted by their row first.

    They are if there are many rows of few keys each, as a large slide has.
    """
    n_rows = (int(keys.max()) >> _GENE_BITS) + 1
    if n_rows > 2 * keys.size:
        return None
    sizes = np.zeros(n_rows, dtype=np.int64)
    _add_rows(keys, sizes)
    return offsets_of(sizes) if sizes.max() <= _SHORT_ROW else None


@numba.njit(cache=True, nogil=True)
def _add_rows(keys, sizes):
    for key in keys:
        sizes[key >> _GENE_BITS] += 1


@numba.njit(cache=True, nogil=True)
def _split(keys, row_sizes):
    """Add the keys of each row to its size; gives their codes."""
    codes = np.empty(keys.size, dtype=np.int64)
    for i in range(keys.size):
        row_sizes[keys[i] >> _GENE_BITS] += 1
        codes[i] = keys[i] & ((1 << _GENE_BITS) - 1)
    return codes


@numba.njit(cache=True, nogil=True)
def _sorted_by_row(keys, starts):
    """Sort keys by counting how many each row has, then the few of a row one by one."""
    out = np.empty_like(keys)
    for key in keys:
        row = key >> _GENE_BITS
        out[starts[row]] = key
        starts[row] += 1
    for i in range(1, out.size):
        key, k = out[i], i
        while k > 0 and out[k - 1] > key:
            out[k] = out[k - 1]
            k -= 1
        out[k] = key
    return out


@numba.njit(cache=True, nogil=True)
def _run_lengths(keys):
    """Distinct values of a sorted array, and how often each occurs."""
    n = 0
    for i in range(keys.size):
        n += i == 0 or keys[i] != keys[i - 1]
    distinct = np.empty(n, dtype=np.int64)
    counts = np.zeros(n, dtype=np.int32)
    k = -1
    for i in range(keys.size):
        if i == 0 or keys[i] != keys[i - 1]:
            k += 1
            distinct[k] = keys[i]
        counts[k] += 1
    return distinct, counts


@numba.njit(cache=True, nogil=True)
def _merge(keys_a, counts_a, keys_b, counts_b):
    """Add up two sorted runs."""
    keys = np.empty(keys_a.size + keys_b.size, dtype=np.int64)
    counts = np.empty(keys.size, dtype=np.int32)
    i = j = n = 0
    while i < keys_a.size or j < keys_b.size:
        take_a = j == keys_b.size or (i < keys_a.size and keys_a[i] <= keys_b[j])
        take_b = i == keys_a.size or (j < keys_b.size and keys_b[j] <= keys_a[i])
        total = 0
        if take_a:
            keys[n] = keys_a[i]
            total += counts_a[i]
            i += 1
        if take_b:
            keys[n] = keys_b[j]
            total += counts_b[j]
            j += 1
        counts[n] = total
        n += 1
    return keys[:n].copy(), counts[:n].copy()


def _share(part: int, whole: int) -> float | None:
    return float(part) / float(whole) if whole else None


def _plane_column(batch: pa.Table) -> NDArray[np.int64] | None:
    if "z_plane" not in batch.column_names:
        return None
    column = batch.column("z_plane")
    if column.null_count:
        column = column.cast(pa.int64()).fill_null(_NO_PLANE)
    return np.ascontiguousarray(column.to_numpy(), dtype=np.int64)
