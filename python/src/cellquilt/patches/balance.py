"""Where to cut a slide of transcripts, so that every patch holds about as many as the others.

Transcripts are counted once on a fine grid. A window of the slide that holds too many is then cut in two along its
longer side, at the line of the grid that shares them out best, and so on: a tree whose leaves tile the slide. How many
lie in any window is four look-ups in the grid's running sums, so the windows with their halo can be held to a limit.

The grid's lines lie at multiples of a power of two of a micron: dividing by it is exact, and a transcript lies on the
same side of a line for whoever asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError

#: Finest spacing of the grid in µm.
STEP_UM = 8.0
_MAX_SQUARES = 1 << 22
#: Coordinates beyond (µm, half a metre) are no slide's.
_FARTHEST_UM = 500_000.0


class CountGrid:
    """How many transcripts lie where; independent of the order in which they come.

    Attributes
    ----------
    step_um
        Width of a square: `STEP_UM`, or twice, four times, … that, so that there are at most 4 million squares.
    first
        (column, row) of the first square; square (i, j) covers [i, i + 1) × [j, j + 1) times `step_um` in x and y.
    counts
        (rows, columns) int64; spans just the squares from the first to the last that hold anything.
    """

    def __init__(self) -> None:
        self.step_um = STEP_UM
        self.first = (0, 0)
        self.counts: NDArray[np.int64] = np.zeros((0, 0), dtype=np.int64)

    @property
    def n(self) -> int:
        """All transcripts."""
        return int(self.counts.sum())

    def add(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        """Count transcripts at finite coordinates in µm.

        Raises
        ------
        CellquiltError
            ``transcripts-far-away`` if a coordinate is no slide's.
        """
        if not x.size:
            return
        for axis, values in (("x", x), ("y", y)):
            farthest = values[np.abs(values).argmax()]
            if abs(farthest) > _FARTHEST_UM:
                raise CellquiltError(
                    "transcripts-far-away",
                    f"a transcript has {axis} = {farthest:g} µm, further than any slide reaches",
                    "check the unit of the coordinates (transcripts_unit) when converting",
                )
        self._hold(x.min(), x.max(), y.min(), y.max())
        _add(x, y, 1.0 / self.step_um, *self.first, self.counts)

    def _hold(self, x0: float, x1: float, y0: float, y1: float) -> None:
        """Make room for a rectangle, with wider squares if it takes too many."""
        while True:
            i0, j0 = (int(np.floor(value / self.step_um)) for value in (x0, y0))
            i1, j1 = (int(np.floor(value / self.step_um)) + 1 for value in (x1, y1))
            if self.counts.size:
                (i, j), (rows, columns) = self.first, self.counts.shape
                i0, j0, i1, j1 = min(i0, i), min(j0, j), max(i1, i + columns), max(j1, j + rows)
            if (i1 - i0) * (j1 - j0) <= _MAX_SQUARES:
                break
            self._coarsen()
        if self.counts.shape == (j1 - j0, i1 - i0):
            return
        grown = np.zeros((j1 - j0, i1 - i0), dtype=np.int64)
        if self.counts.size:
            (i, j), (rows, columns) = self.first, self.counts.shape
            grown[j - j0 : j - j0 + rows, i - i0 : i - i0 + columns] = self.counts
        self.first, self.counts = (i0, j0), grown

    def _coarsen(self) -> None:
        self.step_um *= 2
        if not self.counts.size:
            return
        (i, j), (rows, columns) = self.first, self.counts.shape
        padded = np.pad(self.counts, ((j % 2, (j + rows) % 2), (i % 2, (i + columns) % 2)))
        self.first = (i // 2, j // 2)
        self.counts = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2).sum(axis=(1, 3))


@numba.njit(cache=True, nogil=True)
def _add(x, y, per_um, first_column, first_row, counts):
    for k in range(x.size):
        counts[int(np.floor(y[k] * per_um)) - first_row, int(np.floor(x[k] * per_um)) - first_column] += 1


@dataclass(frozen=True)
class Cut:
    """The patches of a slide.

    Attributes
    ----------
    squares
        (n, 4) int64: first column, first row, last column + 1, last row + 1 of each core, in squares of the grid.
        They do not overlap; squares with transcripts are each in one of them.
    core_um, window_um
        (n, 4) float64: x0, y0, x1, y1 of the core and of the window. A window reaches beyond its core on the sides
        that are not the slide's.
    core_of
        (rows, columns) int32: the core that each square belongs to, -1 for none.
    n_core
        (n,) int64, transcripts in each core.
    """

    squares: NDArray[np.int64]
    core_um: NDArray[np.float64]
    window_um: NDArray[np.float64]
    core_of: NDArray[np.int32]
    n_core: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.squares)


class _Sums:
    """Transcripts in rectangles of a grid."""

    def __init__(self, counts: NDArray[np.int64]) -> None:
        self.rows, self.columns = counts.shape
        self._table = np.zeros((self.rows + 1, self.columns + 1), dtype=np.int64)
        np.cumsum(np.cumsum(counts, axis=0), axis=1, out=self._table[1:, 1:])

    def within(self, i0: int, j0: int, i1: int, j1: int, margin: int = 0) -> int:
        """In columns [i0, i1) and rows [j0, j1), and `margin` squares around."""
        i0, j0 = max(i0 - margin, 0), max(j0 - margin, 0)
        i1, j1 = min(i1 + margin, self.columns), min(j1 + margin, self.rows)
        t = self._table
        return int(t[j1, i1] - t[j0, i1] - t[j1, i0] + t[j0, i0])

    def along(self, i0: int, j0: int, i1: int, j1: int, axis: int) -> NDArray[np.int64]:
        """In [i0, i) for every column i from i0 to i1 (axis 0), or in [j0, j) for every row (axis 1)."""
        t = self._table
        columns, rows = t[:, i0 : i1 + 1], t[j0 : j1 + 1]
        line = columns[j1] - columns[j0] if axis == 0 else rows[:, i1] - rows[:, i0]
        return line - line[0]


Box = tuple[int, int, int, int]


def balanced(grid: CountGrid, at_most: int, overlap_um: float) -> Cut:
    """Cut so that no window holds more than so many transcripts.

    Parameters
    ----------
    grid
        Where the transcripts are.
    at_most
        Transcripts in a window, its halo included. Where a window no wider than twice the overlap holds more, it is
        not cut any further.
    overlap_um
        Width of the strip that two neighbours share.
    """
    sums = _Sums(grid.counts)
    margin = int(np.ceil(overlap_um / 2 / grid.step_um))
    narrowest = max(int(np.ceil(overlap_um / grid.step_um)), 1)
    whole: list[Box] = [(0, 0, sums.columns, sums.rows)] if grid.counts.size else []
    # Cut what is too much, and it is surely enough, but some patches are then half empty. So first as few parts of
    # equal numbers as could do, then more of them, up to as many as that takes.
    enough = _cut_until(sums, whole, at_most, margin, narrowest)
    parts = -(-grid.n // at_most)
    while parts < len(enough):
        boxes = _share_out(sums, whole, parts, narrowest)
        if all(sums.within(*box, margin) <= at_most for box in boxes):
            enough = boxes
            break
        parts += max(parts // 20, 1)
    return _cut(grid, [box for box in enough if sums.within(*box)], overlap_um)


def _cut_until(sums: _Sums, boxes: list[Box], at_most: int, margin: int, narrowest: int) -> list[Box]:
    """Halve every box that holds too many, as far as it can be."""
    waiting, out = list(boxes), []
    while waiting:
        box = waiting.pop()
        held = sums.within(*box, margin)
        halves = _halve(sums, box, -(-held // at_most), narrowest) if held > at_most else None
        if halves:
            waiting += halves
        else:
            out.append(box)
    return out


def _share_out(sums: _Sums, boxes: list[Box], parts: int, narrowest: int) -> list[Box]:
    """Cut each box into so many of about equal numbers."""
    waiting, out = [(box, parts) for box in boxes], []
    while waiting:
        box, parts = waiting.pop()
        halves = _halve(sums, box, parts, narrowest) if parts > 1 else None
        if halves:
            waiting += [(halves[0], parts // 2), (halves[1], parts - parts // 2)]
        else:
            out.append(box)
    return out


def _halve(sums: _Sums, box: Box, parts: int, narrowest: int) -> list[Box] | None:
    """Two boxes that share the transcripts as the halves of so many parts; None if the box is too narrow to cut."""
    i0, j0, i1, j1 = box
    for axis in (0, 1) if i1 - i0 >= j1 - j0 else (1, 0):
        length = (i1 - i0, j1 - j0)[axis]
        if length < 2 * narrowest:
            continue
        before = sums.along(*box, axis)
        wanted = before[-1] * (parts // 2) / parts
        allowed = before[narrowest : length - narrowest + 1]
        at = narrowest + int(np.abs(allowed - wanted).argmin())
        if axis == 0:
            return [(i0, j0, i0 + at, j1), (i0 + at, j0, i1, j1)]
        return [(i0, j0, i1, j0 + at), (i0, j0 + at, i1, j1)]
    return None


def of_width(grid: CountGrid, width_um: float, overlap_um: float, at_least: int = 1) -> Cut:
    """Cut into patches of one width, without slivers.

    Parameters
    ----------
    grid
        Where the transcripts are.
    width_um
        Largest width of a core; all of a row or column are as wide as each other, up to a square of the grid. Infinite
        for one patch.
    overlap_um
        Width of the strip that two neighbours share.
    at_least
        Cores with fewer transcripts are put together with one beside them in their row, if there is one.
    """
    if not grid.counts.size:
        return _cut(grid, [], overlap_um)
    sums = _Sums(grid.counts)
    columns, rows = (_edges(length, width_um / grid.step_um) for length in (sums.columns, sums.rows))
    cores: list[Box] = []
    for j0, j1 in pairwise(rows):
        row: list[Box] = []
        for i0, i1 in pairwise(columns):
            n = sums.within(i0, j0, i1, j1)
            beside = bool(row) and row[-1][2] == i0
            if n and beside and min(n, sums.within(*row[-1])) < at_least:
                row[-1] = (row[-1][0], j0, i1, j1)
            elif n:
                row.append((i0, j0, i1, j1))
        cores += row
    return _cut(grid, cores, overlap_um)


def _edges(length: int, width: float) -> list[int]:
    """Evenly spaced whole numbers from 0 to `length`, at most `width` apart (but never less than one)."""
    count = min(max(int(np.ceil(length / width)), 1), length)
    return [round(k * length / count) for k in range(count + 1)]


def _cut(grid: CountGrid, cores: Sequence[Box], overlap_um: float) -> Cut:
    rows, columns = grid.counts.shape
    squares = np.array(sorted(cores, key=lambda box: (box[1], box[0])), dtype=np.int64).reshape(-1, 4)
    core_of = np.full((rows, columns), -1, dtype=np.int32)
    n_core = np.zeros(len(squares), dtype=np.int64)
    for number, (i0, j0, i1, j1) in enumerate(squares.tolist()):
        core_of[j0:j1, i0:i1] = number
        n_core[number] = grid.counts[j0:j1, i0:i1].sum()
    core_um = (squares + np.array([*grid.first, *grid.first])) * grid.step_um
    inner = squares != np.array([0, 0, columns, rows])
    window_um = core_um + np.where(inner, np.array([-1, -1, 1, 1]) * (overlap_um / 2), 0.0)
    return Cut(squares, core_um.astype(np.float64), window_um, core_of, n_core)
