"""How much of each unit square do polygons cover, exactly, and which polygon covers most of it?

The part of a square that lies right of an edge is a trapezoid. Summed over a polygon's edges, with the sign of their
direction, and along each row from left to right, these parts give the area that the polygon covers of every square.
"""

import math

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.geometry.polygons import Rings

_LEAST = 1e-9  # of a square; less is rounding


def largest_shares(rings: Rings, shape: tuple[int, int]) -> NDArray[np.int32]:
    """The polygon that covers most of each square of a grid, if no smaller a part of it lies in no polygon.

    Parameters
    ----------
    rings
        Valid polygons, in squares. They may overlap.
    shape
        (rows, columns) of the grid; square (row, column) is [column, column + 1) × [row, row + 1).

    Returns
    -------
    numpy.ndarray
        (rows, columns) int32, number of the polygon from 1 on, 0 for none. Of polygons that cover the same part it is
        the one whose centroid is nearest to the square's middle, then the first.

    Notes
    -----
    Takes 16 bytes a square.
    """
    owner = np.zeros(shape, dtype=np.int32)
    largest, total = np.zeros(shape), np.zeros(shape, dtype=np.float32)
    _claim(
        rings.coords, rings.ring_offsets, rings.polygon_offsets, rings.exterior, rings.bounds(), rings.centroids(),
        owner, largest, total,
    )  # fmt: skip
    # Where polygons overlap the parts add up to more than the square.
    outside = np.maximum(1.0 - total, 0.0)
    owner[(largest < _LEAST) | (largest < outside - 1e-6)] = 0
    return owner


def covered_shares(rings: Rings, shape: tuple[int, int]) -> NDArray[np.float64]:
    """(rows, columns) float64, the area that a single polygon covers of each square of a grid."""
    if len(rings) != 1:
        raise ValueError(f"{len(rings)} polygons, one expected")
    largest = np.zeros(shape)
    _claim(
        rings.coords, rings.ring_offsets, rings.polygon_offsets, rings.exterior, rings.bounds(), rings.centroids(),
        np.zeros(shape, dtype=np.int32), largest, np.zeros(shape, dtype=np.float32),
    )  # fmt: skip
    return largest


@numba.njit(cache=True, nogil=True)
def _claim(coords, ring_offsets, polygon_offsets, exterior, bounds, centroids, owner, largest, total):
    n_rows, n_columns = owner.shape
    shares = np.zeros(1024)
    for p in range(polygon_offsets.size - 1):
        if not (
            bounds[p, 2] > 0 and bounds[p, 0] < n_columns and bounds[p, 3] > 0 and bounds[p, 1] < n_rows
        ):  # also without rings: NaN
            continue
        x0, y0 = math.floor(bounds[p, 0]), math.floor(bounds[p, 1])
        w = math.ceil(bounds[p, 2]) - x0 + 1
        h = math.ceil(bounds[p, 3]) - y0
        if shares.size < w * h:
            shares = np.zeros(2 * w * h)
        shares[: w * h] = 0.0
        for r in range(polygon_offsets[p], polygon_offsets[p + 1]):
            first, last = ring_offsets[r], ring_offsets[r + 1]
            _add_ring(coords[first:last], exterior[r], x0, y0, w, shares)
        for i in range(max(-y0, 0), min(h, n_rows - y0)):
            covered = 0.0
            for j in range(w):
                covered += shares[i * w + j]
                row, column = y0 + i, x0 + j
                share = min(covered, 1.0)
                if column < 0 or column >= n_columns or share < _LEAST:
                    continue
                total[row, column] += share
                best = largest[row, column]
                if share < best - _LEAST:
                    continue
                if share <= best + _LEAST:
                    other = owner[row, column] - 1
                    if other >= 0 and not _nearer(centroids, p, other, row, column):
                        continue
                largest[row, column] = max(share, best)
                owner[row, column] = p + 1


@numba.njit(cache=True, nogil=True)
def _nearer(centroids, p, other, row, column):
    """Whether the centroid of one polygon is nearer to a square's middle than that of another, or it comes first."""
    x, y = column + 0.5, row + 0.5
    mine = (centroids[p, 0] - x) ** 2 + (centroids[p, 1] - y) ** 2
    theirs = (centroids[other, 0] - x) ** 2 + (centroids[other, 1] - y) ** 2
    return mine < theirs or (mine == theirs and p < other)


@numba.njit(cache=True, nogil=True)
def _add_ring(ring, adds, x0, y0, w, shares):
    """Add what each edge of a ring changes from square to square along the rows; holes are taken off.

    An edge that goes down (y grows) has the squares' right parts on its left hand: a ring whose signed area is
    negative is one that goes down on its left side, and counts as it is.
    """
    twice = 0.0
    ox, oy = ring[0, 0], ring[0, 1]
    for v in range(ring.shape[0] - 1):
        ax, ay = ring[v, 0] - ox, ring[v, 1] - oy
        bx, by = ring[v + 1, 0] - ox, ring[v + 1, 1] - oy
        twice += ax * by - bx * ay
    sign = -1.0 if (twice > 0) == adds else 1.0
    for v in range(ring.shape[0] - 1):
        ax, ay, bx, by = ring[v, 0] - x0, ring[v, 1] - y0, ring[v + 1, 0] - x0, ring[v + 1, 1] - y0
        if ay == by:
            continue
        down = sign
        if ay > by:
            ax, ay, bx, by = bx, by, ax, ay
            down = -sign
        slope = (bx - ax) / (by - ay)
        for row in range(int(ay), math.ceil(by)):
            low, high = max(ay, row), min(by, row + 1)
            if high <= low:
                continue
            left, right = ax + (low - ay) * slope, ax + (high - ay) * slope
            if left > right:
                left, right = right, left
            first, last = int(left), int(right)
            for column in range(first, last + 1):
                height = high - low
                middle = 0.5 * (left + right)
                if last > first:  # only the piece within this column
                    start, stop = max(left, column), min(right, column + 1)
                    height *= (stop - start) / (right - left)
                    middle = 0.5 * (start + stop)
                here = down * height * (column + 1 - middle)
                at = row * w + column
                shares[at] += here
                if column + 1 < w:
                    shares[at + 1] += down * height - here
