"""Which groups of cells lie within which distance of each other, against chance.

Pairs of cells are counted ring by ring of distance. The pairs of a ring are the edges of a graph, so that mean and
variance under random groups are those of its edges (`enrichment.join_count_moments`): exact, and at no cost.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.geometry.locate import in_threads
from cellquilt.spatial.enrichment import join_count_moments, z_of
from cellquilt.spatial.permutations import AT_LEAST, compact, shuffle, two_sided
from cellquilt.statistics.multiplicity import benjamini_hochberg

if TYPE_CHECKING:
    import pandas as pd

#: Rings of distance in µm.
RINGS_UM = tuple(float(step) for step in range(0, 101, 10))
#: Squares that the largest distance spans: more make fewer pairs to look at in vain, and more rows to visit.
_SQUARES = 3
_MOST_SQUARES = 1 << 24
_AT_LEAST_CELLS = 20_000
#: Permutations that are counted at once: what two cells' distance is, is then found once for all.
_TOGETHER = 8


@dataclass(frozen=True)
class CoOccurrence:
    """Pairs of cells by group and distance.

    Attributes
    ----------
    groups
        K names.
    edges_um
        (R + 1,) limits of the rings, in µm. A pair lies in ring r if it is farther than ``edges_um[r]`` and no farther
        than ``edges_um[r + 1]``; the first ring holds cells in one place, too, if it begins at 0.
    pairs
        (R, K, K) int64, symmetric: pairs of cells of two groups, on the diagonal of one, each once.
    expected, deviation
        (R, K, K) exact mean and standard deviation for random groups.
    p
        (R, K, K), two-sided by permutation; NaN without permutations.
    n_permutations
        How many there were.
    """

    groups: list[str]
    edges_um: NDArray[np.float64]
    pairs: NDArray[np.int64]
    expected: NDArray[np.float64]
    deviation: NDArray[np.float64]
    p: NDArray[np.float64]
    n_permutations: int

    @property
    def ratio(self) -> NDArray[np.float64]:
        """(R, K, K) how much likelier a neighbour in the ring is of group b if the cell is of group a."""
        return _ratio(self.pairs)

    @property
    def ratio_within(self) -> NDArray[np.float64]:
        """(R, K, K) the same of all rings up to this one, as ``squidpy.gr.co_occurrence`` gives it."""
        return _ratio(self.pairs.cumsum(axis=0))

    @property
    def z(self) -> NDArray[np.float64]:
        """(R, K, K) deviations from the mean."""
        return z_of(self.pairs, self.expected, self.deviation)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each pair of groups and ring: ``a``, ``b``, ``from_um``, ``to_um``, ``n_pairs``, ``expected``,
        ``ratio``, ``ratio_within``, ``z``, ``p``, ``p_bh``.
        """
        import pandas as pd

        a, b = np.triu_indices(len(self.groups))
        names = np.array(self.groups, dtype=object)
        n = len(self.pairs)

        def column(values: NDArray) -> NDArray:
            return values[:, a, b].T.ravel()

        return pd.DataFrame(
            {
                "a": np.repeat(names[a], n),
                "b": np.repeat(names[b], n),
                "from_um": np.tile(self.edges_um[:-1], a.size),
                "to_um": np.tile(self.edges_um[1:], a.size),
                "n_pairs": column(self.pairs),
                "expected": column(self.expected),
                "ratio": column(self.ratio),
                "ratio_within": column(self.ratio_within),
                "z": column(self.z),
                "p": column(self.p),
                "p_bh": benjamini_hochberg(column(self.p)),
            }
        )


