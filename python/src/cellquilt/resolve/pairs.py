"""Which polygons overlap, and by how much."""

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.geometry.packed import Polygons
from cellquilt.geometry.polygons import Rings, offsets_of

_PAIRS_AT_ONCE = 8192


def box_pairs(
    bounds: NDArray[np.float64], group: NDArray[np.integer] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of boxes that share some area.

    Parameters
    ----------
    bounds
        (n, 4) float64: min x, min y, max x, max y. A box with NaN is in no pair.
    group
        (n,) if given, only pairs of different groups.

    Returns
    -------
    a, b
        (n_pairs,) int64 positions, a < b, ordered by a, then b.
    """
    bounds = np.ascontiguousarray(bounds, dtype=np.float64)
    n = len(bounds)
    if group is None:
        codes = np.full(n, -1, dtype=np.int64)
    else:
        codes = np.ascontiguousarray(np.unique(group, return_inverse=True)[1], dtype=np.int64)
    known = np.isfinite(bounds).all(axis=1)
    subset = np.flatnonzero(known)
    if group is not None and subset.size:
        subset = subset[_meets_another_group(bounds[subset], codes[subset])]
    if subset.size < 2:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    boxes = bounds[subset]
    low = boxes[:, :2].min(axis=0)
    extent = np.maximum(boxes[:, 2:].max(axis=0) - low, 1e-300)
    # Bins about as wide as two boxes, and no more of them than a few for each box.
    size = np.maximum(2 * (boxes[:, 2:] - boxes[:, :2]).mean(axis=0), extent / 32_768)
    size = np.maximum(size * max(1.0, np.sqrt(np.prod(extent / size) / (4 * subset.size + 16))), 1e-300)
    a, b = _pairs_by_bin(boxes, codes[subset], low[0], low[1], size[0], size[1])
    a, b = subset[a], subset[b]
    order = np.lexsort((b, a))
    return a[order], b[order]


def overlap_areas(rings: Rings, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """Area shared by the polygons of each pair, exact but for rounding (exact for polygons on the pixel lattice).

    A polygon is the signed sum of the trapezoids below its edges, so what two polygons share is the signed sum, over
    pairs of their edges, of what two trapezoids share: the area below the lower of two lines. No intersection is ever
    built.

    Parameters
    ----------
    rings
        Valid polygons (no ring crosses itself or another one).
    a, b
        (n_pairs,) positions.

    Returns
    -------
    numpy.ndarray
        (n_pairs,) float64.
    """
    return _overlap_areas(
        rings.coords,
        rings.ring_offsets,
        rings.polygon_offsets,
        rings.exterior,
        np.ascontiguousarray(a, dtype=np.int64),
        np.ascontiguousarray(b, dtype=np.int64),
    )


def shared_areas(polygons: Polygons, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """`overlap_areas` of many polygons, some thousand pairs at a time: quickest if successive pairs are near."""
    out = np.empty(a.size)
    for start in range(0, a.size, _PAIRS_AT_ONCE):
        pairs = np.stack([a[start : start + _PAIRS_AT_ONCE], b[start : start + _PAIRS_AT_ONCE]])
        held, position = np.unique(pairs, return_inverse=True)
        i, j = position.reshape(2, -1)
        out[start : start + _PAIRS_AT_ONCE] = overlap_areas(polygons.rings(held), i, j)
    return out


def neighbours_of(n: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs as lists: i's partners are ``partners[offsets[i]:offsets[i + 1]]``, ascending."""
    source = np.concatenate([a, b])
    target = np.concatenate([b, a])
    order = np.lexsort((target, source))
    return offsets_of(np.bincount(source, minlength=n).astype(np.int64)), target[order]


def _meets_another_group(bounds: NDArray[np.float64], codes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether a box meets the bounding box of any other group: only the cells in patch overlaps do."""
    n_groups = int(codes.max()) + 1
    extents = np.full((n_groups, 4), np.nan)
    _group_extents(bounds, codes, extents)
    a, b = box_pairs(extents)
    offsets, partners = neighbours_of(n_groups, a, b)
    return _meets(bounds, codes, extents, offsets, partners)


@numba.njit(cache=True, nogil=True)
def _group_extents(bounds, codes, extents):
    for i in range(codes.size):
        g = codes[i]
        if np.isnan(extents[g, 0]):
            extents[g] = bounds[i]
        else:
            extents[g, 0] = min(extents[g, 0], bounds[i, 0])
            extents[g, 1] = min(extents[g, 1], bounds[i, 1])
            extents[g, 2] = max(extents[g, 2], bounds[i, 2])
            extents[g, 3] = max(extents[g, 3], bounds[i, 3])


@numba.njit(cache=True, nogil=True)
def _share(p, q):
    return p[0] < q[2] and q[0] < p[2] and p[1] < q[3] and q[1] < p[3]


@numba.njit(cache=True, nogil=True)
def _meets(bounds, codes, extents, offsets, partners):
    out = np.zeros(codes.size, dtype=np.bool_)
    for i in range(codes.size):
        for k in range(offsets[codes[i]], offsets[codes[i] + 1]):
            if _share(bounds[i], extents[partners[k]]):
                out[i] = True
                break
    return out


@numba.njit(cache=True, nogil=True)
def _pairs_by_bin(boxes, codes, x0, y0, width, height):
    """Boxes in a grid of bins; a pair is taken in the bin of the upper left corner of what the boxes share."""
    n = codes.size
    n_x = n_y = 1
    for i in range(n):
        n_x = max(n_x, int((boxes[i, 2] - x0) / width) + 1)
        n_y = max(n_y, int((boxes[i, 3] - y0) / height) + 1)
    offsets = np.zeros(n_x * n_y + 1, dtype=np.int64)
    for i in range(n):
        for by in range(int((boxes[i, 1] - y0) / height), int((boxes[i, 3] - y0) / height) + 1):
            for bx in range(int((boxes[i, 0] - x0) / width), int((boxes[i, 2] - x0) / width) + 1):
                offsets[by * n_x + bx + 1] += 1
    for k in range(n_x * n_y):
        offsets[k + 1] += offsets[k]
    members = np.empty(offsets[-1], dtype=np.int64)
    place = offsets[:-1].copy()
    for i in range(n):
        for by in range(int((boxes[i, 1] - y0) / height), int((boxes[i, 3] - y0) / height) + 1):
            for bx in range(int((boxes[i, 0] - x0) / width), int((boxes[i, 2] - x0) / width) + 1):
                members[place[by * n_x + bx]] = i
                place[by * n_x + bx] += 1
    a = np.empty(4 * n + 16, dtype=np.int64)
    b = np.empty(4 * n + 16, dtype=np.int64)
    count = 0
    for k in range(n_x * n_y):
        for s in range(offsets[k], offsets[k + 1]):
            i = members[s]
            for t in range(s + 1, offsets[k + 1]):
                j = members[t]
                if (codes[i] == codes[j] and codes[i] >= 0) or not _share(boxes[i], boxes[j]):
                    continue
                bx = int((max(boxes[i, 0], boxes[j, 0]) - x0) / width)
                by = int((max(boxes[i, 1], boxes[j, 1]) - y0) / height)
                if by * n_x + bx != k:
                    continue
                if count == a.size:
                    longer = np.empty(2 * count, dtype=np.int64)
                    longer[:count] = a
                    a = longer
                    longer = np.empty(2 * count, dtype=np.int64)
                    longer[:count] = b
                    b = longer
                a[count] = i
                b[count] = j
                count += 1
    return a[:count].copy(), b[:count].copy()


@numba.njit(cache=True, nogil=True)
def _ring_signs(coords, ring_offsets, exterior):
    """+1 for a ring whose vertices run the way round that makes parts positive and holes negative, else -1."""
    out = np.empty(exterior.size)
    for r in range(exterior.size):
        first = ring_offsets[r]
        area = 0.0
        ox, oy = coords[first, 0], coords[first, 1]
        for i in range(first, ring_offsets[r + 1] - 1):
            area += (coords[i, 0] - ox) * (coords[i + 1, 1] - oy) - (coords[i + 1, 0] - ox) * (coords[i, 1] - oy)
        out[r] = 1.0 if (area > 0) == exterior[r] else -1.0
    return out


@numba.njit(cache=True, nogil=True)
def _edges_between(p, coords, ring_offsets, polygon_offsets, signs, x0, x1, base, edges):
    """A polygon's edges over (x0, x1), left end first: x, y above base, x, y above base, sign. Vertical ones left out.

    Returns how many there are and `edges`, or a longer array.
    """
    first = ring_offsets[polygon_offsets[p]]
    last = ring_offsets[polygon_offsets[p + 1]]
    if last - first > edges.shape[0]:
        edges = np.empty((2 * (last - first), 5))
    n = 0
    for r in range(polygon_offsets[p], polygon_offsets[p + 1]):
        for i in range(ring_offsets[r], ring_offsets[r + 1] - 1):
            ax, bx = coords[i, 0], coords[i + 1, 0]
            if ax == bx or max(ax, bx) <= x0 or min(ax, bx) >= x1:
                continue
            if ax < bx:
                edges[n, 0], edges[n, 1], edges[n, 2], edges[n, 3] = (
                    ax,
                    coords[i, 1] - base,
                    bx,
                    coords[i + 1, 1] - base,
                )
                edges[n, 4] = signs[r]
            else:
                edges[n, 0], edges[n, 1], edges[n, 2], edges[n, 3] = (
                    bx,
                    coords[i + 1, 1] - base,
                    ax,
                    coords[i, 1] - base,
                )
                edges[n, 4] = -signs[r]
            n += 1
    return n, edges


@numba.njit(cache=True, nogil=True)
def _overlap_areas(coords, ring_offsets, polygon_offsets, exterior, a, b):
    signs = _ring_signs(coords, ring_offsets, exterior)
    n_polygons = polygon_offsets.size - 1
    bounds = np.full((n_polygons, 4), np.nan)
    for p in range(n_polygons):
        for i in range(ring_offsets[polygon_offsets[p]], ring_offsets[polygon_offsets[p + 1]]):
            x, y = coords[i, 0], coords[i, 1]
            if not bounds[p, 0] <= x:
                bounds[p, 0] = x
            if not bounds[p, 1] <= y:
                bounds[p, 1] = y
            if not bounds[p, 2] >= x:
                bounds[p, 2] = x
            if not bounds[p, 3] >= y:
                bounds[p, 3] = y
    out = np.zeros(a.size)
    first_edges = np.empty((128, 5))
    second_edges = np.empty((128, 5))
    for k in range(a.size):
        p, q = bounds[a[k]], bounds[b[k]]
        if not _share(p, q):
            continue
        x0, x1 = max(p[0], q[0]), min(p[2], q[2])
        base = min(p[1], q[1])
        n, first_edges = _edges_between(a[k], coords, ring_offsets, polygon_offsets, signs, x0, x1, base, first_edges)
        m, second_edges = _edges_between(b[k], coords, ring_offsets, polygon_offsets, signs, x0, x1, base, second_edges)
        area = 0.0
        for i in range(n):
            ax0, ay0, ax1, ay1 = first_edges[i, 0], first_edges[i, 1], first_edges[i, 2], first_edges[i, 3]
            for j in range(m):
                left = max(ax0, second_edges[j, 0])
                right = min(ax1, second_edges[j, 2])
                if right <= left:
                    continue
                bx0, by0, by1 = second_edges[j, 0], second_edges[j, 1], second_edges[j, 3]
                a_slope = (ay1 - ay0) / (ax1 - ax0)
                b_slope = (by1 - by0) / (second_edges[j, 2] - bx0)
                a_left, a_right = ay0 + a_slope * (left - ax0), ay0 + a_slope * (right - ax0)
                b_left, b_right = by0 + b_slope * (left - bx0), by0 + b_slope * (right - bx0)
                d_left, d_right = a_left - b_left, a_right - b_right
                if d_left <= 0 and d_right <= 0:
                    below = (a_left + a_right) * (right - left) / 2
                elif d_left >= 0 and d_right >= 0:
                    below = (b_left + b_right) * (right - left) / 2
                else:  # the lines cross in between
                    cross = (right - left) * d_left / (d_left - d_right)
                    height = a_left + a_slope * cross
                    below = (min(a_left, b_left) + height) * cross / 2
                    below += (min(a_right, b_right) + height) * (right - left - cross) / 2
                area += first_edges[i, 4] * second_edges[j, 4] * below
        out[k] = max(area, 0.0)
    return out
