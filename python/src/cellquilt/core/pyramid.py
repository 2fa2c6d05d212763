"""The kernels of the image pyramid; apart from `images`, so that reading pixels does not load numba."""

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def halve_integers(source: np.ndarray, out: np.ndarray) -> None:
    """Mean of each 2 × 2 block of an unsigned image, rounded half up.

    Parameters
    ----------
    source
        (h, w) unsigned integers.
    out
        (ceil(h / 2), ceil(w / 2)) of the same dtype, overwritten. Where h or w is odd, the last row or column is the
        mean of the pixels there are.
    """
    height, width = source.shape
    for i in range(height // 2):
        upper, lower = source[2 * i], source[2 * i + 1]
        for j in range(width // 2):
            # numba widens the sum to 64 bits, so that nothing overflows.
            out[i, j] = (upper[2 * j] + upper[2 * j + 1] + lower[2 * j] + lower[2 * j + 1] + 2) >> 2
        if width % 2:
            out[i, width // 2] = (upper[width - 1] + lower[width - 1] + 1) >> 1
    if height % 2:
        last = source[height - 1]
        for j in range(width // 2):
            out[height // 2, j] = (last[2 * j] + last[2 * j + 1] + 1) >> 1
        if width % 2:
            out[height // 2, width // 2] = last[width - 1]


@numba.njit(cache=True, nogil=True)
def halve_floats(source: np.ndarray, out: np.ndarray) -> None:
    """Mean of each 2 × 2 block of a floating image, summed in float64; as `halve_integers` otherwise."""
    height, width = source.shape
    for i in range(out.shape[0]):
        i1 = min(2 * i + 1, height - 1)
        for j in range(out.shape[1]):
            # Where the block is cut, the pixels there are stand in twice: the same mean.
            j1 = min(2 * j + 1, width - 1)
            total = np.float64(source[2 * i, 2 * j]) + np.float64(source[2 * i, j1])
            out[i, j] = 0.25 * (total + np.float64(source[i1, 2 * j]) + np.float64(source[i1, j1]))


@numba.njit(cache=True, nogil=True)
def is_zero(pixels: np.ndarray) -> bool:
    """Whether an (h, w) image is 0 everywhere; stops at the first pixel that is not."""
    for i in range(pixels.shape[0]):
        for j in range(pixels.shape[1]):
            if pixels[i, j] != 0:
                return False
    return True
