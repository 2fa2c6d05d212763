"""Outlines with few corners, and the same area.

The viewer draws polygons of a fixed number of corners. One corner after the other is taken away: of four corners
A, B, C, D in a row the middle two become one, E, which lies where A, E, D encloses with the line A, D the same area as
A, B, C, D did, on the line of A and B or that of C and D. The pair that moves the least area goes first (after
Kronenfeld, Stanislawski, Buttenfield and Brockmeyer 2020). What crosses itself afterwards, which is rare, is done
again by leaving out the corner of the smallest triangle, and then stretched to its area.
"""

import numba
import numpy as np
import shapely
from numpy.typing import NDArray

from cellquilt.geometry.polygonize import simple_rings
from cellquilt.geometry.polygons import Rings

#: Corners that the machine's own polygons have at most, the first repeated as last.
MAX_VERTICES = 25


def simplified(rings: Rings, max_vertices: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The largest part of each polygon, without holes, with few corners.

    Parameters
    ----------
    rings
        n polygons.
    max_vertices
        Most corners, the first repeated as last; at least 5.

    Returns
    -------
    vertices : numpy.ndarray
        (n, max_vertices, 2) float64, the last corner repeated to the end; 0 for polygons without rings.
    n_vertices : numpy.ndarray
        (n,) int32, 0 for polygons without rings.
    """
    whole = simple_rings(rings)
    out = np.zeros((len(rings), max_vertices, 2))
    n_vertices = np.zeros(len(rings), np.int32)
    offsets = whole.ring_offsets[whole.polygon_offsets]
    _simplify(whole.coords, offsets, False, out, n_vertices)
    done = np.flatnonzero(n_vertices > 0)
    crossed = done[~shapely.is_valid(shapely.polygons(out[done]))] if done.size else done
    if crossed.size:
        again = whole.take(crossed)
        vertices, n = np.zeros((crossed.size, max_vertices, 2)), np.zeros(crossed.size, np.int32)
        _simplify(again.coords, again.ring_offsets[again.polygon_offsets], True, vertices, n)
        out[crossed], n_vertices[crossed] = vertices, n
    return out, n_vertices


@numba.njit(cache=True, nogil=True)
def _cross(ax, ay, bx, by, cx, cy):
    """Twice the signed area of a triangle."""
    return (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)


@numba.njit(cache=True, nogil=True)
def _meet(px, py, qx, qy, ux, uy, v):
    """Where the line through p and q meets the points (x, y) with ux · x + uy · y = v; whether it does."""
    slope = ux * (qx - px) + uy * (qy - py)
    if slope == 0.0:
        return False, 0.0, 0.0
    t = (v - ux * px - uy * py) / slope
    if abs(t) > 1e6:
        return False, 0.0, 0.0
    return True, px + t * (qx - px), py + t * (qy - py)


@numba.njit(cache=True, nogil=True)
def _collapse(ax, ay, bx, by, cx, cy, dx, dy):
    """The corner that stands in for B and C, and the area that it moves (infinite if there is none)."""
    # E is on a line beside A, D: cross(A, E, D) is what the corners B and C enclosed with that line.
    area = _cross(ax, ay, bx, by, dx, dy) + _cross(bx, by, cx, cy, dx, dy)
    ux, uy = dy - ay, ax - dx
    v = area + ux * ax + uy * ay
    best, ex, ey = np.inf, 0.0, 0.0
    for side in range(2):
        if side == 0:
            there, x, y = _meet(ax, ay, bx, by, ux, uy, v)
            # E on A, B: what lies between the old line and the new one, on both of its sides.
            moved = abs(_cross(bx, by, x, y, cx, cy)) + abs(_cross(x, y, cx, cy, dx, dy))
        else:
            there, x, y = _meet(cx, cy, dx, dy, ux, uy, v)
            moved = abs(_cross(cx, cy, x, y, bx, by)) + abs(_cross(x, y, bx, by, ax, ay))
        if there and moved < best:
            best, ex, ey = moved, x, y
    return best, ex, ey


@numba.njit(cache=True, nogil=True)
def _simplify(coords, offsets, plain, out, n_out):
    """Fill `out` with the corners of each ring; `plain` leaves corners out and stretches, which never moves one."""
    limit = out.shape[1] - 1
    longest = 0
    for p in range(offsets.size - 1):
        longest = max(longest, offsets[p + 1] - offsets[p])
    xs, ys = np.empty(longest + 1), np.empty(longest + 1)
    after, before = np.empty(longest + 1, np.int64), np.empty(longest + 1, np.int64)
    cost = np.empty(longest + 1)
    for p in range(offsets.size - 1):
        n = 0
        for i in range(offsets[p], offsets[p + 1] - 1):
            x, y = coords[i, 0], coords[i, 1]
            # Corners that are none, on straight lines, go first: they would only cost time.
            while n >= 2 and _cross(xs[n - 2], ys[n - 2], xs[n - 1], ys[n - 1], x, y) == 0.0:
                n -= 1
            if n and xs[n - 1] == x and ys[n - 1] == y:
                continue
            xs[n], ys[n] = x, y
            n += 1
        while n > 3 and _cross(xs[n - 2], ys[n - 2], xs[n - 1], ys[n - 1], xs[0], ys[0]) == 0.0:
            n -= 1
        if n < 3:
            continue
        wanted = 0.0
        for i in range(n):
            j = (i + 1) % n
            wanted += (xs[i] - xs[0]) * (ys[j] - ys[0]) - (xs[j] - xs[0]) * (ys[i] - ys[0])
            after[i], before[i] = j, (i - 1) % n
        left, first = n, 0
        for i in range(n):
            cost[i] = _cost(xs, ys, after, before, i, plain)
        while left > limit:
            least, place, i = np.inf, -1, first
            for _ in range(left):
                if cost[i] < least:
                    least, place = cost[i], i
                i = after[i]
            if place < 0:
                place = first
            b, c = place, after[place]
            if plain or least == np.inf:
                gone = b
            else:
                _, x, y = _collapse(
                    xs[before[b]], ys[before[b]], xs[b], ys[b], xs[c], ys[c], xs[after[c]], ys[after[c]]
                )
                xs[b], ys[b] = x, y
                gone = c
            after[before[gone]], before[after[gone]] = after[gone], before[gone]
            if first == gone:
                first = after[gone]
            left -= 1
            i = before[before[before[after[gone]]]]
            for _ in range(5):
                cost[i] = _cost(xs, ys, after, before, i, plain)
                i = after[i]
        area, middle_x, middle_y, i = 0.0, 0.0, 0.0, first
        for k in range(left):
            j = after[i]
            area += (xs[i] - xs[first]) * (ys[j] - ys[first]) - (xs[j] - xs[first]) * (ys[i] - ys[first])
            middle_x += xs[i] / left
            middle_y += ys[i] / left
            out[p, k, 0], out[p, k, 1] = xs[i], ys[i]
            i = j
        if area * wanted > 0.0 and plain:
            by = np.sqrt(wanted / area)
            for k in range(left):
                out[p, k, 0] = middle_x + by * (out[p, k, 0] - middle_x)
                out[p, k, 1] = middle_y + by * (out[p, k, 1] - middle_y)
        for k in range(left, out.shape[1]):
            out[p, k] = out[p, 0]
        n_out[p] = left + 1


@numba.njit(cache=True, nogil=True)
def _cost(xs, ys, after, before, b, plain):
    a, c = before[b], after[b]
    if plain:
        return abs(_cross(xs[a], ys[a], xs[b], ys[b], xs[c], ys[c]))
    d = after[c]
    moved, _, _ = _collapse(xs[a], ys[a], xs[b], ys[b], xs[c], ys[c], xs[d], ys[d])
    return moved
