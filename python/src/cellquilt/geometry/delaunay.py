"""Delaunay triangulation of cells in the plane: a sweep from the middle outwards, with flips.

Points are added in the order of their distance from the middle, each joined with the part of the convex hull that it
sees; triangles whose circle holds the opposite point are flipped (Lawson 1977; Sinclair, "S-hull: a fast radial
sweep-hull routine for Delaunay triangulation", 2010). A triangulation is unique but where four points lie on a circle:
where a decision is that near, `triangulate` says so and leaves it to Qhull, whose choice others share.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import Delaunay, QhullError

#: Signs of determinants smaller than this part of their terms are not sure in double precision.
_UNSURE = 1e-12


def triangulate(xy: NDArray[np.float64]) -> NDArray[np.int32] | None:
    """Edges of the Delaunay triangulation.

    Parameters
    ----------
    xy
        (n, 2) distinct points, 3 or more.

    Returns
    -------
    numpy.ndarray or None
        (n_edges, 2) int32; None where points are so regular that a sign is not sure.
    """
    found = _swept(xy)
    if found is None:
        return None
    triangles, twins = found
    half = np.arange(triangles.size)
    once = half > twins  # each edge of two triangles by one of its halves; those of the hull have no twin (-1)
    after = np.where(half % 3 == 2, half - 2, half + 1)
    return np.column_stack([triangles[once], triangles[after[once]]])


def triangles_of(xy: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Triangles of the Delaunay triangulation, counter-clockwise where x points right and y up.

    Parameters
    ----------
    xy
        (n, 2) distinct points.

    Returns
    -------
    triangles : numpy.ndarray
        (m, 3) int32 points; none if all lie on a line.
    twins : numpy.ndarray
        (3 m,) int32: half-edge h leads from corner h % 3 of triangle h // 3 to its next one; its twin is the same edge
        of the neighbour, -1 on the hull.
    """
    found = _swept(xy) if len(xy) > 2 else None
    if found is not None:
        return found[0].reshape(-1, 3), found[1]
    try:
        corners = Delaunay(xy).simplices.astype(np.int32) if len(xy) > 2 else np.empty((0, 3), np.int32)
    except QhullError:
        corners = np.empty((0, 3), np.int32)
    a, b = corners.ravel().astype(np.int64), corners[:, [1, 2, 0]].ravel().astype(np.int64)
    edge = np.minimum(a, b) * len(xy) + np.maximum(a, b)
    order = np.argsort(edge, kind="stable")
    same = np.flatnonzero(edge[order[1:]] == edge[order[:-1]])
    twins = np.full(edge.size, -1, dtype=np.int32)
    twins[order[same]], twins[order[same + 1]] = order[same + 1], order[same]
    return corners, twins


