"""Which polygon does a point lie in?

Exact, and by the same half-open rule as `rasterize`: a point is inside a polygon if an odd number of the polygon's
edges cross the point's row at or left of it. An edge's crossing is computed from its lower end, so that it is the same
number for the two polygons that share the edge, and a point on the edge belongs to exactly one of them.

A uniform grid makes it fast. Bins that no edge of their polygon touches are either wholly inside it or wholly outside,
which settles most points by one look-up. In the others, only those edges of the polygon are tested that reach the
bin's row of the grid: a handful, whatever the number of vertices.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellquilt.geometry.polygons import Rings, offsets_of

# About 8 × 8 bins over a typical polygon: most of its area is then in bins without an edge, and a bin costs 4 bytes.
_BINS_PER_POLYGON = 64
_MIN_BINS = 1 << 12
_MAX_BINS = 1 << 25
_MIN_POINTS_PER_THREAD = 1 << 16
_BLOCK = 1 << 20  # points that are put in order together


class PolygonIndex:
    """Locate points in polygons; built once, asked for every batch of points.

    Parameters
    ----------
    rings
        The polygons (even-odd rule: holes and several parts are fine). They may overlap. One with a coordinate that is
        not finite contains nothing.
    z_plane
        (n_polygons,) plane of each polygon, where polygons are outlines in single planes. A point then only lies in
        polygons of its own plane.

    Attributes
    ----------
    n_polygons
        How many polygons there are.

    Notes
    -----
    Memory: 4 bytes a bin (at most 64 bins a polygon, 32 million in all), 4 bytes for each row of bins that an edge
    which is not level reaches, and 4 bytes a vertex where all vertices have whole numbers as coordinates, as outlines
    on the pixel lattice do. Others' coordinates are not copied, and the polygons stay in memory with the index.
    """

    def __init__(self, rings: Rings, *, z_plane: ArrayLike | None = None) -> None:
        self.n_polygons = len(rings)
        self._planes = np.empty(0, dtype=np.int64)
        self.has_planes = z_plane is not None
        if z_plane is not None:
            self._planes = np.ascontiguousarray(z_plane, dtype=np.int64)
            if self._planes.shape != (self.n_polygons,):
                raise ValueError(f"{self.n_polygons} polygons but planes of shape {self._planes.shape}")
        if self.n_polygons >= 1 << 30 or rings.coords.shape[0] >= 1 << 31:
            raise ValueError("more polygons or vertices than 32-bit positions reach")
        self._centroids = rings.centroids()
        bounds = rings.bounds()
        usable = np.isfinite(bounds).all(axis=1) & _all_finite(rings.coords, rings.ring_offsets, rings.polygon_offsets)
        self._empty = not usable.any()
        if self._empty:
            return
        extent = bounds[usable]
        low, high = extent[:, :2].min(axis=0), extent[:, 2:].max(axis=0)
        n_bins = int(np.clip(_BINS_PER_POLYGON * self.n_polygons, _MIN_BINS, _MAX_BINS))
        span = np.maximum(high - low, 1e-9 * (1.0 + np.abs(low) + np.abs(high)))
        # A bin finer than an eighth of a polygon gains nothing where polygons are few and far between.
        size = max(math.sqrt(span[0] * span[1] / n_bins), float(np.median(extent[:, 2:] - extent[:, :2])) / 16)
        size = max(size, float(span.max()) / 2**24)
        n_columns, n_rows = (int(v) for v in np.floor(span / size) + 1)
        # What rounding can shift: bins within this distance of an edge count as touched by it.
        slack = 1e-6 * size + 1e-12 * float(max(np.abs(low).max(), np.abs(high).max()))
        self._frame = (float(low[0]), float(low[1]), float(high[0]), float(high[1]), 1.0 / size, size, slack)
        first_row, rows_of = _rows(bounds, usable, self._frame, n_rows)
        slab_offsets = offsets_of(rows_of)
        self._slabs = (first_row, slab_offsets)
        edge_offsets, edges = _edges_by_row(
            rings.coords,
            rings.ring_offsets,
            rings.polygon_offsets,
            usable,
            self._frame,
            n_rows,
            first_row,
            slab_offsets,
        )
        self._grid, self._list_offsets, self._lists = _fill_grid(
            rings.coords, bounds, usable, self._frame, n_rows, n_columns, first_row, slab_offsets, edge_offsets, edges
        )  # fmt: skip
        self._edge_offsets, self._edges = _without_level(rings.coords, edge_offsets, edges)
        self._coords, self._origins = _compact(rings, bounds, usable)

    def locate(self, xy: ArrayLike, z_plane: ArrayLike | None = None, *, threads: int = 1) -> NDArray[np.int64]:
        """The polygon that each point lies in.

        Parameters
        ----------
        xy
            (n, 2) coordinates.
        z_plane
            (n,) plane of each point; needed if the polygons have planes, and else ignored.
        threads
            How many threads share the points. The result does not depend on it.

        Returns
        -------
        numpy.ndarray
            (n,) int64 position of the polygon, -1 where there is none or a coordinate is not finite. Of several
            polygons that contain a point it is the one whose centroid is nearest, then the first.
        """
        xy = np.asarray(xy, dtype=np.float64).reshape(-1, 2)
        return self.locate_columns(xy[:, 0], xy[:, 1], z_plane, threads=threads)

    def locate_columns(
        self,
        x: ArrayLike,
        y: ArrayLike,
        z_plane: ArrayLike | None = None,
        *,
        matrix: NDArray[np.float64] | None = None,
        threads: int = 1,
    ) -> NDArray[np.int64]:
        """As `locate`, for coordinates in two columns and optionally in another coordinate system.

        Parameters
        ----------
        x, y
            (n,) coordinates.
        z_plane, threads
            As in `locate`.
        matrix
            (3, 3) affine map from the points' coordinates to the polygons'. Default: the same coordinates.

        Raises
        ------
        ValueError
            If the polygons have planes and the points have none.
        """
        x = np.ascontiguousarray(x, dtype=np.float64)
        y = np.ascontiguousarray(y, dtype=np.float64)
        out = np.full(x.size, -1, dtype=np.int64)
        planes = np.empty(0, dtype=np.int64)
        if self.has_planes:
            if z_plane is None:
                raise ValueError("the polygons belong to planes: the points need a z_plane too")
            planes = np.ascontiguousarray(z_plane, dtype=np.int64)
        if self._empty or x.size == 0:
            return out
        affine = np.ascontiguousarray(np.eye(3) if matrix is None else matrix, dtype=np.float64)

        def work(part: slice) -> None:
            _locate(
                x[part], y[part], planes[part] if self.has_planes else planes, affine, self._frame, self._grid,
                self._list_offsets, self._lists, *self._slabs, self._edge_offsets, self._edges, self._coords,
                self._origins, self._centroids, self._planes, out[part],
            )  # fmt: skip

        in_threads(work, x.size, threads, _MIN_POINTS_PER_THREAD)
        return out


def points_in_polygons(xy: ArrayLike, rings: Rings, *, threads: int = 1) -> NDArray[np.int64]:
    """The polygon that each point lies in, for a single batch; see `PolygonIndex.locate`."""
    return PolygonIndex(rings).locate(xy, threads=threads)


def in_threads(work: Callable[[slice], None], n: int, threads: int, at_least: int) -> None:
    """Share the range 0 .. n out to threads in consecutive slices of at least `at_least` items.

    `work` must release the GIL to gain from it, and must not let slices touch each other's results.
    """
    parts = max(1, min(threads, n // max(at_least, 1)))
    if parts == 1:
        work(slice(0, n))
        return
    cuts = [n * k // parts for k in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, [slice(a, b) for a, b in pairwise(cuts)]))


@numba.njit(cache=True, nogil=True)
def _bin(value, low, per_unit, n):
    """The row or column of bins that a coordinate falls in; never decreasing in `value`, also after rounding."""
    return min(max(int((value - low) * per_unit), 0), n - 1)


@numba.njit(cache=True, nogil=True)
def _all_finite(coords, ring_offsets, polygon_offsets):
    n = polygon_offsets.size - 1
    out = np.ones(n, dtype=np.bool_)
    for p in range(n):
        for v in range(ring_offsets[polygon_offsets[p]], ring_offsets[polygon_offsets[p + 1]]):
            if not (math.isfinite(coords[v, 0]) and math.isfinite(coords[v, 1])):
                out[p] = False
                break
    return out


@numba.njit(cache=True, nogil=True)
def _rows(bounds, usable, frame, n_rows):
    """First row of bins of each polygon, and how many it reaches."""
    n = bounds.shape[0]
    first = np.zeros(n, dtype=np.int32)
    count = np.zeros(n, dtype=np.int64)
    for p in range(n):
        if usable[p]:
            first[p] = _bin(bounds[p, 1], frame[1], frame[4], n_rows)
            count[p] = _bin(bounds[p, 3], frame[1], frame[4], n_rows) - first[p] + 1
    return first, count


@numba.njit(cache=True, nogil=True)
def _edges_by_row(coords, ring_offsets, polygon_offsets, usable, frame, n_rows, first_row, slab_offsets):
    """The edges (by their first vertex) of each polygon that reach each of its rows of bins."""
    offsets = np.zeros(slab_offsets[-1] + 1, dtype=np.int64)
    edges = np.empty(0, dtype=np.int32)
    for fill in range(2):
        if fill == 1:
            for s in range(offsets.size - 1):
                offsets[s + 1] += offsets[s]
            edges = np.empty(offsets[-1], dtype=np.int32)
        for p in range(polygon_offsets.size - 1):
            if not usable[p]:
                continue
            base = slab_offsets[p] - first_row[p]
            for r in range(polygon_offsets[p], polygon_offsets[p + 1]):
                for v in range(ring_offsets[r], ring_offsets[r + 1] - 1):
                    ay, by = coords[v, 1], coords[v + 1, 1]
                    low = _bin(min(ay, by), frame[1], frame[4], n_rows)
                    high = _bin(max(ay, by), frame[1], frame[4], n_rows)
                    for s in range(base + low, base + high + 1):
                        if fill == 0:
                            offsets[s + 1] += 1
                        else:
                            edges[offsets[s]] = v
                            offsets[s] += 1
    for s in range(offsets.size - 1, 0, -1):  # filling moved each offset to the next one's place
        offsets[s] = offsets[s - 1]
    offsets[0] = 0
    return offsets, edges


@numba.njit(cache=True, nogil=True)
def _without_level(coords, edge_offsets, edges):
    """Only the edges that can cross a height: on the pixel lattice half of them."""
    offsets = np.zeros_like(edge_offsets)
    for s in range(edge_offsets.size - 1):
        n = 0
        for e in range(edge_offsets[s], edge_offsets[s + 1]):
            n += coords[edges[e], 1] != coords[edges[e] + 1, 1]
        offsets[s + 1] = offsets[s] + n
    out = np.empty(offsets[-1], dtype=np.int32)
    k = 0
    for v in edges:
        if coords[v, 1] != coords[v + 1, 1]:
            out[k] = v
            k += 1
    return offsets, out


def _compact(
    rings: Rings, bounds: NDArray[np.float64], usable: NDArray[np.bool_]
) -> tuple[NDArray[np.int16] | NDArray[np.float64], NDArray[np.float64]]:
    """Vertices in 16 bits where that loses nothing, and what to add to those of each polygon."""
    small = np.zeros(rings.coords.shape, dtype=np.int16)
    origins = np.ascontiguousarray(np.where(usable[:, None], bounds[:, :2], 0.0))
    if _to_16_bits(rings.coords, rings.ring_offsets, rings.polygon_offsets, bounds, usable, small):
        return small, origins
    return rings.coords, np.zeros_like(origins)


@numba.njit(cache=True, nogil=True)
def _to_16_bits(coords, ring_offsets, polygon_offsets, bounds, usable, out):
    """Fill `out` with the distances from each polygon's corner; false if one is no whole number or too long."""
    for p in range(polygon_offsets.size - 1):
        if not usable[p]:
            continue
        for axis in range(2):
            low, high = bounds[p, axis], bounds[p, 2 + axis]
            if high - low > 32767 or max(abs(low), abs(high)) > 2.0**50:
                return False
            for v in range(ring_offsets[polygon_offsets[p]], ring_offsets[polygon_offsets[p + 1]]):
                if coords[v, axis] != np.floor(coords[v, axis]):
                    return False
                out[v, axis] = np.int16(coords[v, axis] - low)
    return True


