"""How far points of the plane are from each other and from outlines."""

import math

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellquilt.geometry.polygons import Rings


def nearest_distances(xy: ArrayLike) -> NDArray[np.float64]:
    """Distance of each point to the nearest other point.

    Parameters
    ----------
    xy
        (n, 2) finite coordinates.

    Returns
    -------
    numpy.ndarray
        (n,) float64 in units of the coordinates; 0 where two points are in one place, inf for a single point.

    Notes
    -----
    Exact. Points are sorted into squares, about one a point: 40 bytes a point, and time that grows with their number
    where they are spread about evenly.
    """
    xy = np.ascontiguousarray(xy, dtype=np.float64).reshape(-1, 2)
    if len(xy) < 2:
        return np.full(len(xy), np.inf)
    low, span = xy.min(axis=0), np.ptp(xy, axis=0)
    # Points on a line, too, have no more squares than points; and never so fine that rounding counts.
    size = max(math.sqrt(span[0] * span[1] / len(xy)), span.max() / len(xy), 1e-9 * float(np.abs(xy).max()), 1e-300)
    column, row = (((xy - low) / size).astype(np.int64)).T
    n_columns, n_rows = int(column.max()) + 1, int(row.max()) + 1
    square = row * n_columns + column
    order = np.argsort(square, kind="stable")
    starts = np.searchsorted(square[order], np.arange(n_columns * n_rows + 1))
    return _nearest(xy, order, starts, column, row, n_columns, n_rows, size)


def median_spacing(xy: ArrayLike) -> float | None:
    """Median distance of points to their nearest other; None for fewer than three, which tell nothing."""
    distances = nearest_distances(xy)
    return float(np.median(distances)) if distances.size >= 3 else None


def outline_distances(
    rings: Rings, polygon: NDArray[np.int64], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance of each point to the outline, holes included, of a polygon of its own.

    Parameters
    ----------
    rings
        Polygons.
    polygon
        (n,) position of each point's polygon.
    x, y
        (n,) coordinates.

    Returns
    -------
    numpy.ndarray
        (n,) float64, inside the polygon as outside; inf where it is empty.
    """
    return _outline_distances(rings.coords, rings.ring_offsets, rings.polygon_offsets, polygon, x, y)


@numba.njit(cache=True, nogil=True)
def _outline_distances(coords, ring_offsets, polygon_offsets, polygon, x, y):
    out = np.empty(x.size)
    for i in range(x.size):
        best = np.inf
        p = polygon[i]
        for r in range(polygon_offsets[p], polygon_offsets[p + 1]):
            for v in range(ring_offsets[r], ring_offsets[r + 1] - 1):
                ax, ay = coords[v, 0], coords[v, 1]
                dx, dy = coords[v + 1, 0] - ax, coords[v + 1, 1] - ay
                length = dx * dx + dy * dy
                along = ((x[i] - ax) * dx + (y[i] - ay) * dy) / length if length > 0 else 0.0
                along = min(max(along, 0.0), 1.0)
                best = min(best, (x[i] - ax - along * dx) ** 2 + (y[i] - ay - along * dy) ** 2)
        out[i] = math.sqrt(best)
    return out


@numba.njit(cache=True, nogil=True)
def _nearest(xy, order, starts, column, row, n_columns, n_rows, size):
    out = np.empty(xy.shape[0])
    for k in range(xy.shape[0]):
        i = order[k]
        best = np.inf
        ring = 0
        # All that is not within the rings looked at is at least one square less far than their number.
        while ring <= max(n_columns, n_rows) and best > (max(ring - 1, 0) * size) ** 2:
            for r in range(max(row[i] - ring, 0), min(row[i] + ring, n_rows - 1) + 1):
                whole = r == row[i] - ring or r == row[i] + ring
                for c in range(column[i] - ring, column[i] + ring + 1, 1 if whole else max(2 * ring, 1)):
                    if c < 0 or c >= n_columns:
                        continue
                    for s in range(starts[r * n_columns + c], starts[r * n_columns + c + 1]):
                        j = order[s]
                        if j != i:
                            best = min(best, (xy[j, 0] - xy[i, 0]) ** 2 + (xy[j, 1] - xy[i, 1]) ** 2)
            ring += 1
        out[i] = math.sqrt(best)
    return out
