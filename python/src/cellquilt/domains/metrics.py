"""How domains look: continuity in space, shares over slides, and agreement with truth where there is one.

None of them says by itself that domains are right. Continuity rewards domains that were merged into one, and even
shares reward splitting at random: they are shown, and nothing is chosen by them.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.spatial.tables import SlideRows, graph_of, slides_of, tables_of

if TYPE_CHECKING:
    from anndata import AnnData


def fide_score(
    adata: "AnnData | Sequence[AnnData]", obs_key: str, slide_key: str | None = None, n_classes: int | None = None
) -> float:
    """Continuity of domains: the F1 score of the domains at both ends of edges, mean over domains, then over slides.

    Parameters
    ----------
    adata
        Tables with a graph.
    obs_key
        Column of `obs` with the domains; cells without one are left out with their edges.
    slide_key
        Column that names the slides; None: each table is one.
    n_classes
        How many domains there should be: those that a slide lacks count as 0. Default: those that it has.

    Returns
    -------
    float
        Between 0 and 1. Of a symmetric graph the F1 of a domain is the share of its edges that stay in it.

    References
    ----------
    Blampey et al., Nature Methods 2025 (FIDE).
    """
    return float(
        np.mean([_fide(table, part, obs_key, n_classes) for table, part in _slides(adata, obs_key, slide_key)])
    )


def _fide(table: "AnnData", part: SlideRows, obs_key: str, n_classes: int | None) -> float:
    graph = graph_of(table, part.rows)
    codes, names = _codes(table, part.rows, obs_key)
    a, b = np.repeat(codes, graph.degree), codes[graph.indices]
    known = (a >= 0) & (b >= 0)
    a, b = a[known], b[known]
    inside = np.bincount(a[a == b], minlength=len(names))
    ends = np.bincount(a, minlength=len(names)) + np.bincount(b, minlength=len(names))
    scores = 2 * inside[ends > 0] / ends[ends > 0]
    if n_classes is None:
        return float(scores.mean()) if scores.size else 0.0
    if n_classes < scores.size:
        raise CellquiltError(
            "n-classes-too-few", f"n_classes is {n_classes}, but {part.name} has {scores.size} domains", "give all"
        )
    return float(scores.sum() / n_classes)


def jensen_shannon_divergence(
    adata: "AnnData | Sequence[AnnData]", obs_key: str, slide_key: str | None = None
) -> float:
    """How much the shares of domains differ between slides, in bits: 0 where all slides have the same.

    The entropy of the mean share less the mean of the slides' entropies.
    """
    shares = domain_shares(adata, obs_key, slide_key)[1]
    return float(entropy(shares.mean(axis=0)) - np.mean([entropy(share) for share in shares]))


def mean_normalized_entropy(
    adata: "AnnData | Sequence[AnnData]", n_classes: int, obs_key: str, slide_key: str | None = None
) -> float:
    """Mean over slides of the entropy of the shares over that of even shares: 1 where all domains are as frequent."""
    shares = domain_shares(adata, obs_key, slide_key)[1]
    return sum(entropy(share) for share in shares) / len(shares) / math.log2(n_classes)


def heuristic(
    adata: "AnnData | Sequence[AnnData]", obs_key: str, n_classes: int, slide_key: str | None = None
) -> float:
    """Mean over slides of continuity times normalised entropy."""
    found = []
    for table, part in _slides(adata, obs_key, slide_key):
        codes, names = _codes(table, part.rows, obs_key)
        number = np.bincount(codes[codes >= 0], minlength=len(names))
        share = number / max(int(number.sum()), 1)
        found.append(_fide(table, part, obs_key, n_classes) * entropy(share) / math.log2(n_classes))
    return float(np.mean(found))


def agreement(adata: "AnnData | Sequence[AnnData]", obs_key: str, truth_key: str) -> dict[str, float]:
    """Agreement with the truth over all cells that have both: ``ari`` and ``nmi`` (1: the same partition)."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found, truth = [], []
    for table in tables_of(adata):
        rows = np.arange(table.n_obs)
        codes, names = _codes(table, rows, obs_key)
        true_codes, true_names = _codes(table, rows, truth_key)
        both = (codes >= 0) & (true_codes >= 0)
        found += np.asarray(names, dtype=object)[codes[both]].tolist()
        truth += np.asarray(true_names, dtype=object)[true_codes[both]].tolist()
    return {
        "ari": float(adjusted_rand_score(truth, found)),
        "nmi": float(normalized_mutual_info_score(truth, found)),
    }


