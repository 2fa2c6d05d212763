"""How far cells of one group are from the nearest of another, in µm and in steps along the graph, against chance.

Two questions, two kinds of chance:

- Of groups that partition the cells alike (cell types against cell types) all groups are dealt to the cells at random.
  A rare type is far from everything by chance alone, and that is in the comparison, whatever the distance: nothing is
  cut off, and no formula for endless grids is needed.
- Of a pattern that is there (domains, regions, another column) only the sources are dealt at random: are they nearer to
  it than cells usually are? Mean and variance are then known exactly.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from cellquilt.geometry.locate import in_threads
from cellquilt.geometry.neighbours import SpatialGraph
from cellquilt.spatial.enrichment import z_of
from cellquilt.spatial.permutations import shuffle, two_sided
from cellquilt.statistics.multiplicity import benjamini_hochberg

if TYPE_CHECKING:
    import pandas as pd

#: Units of a distance.
UNITS = ("um", "hops")
#: Sources of a group that enter the test of distances in µm: of more a random choice, the same size under chance.
_SOURCES = 2000


@dataclass(frozen=True)
class Distances:
    """Distances from each group to each other.

    Attributes
    ----------
    unit
        ``um`` or ``hops``.
    sources, targets
        S and T names of groups; the same list if groups are compared with themselves.
    n_sources, n_targets
        (S,) and (T,) int64 cells of each.
    mean, median
        (S, T) float64 over the sources that reach a target; of a group to itself the nearest other cell. NaN where none
        does.
    unreachable
        (S, T) int64 sources from which the graph leads to no target: they are in neither mean nor median.
    expected, deviation
        (S, T) float64: mean and standard deviation of the mean under chance; NaN without permutations where these are
        needed.
    z, p
        (S, T) of what is tested: deviations from the expected mean, and two-sided p by permutation.
    n_permutations
        How many there were.
    """

    unit: str
    sources: list[str]
    targets: list[str]
    n_sources: NDArray[np.int64]
    n_targets: NDArray[np.int64]
    mean: NDArray[np.float64]
    median: NDArray[np.float64]
    unreachable: NDArray[np.int64]
    expected: NDArray[np.float64]
    deviation: NDArray[np.float64]
    z: NDArray[np.float64]
    p: NDArray[np.float64]
    n_permutations: int = field(default=0)

    @property
    def ratio(self) -> NDArray[np.float64]:
        """(S, T) mean over that expected: below 1 is nearer than by chance."""
        out = np.full(self.mean.shape, np.nan)
        return np.divide(self.mean, self.expected, out=out, where=self.expected > 0)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each source and target: ``unit``, ``source``, ``target``, ``n_source``, ``n_target``, ``mean``,
        ``median``, ``n_unreachable``, ``expected``, ``ratio``, ``z``, ``p``, ``p_bh``.
        """
        import pandas as pd

        s, t = (index.ravel() for index in np.indices(self.mean.shape))
        return pd.DataFrame(
            {
                "unit": self.unit,
                "source": np.array(self.sources, dtype=object)[s],
                "target": np.array(self.targets, dtype=object)[t],
                "n_source": self.n_sources[s],
                "n_target": self.n_targets[t],
                "mean": self.mean.ravel(),
                "median": self.median.ravel(),
                "n_unreachable": self.unreachable.ravel(),
                "expected": self.expected.ravel(),
                "ratio": self.ratio.ravel(),
                "z": self.z.ravel(),
                "p": self.p.ravel(),
                "p_bh": benjamini_hochberg(self.p.ravel()),
            }
        )


def nearest_um(
    xy_um: NDArray[np.floating], codes: NDArray[np.integer], n_groups: int, *, threads: int = 1
) -> NDArray[np.float64]:
    """Distance of every cell to the nearest cell of each group.

    Parameters
    ----------
    xy_um
        (n, 2) centres in µm, finite.
    codes
        (n,) number of each cell's group, -1 for none.
    n_groups
        How many there are.
    threads
        Changes nothing but the time.

    Returns
    -------
    numpy.ndarray
        (n, n_groups) float64; of a cell's own group to the nearest other cell, inf where there is none.
    """
    xy = np.asarray(xy_um, dtype=np.float64)
    out = np.full((len(xy), n_groups), np.inf)
    for group in range(n_groups):
        own = codes == group
        if not own.any():
            continue
        tree = cKDTree(xy[own])
        out[~own, group] = tree.query(xy[~own], workers=threads)[0]
        if own.sum() > 1:
            out[own, group] = tree.query(xy[own], k=2, workers=threads)[0][:, 1]
    return out


