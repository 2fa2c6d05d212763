"""Genes that differ between domains, ranked by how much; slide by slide, so that a batch makes no gene variable."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.domains.analysis.expression import Measured, measured, membership
from cellquilt.spatial.slides import all_domains, slides

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

#: Entries of a matrix that are sorted at a time.
_ENTRIES = 4_000_000
#: A gene is variable only if this share of the cells of one domain have it.
MIN_SHARE = 0.05


@dataclass(frozen=True)
class GeneStatistics:
    """How G genes differ between K domains, over all slides; NaN where no slide has the gene, the domain and others.

    Every number compares a domain's cells with the other cells *of the same slide*; slides are averaged with weights
    n_in n_out / (n_in + n_out).

    Attributes
    ----------
    genes, domains
        Names.
    mean
        (K, G) mean log1p expression in the domain, mean over slides.
    difference
        (K, G) mean log1p expression in the domain less that in the others.
    effect
        (K, G) the difference over the standard deviation within the two.
    auc
        (K, G) chance that a cell of the domain has more than one of the others, ties half: 0.5 is no difference.
    share_in, share_out
        (K, G) shares of the cells that have the gene, in the domain and in the others.
    p_descriptive
        (K, G) Wilcoxon rank sums stratified by slide. The cells of a slide are no independent observations, and the
        domains were made from the same numbers: it orders genes, and is no evidence.
    explained
        (G,) share of the variance within slides that lies between domains.
    n_slides
        (G,) slides with the gene.
    n_cells
        (K,) cells of the domain.
    """

    genes: list[str]
    domains: list[str]
    mean: NDArray[np.float64]
    difference: NDArray[np.float64]
    effect: NDArray[np.float64]
    auc: NDArray[np.float64]
    share_in: NDArray[np.float64]
    share_out: NDArray[np.float64]
    p_descriptive: NDArray[np.float64]
    explained: NDArray[np.float64]
    n_slides: NDArray[np.int64]
    n_cells: NDArray[np.int64]

    def by_domain(self) -> "pd.DataFrame":
        """A row for each domain and gene, in each domain the largest effect first (``rank`` 1)."""
        import pandas as pd

        k, g = self.difference.shape
        order = np.argsort(np.where(np.isnan(self.effect), np.inf, -self.effect), axis=1, kind="stable")
        domain = np.repeat(np.arange(k), g)
        gene = order.ravel()
        columns: dict[str, Any] = {
            "domain": np.array(self.domains, dtype=object)[domain],
            "gene": np.array(self.genes, dtype=object)[gene],
            "rank": np.tile(np.arange(1, g + 1), k),
        }
        for name in ("effect", "difference", "auc", "mean", "share_in", "share_out", "p_descriptive"):
            columns[name] = getattr(self, name)[domain, gene]
        columns["n_slides"] = self.n_slides[gene]
        found = pd.DataFrame(columns)
        return found[found["effect"].notna()].reset_index(drop=True)

    def by_gene(self, min_share: float = MIN_SHARE) -> "pd.DataFrame":
        """A row for each gene, the most variable in space first.

        Parameters
        ----------
        min_share
            Genes that fewer of the cells of every domain have come last.

        Returns
        -------
        pandas.DataFrame
            ``gene``, ``rank``, ``variability`` (standard deviation over domains of `difference`), ``explained``,
            ``top_domain`` and its ``difference``, ``effect`` and ``auc``, ``share_in`` there, ``p_descriptive`` (the
            smallest over domains, times their number), ``n_slides``.
        """
        import pandas as pd

        known = ~np.isnan(self.difference)
        n_known = known.sum(axis=0)
        filled = np.where(known, self.difference, 0)
        mean = filled.sum(axis=0) / np.maximum(n_known, 1)
        square = np.where(known, (self.difference - mean) ** 2, 0).sum(axis=0)
        variability = np.where(n_known > 1, np.sqrt(square / np.maximum(n_known, 1)), np.nan)
        gene = np.arange(len(self.genes))
        top = np.where(known, self.difference, -np.inf).argmax(axis=0)
        frequent = np.where(known, self.share_in, 0).max(axis=0, initial=0) >= min_share
        order = np.lexsort((gene, np.where(np.isnan(variability), np.inf, -variability), ~frequent))
        smallest = np.where(known, self.p_descriptive, 1).min(axis=0, initial=1)
        found = pd.DataFrame(
            {
                "gene": np.array(self.genes, dtype=object),
                "variability": variability,
                "explained": self.explained,
                "top_domain": np.array(self.domains, dtype=object)[top],
                "difference": self.difference[top, gene],
                "effect": self.effect[top, gene],
                "auc": self.auc[top, gene],
                "share_in": self.share_in[top, gene],
                "p_descriptive": np.minimum(smallest * n_known, 1),
                "n_slides": self.n_slides,
            }
        ).iloc[order]
        found.insert(1, "rank", np.arange(1, len(found) + 1))
        return found[found["variability"].notna()].reset_index(drop=True)


@dataclass(frozen=True)
class _Sums:
    """Of one slide, K domains and G genes."""

    genes: list[str]
    domains: list[str]
    n: NDArray[np.int64]  # (K,) cells
    total: NDArray[np.float64]  # (K, G) of logarithms
    square: NDArray[np.float64]  # (K, G) of their squares
    some: NDArray[np.float64]  # (K, G) cells with the gene
    ranks: NDArray[np.float64]  # (K, G) of ranks over all cells
    ties: NDArray[np.float64]  # (G,) Σ t³ - t over groups of equal values


def gene_statistics(
    adatas: "AnnData | Sequence[AnnData]",
    domain_key: str = "domain",
    slide_key: str | None = None,
    *,
    layer: str | None = None,
    kind: str | None = None,
) -> GeneStatistics:
    """Compare every gene between each domain and the rest, within slides.

    Parameters
    ----------
    adatas
        Tables with domains, and counts, logarithms or intensities in X; their panels may differ.
    domain_key
        Column of `obs` with the domains; cells without one are left out.
    slide_key
        Column that names the slides; None: each table is one.
    layer
        Layer to take instead of X.
    kind
        What it holds: ``counts``, ``log1p`` or ``protein``; None: by its values.

    Raises
    ------
    CellquiltError
        ``domains-too-few``, ``layer-unknown``, ``genes-missing``, ``genes-twice``, and what the values of X may be
        refused for.
    """
    from cellquilt.core.errors import CellquiltError

    found = []
    for slide in slides(adatas, domain_key, slide_key):
        if (slide.codes >= 0).any():
            found.append(_sums(measured(slide, layer, kind), slide.domains))
    domains, places = all_domains([own.domains for own in found])
    if len(domains) < 2:
        raise CellquiltError(
            "domains-too-few", f"all cells are of one domain, {domains[0]}", "assign two domains or more"
        )
    genes = sorted({gene for own in found for gene in own.genes})
    return _combined(found, places, domains, genes)


def spatially_variable_genes(
    adatas: "AnnData | Sequence[AnnData]",
    domain_key: str = "domain",
    slide_key: str | None = None,
    *,
    layer: str | None = None,
    kind: str | None = None,
    min_share: float = MIN_SHARE,
) -> "pd.DataFrame":
    """Genes by how much they differ between domains: `gene_statistics(...).by_gene()`."""
    return gene_statistics(adatas, domain_key, slide_key, layer=layer, kind=kind).by_gene(min_share)


def variable_genes_by_domain(
    adatas: "AnnData | Sequence[AnnData]",
    domain_key: str = "domain",
    slide_key: str | None = None,
    *,
    layer: str | None = None,
    kind: str | None = None,
) -> "pd.DataFrame":
    """Every gene in every domain against the rest: `gene_statistics(...).by_domain()`."""
    return gene_statistics(adatas, domain_key, slide_key, layer=layer, kind=kind).by_domain()


def _sums(own: Measured, domains: list[str]) -> _Sums:
    matrix, codes = own.logarithms(), own.codes
    member = membership(codes, len(domains))
    matrix.eliminate_zeros()
    squares, some = matrix.copy(), matrix.copy()
    squares.data **= 2
    some.data[:] = 1
    n = np.bincount(codes, minlength=len(domains))
    total, square, number = ((member @ each).toarray() for each in (matrix, squares, some))
    ranks, ties = _rank_sums(matrix.tocsc(), codes, n, number)
    return _Sums(own.genes, domains, n, total, square, number, ranks, ties)


def _rank_sums(
    matrix: Any, codes: NDArray[np.int64], n: NDArray[np.int64], some: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(K, G) sums over the cells of domains of their ranks among all cells, ties sharing theirs; (G,) tie terms.

    Zeros are not stored and tie with each other, between what is below and above them.
    """
    k, g = some.shape
    n_cells = codes.size
    n_zero = n_cells - np.diff(matrix.indptr).astype(np.float64)
    ranks, ties = np.empty((k, g)), np.empty(g)
    start = 0
    while start < g:
        stop = int(np.searchsorted(matrix.indptr, matrix.indptr[start] + _ENTRIES, side="right")) - 1
        stop = min(max(stop, start + 1), g)
        first, last = matrix.indptr[start], matrix.indptr[stop]
        value, cell = matrix.data[first:last], matrix.indices[first:last]
        gene = np.repeat(np.arange(stop - start), np.diff(matrix.indptr[start : stop + 1]))
        order = np.lexsort((value, gene))
        value, gene, domain = value[order], gene[order], codes[cell[order]]
        place = np.arange(value.size) - np.repeat(
            matrix.indptr[start:stop] - first, np.diff(matrix.indptr[start : stop + 1])
        )
        new = np.ones(value.size, dtype=bool)
        new[1:] = (value[1:] != value[:-1]) | (gene[1:] != gene[:-1])
        begin = np.flatnonzero(new)
        size = np.diff(np.append(begin, value.size))
        rank = np.repeat(place[begin] + (size + 1) / 2, size)
        zero = n_zero[start:stop]
        rank += np.where(value > 0, zero[gene], 0)
        width = stop - start
        found = np.bincount(domain * width + gene, weights=rank, minlength=k * width).reshape(k, width)
        below = np.bincount(gene[value < 0], minlength=width)
        ranks[:, start:stop] = found + (n[:, None] - some[:, start:stop]) * (below + (zero + 1) / 2)
        tied = size.astype(np.float64)
        ties[start:stop] = np.bincount(gene[begin], weights=tied**3 - tied, minlength=width) + zero**3 - zero
        start = stop
    return ranks, ties


