"""Cell types and niches as one network: who is how many steps from whom."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellquilt.geometry.neighbours import SpatialGraph
from cellquilt.spatial.distances import nearest_hops
from cellquilt.spatial.slides import CELL_TYPE

if TYPE_CHECKING:
    import pandas as pd

#: Kind of the nodes that are no cell types.
NICHE = "niche"


@dataclass(frozen=True)
class Network:
    """Mean steps along the graph between cell types and niches.

    Attributes
    ----------
    names
        K + L names, cell types first.
    kinds
        ``cell_type`` or ``niche`` of each.
    n_cells
        (K + L,) int64.
    hops
        (K + L, K + L) float64, mean steps from the cells of the row to the nearest of the column; 0 for cells that are
        in it themselves, 1 at least between groups of one kind. NaN where no way leads there.
    numbers
        (K, L) int64 cells of each type in each niche.
    """

    names: list[str]
    kinds: list[str]
    n_cells: NDArray[np.int64]
    hops: NDArray[np.float64]
    numbers: NDArray[np.int64]

    @property
    def weights(self) -> NDArray[np.float64]:
        """(K + L, K + L) symmetric: 1 / (1 + mean steps of either way); 0 on the diagonal and where no way leads."""
        both = (self.hops + self.hops.T) / 2
        out = np.where(np.isfinite(both), 1 / (1 + both), 0.0)
        np.fill_diagonal(out, 0)
        return out

    def to_frame(self) -> "pd.DataFrame":
        """A row for each pair of nodes: ``a``, ``kind_a``, ``b``, ``kind_b``, ``hops_ab``, ``hops_ba``, ``weight``."""
        import pandas as pd

        a, b = np.triu_indices(len(self.names), 1)
        names, kinds = np.array(self.names, dtype=object), np.array(self.kinds, dtype=object)
        return pd.DataFrame(
            {
                "a": names[a],
                "kind_a": kinds[a],
                "b": names[b],
                "kind_b": kinds[b],
                "hops_ab": self.hops[a, b],
                "hops_ba": self.hops[b, a],
                "weight": self.weights[a, b],
            }
        )

    def composition(self) -> "pd.DataFrame":
        """A row for each cell type and niche: ``cell_type``, ``niche``, ``n_cells``, ``share`` (of the niche's cells
        that have a type), ``ratio`` (of that share to the one in all niches).
        """
        import pandas as pd

        numbers = self.numbers.astype(np.float64)
        k, n_niches = numbers.shape
        total = numbers.sum(axis=0)
        share = np.divide(numbers, total, out=np.full(numbers.shape, np.nan), where=total > 0)
        overall = numbers.sum(axis=1, keepdims=True) / max(float(numbers.sum()), 1.0)
        ratio = np.divide(share, overall, out=np.full(numbers.shape, np.nan), where=overall > 0)
        return pd.DataFrame(
            {
                "cell_type": np.repeat(self.names[:k], n_niches),
                "niche": np.tile(self.names[k:], k),
                "n_cells": self.numbers.ravel(),
                "share": share.ravel(),
                "ratio": ratio.ravel(),
            }
        )


def network_of(
    graph: SpatialGraph,
    types: NDArray[np.integer],
    type_names: list[str],
    niches: NDArray[np.integer],
    niche_names: list[str],
    *,
    threads: int = 1,
) -> Network:
    """Measure the steps between all cell types and niches.

    Parameters
    ----------
    graph
        Neighbours of n cells.
    types, niches
        (n,) number of each cell's type and niche, -1 for none.
    type_names, niche_names
        K and L names.
    threads
        Changes nothing but the time.
    """
    k, n_niches = len(type_names), len(niche_names)
    far = [nearest_hops(graph, codes, n, threads=threads) for codes, n in ((types, k), (niches, n_niches))]
    hops = np.full((k + n_niches, k + n_niches), np.nan)
    for source, (codes, n, first) in enumerate(((types, k, 0), (niches, n_niches, k))):
        for target, (others, m, start) in enumerate(((types, k, 0), (niches, n_niches, k))):
            steps = far[target]
            if source != target:
                inside = others >= 0
                steps = steps.copy()
                steps[np.flatnonzero(inside), others[inside]] = 0
            for group in range(n):
                own = steps[codes == group]
                number = np.isfinite(own).sum(axis=0)
                total = np.where(np.isfinite(own), own, 0).sum(axis=0)
                hops[first + group, start : start + m] = np.divide(
                    total, number, out=np.full(m, np.nan), where=number > 0
                )
    both = (types >= 0) & (niches >= 0)
    numbers = np.bincount(types[both] * n_niches + niches[both], minlength=k * n_niches).reshape(k, n_niches)
    sizes = [np.bincount(codes[codes >= 0], minlength=n) for codes, n in ((types, k), (niches, n_niches))]
    kinds = [CELL_TYPE] * k + [NICHE] * n_niches
    return Network([*type_names, *niche_names], kinds, np.concatenate(sizes), hops, numbers)
