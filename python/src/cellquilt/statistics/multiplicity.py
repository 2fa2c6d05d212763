"""Many tests at once."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def benjamini_hochberg(p: ArrayLike) -> NDArray[np.float64]:
    """Adjusted p-values: calling all up to q a discovery makes at most a share q of the discoveries false.

    Parameters
    ----------
    p
        p-values of any shape; those that are NaN stay so and count as no test.

    Returns
    -------
    numpy.ndarray
        float64 of the same shape.
    """
    values = np.asarray(p, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(values.ravel()))
    out = np.full(values.size, np.nan)
    order = known[np.argsort(values.ravel()[known], kind="stable")]
    raised = values.ravel()[order] * order.size / np.arange(1, order.size + 1)
    out[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1)
    return out.reshape(values.shape)