def _swept(xy: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """Corners of all triangles, one after the other, and the twins of their half-edges; None if a sign is not sure."""
    # About the middle, so that large coordinates cost no precision.
    points = np.ascontiguousarray(xy - (xy.min(axis=0) + xy.max(axis=0)) / 2)
    seed = _seed(points)
    if seed is None:
        return None
    centre = _circumcentre(*points[seed])
    order = np.argsort(((points - centre) ** 2).sum(axis=1), kind="stable")
    kernel: Any = _sweep
    triangles, twins, sure = kernel(points, order, seed, centre)
    return (triangles, twins) if sure and triangles.size else None


def _seed(points: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """Three points near the middle whose circle is small, counter-clockwise; None if all points lie on a line."""
    first = int((points**2).sum(axis=1).argmin())
    far = ((points - points[first]) ** 2).sum(axis=1)
    far[first] = np.inf
    second = int(far.argmin())
    a, b = points[first], points[second]
    side, other = b - a, points - a
    cross = side[0] * other[:, 1] - side[1] * other[:, 0]
    length = (other**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        radius = length * ((points - b) ** 2).sum(axis=1) / cross**2
    radius[[first, second]] = np.inf
    radius[~np.isfinite(radius)] = np.inf
    third = int(radius.argmin())
    if not np.isfinite(radius[third]):
        return None
    return np.array([first, second, third] if cross[third] > 0 else [first, third, second])


def _circumcentre(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    d, e = b - a, c - a
    twice = 2 * (d[0] * e[1] - d[1] * e[0])
    dd, ee = d @ d, e @ e
    return a + np.array([e[1] * dd - d[1] * ee, d[0] * ee - e[0] * dd]) / twice


@numba.njit(inline="always")
def _left(xy, a, b, c):
    """Twice the area of a triangle, above 0 if it is counter-clockwise; 0 where that is not sure."""
    left = (xy[b, 0] - xy[a, 0]) * (xy[c, 1] - xy[a, 1])
    right = (xy[b, 1] - xy[a, 1]) * (xy[c, 0] - xy[a, 0])
    found = left - right
    return found if abs(found) > _UNSURE * (abs(left) + abs(right)) else 0.0


@numba.njit(inline="always")
def _in_circle(xy, a, b, c, d):
    """Above 0 if d lies within the circle of the counter-clockwise triangle a, b, c; 0 where that is not sure."""
    ax, ay = xy[a, 0] - xy[d, 0], xy[a, 1] - xy[d, 1]
    bx, by = xy[b, 0] - xy[d, 0], xy[b, 1] - xy[d, 1]
    cx, cy = xy[c, 0] - xy[d, 0], xy[c, 1] - xy[d, 1]
    aa, bb, cc = ax * ax + ay * ay, bx * bx + by * by, cx * cx + cy * cy
    bc, ca, ab = bx * cy - by * cx, cx * ay - cy * ax, ax * by - ay * bx
    found = aa * bc + bb * ca + cc * ab
    size = aa * (abs(bx * cy) + abs(by * cx)) + bb * (abs(cx * ay) + abs(cy * ax)) + cc * (abs(ax * by) + abs(ay * bx))
    return found if abs(found) > _UNSURE * size else 0.0


@numba.njit(inline="always")
def _bin(x, y, n_bins):
    """Where a direction lies among bins around the middle; grows with its angle."""
    share = x / (abs(x) + abs(y)) if x != 0 or y != 0 else 0.0
    turn = (3.0 - share if y > 0 else 1.0 + share) / 4.0
    return int(turn * n_bins) % n_bins


@numba.njit(cache=True, nogil=True)
def _sweep(xy, order, seed, centre):
    n = len(xy)
    # Half-edge e runs from triangles[e] to the next corner of its triangle; twins[e] is the same edge of the neighbour.
    triangles = np.empty(6 * n, dtype=np.int32)
    twins = np.full(6 * n, -1, dtype=np.int32)
    # The hull, counter-clockwise: the points after and before each, and the half-edge that leaves each along the hull.
    after, before = np.full(n, -1, dtype=np.int64), np.full(n, -1, dtype=np.int64)
    outer = np.full(n, -1, dtype=np.int64)
    n_bins = int(np.ceil(np.sqrt(n)))
    bins = np.full(n_bins, -1, dtype=np.int64)
    stack = np.empty(256, dtype=np.int64)
    for k in range(3):
        point, follower = seed[k], seed[(k + 1) % 3]
        triangles[k] = point
        after[point], before[follower], outer[point] = follower, point, k
        bins[_bin(xy[point, 0] - centre[0], xy[point, 1] - centre[1], n_bins)] = point
    size, entry = 3, seed[0]
    for i in order:
        if i == seed[0] or i == seed[1] or i == seed[2]:
            continue
        # A point of the hull in about this direction, and from it the first edge that the new point sees.
        place = _bin(xy[i, 0] - centre[0], xy[i, 1] - centre[1], n_bins)
        start = entry
        for step in range(n_bins):
            found = bins[(place + step) % n_bins]
            if found >= 0 and after[found] >= 0:
                start = found
                break
        start = before[start]
        edge = start
        while True:
            seen = _left(xy, edge, after[edge], i)
            if seen == 0.0:
                return triangles[:0], twins[:0], False
            if seen < 0:
                break
            edge = after[edge]
            if edge == start:
                return triangles[:0], twins[:0], False
        # What lies behind the first edge found may be seen as well.
        while True:
            seen = _left(xy, before[edge], edge, i)
            if seen == 0.0:
                return triangles[:0], twins[:0], False
            if seen > 0:
                break
            edge = before[edge]
        first, last = edge, edge
        new_outer_in = -1  # half-edge from the first point of the hull to the new one
        shared = -1  # of the latest triangle the half-edge that the next one shares: from the new point to the hull
        while True:
            follower = after[last]
            # Half-edges last → i, i → follower, and follower → last, whose twin is the hull's last → follower.
            triangles[size], triangles[size + 1], triangles[size + 2] = last, i, follower
            beside = outer[last]
            twins[size + 2], twins[beside] = beside, size + 2
            if shared >= 0:
                twins[size], twins[shared] = shared, size
            else:
                new_outer_in = size
            shared = size + 1
            size += 3
            if last != first:
                after[last] = -1
            last = follower
            seen = _left(xy, last, after[last], i)
            if seen == 0.0:
                return triangles[:0], twins[:0], False
            if seen > 0:
                break
        after[first], before[i], after[i], before[last] = i, first, last, i
        outer[first], outer[i] = new_outer_in, shared
        entry = i
        bins[place] = i
        bins[_bin(xy[first, 0] - centre[0], xy[first, 1] - centre[1], n_bins)] = first
        # Flips: every new triangle's edge opposite to the new point.
        for t in range(new_outer_in, size, 3):
            stack[0] = t + 2
            depth = 1
            while depth:
                depth -= 1
                a = stack[depth]
                b = twins[a]
                if b < 0:
                    continue
                a0, b0 = a - a % 3, b - b % 3
                an, ap = a0 + (a + 1) % 3, a0 + (a + 2) % 3
                bn, bp = b0 + (b + 1) % 3, b0 + (b + 2) % 3
                # a: p → q, with the tip (the new point) at ap; b: q → p, with the far point at bp.
                tip, far = triangles[ap], triangles[bp]
                inside = _in_circle(xy, triangles[a], triangles[an], tip, far)
                if inside == 0.0:
                    return triangles[:0], twins[:0], False
                if inside < 0:
                    continue
                # The edge p–q becomes tip–far: triangles (p → far → tip) in a's place and (q → tip → far) in b's.
                across_an, across_bn = twins[ap], twins[bp]
                triangles[a], triangles[b] = far, tip
                twins[a], twins[b] = across_bn, across_an
                if across_bn >= 0:
                    twins[across_bn] = a
                else:
                    outer[triangles[a]] = a
                if across_an >= 0:
                    twins[across_an] = b
                else:
                    outer[triangles[b]] = b
                twins[ap], twins[bp] = bp, ap
                if depth + 2 > stack.size:
                    larger = np.empty(2 * stack.size, dtype=np.int64)
                    larger[:depth] = stack[:depth]
                    stack = larger
                stack[depth] = a
                stack[depth + 1] = bn
                depth += 2
    return triangles[:size], twins[:size], True