def _ratio(pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """P(b | a) / P(b) of symmetric numbers of pairs, 0 where there is none."""
    k = pairs.shape[-1]
    both = pairs.astype(np.float64)
    both[..., np.arange(k), np.arange(k)] *= 2  # seen from either cell
    of_group = both.sum(axis=-1)
    total = of_group.sum(axis=-1)[..., None, None]
    chance = of_group[..., :, None] * of_group[..., None, :]
    return np.divide(both * total, chance, out=np.zeros_like(both), where=chance > 0)


def co_occurrence_of(
    xy_um: NDArray[np.floating],
    codes: NDArray[np.integer],
    groups: list[str],
    edges_um: ArrayLike = RINGS_UM,
    *,
    n_permutations: int = 100,
    seed: int = 0,
    threads: int = 1,
) -> CoOccurrence:
    """Count pairs of cells by their groups and distance.

    Parameters
    ----------
    xy_um
        (n, 2) centres in µm, finite.
    codes
        (n,) number of each cell's group, -1 for none: such cells are left out.
    groups
        Names.
    edges_um
        Limits of the rings, ascending. Time grows with the square of the last.
    n_permutations
        For p-values; 0 gives none, and z all the same.
    seed
        Of the permutations.
    threads
        Changes nothing but the time.

    Raises
    ------
    CellquiltError
        ``rings-invalid``.
    """
    edges = np.asarray(edges_um, dtype=np.float64)
    if (
        edges.ndim != 1
        or edges.size < 2
        or not (np.isfinite(edges).all() and edges[0] >= 0 and (np.diff(edges) > 0).all())
    ):
        raise CellquiltError(
            "rings-invalid", f"rings of distance end at {edges.tolist()} µm", "give two distances or more, ascending"
        )
    codes = np.asarray(codes, dtype=np.int64)
    known = codes >= 0
    xy, labels, k = np.asarray(xy_um, dtype=np.float64)[known], compact(codes[known]), len(groups)
    grid = _Grid.of(xy, float(edges[-1]))
    places = np.ascontiguousarray(xy[grid.order])
    labels = labels[grid.order]
    # The smallest square of a distance that is no farther than each limit.
    squares = edges**2
    n_rings = edges.size - 1
    parts: list[tuple[int, NDArray, NDArray]] = []
    count: Any = _count
    permute: Any = _permuted

    def work(part: slice) -> None:
        pairs, wedges = np.zeros((n_rings, k, k), dtype=np.int64), np.zeros(n_rings, dtype=np.int64)
        count(
            places, labels, grid.starts, grid.n_columns, grid.square_of, squares, part.start, part.stop, pairs, wedges
        )
        parts.append((part.start, pairs, wedges))

    in_threads(work, len(places), threads, _AT_LEAST_CELLS)
    seen = sum((pairs for _, pairs, _ in parts), np.zeros((n_rings, k, k), dtype=np.int64))
    wedges = sum((found for _, _, found in parts), np.zeros(n_rings, dtype=np.int64))
    pairs = _once(seen)
    sizes = np.bincount(labels, minlength=k)
    moments = [join_count_moments(int(own.sum()) // 2, int(w), sizes) for own, w in zip(seen, wedges, strict=True)]
    mean, variance = (np.array([moment[which] for moment in moments]) for which in (0, 1))
    p = np.full(pairs.shape, np.nan)
    if n_permutations:
        permuted = np.empty((n_permutations, n_rings, k, k), dtype=np.int64)

        def shuffled(part: slice) -> None:
            for first in range(part.start, part.stop, _TOGETHER):
                out = permuted[first : min(first + _TOGETHER, part.stop)]
                permute(
                    places, labels, grid.starts, grid.n_columns, grid.square_of, squares, seed, first, out
                )  # fmt: skip

        in_threads(shuffled, n_permutations, threads, AT_LEAST)
        permuted += np.swapaxes(permuted, -1, -2)
        permuted[..., np.arange(k), np.arange(k)] //= 2
        p = two_sided(pairs, permuted, mean)
    return CoOccurrence(groups, edges, pairs, mean, np.sqrt(variance), p, n_permutations)


def _once(seen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs counted from either cell, as symmetric numbers of pairs."""
    pairs = seen.copy()
    k = seen.shape[-1]
    pairs[..., np.arange(k), np.arange(k)] //= 2
    return pairs


@dataclass(frozen=True)
class _Grid:
    """Cells sorted by squares, row after row."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    n_columns: int
    square_of: NDArray[np.int64]  # of the cells in their new order

    @classmethod
    def of(cls, xy: NDArray[np.float64], reach: float) -> "_Grid":
        if not len(xy):
            return cls(np.zeros(0, np.int64), np.zeros(2, np.int64), 1, np.zeros(0, np.int64))
        low, span = xy.min(axis=0), np.ptp(xy, axis=0)
        # No square is smaller than what `_SQUARES` of them span the reach with.
        size = max(reach / _SQUARES, float(np.sqrt(span[0] * span[1] / _MOST_SQUARES)), float(span.max()) / 2**22)
        column, row = ((xy - low) / size).astype(np.int64).T
        n_columns, n_rows = int(column.max()) + 1, int(row.max()) + 1
        square = row * n_columns + column
        order = np.argsort(square, kind="stable")
        starts = np.zeros(n_columns * n_rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(square, minlength=n_columns * n_rows), out=starts[1:])
        return cls(order, starts, n_columns, square[order])


@numba.njit(inline="always")
def _ring(d2, squares):
    """The ring of a squared distance no larger than the last limit's; -1 for one below the first."""
    r = squares.size - 2
    while r >= 0 and d2 <= squares[r]:
        r -= 1
    if r < 0 and squares[0] == 0.0:  # cells in one place
        return 0
    return r


@numba.njit(cache=True, nogil=True)
def _count(xy, labels, starts, n_columns, square_of, squares, first, last, pairs, wedges):
    """Pairs seen from each of some cells; a cell's two neighbours in one ring make a wedge."""
    n_rows = (starts.size - 1) // n_columns
    degree = np.empty(wedges.size, dtype=np.int64)
    for i in range(first, last):
        degree[:] = 0
        x, y, own = xy[i, 0], xy[i, 1], labels[i]
        row, column = square_of[i] // n_columns, square_of[i] % n_columns
        left, right = max(column - 3, 0), min(column + 3, n_columns - 1)
        for other in range(max(row - 3, 0), min(row + 3, n_rows - 1) + 1):
            for j in range(starts[other * n_columns + left], starts[other * n_columns + right + 1]):
                d2 = (xy[j, 0] - x) ** 2 + (xy[j, 1] - y) ** 2
                if d2 <= squares[-1] and j != i:
                    r = _ring(d2, squares)
                    if r >= 0:
                        pairs[r, own, labels[j]] += 1
                        degree[r] += 1
        for r in range(wedges.size):
            wedges[r] += degree[r] * (degree[r] - 1) // 2


@numba.njit(cache=True, nogil=True)
def _permuted(xy, labels, starts, n_columns, square_of, squares, seed, number, out):
    """Pairs, each from one of its cells, of several random orders of the groups."""
    n_rows = (starts.size - 1) // n_columns
    n = labels.size
    own = np.empty((n, out.shape[0]), dtype=labels.dtype)
    for q in range(out.shape[0]):
        mixed = labels.copy()
        shuffle(mixed, seed, number + q)
        own[:, q] = mixed
    out[:] = 0
    for i in range(n):
        x, y = xy[i, 0], xy[i, 1]
        row, column = square_of[i] // n_columns, square_of[i] % n_columns
        left, right = max(column - 3, 0), min(column + 3, n_columns - 1)
        for other in range(row, min(row + 3, n_rows - 1) + 1):
            begin = i + 1 if other == row else starts[other * n_columns + left]
            for j in range(begin, starts[other * n_columns + right + 1]):
                d2 = (xy[j, 0] - x) ** 2 + (xy[j, 1] - y) ** 2
                if d2 <= squares[-1]:
                    r = _ring(d2, squares)
                    if r >= 0:
                        for q in range(out.shape[0]):
                            out[q, r, own[i, q], own[j, q]] += 1