def nearest_hops(
    graph: SpatialGraph, codes: NDArray[np.integer], n_groups: int, *, threads: int = 1
) -> NDArray[np.float64]:
    """Steps along the graph from every cell to the nearest cell of each group.

    Parameters
    ----------
    graph
        Neighbours of n cells.
    codes
        (n,) number of each cell's group, -1 for none; paths lead over such cells, too.
    n_groups
        How many there are.
    threads
        Changes nothing but the time.

    Returns
    -------
    numpy.ndarray
        (n, n_groups) float64; of a cell's own group to the nearest other cell, inf where no path leads to one.
    """
    labels = np.asarray(codes, dtype=np.int64)
    out = np.empty((n_groups, len(graph)))
    kernel: Any = _hops_of_group

    def work(part: slice) -> None:
        steps, origin, queue = (np.empty(len(graph), dtype=np.int32) for _ in range(3))
        for group in range(part.start, part.stop):
            kernel(graph.indptr, graph.indices, labels, group, steps, origin, queue, out[group])

    in_threads(work, n_groups, threads, 1)
    return np.ascontiguousarray(out.T)


def distances_of(
    places: "SpatialGraph | NDArray[np.floating]",
    codes: NDArray[np.integer],
    groups: list[str],
    *,
    n_permutations: int = 100,
    seed: int = 0,
    threads: int = 1,
) -> Distances:
    """Distances between groups; chance deals all of them to the cells at random.

    Parameters
    ----------
    places
        Of n cells: a graph for steps along it, or (n, 2) centres in µm.
    codes
        (n,) number of each cell's group, -1 for none: these stay without.
    groups
        Names.
    n_permutations
        For expected means and p-values; 0 gives neither.
    seed
        Of the permutations.
    threads
        Changes nothing but the time.

    Notes
    -----
    In µm the test looks at no more than 2000 sources of a group: of larger ones at a random choice, under chance as in
    what is observed. `mean` and `median` are of all.
    """
    own = np.asarray(codes, dtype=np.int64)
    k = len(groups)
    sizes = np.bincount(own[own >= 0], minlength=k)
    steps = isinstance(places, SpatialGraph)
    far = _nearest(places, own, k, threads)
    mean, median, unreachable = _summary(far, own, k)
    permuted = np.full((n_permutations, k, k), np.nan)
    known = np.flatnonzero(own >= 0)
    tested = mean
    if isinstance(places, SpatialGraph):
        work = _shuffled_hops(places, own, known, seed, permuted)
    else:
        chosen = _choice(own, k, seed)
        tested = _summary(far[chosen], own[chosen], k)[0]
        work = _shuffled_um(np.asarray(places, dtype=np.float64), sizes, known, seed, permuted)
    in_threads(work, n_permutations, threads, 1)
    expected, deviation = _moments(permuted)
    p = two_sided(tested, permuted, expected) if n_permutations else np.full((k, k), np.nan)
    z = z_of(tested, expected, deviation)
    unit = "hops" if steps else "um"
    return Distances(
        unit, groups, groups, sizes, sizes, mean, median, unreachable, expected, deviation, z, p, n_permutations
    )


