"""Domains from prototypes: a tree whose levels all slides share, or communities of prototypes."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError

_NEIGHBOURS = 15


@dataclass(frozen=True)
class Hierarchy:
    """Prototypes merged two by two: average linkage of cosine distances.

    Attributes
    ----------
    merges
        (n_prototypes - 1, 2) int64: merge m makes node ``n_prototypes + m`` of two nodes; nodes below ``n_prototypes``
        are the prototypes.
    heights
        (n_prototypes - 1,) float64 the distances at which they merge, ascending.
    """

    merges: NDArray[np.int64]
    heights: NDArray[np.float64]

    @classmethod
    def of(cls, prototypes: NDArray[np.floating]) -> "Hierarchy":
        """Of (n_prototypes, size) prototypes."""
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import pdist

        if len(prototypes) < 2:
            return cls(np.empty((0, 2), np.int64), np.empty(0))
        found = linkage(np.maximum(pdist(np.asarray(prototypes, dtype=np.float64), "cosine"), 0), "average")
        return cls(found[:, :2].astype(np.int64), found[:, 2])

    @classmethod
    def ward(
        cls,
        prototypes: NDArray[np.floating],
        cells: NDArray[np.floating],
        groups: NDArray[np.int64] | None = None,
    ) -> "Hierarchy":
        """Of (n_prototypes, size) prototypes that stand for so many cells, (n_prototypes,) each.

        Those merge first whose merging adds least to the squared distances of cells to their centres (Ward 1963);
        within groups before groups merge.
        """
        n = len(prototypes)
        centres = np.asarray(prototypes, dtype=np.float64).copy()
        weights = np.maximum(np.asarray(cells, dtype=np.float64), 1e-9)
        squares = ((centres[:, None] - centres) ** 2).sum(axis=2)
        cost = squares * weights[:, None] * weights / (weights[:, None] + weights)
        np.fill_diagonal(cost, np.inf)
        # More than any merging costs.
        apart = weights.sum() * squares.max(initial=0) + 1
        group = np.zeros(n, dtype=np.int64) if groups is None else groups
        cost += apart * (group[:, None] != group)
        node = np.arange(n)
        merges, heights = np.empty((max(n - 1, 0), 2), np.int64), np.empty(max(n - 1, 0))
        for merge in range(n - 1):
            i, j = sorted(divmod(int(cost.argmin()), n))
            merges[merge], heights[merge] = sorted((node[i], node[j])), np.sqrt(2 * (cost[i, j] % apart))
            both = weights[i] + weights[j]
            centres[i] = (weights[i] * centres[i] + weights[j] * centres[j]) / both
            weights[i], node[i] = both, n + merge
            centres[j] = np.inf
            added = ((centres - centres[i]) ** 2).sum(axis=1) * weights * both / (weights + both)
            added[i] = np.inf
            added += apart * (group != group[i])
            cost[i], cost[:, i] = added, added
            cost[j], cost[:, j] = np.inf, np.inf
        return cls(merges, np.maximum.accumulate(heights))

    @property
    def n_prototypes(self) -> int:
        """How many prototypes."""
        return len(self.merges) + 1

    def nodes_at(self, level: int) -> NDArray[np.int64]:
        """(n_prototypes,) int64 the node that each prototype belongs to where there are `level` nodes."""
        if not 1 <= level <= self.n_prototypes:
            raise CellquiltError(
                "level-unknown", f"level is {level}; levels go from 1 to {self.n_prototypes}", "choose one of them"
            )
        return self._nodes[level - 1]

    @cached_property
    def _nodes(self) -> NDArray[np.int64]:
        """(n_prototypes, n_prototypes) the node of each prototype at levels 1, 2, …"""
        found = np.empty((self.n_prototypes, self.n_prototypes), dtype=np.int64)
        node = np.arange(self.n_prototypes)
        found[-1] = node
        for merge, (a, b) in enumerate(self.merges):
            node = np.where((node == a) | (node == b), self.n_prototypes + merge, node)
            found[-2 - merge] = node
        return found

    def level_of(self, n_domains: int, used: NDArray[np.int64]) -> int:
        """The lowest level at which the prototypes that are used make so many domains.

        Raises
        ------
        CellquiltError
            ``n-domains-impossible`` if there is none, as at a merge of three; with the nearest numbers.
        """
        used = np.unique(used)
        numbers = np.array([np.unique(nodes).size for nodes in self._nodes[:, used]])
        found = np.flatnonzero(numbers == n_domains)
        if not found.size:
            near = sorted(set(numbers.tolist()), key=lambda number: (abs(number - n_domains), number))[:2]
            raise CellquiltError(
                "n-domains-impossible",
                f"no level has {n_domains} domains among the {used.size} prototypes in use",
                f"nearest: {', '.join(map(str, sorted(near)))}",
            )
        return int(found[0]) + 1


def communities(prototypes: NDArray[np.floating], resolution: float, seed: int = 0) -> NDArray[np.int64]:
    """(n_prototypes,) int64 community of each prototype, the largest first: Leiden on its nearest prototypes."""
    import random

    import igraph

    unit = prototypes / np.maximum(np.linalg.norm(prototypes, axis=1, keepdims=True), 1e-12)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    k = min(_NEIGHBOURS, len(unit) - 1)
    nearest = np.sort(np.argpartition(-likeness, k - 1, axis=1)[:, :k], axis=1)
    a, b = np.repeat(np.arange(len(unit)), k), nearest.ravel()
    edges = np.unique(np.sort(np.column_stack([a, b]), axis=1), axis=0)
    graph = igraph.Graph(n=len(unit), edges=edges.tolist())
    igraph.set_random_number_generator(random.Random(seed))
    weights = np.maximum(likeness[edges[:, 0], edges[:, 1]], 1e-6).tolist()
    found = graph.community_leiden("modularity", weights=weights, resolution=resolution, n_iterations=-1)
    member = np.asarray(found.membership)
    size = np.bincount(member)
    first = np.unique(member, return_index=True)[1]
    place = np.empty(size.size, dtype=np.int64)
    place[np.lexsort((first, -size))] = np.arange(size.size)
    return place[member]
