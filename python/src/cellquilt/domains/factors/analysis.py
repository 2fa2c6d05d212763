"""Factor analysis of genes that were measured in different panels."""

import numpy as np
from numpy.typing import NDArray

#: Least share of a gene's variance that is its own.
_LEAST_OWN = 0.05
_STEPS = 30


def factor_analysis(
    correlation: NDArray[np.float64], n_factors: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Loadings and own variances: ``correlation ≈ V Vᵀ + diag(ψ)``.

    Principal factors of the correlation in units of the own variances, in turn with these (Jöreskog 1967). Genes that
    were never measured together take their correlation from the factors.

    Parameters
    ----------
    correlation
        (n_genes, n_genes); NaN for pairs that no panel has.
    n_factors
        How many.

    Returns
    -------
    loadings, own
        (n_genes, n_factors) and (n_genes,) float64.
    """
    unknown = ~np.isfinite(correlation)
    filled = np.where(unknown, 0.0, correlation)
    variance = np.diag(filled).copy()
    own = 0.5 * variance
    loadings = np.zeros((len(filled), n_factors))
    for _ in range(_STEPS):
        unit = 1 / np.sqrt(own)
        loadings = _largest(filled * unit[:, None] * unit, n_factors) / unit[:, None]
        own = np.maximum(variance - (loadings**2).sum(axis=1), _LEAST_OWN * variance)
        if unknown.any():
            filled[unknown] = (loadings @ loadings.T)[unknown]
    return loadings, own


def _largest(matrix: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """(size, n) eigenvectors times the root of what their eigenvalues are above 1, their largest numbers positive."""
    from scipy.linalg import eigh

    size = len(matrix)
    values, vectors = eigh(matrix, subset_by_index=(size - n, size - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[largest, np.arange(n)])
    found: NDArray[np.float64] = vectors * np.sqrt(np.maximum(values - 1, 0))
    return found


def panel_weights(loadings: NDArray[np.float64], own: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n_panel, n_factors) weights whose sums with a cell's expression are the expected factors, given the panel.

    ``Ψ⁻¹ V (I + Vᵀ Ψ⁻¹ V)⁻¹`` (Thomson 1951): genes with much variance of their own say little, and a small panel says
    less than a large one.
    """
    weighted = loadings / own[:, None]
    inner = np.eye(loadings.shape[1]) + loadings.T @ weighted
    found: NDArray[np.float64] = np.linalg.solve(inner, weighted.T).T
    return found