def distances_to_pattern(
    far: NDArray[np.floating],
    unit: str,
    codes: NDArray[np.integer],
    sources: list[str],
    targets: list[str],
    n_targets: NDArray[np.integer],
    *,
    n_permutations: int = 100,
    seed: int = 0,
    threads: int = 1,
) -> Distances:
    """Distances from groups to something that stays where it is; chance deals the groups to the cells at random.

    Parameters
    ----------
    far
        (n, T) distance of every cell to each target, 0 within, inf where there is no way.
    unit
        ``um`` or ``hops``.
    codes
        (n,) number of each cell's group, -1 for none.
    sources, targets
        Names of groups and of targets.
    n_targets
        (T,) how many cells, or regions, make up each target.
    n_permutations
        For p-values; 0 gives none, and z all the same.
    seed, threads
        As in `distances_of`.
    """
    every = np.asarray(codes, dtype=np.int64)
    known = every >= 0
    values, own = np.ascontiguousarray(far[known], dtype=np.float64), every[known]
    s, t = len(sources), len(targets)
    sizes = np.bincount(own, minlength=s)
    mean, median, unreachable = _summary(values, own, s)
    reached = np.isfinite(values)
    n = reached.sum(axis=0)
    some = np.where(reached, values, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = some.sum(axis=0) / n
        spread = np.where(reached, (values - centre) ** 2, 0.0).sum(axis=0) / (n - 1)
        # Drawn without putting back; those without a way are left out of either mean.
        taken = sizes[:, None] - unreachable
        variance = spread / taken * (1 - taken / n)
    expected = np.where(taken > 0, centre, np.nan)
    deviation = np.sqrt(np.maximum(variance, 0))
    permuted = np.full((n_permutations, s, t), np.nan)
    kernel: Any = _sources_permuted

    def work(part: slice) -> None:
        kernel(values, own, s, seed, part.start, permuted[part])

    in_threads(work, n_permutations, threads, 4)
    p = two_sided(mean, permuted, expected) if n_permutations else np.full((s, t), np.nan)
    return Distances(
        unit, sources, targets, sizes, np.asarray(n_targets, dtype=np.int64), mean, median, unreachable, expected,
        deviation, z_of(mean, expected, deviation), p, n_permutations,
    )  # fmt: skip


def distances_to_groups(
    places: "SpatialGraph | NDArray[np.floating]",
    codes: NDArray[np.integer],
    sources: list[str],
    others: NDArray[np.integer],
    targets: list[str],
    **how: int,
) -> Distances:
    """`distances_to_pattern` of groups of cells that stay where they are, such as domains.

    Parameters
    ----------
    places
        As `distances_of` takes them.
    codes, others
        (n,) number of each cell's group, and of the group to go to that it is in; -1 for none.
    sources, targets
        Their names.
    **how
        ``n_permutations``, ``seed`` and ``threads``, as `distances_of` takes them.
    """
    far = _nearest(places, others, len(targets), how.get("threads", 1))
    inside = np.flatnonzero(others >= 0)
    far[inside, others[inside]] = 0
    numbers = np.bincount(others[inside], minlength=len(targets))
    unit = "hops" if isinstance(places, SpatialGraph) else "um"
    return distances_to_pattern(far, unit, codes, sources, targets, numbers, **how)


def _nearest(
    places: "SpatialGraph | NDArray[np.floating]", codes: NDArray[np.integer], n_groups: int, threads: int
) -> NDArray[np.float64]:
    if isinstance(places, SpatialGraph):
        return nearest_hops(places, codes, n_groups, threads=threads)
    return nearest_um(places, codes, n_groups, threads=threads)


def _summary(
    far: NDArray[np.float64], codes: NDArray[np.int64], n_groups: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean and median of each group's finite distances to each target, and how many are not finite."""
    mean, median = (np.full((n_groups, far.shape[1]), np.nan) for _ in range(2))
    lost = np.zeros(mean.shape, dtype=np.int64)
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(n_groups + 1))
    for group in range(n_groups):
        own = far[order[starts[group] : starts[group + 1]]]
        for target, values in enumerate(own.T):
            finite = values[np.isfinite(values)]
            lost[group, target] = values.size - finite.size
            if finite.size:
                mean[group, target], median[group, target] = finite.mean(), np.median(finite)
    return mean, median, lost


def _moments(permuted: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation over permutations, NaN where no permutation has a number."""
    there = np.isfinite(permuted)
    number = there.sum(axis=0)
    values = np.where(there, permuted, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = values.sum(axis=0) / number
        variance = np.where(there, (permuted - mean) ** 2, 0.0).sum(axis=0) / (number - 1)
    return np.where(number > 0, mean, np.nan), np.where(number > 1, np.sqrt(variance), np.nan)


def _choice(codes: NDArray[np.int64], n_groups: int, seed: int) -> NDArray[np.int64]:
    """Rows of at most `_SOURCES` cells of each group, chosen at random, in order."""
    rows = np.flatnonzero(codes >= 0)
    mixed: Any = shuffle
    mixed(rows, seed, -1)
    own = codes[rows]
    order = np.argsort(own, kind="stable")
    starts = np.searchsorted(own[order], np.arange(n_groups + 1))
    picked = [rows[order[a : min(a + _SOURCES, b)]] for a, b in pairwise(starts)]
    return np.sort(np.concatenate(picked)) if picked else rows


def _shuffled_hops(
    graph: SpatialGraph, codes: NDArray[np.int64], known: NDArray[np.int64], seed: int, out: NDArray[np.float64]
) -> Any:
    kernel: Any = _hops_permuted

    def work(part: slice) -> None:
        kernel(graph.indptr, graph.indices, codes, known, seed, part.start, out[part])

    return work


def _shuffled_um(
    xy: NDArray[np.float64], sizes: NDArray[np.int64], known: NDArray[np.int64], seed: int, out: NDArray[np.float64]
) -> Any:
    kernel: Any = _um_permuted
    # About the middle: large coordinates cost no precision.
    places = np.ascontiguousarray(xy[known] - xy[known].min(axis=0)) if known.size else np.zeros((0, 2))
    span = np.ptp(places, axis=0) if known.size else np.ones(2)

    def work(part: slice) -> None:
        kernel(places, sizes, span, _SOURCES, seed, part.start, out[part])

    return work


@numba.njit(cache=True, nogil=True)
def _hops_of_group(indptr, indices, labels, group, steps, origin, queue, out):
    """Steps from every cell to the nearest of a group, and for the group's own cells to the nearest other.

    The search goes out from all cells of the group at once, and remembers which of them each cell was reached from.
    The shortest way between two of them crosses from the cells of one to those of another over an edge, so the edges
    give it.
    """
    n = labels.size
    head, tail = 0, 0
    for i in range(n):
        steps[i] = -1
        origin[i] = -1
        out[i] = np.inf
        if labels[i] == group:
            steps[i] = 0
            origin[i] = i
            queue[tail] = i
            tail += 1
    n_own = tail
    while head < tail:
        i = queue[head]
        head += 1
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            if steps[j] < 0:
                steps[j] = steps[i] + 1
                origin[j] = origin[i]
                queue[tail] = j
                tail += 1
            elif steps[i] + steps[j] == 0:
                out[i] = 1.0
    if n_own > 1:
        for q in range(tail):
            i = queue[q]
            own = origin[i]
            # A neighbour is one step nearer at most: no edge from here can lead to another on a shorter way.
            if out[own] <= 2.0 * steps[i]:
                continue
            for e in range(indptr[i], indptr[i + 1]):
                j = indices[e]
                if origin[j] != own:
                    length = steps[i] + 1.0 + steps[j]
                    if length < out[own]:
                        out[own] = length
    for q in range(n_own, tail):
        out[queue[q]] = steps[queue[q]]


@numba.njit(cache=True, nogil=True)
def _hops_permuted(indptr, indices, codes, known, seed, first, out):
    """Mean steps from each group to each other in random orders of the groups."""
    n, k = codes.size, out.shape[1]
    steps, origin, queue = np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.int32)
    far = np.empty(n)
    labels = codes.copy()
    for number in range(out.shape[0]):
        mixed = codes[known]
        shuffle(mixed, seed, first + number)
        for q in range(known.size):
            labels[known[q]] = mixed[q]
        for group in range(k):
            _hops_of_group(indptr, indices, labels, group, steps, origin, queue, far)
            total, reached = np.zeros(k), np.zeros(k, np.int64)
            for q in range(known.size):
                i = known[q]
                if far[i] < np.inf:
                    total[labels[i]] += far[i]
                    reached[labels[i]] += 1
            for source in range(k):
                out[number, source, group] = total[source] / reached[source] if reached[source] else np.nan


@numba.njit(cache=True, nogil=True)
def _um_permuted(xy, sizes, span, most, seed, first, out):
    """Mean distance from some cells of each group to each other group in random orders of the groups.

    A group's cells are then spread like all cells, so that squares of about one of them each find the nearest at once.
    """
    n, k = xy.shape[0], sizes.size
    order, sorted_cells = np.empty(n, np.int64), np.empty(n, np.int64)
    begins = np.zeros(k + 1, np.int64)
    for group in range(k):
        begins[group + 1] = begins[group] + sizes[group]
    for number in range(out.shape[0]):
        for i in range(n):
            order[i] = i
        shuffle(order, seed, first + number)
        for target in range(k):
            a, b = begins[target], begins[target + 1]
            m = b - a
            if m == 0:
                for source in range(k):
                    out[number, source, target] = np.nan
                continue
            size = max(np.sqrt(span[0] * span[1] / m), max(span[0], span[1]) / (4.0 * m), 1e-9 * max(span[0], span[1]))
            if size == 0.0:
                size = 1.0
            n_columns, n_rows = int(span[0] / size) + 1, int(span[1] / size) + 1
            starts = np.zeros(n_columns * n_rows + 1, np.int64)
            for q in range(a, b):
                square = int(xy[order[q], 1] / size) * n_columns + int(xy[order[q], 0] / size)
                starts[square + 1] += 1
            for square in range(n_columns * n_rows):
                starts[square + 1] += starts[square]
            for q in range(a, b):
                square = int(xy[order[q], 1] / size) * n_columns + int(xy[order[q], 0] / size)
                sorted_cells[starts[square]] = order[q]
                starts[square] += 1
            for square in range(n_columns * n_rows, 0, -1):  # filling moved each start to the next one's place
                starts[square] = starts[square - 1]
            starts[0] = 0
            for source in range(k):
                total, reached = 0.0, 0
                for q in range(begins[source], min(begins[source] + most, begins[source + 1])):
                    d2 = _nearest_other(xy, order[q], sorted_cells, starts, n_columns, n_rows, size)
                    if d2 < np.inf:
                        total += np.sqrt(d2)
                        reached += 1
                out[number, source, target] = total / reached if reached else np.nan


@numba.njit(cache=True, nogil=True)
def _nearest_other(xy, i, cells, starts, n_columns, n_rows, size):
    """Squared distance to the nearest of the cells in squares, that is not the cell itself; square after square."""
    x, y = xy[i, 0], xy[i, 1]
    column, row = int(x / size), int(y / size)
    best = np.inf
    for reach in range(max(n_columns, n_rows) + 1):
        # All squares that far away are farther than this.
        gap = (reach - 1) * size
        if reach > 1 and best <= gap * gap:
            break
        for r in range(row - reach, row + reach + 1):
            if r < 0 or r >= n_rows:
                continue
            step = 1 if r == row - reach or r == row + reach or reach == 0 else 2 * reach
            for c in range(column - reach, column + reach + 1, step):
                if c < 0 or c >= n_columns:
                    continue
                square = r * n_columns + c
                for q in range(starts[square], starts[square + 1]):
                    j = cells[q]
                    if j != i:
                        d2 = (xy[j, 0] - x) ** 2 + (xy[j, 1] - y) ** 2
                        if d2 < best:
                            best = d2
    return best


@numba.njit(cache=True, nogil=True)
def _sources_permuted(far, codes, n_groups, seed, first, out):
    """Mean of a number over each group in random orders of the groups."""
    n, t = far.shape
    for number in range(out.shape[0]):
        labels = codes.copy()
        shuffle(labels, seed, first + number)
        total, reached = np.zeros((n_groups, t)), np.zeros((n_groups, t), np.int64)
        for i in range(n):
            for target in range(t):
                if far[i, target] < np.inf:
                    total[labels[i], target] += far[i, target]
                    reached[labels[i], target] += 1
        for source in range(n_groups):
            for target in range(t):
                out[number, source, target] = (
                    total[source, target] / reached[source, target] if reached[source, target] else np.nan
                )
