"""What a slide shows more or less of than others do, given what its cells are.

Machines, panels and fixations see some genes better than others, and add to some. The share of a gene in a slide says
so, but it also says which cells the slide has. So cells are compared with cells of the same state: a slide that is
cropped, or that lacks a kind of tissue, keeps its numbers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.domains.expression import Expression, Panel, scaled_to, totals

#: Molecules of each gene, or cells, that a slide must show before its numbers are believed.
_BELIEF_MOLECULES, _BELIEF_CELLS = 10.0, 20.0
_STEPS = 5


@dataclass(frozen=True)
class States:
    """States of cells, roughly their types.

    Attributes
    ----------
    centres
        (n_states, n_factors) float64 in the space of factors.
    rates
        (n_states, n_genes) float64 shares of all molecules that are of each gene, for counts; of each panel's genes
        they are taken anew.
    means
        (n_states, n_genes) float64 mean of each gene after it was bent (log1p, arcsinh).
    """

    centres: NDArray[np.float64]
    rates: NDArray[np.float64]
    means: NDArray[np.float64]

    def nearest(self, factors: NDArray[np.floating]) -> NDArray[np.int64]:
        """(n_cells,) number of the state nearest to each cell."""
        far = (self.centres**2).sum(axis=1) - 2 * factors @ self.centres.T
        return far.argmin(axis=1)


@dataclass(frozen=True)
class Own:
    """What is a slide's own.

    Attributes
    ----------
    factor
        (n_panel,) how many times more often each gene is seen, of counts; their geometric mean is 1.
    offset
        (n_panel,) what is left after that, of bent values.
    """

    factor: NDArray[np.float64]
    offset: NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """How expression of any slide is brought to scale, but for what is the slide's own.

    Attributes
    ----------
    kind
        See `expression.KINDS`.
    target
        Molecules that a cell is scaled to if all genes were measured.
    rate
        (n_genes,) share of all molecules.
    cofactor, mean, std
        (n_genes,): intensities are divided by the first before their arcsinh is taken.
    """

    kind: str
    target: float
    rate: NDArray[np.float64]
    cofactor: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def expression(self, matrix: Any, panel: Panel, own: Own | None = None) -> Expression:
        """Cells brought to scale.

        Parameters
        ----------
        matrix
            (n_cells, n_columns) of a slide.
        panel
            Its genes.
        own
            What is the slide's own; None: nothing.
        """
        genes = panel.numbers
        scale = np.ones(matrix.shape[0], dtype=np.float32)
        divisor = np.ones(genes.size) if own is None else own.factor
        mean = self.mean[genes] if own is None else self.mean[genes] + own.offset
        if self.kind == "counts":
            total = totals(matrix, panel, divisor.astype(np.float32))
            target = self.target * self.rate[genes].sum()
            scale = scaled_to(total, target)
        elif self.kind == "protein":
            divisor = self.cofactor[genes]
        single = [part.astype(np.float32) for part in (divisor, mean, self.std[genes])]
        return Expression(matrix, panel, self.kind, scale, *single)

    def bent(self, matrix: Any, panel: Panel, own: Own | None = None) -> Any:
        """(n_cells, n_panel) values before means are taken off and deviations divided by, CSR or dense."""
        return self.expression(matrix, panel, own).transformed(slice(None))


def own_sensitivity(matrix: Any, panel: Panel, scale: Scale, states: States, weights: NDArray[np.float64]) -> Own:
    """What is a slide's own.

    Parameters
    ----------
    matrix
        (n_cells, n_columns) of the slide, or of a sample of its cells.
    panel
        Its genes.
    scale, states
        The model's.
    weights
        (n_panel, n_factors) of scaled expression.
    """
    # To begin with, as if the slide had the cells that the cohort has.
    everything = States(np.zeros((1, weights.shape[1])), scale.rate[None], scale.mean[None])
    own = compared(matrix, panel, scale, everything, np.zeros(matrix.shape[0], dtype=np.int64))
    for _ in range(_STEPS):
        factors = scale.expression(matrix, panel, own).project(weights)
        own = compared(matrix, panel, scale, states, states.nearest(factors))
    return own


def compared(matrix: Any, panel: Panel, scale: Scale, states: States, state: NDArray[np.int64]) -> Own:
    """What cells show, over what cells in their states show in the cohort; see `own_sensitivity`."""
    n_states, n_cells = len(states.means), matrix.shape[0]
    factor = np.ones(panel.numbers.size)
    if scale.kind == "counts":
        rates = states.rates[:, panel.numbers]
        molecules = np.bincount(state, weights=totals(matrix, panel), minlength=n_states)
        expected = molecules @ (rates / np.maximum(rates.sum(axis=1, keepdims=True), 1e-12))
        seen = np.asarray(matrix.sum(axis=0), dtype=np.float64).ravel()[panel.columns]
        factor = (seen + _BELIEF_MOLECULES) / (expected + _BELIEF_MOLECULES)
        factor = factor / np.exp(np.log(factor).mean())
    own = Own(factor, np.zeros(factor.size))
    seen = np.asarray(scale.bent(matrix, panel, own).sum(axis=0), dtype=np.float64).ravel()
    expected = np.bincount(state, minlength=n_states) @ states.means[:, panel.numbers]
    return Own(factor, (seen - expected) / (n_cells + _BELIEF_CELLS))


def sums(x: Any, group: NDArray[np.int64], n_groups: int) -> NDArray[np.float64]:
    """(n_groups, n_genes) sums of the rows of each group."""
    from scipy.sparse import csr_matrix

    member = csr_matrix((np.ones(group.size), (group, np.arange(group.size))), shape=(n_groups, group.size))
    found = member @ x
    return np.asarray(found.toarray() if hasattr(found, "toarray") else found, dtype=np.float64)
