"""Shares that sum to 1: when one rises, others must fall, so they are compared by ratios."""

import numpy as np
from numpy.typing import NDArray

#: Added to every number before logarithms are taken, so that a part that a sample lacks has one.
PSEUDOCOUNT = 0.5


def centred_log_ratios(numbers: NDArray[np.number], pseudocount: float = PSEUDOCOUNT) -> NDArray[np.float64]:
    """log2 of each part over the geometric mean of the sample's parts.

    Parameters
    ----------
    numbers
        (n_samples, n_parts), 0 or more.
    pseudocount
        Added to each.

    Returns
    -------
    numpy.ndarray
        (n_samples, n_parts) float64; rows sum to 0.
    """
    logs = np.log2(np.asarray(numbers, dtype=np.float64) + pseudocount)
    return logs - logs.mean(axis=1, keepdims=True)


def median_log_ratios(numbers: NDArray[np.number], pseudocount: float = PSEUDOCOUNT) -> NDArray[np.float64]:
    """log2 of each part over a reference that a few changing parts do not move.

    The reference of a sample is the median over parts of how far each is from its own mean over samples, as sizes of
    libraries are found. Against the geometric mean of all parts instead, one part that a condition lacks makes all
    others seem to rise.

    Parameters
    ----------
    numbers
        (n_samples, n_parts), 0 or more.
    pseudocount
        Added to each.

    Returns
    -------
    numpy.ndarray
        (n_samples, n_parts) float64.
    """
    logs = np.log2(np.asarray(numbers, dtype=np.float64) + pseudocount)
    return logs - np.median(logs - logs.mean(axis=0), axis=1, keepdims=True)
