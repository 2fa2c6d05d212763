"""Which domains lie next to which: borders counted on the graph of cells, against chance, and PAGA."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.spatial.enrichment import enrichment_of
from cellquilt.spatial.slides import all_domains, slides
from cellquilt.spatial.tables import graph_of

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

#: Name of the cohort among the slides.
COHORT = "cohort"


@dataclass(frozen=True)
class Architecture:
    """Borders between domains.

    Attributes
    ----------
    domains
        K names.
    slides
        S names.
    edges
        (S, K, K) int64, symmetric: edges between cells of two domains; on the diagonal edges within one.
    expected
        (S, K, K) float64: what these would be on average if each slide's domains were dealt to its cells at random.
    sizes
        (S, K) int64 cells that have a domain.
    """

    domains: list[str]
    slides: list[str]
    edges: NDArray[np.int64]
    expected: NDArray[np.float64]
    sizes: NDArray[np.int64]

    def paga(self, slide: str | None = None) -> NDArray[np.float64]:
        """(K, K) PAGA connectivity of one slide, or of all together: 0 no border, 1 as many edges as at random.

        The measure of Wolf et al., Genome Biology 2019, as ``scanpy.tl.paga`` gives it for the graph and domains.
        """
        edges = self._of(self.edges, slide)
        n_cells = self._of(self.sizes, slide)
        between = edges - np.diag(np.diag(edges))
        # Every edge counts in both directions.
        ends = 2 * np.diag(edges) + between.sum(axis=1)
        chance = (ends[:, None] * n_cells + ends[None, :] * n_cells[:, None]) / max(int(n_cells.sum()) - 1, 1)
        return np.minimum(np.divide(2 * between, chance, out=np.zeros(chance.shape), where=chance > 0), 1)

    def ratio(self, slide: str | None = None) -> NDArray[np.float64]:
        """(K, K) observed over expected edges; NaN where none is expected."""
        edges, expected = self._of(self.edges, slide), self._of(self.expected, slide)
        return np.divide(edges, expected, out=np.full(expected.shape, np.nan), where=expected > 0)

    def border_share(self, slide: str | None = None) -> NDArray[np.float64]:
        """(K, K) of the edges that leave the row's domain the share that leads to the column's; NaN without any."""
        edges = self._of(self.edges, slide).astype(np.float64)
        np.fill_diagonal(edges, 0)
        total = edges.sum(axis=1, keepdims=True)
        return np.divide(edges, total, out=np.full(edges.shape, np.nan), where=total > 0)

    def continuity(self, slide: str) -> float:
        """Share of the ends of edges of a domain that lie in it, mean over the slide's domains (FIDE of Novae)."""
        edges = self._of(self.edges, slide)
        ends = edges.sum(axis=1) + np.diag(edges)
        some = ends > 0
        return float(np.mean(2 * np.diag(edges)[some] / ends[some])) if some.any() else 0.0

    def _of[T: np.generic](self, numbers: NDArray[T], slide: str | None) -> NDArray[T]:
        return numbers.sum(axis=0) if slide is None else numbers[self.slides.index(slide)]

    def to_frame(self) -> "pd.DataFrame":
        """A row for each slide, and for the cohort, and each pair of domains that it has.

        Columns: ``slide``, ``domain_a``, ``domain_b``, ``n_edges``, ``expected``, ``ratio``, ``border_share`` (of the
        edges that leave a, those to b; NaN for a itself), ``paga``.
        """
        import pandas as pd

        parts = []
        for name in [*self.slides, None]:
            there = np.flatnonzero(self._of(self.sizes, name))
            a, b = (index.ravel() for index in np.meshgrid(there, there, indexing="ij"))
            share = self.border_share(name)
            np.fill_diagonal(share, np.nan)
            columns = {
                "slide": COHORT if name is None else name,
                "domain_a": np.array(self.domains, dtype=object)[a],
                "domain_b": np.array(self.domains, dtype=object)[b],
                "n_edges": self._of(self.edges, name)[a, b],
                "expected": self._of(self.expected, name)[a, b],
                "ratio": self.ratio(name)[a, b],
                "border_share": share[a, b],
                "paga": self.paga(name)[a, b],
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)


def architecture(
    adatas: "AnnData | Sequence[AnnData]", domain_key: str = "domain", slide_key: str | None = None
) -> Architecture:
    """Count the edges of the spatial graph within and between domains.

    Parameters
    ----------
    adatas
        Tables with domains and a graph (`cellquilt.spatial_neighbors`).
    domain_key
        Column of `obs` with the domains; cells without one are left out with their edges.
    slide_key
        Column that names the slides; None: each table is one.

    Raises
    ------
    CellquiltError
        ``graph-missing``, ``domains-too-few``, and what `proportions` raises.
    """
    found = []
    for slide in slides(adatas, domain_key, slide_key):
        graph = graph_of(slide.table, slide.rows)
        found.append((slide.name, enrichment_of(graph, slide.codes, slide.domains, n_permutations=0)))
    domains, places = all_domains([own.groups for _, own in found])
    if len(domains) < 2:
        raise CellquiltError(
            "domains-too-few", f"all cells are of one domain, {domains[0]}", "assign two domains or more"
        )
    shape = len(found), len(domains), len(domains)
    edges, expected = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    sizes = np.zeros(shape[:2], dtype=np.int64)
    for s, (place, (_, own)) in enumerate(zip(places, found, strict=True)):
        edges[s][np.ix_(place, place)] = own.edges
        expected[s][np.ix_(place, place)] = own.expected
        sizes[s, place] = own.sizes
    return Architecture(domains, [name for name, _ in found], edges, expected, sizes)
