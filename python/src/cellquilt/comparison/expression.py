"""What the counts of cells say about a segmentation: do cells hold what belongs together, and only that?"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_ENTRIES = 4_000_000  # of a matrix worked on at a time
_ROWS = 20_000
#: Prior transcripts that `information` tries: from cells that say all to cells that say next to nothing.
_PRIORS = 2.0 ** np.arange(2, 15)
#: Largest standard error with which a leakage still says something.
MAX_STANDARD_ERROR = 0.1


def mecr(counts: "csr_matrix", a: NDArray[np.integer], b: NDArray[np.integer]) -> float:
    """Mutually exclusive co-expression rate.

    Of the cells with either gene of a pair the share that has both, averaged over pairs (Hartman and Satija, eLife
    2024).

    Parameters
    ----------
    counts
        (n_cells, n_genes) counts.
    a, b
        (m,) columns of the genes of each pair.

    Returns
    -------
    float
        0..1, 0 is best; NaN without a pair that occurs.

    Notes
    -----
    It falls with the number of transcripts a cell, whether these are right or not: cells cut in two, or half empty,
    have a lower rate than the true ones. `coexpression_ratio` does not.
    """
    from scipy.sparse import csc_matrix

    if len(a) == 0:
        return float("nan")
    genes, place = np.unique(np.concatenate([a, b]), return_inverse=True)
    present = csc_matrix(counts[:, genes] > 0, dtype=np.int64)
    together = (present.T @ present).toarray()
    i, j = place.reshape(2, -1)
    both = together[i, j]
    either = together[i, i] + together[j, j] - both
    occurs = either > 0
    return float(np.mean(both[occurs] / either[occurs])) if occurs.any() else float("nan")


def coexpression_ratio(counts: "csr_matrix", a: NDArray[np.integer], b: NDArray[np.integer]) -> float:
    """How often exclusive genes meet in a cell, over how often they would by chance.

    Take a transcript of one gene of a pair, and any other transcript of the same cell: how likely is it of the pair's
    other gene, over that gene's share of all transcripts in cells? With x the counts, N their sum in a cell and p the
    genes' shares::

        Σ_pairs Σ_cells x_a x_b / (N - 1)   /   Σ_pairs p_a p_b Σ_cells N

    Parameters
    ----------
    counts
        (n_cells, n_genes) counts.
    a, b
        (m,) columns of the genes of each pair.

    Returns
    -------
    float
        0: never; 1: as in cells filled at random. NaN where the genes of no pair occur.

    Notes
    -----
    Its expectation does not depend on how many transcripts cells have, so methods with cells of different sizes can be
    compared.
    """
    if len(a) == 0:
        return float("nan")
    counts = counts[np.flatnonzero(row_sums(counts) > 1)]
    totals = row_sums(counts)
    n = totals.sum()
    genes, place = np.unique(np.concatenate([a, b]), return_inverse=True)
    some = counts[:, genes].tocsr().astype(np.float64)
    share = np.asarray(some.sum(axis=0)).ravel() / max(n, 1)
    per_cell = scaled_rows(some, 1.0 / (totals - 1))
    together = (some.T @ per_cell).toarray()
    i, j = place.reshape(2, -1)
    chance = float(n * (share[i] * share[j]).sum())
    return float(together[i, j].sum()) / chance if chance > 0 else float("nan")


def row_sums(counts: "csr_matrix") -> NDArray[np.int64]:
    """(n,) int64."""
    return np.asarray(counts.sum(axis=1, dtype=np.int64)).ravel()


def scaled_rows(counts: "csr_matrix", factor: NDArray[np.float64]) -> "csr_matrix":
    """A copy of the matrix with row i times factor[i]."""
    scaled = counts.astype(np.float64)
    scaled.data *= np.repeat(factor, np.diff(scaled.indptr))
    return scaled


@dataclass(frozen=True)
class Leakage:
    """What the rings of cells are made of.

    Attributes
    ----------
    share
        Share of a ring's profile that the cores of the neighbours explain rather than the cell's own; NaN where there
        are too few transcripts to tell (`standard_error` above `MAX_STANDARD_ERROR`).
    standard_error
        Of `share`; NaN where nothing can be said at all.
    similarity_own, similarity_neighbours
        Similarity of a ring with its own core and with the cores around, 1 for the same profile, 0 for what all cells
        have in common. NaN where `share` is.
    """

    share: float = float("nan")
    standard_error: float = float("nan")
    similarity_own: float = float("nan")
    similarity_neighbours: float = float("nan")


def leakage(core: "csr_matrix", ring: "csr_matrix", near: NDArray[np.integer], shares: NDArray[np.float64]) -> Leakage:
    """How much of the cells' rings comes from the cells around.

    Parameters
    ----------
    core, ring
        (n_cells, n_genes) counts of the core of every cell and of the rest of it.
    near
        (n_cells, k) positions of the neighbours of every cell, -1 for none.
    shares
        (n_genes,) share of every gene on the slide, the same for all methods.

    Notes
    -----
    With the profiles r of a cell's ring, c of its core and n of its neighbours' cores (shares of genes, all
    neighbours together) the model is r = (1 - λ) c + λ n, and λ is fitted over all cells::

        λ = Σ w <r - c, n - c> / Σ w <n - c, n - c>,   <u, v> = Σ_g u_g v_g / (q_g + 1/G)

    with the shares q of the G genes, so that abundant genes do not decide alone, and w the product of the numbers of
    transcripts in ring and core. Core, ring and neighbours have no transcript in common, and squares are taken over
    pairs of different transcripts; so noise adds nothing on average, and cells with few transcripts are no more
    similar to each other than they should be. What tells ring from core otherwise (say, nucleus from cytoplasm) does
    not count, unless it lies in the direction of the neighbours. The standard error is that of a ratio of sums over
    cells that are independent.
    """
    n_genes = core.shape[1]
    if core.shape[0] == 0 or n_genes == 0:
        return Leakage()
    weight = 1.0 / (shares + 1.0 / n_genes)
    # Sums over genes of the products of profiles, one row a cell: rc, rn, cn, cc, nn, rr, and with the slide's own q.
    parts = [
        _profile_products(core, ring, near[first : first + _ROWS], first, weight, shares)
        for first in range(0, core.shape[0], _ROWS)
    ]
    w, rc, rn, cn, cc, nn, rr, rq, cq, nq = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    numerator, denominator = w * (rn - rc - cn + cc), w * (nn - 2 * cn + cc)
    total = denominator.sum()
    if w.size < 2 or not total > 0:
        return Leakage()
    share = float(numerator.sum() / total)
    error = float(np.sqrt(((numerator - share * denominator) ** 2).sum()) / total)
    if error > MAX_STANDARD_ERROR:
        return Leakage(standard_error=error)
    qq = float((weight * shares**2).sum())

    def similarity(uv, uu, vv, uq, vq):  # type: ignore[no-untyped-def]
        """Of the profiles' differences from the slide's, over all cells."""
        squares = (w * (uu - 2 * uq + qq)).sum() * (w * (vv - 2 * vq + qq)).sum()
        return float((w * (uv - uq - vq + qq)).sum() / np.sqrt(squares)) if squares > 0 else float("nan")

    return Leakage(share, error, similarity(rc, rr, cc, rq, cq), similarity(rn, rr, nn, rq, nq))


def _profile_products(
    core: "csr_matrix",
    ring: "csr_matrix",
    near: NDArray[np.integer],
    first: int,
    weight: NDArray[np.float64],
    shares: NDArray[np.float64],
) -> tuple[NDArray[np.float64], ...]:
    """Weight and products of profiles of those cells of a piece that have two transcripts everywhere."""
    from scipy.sparse import csr_matrix

    n = len(near)
    row, _ = np.nonzero(near >= 0)
    links = csr_matrix((np.ones(row.size), (row, near[near >= 0])), shape=(n, core.shape[0]))
    c, r = (part[first : first + n].astype(np.float64) for part in (core, ring))
    around = csr_matrix(links @ core)
    n_c, n_r, n_n = (np.asarray(part.sum(axis=1)).ravel() for part in (c, r, around))
    keep = np.flatnonzero((n_c > 1) & (n_r > 1) & (n_n > 1))
    c, r, around, n_c, n_r, n_n = c[keep], r[keep], around[keep], n_c[keep], n_r[keep], n_n[keep]

    def product(u: Any, v: Any) -> NDArray[np.float64]:
        return np.asarray(u.multiply(v) @ weight).ravel()

    def square(u: Any, total: NDArray[np.float64]) -> NDArray[np.float64]:
        pairs = u.copy()
        pairs.data *= pairs.data - 1
        return np.asarray(pairs @ weight).ravel() / (total * (total - 1))

    with_slide = weight * shares
    return (
        n_r * n_c,
        product(r, c) / (n_r * n_c),
        product(r, around) / (n_r * n_n),
        product(c, around) / (n_c * n_n),
        square(c, n_c),
        square(around, n_n),
        square(r, n_r),
        np.asarray(r @ with_slide).ravel() / n_r,
        np.asarray(c @ with_slide).ravel() / n_c,
        np.asarray(around @ with_slide).ravel() / n_n,
    )


def information(counts: "csr_matrix", shares: NDArray[np.float64], n_transcripts: int) -> float:
    """How much a transcript's cell tells about the transcript, in bits.

    Every transcript in a cell is predicted from the other transcripts of that cell, and from the slide's shares of
    genes where the cell says little; what this is better than the slide's shares alone is the gain. A transcript in no
    cell gains nothing::

        Σ_cells Σ_transcripts log2 [ (x_g - 1 + α q_g) / ((N - 1 + α) q_g) ]  /  n_transcripts

    where g is the transcript's gene, x the cell's counts, N their sum, q the slide's shares. That is the logarithmic
    score of the leave-one-out predictions of a Dirichlet-multinomial model; α, the number of transcripts that the
    slide's shares count as, is the power of two that is best for the method at hand.

    Parameters
    ----------
    counts
        (n_cells, n_genes) counts.
    shares
        (n_genes,) share of every gene on the slide, in cells or not.
    n_transcripts
        All transcripts of the slide that may be counted, in cells or not.

    Returns
    -------
    float
        Bits a transcript; NaN without transcripts.

    Notes
    -----
    It needs no truth, no marker and no second method, and no trade of sensitivity for contamination wins: transcripts
    left out gain nothing, foreign ones cost, a cell merged from two unlike ones predicts both worse, and a cell cut in
    two knows only half of what it could about each of its transcripts.
    """
    if n_transcripts == 0:
        return float("nan")
    totals = row_sums(counts)
    gains = np.zeros(len(_PRIORS))
    for first in range(0, counts.nnz, _ENTRIES):
        part = slice(first, first + _ENTRIES)
        x, gene = counts.data[part].astype(np.float64), counts.indices[part]
        row = np.searchsorted(counts.indptr, np.arange(first, first + x.size), side="right") - 1
        q, others = shares[gene], totals[row] - 1.0
        gains += [(x * np.log2((x - 1 + prior * q) / ((others + prior) * q))).sum() for prior in _PRIORS]
    return float(gains.max() / n_transcripts)
