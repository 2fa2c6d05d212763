"""Which groups of cells are neighbours more often than chance has it.

If groups were dealt to the cells at random, the number of edges between two groups would have a mean and a variance
that are known exactly (join counts; Cliff and Ord, 1981): z needs no permutation. Permutations give p-values that do
not lean on a normal distribution, which rare groups do not have.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.geometry.locate import in_threads
from cellquilt.geometry.neighbours import SpatialGraph
from cellquilt.spatial.permutations import AT_LEAST, compact, shuffle, two_sided
from cellquilt.statistics.multiplicity import benjamini_hochberg

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Enrichment:
    """Edges between groups against chance.

    Attributes
    ----------
    groups
        K names.
    sizes
        (K,) int64 cells of each group.
    edges
        (K, K) int64, symmetric: edges between cells of two groups; on the diagonal those within one, each once.
    expected, deviation
        (K, K) float64: exact mean and standard deviation if the groups were dealt to the cells at random.
    p
        (K, K) float64, two-sided by permutation; NaN without permutations.
    n_permutations
        How many there were.
    """

    groups: list[str]
    sizes: NDArray[np.int64]
    edges: NDArray[np.int64]
    expected: NDArray[np.float64]
    deviation: NDArray[np.float64]
    p: NDArray[np.float64]
    n_permutations: int

    @property
    def z(self) -> NDArray[np.float64]:
        """(K, K) deviations from the mean; NaN where the number of edges cannot vary."""
        return z_of(self.edges, self.expected, self.deviation)

    @property
    def ratio(self) -> NDArray[np.float64]:
        """(K, K) observed over expected edges; NaN where none is expected."""
        out = np.full(self.expected.shape, np.nan)
        return np.divide(self.edges, self.expected, out=out, where=self.expected > 0)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each pair of groups: ``a``, ``b``, ``n_a``, ``n_b``, ``n_edges``, ``expected``, ``ratio``, ``z``,
        ``p``, ``p_bh`` (over pairs, each once).
        """
        import pandas as pd

        a, b = np.triu_indices(len(self.groups))
        names = np.array(self.groups, dtype=object)
        return pd.DataFrame(
            {
                "a": names[a],
                "b": names[b],
                "n_a": self.sizes[a],
                "n_b": self.sizes[b],
                "n_edges": self.edges[a, b],
                "expected": self.expected[a, b],
                "ratio": self.ratio[a, b],
                "z": self.z[a, b],
                "p": self.p[a, b],
                "p_bh": benjamini_hochberg(self.p[a, b]),
            }
        )


def z_of(observed: NDArray, mean: NDArray, deviation: NDArray) -> NDArray[np.float64]:
    """Distance from the mean in standard deviations; NaN where nothing can vary."""
    some = deviation > 1e-9 * np.maximum(np.abs(mean), 1e-300)
    return np.divide(observed - mean, deviation, out=np.full(np.shape(mean), np.nan), where=some)