@numba.njit(cache=True, nogil=True)
def _mark_bins(
    p, coords, frame, first_row, n_slabs, first_column, n_columns, slab, edge_offsets, edges, total_columns, marks
):
    """Sort the bins of a polygon's box into `marks`: 0 outside, 1 touched by an edge, 2 wholly inside.

    On the way, bit 0 of a mark says that an edge touches the bin, and bit 1 that an odd number of edges cross the
    middle of its row within it.
    """
    low_x, low_y, per_unit, size, slack = frame[0], frame[1], frame[4], frame[5], frame[6]
    for i in range(n_slabs * n_columns):
        marks[i] = 0
    for i in range(n_slabs):
        bottom = low_y + (first_row + i) * size - slack
        top = low_y + (first_row + i + 1) * size + slack
        middle = low_y + (first_row + i + 0.5) * size
        at = i * n_columns
        for e in range(edge_offsets[slab + i], edge_offsets[slab + i + 1]):
            v = edges[e]
            ax, ay, bx, by = coords[v, 0], coords[v, 1], coords[v + 1, 0], coords[v + 1, 1]
            if ay > by:
                ax, ay, bx, by = bx, by, ax, ay
            left, right = min(ax, bx), max(ax, bx)
            if by > ay:
                slope = (bx - ax) / (by - ay)
                one = ax + (max(ay, bottom) - ay) * slope
                two = ax + (min(by, top) - ay) * slope
                left = max(left, min(one, two))
                right = min(right, max(one, two))
                if ay <= middle < by:
                    c = _bin(ax + (middle - ay) * slope, low_x, per_unit, total_columns) - first_column
                    c = min(max(c, 0), n_columns - 1)
                    marks[at + c] ^= 2
                    marks[at + c] |= 1
            c0 = max(_bin(left - slack, low_x, per_unit, total_columns) - first_column, 0)
            c1 = min(_bin(right + slack, low_x, per_unit, total_columns) - first_column, n_columns - 1)
            for c in range(c0, c1 + 1):
                marks[at + c] |= 1
        inside = False
        for c in range(n_columns):
            mark = marks[at + c]
            if mark & 2:
                inside = not inside
            if mark & 1:
                marks[at + c] = 1
            else:
                marks[at + c] = 2 if inside else 0


