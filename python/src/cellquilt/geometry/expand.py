"""Growing labels by a distance, each pixel to its nearest label.

The squared distance between pixel centres is exact (whole numbers) and found in two passes over the image, along
columns, then along rows by the lower envelope of parabolas (Meijster, Roerdink and Hesselink 2000; Felzenszwalb and
Huttenlocher 2012), whatever the distance. Where several seed pixels are equally near, the one in the leftmost column
wins, of those the upper one: the choice depends on positions alone, never on where a tile begins or how labels are
numbered.
"""

import numba
import numpy as np
from numpy.typing import NDArray


def expand_labels(
    labels: NDArray[np.int32],
    distance_px: float,
    *,
    out: NDArray[np.int32] | None = None,
    scratch: NDArray[np.int32] | None = None,
) -> NDArray[np.int32]:
    """Give every background pixel within a distance the nearest label.

    A straight outline moves outwards by exactly `distance_px` if that is a whole number.

    Parameters
    ----------
    labels
        (h, w) int32, 0 is background.
    distance_px
        Largest distance between the centres of a pixel and of the seed pixel that it takes its label from.
    out, scratch
        (h, w) int32 to use for the result and for the work; their values do not matter. Default: made here.

    Returns
    -------
    numpy.ndarray
        (h, w) int32. A window of it is the same whether computed from the whole image or from the window with a rim
        of `distance_px`.

    Notes
    -----
    Time and memory grow with the number of pixels only: one int32 plane besides the result.
    """
    labels = np.ascontiguousarray(labels, dtype=np.int32)
    if not distance_px >= 0:
        raise ValueError(f"distance_px must be 0 or more, got {distance_px}")
    out = np.empty_like(labels) if out is None else out
    if distance_px < 1 or labels.size == 0:
        out[:] = labels
        return out
    h, w = labels.shape
    reach = min(float(distance_px), float(h + w))  # no two pixels are farther apart
    _expand(labels, int(np.floor(reach * reach + 1e-9)), np.empty_like(labels) if scratch is None else scratch, out)
    return out


@numba.njit(cache=True, nogil=True)
def _lower_envelope(steps, reach, column, height, begin):
    """Of a row's parabolas those that are lowest somewhere, by Felzenszwalb and Huttenlocher (2012).

    Parameters
    ----------
    steps
        (w,) int32, distance from each pixel along its column to a seed, either sign.
    reach
        Columns whose seed is farther have no parabola.
    column, height, begin
        (w,) int32, int64, int32, filled: column of each parabola, its squared distance there, and the first pixel
        where it is lowest.

    Returns
    -------
    int
        How many there are.
    """
    n = 0
    w = steps.size
    for u in range(w):
        g = np.int64(abs(steps[u]))
        if g > reach:
            continue
        g *= g
        start = np.int64(0)
        while n > 0:
            i = np.int64(column[n - 1])
            # Strictly beyond this point u is lower than i; at it they are equal and i, further left, stays.
            start = (np.int64(u) * u - i * i + g - height[n - 1]) // (2 * (u - i)) + 1
            if start > begin[n - 1]:
                break
            n -= 1
            start = np.int64(0)
        if start < w:
            column[n] = u
            height[n] = g
            begin[n] = start
            n += 1
    return n


@numba.njit(cache=True, nogil=True)
def _expand(labels, limit, down, out):
    """`limit` is the largest squared distance; `down` and `out`, (h, w) int32, are filled."""
    h, w = labels.shape
    far = np.int32(h + w + 1)
    reach = 0
    while (reach + 1) * (reach + 1) <= limit:
        reach += 1
    # down[y, x]: rows from the pixel to the nearest seed of its column, negative if that is above; `far` if none.
    any_seed = np.zeros(h, dtype=np.bool_)
    run = np.full(w, far, dtype=np.int32)
    for y in range(h - 1, -1, -1):
        for x in range(w):
            step = np.int32(0) if labels[y, x] != 0 else np.int32(run[x] + 1)
            run[x] = min(step, far)
            down[y, x] = run[x]
    run[:] = far
    for y in range(h):
        near = far
        for x in range(w):
            step = np.int32(0) if labels[y, x] != 0 else np.int32(run[x] + 1)
            run[x] = min(step, far)
            d = down[y, x]
            if run[x] <= d and run[x] < far:  # at the same distance the upper one
                d = -run[x]
                down[y, x] = d
            near = min(near, abs(d))
        any_seed[y] = near <= reach
    column = np.empty(w, dtype=np.int32)
    height = np.empty(w, dtype=np.int64)
    begin = np.empty(w, dtype=np.int32)
    for y in range(h):
        out[y] = 0
        if not any_seed[y]:
            continue
        n = _lower_envelope(down[y], reach, column, height, begin)
        k = 0
        for x in range(w):
            if labels[y, x] != 0:
                out[y, x] = labels[y, x]
                continue
            while k + 1 < n and begin[k + 1] <= x:
                k += 1
            dx = np.int64(x - column[k])
            if dx * dx + height[k] <= limit:
                out[y, x] = labels[y + down[y, column[k]], column[k]]


@numba.njit(cache=True, nogil=True)
def squared_distance(seeds, out):
    """Squared distance of every pixel to the nearest seed pixel, exact.

    Parameters
    ----------
    seeds
        (h, w) bool or integer, seeds where not 0.
    out
        (h, w) int32, filled; the largest int32 everywhere if there is no seed.
    """
    h, w = seeds.shape
    none = np.int32(2147483647)
    far = np.int64(h + w + 1)
    for x in range(w):
        steps = far
        for y in range(h):
            steps = np.int64(0) if seeds[y, x] != 0 else min(steps + 1, far)
            out[y, x] = steps
        steps = far
        for y in range(h - 1, -1, -1):
            steps = np.int64(0) if seeds[y, x] != 0 else min(steps + 1, far)
            out[y, x] = min(out[y, x], steps)
    column = np.empty(w, dtype=np.int32)
    height = np.empty(w, dtype=np.int64)
    begin = np.empty(w, dtype=np.int32)
    for y in range(h):
        n = _lower_envelope(out[y], far - 1, column, height, begin)
        k = 0
        for x in range(w):
            if n == 0:
                out[y, x] = none
                continue
            while k + 1 < n and begin[k + 1] <= x:
                k += 1
            dx = np.int64(x - column[k])
            out[y, x] = dx * dx + height[k]