def enrichment_of(
    graph: SpatialGraph,
    codes: NDArray[np.integer],
    groups: list[str],
    *,
    n_permutations: int = 1000,
    seed: int = 0,
    threads: int = 1,
) -> Enrichment:
    """Count edges between groups and compare them with groups dealt to the cells at random.

    Parameters
    ----------
    graph
        Neighbours of n cells.
    codes
        (n,) number of each cell's group, -1 for none: such cells are left out with their edges.
    groups
        Names.
    n_permutations
        For p-values; 0 gives none, and z all the same.
    seed
        Of the permutations.
    threads
        Changes nothing but the time.
    """
    graph, codes = labelled(graph, codes)
    k = len(groups)
    labels = compact(codes)
    a, b = undirected(graph)
    edges = _symmetric(_count(a, b, labels, k))
    sizes = np.bincount(codes, minlength=k)
    degree = graph.degree
    mean, variance = join_count_moments(a.size, int((degree * (degree - 1) // 2).sum()), sizes)
    permuted = np.empty((n_permutations, k, k), dtype=np.int64)
    kernel: Any = _permuted

    def work(part: slice) -> None:
        kernel(a, b, labels, k, seed, part.start, permuted[part])

    in_threads(work, n_permutations, threads, AT_LEAST)
    p = np.full((k, k), np.nan)
    if n_permutations:
        p = two_sided(edges, _symmetric(permuted), mean)
    return Enrichment(groups, sizes, edges, mean, np.sqrt(variance), p, n_permutations)


def labelled(graph: SpatialGraph, codes: NDArray[np.integer]) -> tuple[SpatialGraph, NDArray[np.int64]]:
    """Only the cells that are of a group, and the edges between them."""
    own = np.asarray(codes, dtype=np.int64)
    known = np.flatnonzero(own >= 0)
    if known.size == own.size:
        return graph, own
    return SpatialGraph.from_csr(graph.to_csr()[known][:, known]), own[known]


def undirected(graph: SpatialGraph) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Each edge once, by its two cells, the smaller number first."""
    a = np.repeat(np.arange(len(graph), dtype=np.int32), graph.degree)
    once = a < graph.indices
    return a[once], graph.indices[once]


def join_count_moments(
    n_edges: int, n_wedges: int, sizes: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of the number of edges between groups that are dealt to the cells at random.

    Parameters
    ----------
    n_edges
        Edges, each once.
    n_wedges
        Pairs of edges that share a cell: the sum of d (d - 1) / 2 over the cells' degrees d.
    sizes
        (K,) cells of each group.

    Returns
    -------
    mean, variance : numpy.ndarray
        (K, K) float64; on the diagonal of edges within a group.
    """
    size = np.asarray(sizes, dtype=np.float64)
    n = float(size.sum())
    m, wedges = float(n_edges), float(n_wedges)
    apart = m * (m - 1) / 2 - wedges  # pairs of edges without a cell in common

    def chance(*numbers: NDArray) -> NDArray[np.float64]:
        """That as many cells, drawn one after the other, are of the groups meant: the numbers left in each."""
        out = np.ones(np.broadcast_shapes(*(number.shape for number in numbers)))
        for drawn, number in enumerate(numbers):
            out = out * np.maximum(number, 0) / max(n - drawn, 1.0)
        return out

    s, t = size[:, None], size[None, :]
    pair = 2 * chance(s, t)
    # Two edges from one cell reach the other group both; either group may be in the middle.
    fork = chance(s, t, t - 1) + chance(t, s, s - 1)
    square = m * pair + 2 * wedges * fork + 2 * apart * 4 * chance(s, s - 1, t, t - 1)
    mean = m * pair
    inside = m * chance(size, size - 1)
    squared = inside + 2 * wedges * chance(size, size - 1, size - 2)
    squared += 2 * apart * chance(size, size - 1, size - 2, size - 3)
    np.fill_diagonal(mean, inside)
    np.fill_diagonal(square, squared)
    variance = square - mean**2
    # What is left of two large numbers that are equal is rounding.
    variance[variance < 1e-12 * mean**2] = 0
    return mean, variance


def _symmetric(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Edges counted in one direction, (…, K, K), as symmetric numbers."""
    k = counts.shape[-1]
    both = counts + np.swapaxes(counts, -1, -2)
    both[..., np.arange(k), np.arange(k)] //= 2
    return both


def _count(a: NDArray, b: NDArray, labels: NDArray, k: int) -> NDArray[np.int64]:
    out = np.zeros((k, k), dtype=np.int64)
    kernel: Any = _add_edges
    kernel(a, b, labels, out)
    return out


@numba.njit(cache=True, nogil=True)
def _add_edges(a, b, labels, out):
    for e in range(a.size):
        out[labels[a[e]], labels[b[e]]] += 1


@numba.njit(cache=True, nogil=True)
def _permuted(a, b, labels, k, seed, first, out):
    for q in range(out.shape[0]):
        own = labels.copy()
        shuffle(own, seed, first + q)
        out[q] = 0
        _add_edges(a, b, own, out[q])