@numba.njit(cache=True, nogil=True)
def _fill_grid(
    coords, bounds, usable, frame, n_rows, n_columns, first_row, slab_offsets, edge_offsets, edges
):  # fmt: skip
    """The polygons of every bin.

    A grid value is -1 for no polygon, ``2 * p + inside`` for one polygon, and ``-2 - k`` for list k of several, which
    holds such values in the order of the polygons.
    """
    grid = np.full((n_rows, n_columns), -1, dtype=np.int32)
    lengths = np.zeros(1024, dtype=np.int64)
    n_lists = 0
    marks = np.empty(1024, dtype=np.uint8)
    offsets = np.zeros(1, dtype=np.int64)
    lists = np.empty(0, dtype=np.int32)
    shares = np.zeros(bounds.shape[0], dtype=np.bool_)  # polygons with a bin that another one has, too
    for fill in range(2):
        if fill == 1:
            offsets = np.zeros(n_lists + 1, dtype=np.int64)
            for k in range(n_lists):
                offsets[k + 1] = offsets[k] + lengths[k]
                lengths[k] = 0
            lists = np.empty(offsets[n_lists], dtype=np.int32)
            if n_lists == 0:
                break
        for p in range(bounds.shape[0]):
            if not usable[p] or (fill == 1 and not shares[p]):
                continue
            rows = slab_offsets[p + 1] - slab_offsets[p]
            left = _bin(bounds[p, 0], frame[0], frame[4], n_columns)
            columns = _bin(bounds[p, 2], frame[0], frame[4], n_columns) - left + 1
            if rows * columns > marks.size:
                marks = np.empty(2 * rows * columns, dtype=np.uint8)
            _mark_bins(
                p, coords, frame, first_row[p], rows, left, columns, slab_offsets[p], edge_offsets, edges, n_columns,
                marks,
            )  # fmt: skip
            for i in range(rows):
                row = first_row[p] + i
                for c in range(columns):
                    mark = marks[i * columns + c]
                    if mark == 0:
                        continue
                    value = 2 * p + (mark == 2)
                    there = grid[row, left + c]
                    if fill == 0:
                        if there == -1:
                            grid[row, left + c] = value
                        elif there >= 0:
                            shares[p] = shares[there >> 1] = True
                            if n_lists == lengths.size:
                                longer = np.zeros(2 * n_lists, dtype=np.int64)
                                longer[:n_lists] = lengths
                                lengths = longer
                            lengths[n_lists] = 2
                            grid[row, left + c] = -2 - n_lists
                            n_lists += 1
                        else:
                            shares[p] = True
                            lengths[-2 - there] += 1
                    elif there <= -2:
                        k = -2 - there
                        lists[offsets[k] + lengths[k]] = value
                        lengths[k] += 1
    return grid, offsets, lists