def domain_shares(
    adata: "AnnData | Sequence[AnnData]", obs_key: str, slide_key: str | None = None
) -> tuple[list[str], NDArray[np.float64], list[str]]:
    """Shares of the domains in each slide.

    Returns
    -------
    domains
        Their names, sorted.
    shares
        (n_slides, n_domains) float64, rows sum to 1; of cells that have a domain.
    slides
        Their names, in the order of the tables.
    """
    slides = list(_slides(adata, obs_key, slide_key))
    coded = [_codes(table, part.rows, obs_key) for table, part in slides]
    domains = sorted({names[code] for codes, names in coded for code in np.unique(codes[codes >= 0]).tolist()})
    shares = np.zeros((len(slides), len(domains)))
    place = {name: k for k, name in enumerate(domains)}
    for row, (codes, names) in zip(shares, coded, strict=True):
        number = np.bincount(codes[codes >= 0], minlength=len(names))
        for code in np.flatnonzero(number).tolist():
            row[place[names[code]]] = number[code] / number.sum()
    return domains, shares, [part.name for _, part in slides]


def entropy(share: NDArray[np.floating]) -> float:
    """Entropy of shares that sum to 1, in bits."""
    some = share[share > 0]
    return float(-(some * np.log2(some)).sum()) if some.size else 0.0


def _slides(
    adata: "AnnData | Sequence[AnnData]", obs_key: str, slide_key: str | None
) -> "list[tuple[AnnData, SlideRows]]":
    return [(table, part) for table in tables_of(adata) for part in slides_of(table, slide_key)]


def _codes(table: "AnnData", rows: NDArray[np.int64], obs_key: str) -> tuple[NDArray[np.int64], list[str]]:
    """Number of each cell's domain, -1 for none, and the domains' names."""
    if obs_key not in table.obs:
        raise CellquiltError(
            "domains-missing", f'obs has no column "{obs_key}"', did_you_mean(obs_key, list(table.obs.columns))
        )
    column = table.obs[obs_key].astype("category").cat
    names = [str(name) for name in column.categories]
    return np.asarray(column.codes)[rows].astype(np.int64), names


def mixing(latents: NDArray[np.floating], slides: NDArray[np.generic], n_neighbours: int = 30, seed: int = 0) -> float:
    """How well slides are mixed among the nearest neighbours of cells in the space of latents.

    Parameters
    ----------
    latents
        (n_cells, size).
    slides
        (n_cells,) the slide, or the batch, of each.
    n_neighbours
        Nearest cells that are asked.
    seed
        Of a sample of 5,000 cells that stand for all.

    Returns
    -------
    float
        Mean inverse Simpson index of the neighbours' slides: 1 where they are the cell's own, the number of slides
        where all are there alike.

    References
    ----------
    Korsunsky et al., Nature Methods 2019 (LISI; neighbours count alike here).
    """
    from scipy.spatial import cKDTree

    _, slide = np.unique(slides, return_inverse=True)
    asked = np.arange(len(latents))
    if len(asked) > 5_000:
        asked = np.random.default_rng(seed).choice(len(asked), 5_000, replace=False)
    k = min(n_neighbours + 1, len(latents))
    _, near = cKDTree(latents).query(np.asarray(latents)[asked], k=k)
    share = np.stack([(slide[near[:, 1:]] == number).mean(axis=1) for number in range(int(slide.max()) + 1)], axis=1)
    return float(np.mean(1 / (share**2).sum(axis=1)))
