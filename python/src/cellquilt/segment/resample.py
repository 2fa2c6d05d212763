"""Resizing on one lattice for the whole slide.

A part of the slide resized here has, for each of its pixels, the same value as if the whole slide had been resized:
positions are counted from the slide's origin and the order of additions does not depend on the part.
"""

import numba
import numpy as np


def taps(positions: np.ndarray, reach: float, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights of linear interpolation along one axis.

    Parameters
    ----------
    positions
        (n,) float64 coordinates to sample at; pixel centres lie at integers.
    reach
        Half-width of the triangular kernel in pixels: 1 is plain linear interpolation; when an image is made smaller
        by a factor, that factor, against aliasing.
    start, stop
        First pixel there is, and one past the last. Taps beyond are left out and the weights rescaled.

    Returns
    -------
    first : numpy.ndarray
        (n,) int64 first pixel of the taps, counted from `start`.
    weights : numpy.ndarray
        (n, k) float32, rows sum to 1.
    """
    count = int(np.ceil(2 * reach)) + 1
    first = np.ceil(positions - reach - 1e-9).astype(np.int64)
    index = first[:, None] + np.arange(count)
    weights = np.maximum(0.0, 1.0 - np.abs(index - positions[:, None]) / reach)
    weights[(index < start) | (index >= stop)] = 0.0
    total = weights.sum(axis=1, keepdims=True)
    outside = total[:, 0] <= 0
    weights = weights / np.where(total > 0, total, 1.0)
    if outside.any():  # a position more than a pixel outside: repeat the edge
        nearest = np.clip(np.round(positions[outside]).astype(np.int64), start, stop - 1)
        first[outside] = nearest
        weights[outside] = 0.0
        weights[outside, 0] = 1.0
    return first - start, weights.astype(np.float32)


def resample(
    planes: np.ndarray, rows: tuple[np.ndarray, np.ndarray], columns: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Separable interpolation.

    Parameters
    ----------
    planes
        (C, h, w) float32.
    rows, columns
        `taps` along y and x.

    Returns
    -------
    numpy.ndarray
        (C, n_rows, n_columns) float32.
    """
    out = np.empty((planes.shape[0], len(rows[0]), len(columns[0])), dtype=np.float32)
    for channel in range(planes.shape[0]):
        _resample(np.ascontiguousarray(planes[channel]), *rows, *columns, out[channel])
    return out


@numba.njit(cache=True, nogil=True)
def _resample(plane, first_y, weight_y, first_x, weight_x, out):  # type: ignore[no-untyped-def]
    _height, width = plane.shape
    line = np.empty(width, np.float32)
    for i in range(out.shape[0]):
        line[:] = 0.0
        for k in range(weight_y.shape[1]):
            w = weight_y[i, k]
            if w > 0:
                y = first_y[i] + k
                for x in range(width):
                    line[x] += w * plane[y, x]
        for j in range(out.shape[1]):
            total = np.float32(0.0)
            for k in range(weight_x.shape[1]):
                w = weight_x[j, k]
                if w > 0:
                    total += w * line[first_x[j] + k]
            out[i, j] = total