@numba.njit(cache=True, nogil=True)
def _contains(p, row, x, y, first_row, slab_offsets, edge_offsets, edges, coords, origins):
    """Whether an odd number of the polygon's edges cross the height y at or left of x."""
    slab = slab_offsets[p] + row - first_row[p]
    if slab < slab_offsets[p] or slab >= slab_offsets[p + 1]:
        return False
    inside = False
    for e in range(edge_offsets[slab], edge_offsets[slab + 1]):
        v = edges[e]
        ay, by = origins[p, 1] + coords[v, 1], origins[p, 1] + coords[v + 1, 1]
        if (ay <= y) == (by <= y):
            continue
        ax, bx = origins[p, 0] + coords[v, 0], origins[p, 0] + coords[v + 1, 0]
        if ay > by:
            ax, ay, bx, by = bx, by, ax, ay
        # The same expression as in `rasterize.row_crossings`, so that both agree to the last bit.
        slope = (bx - ax) / (by - ay)
        if ax + (y - ay) * slope <= x:
            inside = not inside
    return inside


@numba.njit(cache=True, nogil=True)
def _locate(
    xs, ys, point_planes, affine, frame, grid, list_offsets, lists, first_row, slab_offsets, edge_offsets, edges,
    coords, origins, centroids, polygon_planes, out,
):  # fmt: skip
    """Locate points in blocks: look all up in the grid, then test the undecided ones row of bins by row of bins.

    Points come in any order, and what a test reads lies all over the memory. Ordered by row, the polygons of a strip
    stay in the processor's cache, which makes the tests about seven times faster.
    """
    low_x, low_y, high_x, high_y, per_unit = frame[0], frame[1], frame[2], frame[3], frame[4]
    n_rows, n_columns = grid.shape
    planes = polygon_planes.size > 0
    block = min(_BLOCK, xs.size)
    value = np.empty(block, dtype=np.int32)
    order = np.empty(block, dtype=np.int32)
    x_of = np.empty(block)
    y_of = np.empty(block)
    value_of = np.empty(block, dtype=np.int32)
    positions = np.empty(block, dtype=np.int32)
    starts = np.empty(n_rows + 1, dtype=np.int64)
    for base in range(0, xs.size, block):
        n = min(block, xs.size - base)
        for i in range(n):
            x = affine[0, 0] * xs[base + i] + affine[0, 1] * ys[base + i] + affine[0, 2]
            y = affine[1, 0] * xs[base + i] + affine[1, 1] * ys[base + i] + affine[1, 2]
            inside = low_x <= x <= high_x and low_y <= y <= high_y  # false where a coordinate is NaN
            row = _bin(y, low_y, per_unit, n_rows) if inside else 0
            column = _bin(x, low_x, per_unit, n_columns) if inside else 0
            value[i] = grid[row, column] if inside else -1
        starts[:] = 0
        n_open = 0
        for i in range(n):
            v = value[i]
            if v == -1:
                continue
            if v >= 0 and (v & 1) != 0 and not planes:
                out[base + i] = v >> 1
                continue
            order[n_open] = i
            n_open += 1
            y = affine[1, 0] * xs[base + i] + affine[1, 1] * ys[base + i] + affine[1, 2]
            starts[_bin(y, low_y, per_unit, n_rows) + 1] += 1
        for row in range(n_rows):
            starts[row + 1] += starts[row]
        for k in range(n_open):
            i = order[k]
            x = affine[0, 0] * xs[base + i] + affine[0, 1] * ys[base + i] + affine[0, 2]
            y = affine[1, 0] * xs[base + i] + affine[1, 1] * ys[base + i] + affine[1, 2]
            row = _bin(y, low_y, per_unit, n_rows)
            at = starts[row]
            starts[row] = at + 1
            x_of[at] = x
            y_of[at] = y
            value_of[at] = value[i]
            positions[at] = i
        for k in range(n_open):
            i = base + positions[k]
            x, y, v = x_of[k], y_of[k], value_of[k]
            row = _bin(y, low_y, per_unit, n_rows)
            if v >= 0:
                p = v >> 1
                if planes and polygon_planes[p] != point_planes[i]:
                    continue
                if v & 1 or _contains(p, row, x, y, first_row, slab_offsets, edge_offsets, edges, coords, origins):
                    out[i] = p
                continue
            best = -1
            nearest = 0.0
            for entry in lists[list_offsets[-2 - v] : list_offsets[-1 - v]]:
                p = entry >> 1
                if planes and polygon_planes[p] != point_planes[i]:
                    continue
                if entry & 1 or _contains(p, row, x, y, first_row, slab_offsets, edge_offsets, edges, coords, origins):
                    distance = (x - centroids[p, 0]) ** 2 + (y - centroids[p, 1]) ** 2
                    if best < 0 or distance < nearest:
                        best = p
                        nearest = distance
            out[i] = best
