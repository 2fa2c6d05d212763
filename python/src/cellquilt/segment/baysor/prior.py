"""Which prior cells the cells that Baysor found come from."""

import numpy as np


def main_prior(labels: np.ndarray, prior: np.ndarray, n_cells: int) -> np.ndarray:
    """The prior cell that most molecules of each cell come from.

    Parameters
    ----------
    labels
        (n,) int32: the cell of every molecule, 0 for none.
    prior
        (n,) int32: its prior cell, 0 for none.
    n_cells
        Cells are numbered 1 to `n_cells`.

    Returns
    -------
    numpy.ndarray
        (n_cells,) int32; 0 where no molecule has a prior cell, the smallest number of several with as many.
    """
    both = (labels > 0) & (prior > 0)
    pairs, counts = np.unique(np.column_stack([labels[both], prior[both]]), axis=0, return_counts=True)
    # The last one written counts: most molecules, then the smallest number.
    order = np.lexsort((-pairs[:, 1], counts))
    out = np.zeros(n_cells, dtype=np.int32)
    out[pairs[order, 0] - 1] = pairs[order, 1]
    return out