def _combined(
    found: list[_Sums], places: list[NDArray[np.int64]], domains: list[str], genes: list[str]
) -> GeneStatistics:
    from scipy.special import erfc

    shape = len(domains), len(genes)
    column = {gene: number for number, gene in enumerate(genes)}
    weight, mean_n = np.zeros(shape), np.zeros(shape)
    sums = {name: np.zeros(shape) for name in ("mean", "difference", "effect", "auc", "in", "out", "z", "variance")}
    weight_effect = np.zeros(shape)
    between, around = np.zeros(len(genes)), np.zeros(len(genes))
    n_slides, n_cells = np.zeros(len(genes), dtype=np.int64), np.zeros(len(domains), dtype=np.int64)
    for own, place in zip(found, places, strict=True):
        columns = np.array([column[gene] for gene in own.genes])
        at = np.ix_(place, columns)
        n_slides[columns] += 1
        n_cells[place] += own.n
        n, n_in = float(own.n.sum()), own.n[:, None].astype(np.float64)
        n_out = n - n_in
        total, square, some = (each.sum(axis=0) for each in (own.total, own.square, own.some))
        around[columns] += square - total**2 / n
        between[columns] += (own.total**2 / n_in).sum(axis=0) - total**2 / n
        sums["mean"][at] += own.total / n_in
        mean_n[at] += 1
        if len(own.n) < 2:
            continue
        w = np.broadcast_to(n_in * n_out / n, own.total.shape)
        mean_in, mean_out = own.total / n_in, (total - own.total) / n_out
        within = own.square - own.total * mean_in + (square - own.square) - (total - own.total) * mean_out
        spread = np.sqrt(np.maximum(within, 0) / max(n - 2, 1))
        varies = spread > 1e-9
        ranks = own.ranks - n_in * (n + 1) / 2
        weight[at] += w
        weight_effect[at] += w * varies
        sums["difference"][at] += w * (mean_in - mean_out)
        sums["effect"][at] += w * np.divide(mean_in - mean_out, spread, out=np.zeros_like(spread), where=varies)
        sums["auc"][at] += w * (0.5 + ranks / (n_in * n_out))
        sums["in"][at] += w * own.some / n_in
        sums["out"][at] += w * (some - own.some) / n_out
        sums["z"][at] += ranks / (n + 1)
        spared = n + 1 - own.ties / max(n * (n - 1), 1)
        sums["variance"][at] += n_in * n_out / 12 * np.maximum(spared, 0) / (n + 1) ** 2

    def over(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(values, weights, out=np.full(values.shape, np.nan), where=weights > 0)

    z = np.abs(over(sums["z"], np.sqrt(sums["variance"])))
    p = np.where(weight > 0, np.where(np.isnan(z), 1.0, erfc(z / np.sqrt(2))), np.nan)
    return GeneStatistics(
        genes=genes,
        domains=domains,
        mean=over(sums["mean"], mean_n),
        difference=over(sums["difference"], weight),
        effect=np.where(weight > 0, np.nan_to_num(over(sums["effect"], weight_effect)), np.nan),
        auc=over(sums["auc"], weight),
        share_in=over(sums["in"], weight),
        share_out=over(sums["out"], weight),
        p_descriptive=p,
        explained=over(np.maximum(between, 0), around),
        n_slides=n_slides,
        n_cells=n_cells,
    )
