"""Polygons to label images by the rule of pixel centres.

Pixel (row i, column j) covers [j, j + 1) × [i, i + 1) and is inside a polygon if its centre (j + 0.5, i + 0.5) is:
an odd number of crossings lie at or left of it. The rule is half-open, so of two polygons that share an edge exactly
one takes a centre on the edge: none is counted twice and none is lost. (The crossing of an edge is computed from its
lower end whichever way round the ring runs, so that it is the same number for both polygons, bit for bit.)
"""

import math

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.geometry.polygons import Rings


def polygons_to_labels(
    rings: Rings,
    values: NDArray[np.integer],
    window: tuple[int, int, int, int],
    *,
    subset: NDArray[np.integer] | None = None,
    overwrite: bool = False,
    out: NDArray[np.int32] | None = None,
) -> NDArray[np.int32]:
    """Paint polygons into a window of the pixel plane.

    Parameters
    ----------
    rings
        The polygons, in pixels. Even-odd: holes stay background.
    values
        (n,) what to paint each polygon with.
    window
        y0, y1, x0, x1; the half-open range of pixels to return. May be negative.
    subset
        Positions of the polygons to paint, in that order. Default: all, in their order.
    overwrite
        Where polygons overlap the first keeps the pixel; if true, the last.
    out
        (y1 - y0, x1 - x0) int32 to use for the result; its values do not matter. Default: made here.

    Returns
    -------
    numpy.ndarray
        (y1 - y0, x1 - x0) int32, 0 where there is no polygon.
    """
    y0, y1, x0, x1 = (int(v) for v in window)
    if y1 < y0 or x1 < x0:
        raise ValueError(f"window {window} has no size: expected y0, y1, x0, x1")
    values = np.ascontiguousarray(values, dtype=np.int32)
    if values.shape != (len(rings),):
        raise ValueError(f"{len(rings)} polygons but values of shape {values.shape}")
    index = np.arange(len(rings), dtype=np.int64) if subset is None else np.asarray(subset, dtype=np.int64)
    if out is None:
        out = np.zeros((y1 - y0, x1 - x0), dtype=np.int32)
    else:
        out[:] = 0
    _paint(rings.coords, rings.ring_offsets, rings.polygon_offsets, index, values, out, y0, x0, overwrite)
    return out


@numba.njit(cache=True, nogil=True)
def rows_in_window(coords, y0, x0, h, w):
    """First row and number of rows of a window that a polygon may reach, 0 rows if its bounding box is outside.

    Parameters
    ----------
    coords
        (n, 2) vertices of all its rings. With a NaN among them it is outside.
    y0, x0, h, w
        The window.
    """
    if coords.shape[0] == 0:
        return y0, 0
    low_x = high_x = coords[0, 0]
    low_y = high_y = coords[0, 1]
    for v in range(coords.shape[0]):
        low_x, high_x = min(low_x, coords[v, 0]), max(high_x, coords[v, 0])
        low_y, high_y = min(low_y, coords[v, 1]), max(high_y, coords[v, 1])
    if not (high_x > x0 and low_x < x0 + w and high_y > y0 and low_y < y0 + h):
        return y0, 0
    row = max(math.floor(low_y), y0)
    return row, min(math.ceil(high_y), y0 + h) - row


@numba.njit(cache=True, nogil=True)
def run_between(a, b, x0, w):
    """Pixels of a window's row, from and up to but without, whose middles lie between two crossings."""
    return max(math.ceil(a - 0.5) - x0, 0), min(math.ceil(b - 0.5) - x0, w)


@numba.njit(cache=True, nogil=True)
def row_crossings(coords, ring_start, ring_stop, ring_offsets, y0, n_rows, starts, xs):
    """Where a polygon's edges cross the middles of rows of pixels.

    Parameters
    ----------
    coords, ring_offsets
        As in `Rings`.
    ring_start, ring_stop
        The polygon's rings.
    y0, n_rows
        Rows y0 to y0 + n_rows - 1, whose middles lie at + 0.5.
    starts
        (>= n_rows + 1,) int64, filled: the crossings of row y0 + i are ``xs[starts[i]:starts[i + 1]]``, ascending.
    xs
        float64 scratch; a longer one is made if it does not suffice.

    Returns
    -------
    numpy.ndarray
        `xs`, or the longer one.
    """
    for i in range(n_rows + 1):
        starts[i] = 0
    for r in range(ring_start, ring_stop):
        for v in range(ring_offsets[r], ring_offsets[r + 1] - 1):
            ay, by = coords[v, 1], coords[v + 1, 1]
            if ay == by:
                continue
            low, high = min(ay, by), max(ay, by)
            first = max(math.ceil(low - 0.5) - y0, 0)
            last = min(math.ceil(high - 0.5) - 1 - y0, n_rows - 1)
            for i in range(first, last + 1):
                starts[i + 1] += 1
    for i in range(n_rows):
        starts[i + 1] += starts[i]
    n = starts[n_rows]
    if n > xs.size:
        xs = np.empty(2 * n, dtype=np.float64)
    # Fill each row from its start while moving the start on; the offsets are moved back at the end.
    for r in range(ring_start, ring_stop):
        for v in range(ring_offsets[r], ring_offsets[r + 1] - 1):
            ax, ay, bx, by = coords[v, 0], coords[v, 1], coords[v + 1, 0], coords[v + 1, 1]
            if ay == by:
                continue
            if ay > by:
                ax, ay, bx, by = bx, by, ax, ay
            first = max(math.ceil(ay - 0.5) - y0, 0)
            last = min(math.ceil(by - 0.5) - 1 - y0, n_rows - 1)
            slope = (bx - ax) / (by - ay)
            for i in range(first, last + 1):
                xs[starts[i]] = ax + (y0 + i + 0.5 - ay) * slope
                starts[i] += 1
    for i in range(n_rows, 0, -1):
        starts[i] = starts[i - 1]
    starts[0] = 0
    for i in range(n_rows):
        for a in range(starts[i] + 1, starts[i + 1]):  # insertion sort: two crossings a row as a rule
            value = xs[a]
            b = a - 1
            while b >= starts[i] and xs[b] > value:
                xs[b + 1] = xs[b]
                b -= 1
            xs[b + 1] = value
    return xs


@numba.njit(cache=True, nogil=True)
def _paint(coords, ring_offsets, polygon_offsets, index, values, out, y0, x0, overwrite):
    h, w = out.shape
    starts = np.empty(h + 1, dtype=np.int64)
    xs = np.empty(256, dtype=np.float64)
    for k in range(index.size):
        p = index[k]
        ring_start, ring_stop = polygon_offsets[p], polygon_offsets[p + 1]
        row, n_rows = rows_in_window(coords[ring_offsets[ring_start] : ring_offsets[ring_stop]], y0, x0, h, w)
        if n_rows == 0:
            continue
        xs = row_crossings(coords, ring_start, ring_stop, ring_offsets, row, n_rows, starts, xs)
        for i in range(n_rows):
            for c in range(starts[i], starts[i + 1] - 1, 2):
                left, right = run_between(xs[c], xs[c + 1], x0, w)
                for x in range(left, right):
                    if overwrite or out[row - y0 + i, x] == 0:
                        out[row - y0 + i, x] = values[p]
