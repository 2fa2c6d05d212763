"""Many polygons as a few flat arrays.

Every kernel of the package (locating points, rasterising, measuring) walks polygons in numba. `Rings` is the form they
share: the coordinates of all rings one after the other, the rings grouped by polygon. A polygon may have holes and may
have several parts; inside is what an odd number of its rings encloses (even-odd rule), so neither the orientation of
a ring nor whether it is a hole matters to a kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import shapely
from numpy.typing import NDArray

_POLYGONAL = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)


@dataclass(frozen=True)
class Rings:
    """Polygons as ragged arrays.

    Attributes
    ----------
    coords
        (n_vertices, 2) float64, x and y; each ring is closed, its last vertex repeats its first.
    ring_offsets
        (n_rings + 1,) int64; ring r is ``coords[ring_offsets[r]:ring_offsets[r + 1]]``.
    polygon_offsets
        (n_polygons + 1,) int64; polygon p has the rings ``polygon_offsets[p]`` to ``polygon_offsets[p + 1]``.
    exterior
        (n_rings,) bool; the ring starts a part of its polygon (else it is a hole of the part before it).
    """

    coords: NDArray[np.float64]
    ring_offsets: NDArray[np.int64]
    polygon_offsets: NDArray[np.int64]
    exterior: NDArray[np.bool_]

    @classmethod
    def from_shapely(cls, geometry: NDArray[np.object_] | Sequence[shapely.Geometry]) -> "Rings":
        """Flatten shapely polygons; a missing or empty one becomes a polygon without rings.

        Parameters
        ----------
        geometry
            (n,) Polygons and MultiPolygons; a z coordinate is dropped.

        Raises
        ------
        TypeError
            If a geometry is neither Polygon nor MultiPolygon.
        """
        array = np.asarray(geometry, dtype=object).ravel()
        if array.size == 0:
            empty = np.zeros(1, dtype=np.int64)
            return cls(np.empty((0, 2)), empty, empty.copy(), np.empty(0, dtype=bool))
        types = shapely.get_type_id(array)
        known = np.isin(types, _POLYGONAL) | (types == -1)
        if not known.all():
            first = int(np.flatnonzero(~known)[0])
            raise TypeError(f"geometry {first} is a {array[first].geom_type}, expected Polygon or MultiPolygon")
        missing = types == -1
        if missing.any():
            array = array.copy()
            array[missing] = shapely.Polygon()
            types = shapely.get_type_id(array)
        if (types == shapely.GeometryType.POLYGON).all() and not shapely.get_num_interior_rings(array).any():
            # Outlines alone, the usual case: the vertices of a polygon are those of its ring.
            coords = shapely.get_coordinates(array)
            ring_offsets = offsets_of(shapely.get_num_coordinates(array).astype(np.int64))
            full = np.diff(ring_offsets) > 0
            return cls(
                coords,
                np.append(ring_offsets[:-1][full], ring_offsets[-1]),
                offsets_of(full.astype(np.int64)),
                np.ones(int(full.sum()), dtype=bool),
            )
        kind, coords, offsets = shapely.to_ragged_array(array, include_z=False)
        ring_offsets = np.ascontiguousarray(offsets[0], dtype=np.int64)
        part_offsets = np.asarray(offsets[1], dtype=np.int64)
        n_rings = ring_offsets.size - 1
        exterior = np.zeros(n_rings, dtype=bool)
        starts = part_offsets[:-1]
        exterior[starts[part_offsets[1:] > starts]] = True  # a part without rings (an empty polygon) starts nothing
        if kind == shapely.GeometryType.MULTIPOLYGON:
            polygon_offsets = part_offsets[np.asarray(offsets[2], dtype=np.int64)]
        else:
            polygon_offsets = part_offsets
        return cls(
            np.ascontiguousarray(coords, dtype=np.float64),
            ring_offsets,
            np.ascontiguousarray(polygon_offsets, dtype=np.int64),
            exterior,
        )

    def to_shapely(self) -> NDArray[np.object_]:
        """(n_polygons,) object array: a Polygon each, a MultiPolygon where there are several parts."""
        n = len(self)
        if n == 0:
            return np.empty(0, dtype=object)
        part_starts = np.flatnonzero(self.exterior)
        part_offsets = np.append(part_starts, self.exterior.size).astype(np.int64)
        # How many parts start before each polygon's first ring: the offsets of parts by polygon.
        geometry_offsets = np.searchsorted(part_starts, self.polygon_offsets).astype(np.int64)
        n_parts = np.diff(geometry_offsets)
        out = np.empty(n, dtype=object)
        parts = shapely.from_ragged_array(shapely.GeometryType.POLYGON, self.coords, (self.ring_offsets, part_offsets))
        one = n_parts == 1
        out[one] = parts[geometry_offsets[:-1][one]]
        out[n_parts == 0] = shapely.Polygon()
        many = np.flatnonzero(n_parts > 1)
        if many.size:
            take = ranges(geometry_offsets[many], geometry_offsets[many + 1])
            shapely.multipolygons(parts[take], indices=np.repeat(many, n_parts[many]), out=out)
        return out

    def __len__(self) -> int:
        return self.polygon_offsets.size - 1

    def take(self, index: NDArray[np.integer]) -> "Rings":
        """The polygons at the given positions, in the given order."""
        return Rings(
            *_take(self.coords, self.ring_offsets, self.polygon_offsets, self.exterior, np.asarray(index, np.int64))
        )

    @classmethod
    def join(cls, parts: "Sequence[Rings]") -> "Rings":
        """The polygons of several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([np.empty((0, 2)), *(part.coords for part in parts)]),
            _joined_offsets([part.ring_offsets for part in parts]),
            _joined_offsets([part.polygon_offsets for part in parts]),
            np.concatenate([np.empty(0, dtype=bool), *(part.exterior for part in parts)]),
        )

    def n_parts(self) -> NDArray[np.int64]:
        """(n_polygons,) int64: 0 for an empty one."""
        starts: NDArray[np.int64] = offsets_of(self.exterior.astype(np.int64))[self.polygon_offsets]
        return starts[1:] - starts[:-1]

    def on_lattice(self) -> NDArray[np.bool_]:
        """(n_polygons,) bool: all coordinates are whole numbers."""
        return _on_lattice(self.coords, self.ring_offsets, self.polygon_offsets)

    def bounds(self) -> NDArray[np.float64]:
        """(n_polygons, 4) float64: min x, min y, max x, max y; NaN for a polygon without rings."""
        return _bounds(self.coords, self.ring_offsets, self.polygon_offsets)

    def measures(self) -> NDArray[np.float64]:
        """(n_polygons, 3) float64: area, x and y of the centroid; see `areas` and `centroids`."""
        return _measures(self.coords, self.ring_offsets, self.polygon_offsets, self.exterior)

    def areas(self) -> NDArray[np.float64]:
        """(n_polygons,) float64: area in squared units of the coordinates, holes taken off."""
        return self.measures()[:, 0]

    def centroids(self) -> NDArray[np.float64]:
        """(n_polygons, 2) float64: centres of mass (x, y).

        The middle of the bounding box where the area is zero, NaN for a polygon without rings.
        """
        return self.measures()[:, 1:]


def offsets_of(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """(n + 1,) int64 offsets of consecutive runs with the given lengths."""
    out = np.zeros(lengths.size + 1, dtype=np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def _joined_offsets(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Offsets of runs, one list of them after the other."""
    return offsets_of(np.concatenate([np.empty(0, dtype=np.int64), *(np.diff(part) for part in parts)]))


def ranges(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
    """All integers of the half-open ranges ``starts[i] .. stops[i]``, one range after the other."""
    lengths = stops - starts
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths)


@numba.njit(cache=True, nogil=True)
def _take(coords, ring_offsets, polygon_offsets, exterior, index):
    """The fields of the `Rings` of some polygons."""
    polygons = np.zeros(index.size + 1, dtype=np.int64)
    n_vertices = 0
    for k in range(index.size):
        first, last = polygon_offsets[index[k]], polygon_offsets[index[k] + 1]
        polygons[k + 1] = polygons[k] + last - first
        n_vertices += ring_offsets[last] - ring_offsets[first]
    rings = np.zeros(polygons[-1] + 1, dtype=np.int64)
    starts = np.empty(polygons[-1], dtype=np.bool_)
    vertices = np.empty((n_vertices, 2), dtype=np.float64)
    ring = vertex = 0
    for p in index:
        for r in range(polygon_offsets[p], polygon_offsets[p + 1]):
            for i in range(ring_offsets[r], ring_offsets[r + 1]):
                vertices[vertex, 0] = coords[i, 0]
                vertices[vertex, 1] = coords[i, 1]
                vertex += 1
            starts[ring] = exterior[r]
            ring += 1
            rings[ring] = vertex
    return vertices, rings, polygons, starts


@numba.njit(cache=True, nogil=True)
def _bounds(coords, ring_offsets, polygon_offsets):
    n = polygon_offsets.size - 1
    out = np.full((n, 4), np.nan)
    for p in range(n):
        start = ring_offsets[polygon_offsets[p]]
        stop = ring_offsets[polygon_offsets[p + 1]]
        if start == stop:
            continue
        x0 = x1 = coords[start, 0]
        y0 = y1 = coords[start, 1]
        for i in range(start + 1, stop):
            x0 = min(x0, coords[i, 0])
            x1 = max(x1, coords[i, 0])
            y0 = min(y0, coords[i, 1])
            y1 = max(y1, coords[i, 1])
        out[p, 0], out[p, 1], out[p, 2], out[p, 3] = x0, y0, x1, y1
    return out


@numba.njit(cache=True, nogil=True)
def _on_lattice(coords, ring_offsets, polygon_offsets):
    out = np.ones(polygon_offsets.size - 1, dtype=np.bool_)
    for p in range(out.size):
        for i in range(ring_offsets[polygon_offsets[p]], ring_offsets[polygon_offsets[p + 1]]):
            if coords[i, 0] != np.floor(coords[i, 0]) or coords[i, 1] != np.floor(coords[i, 1]):
                out[p] = False
                break
    return out


@numba.njit(cache=True, nogil=True)
def _measures(coords, ring_offsets, polygon_offsets, exterior):
    """Area and centroid (shoelace formula), relative to the polygon's first vertex so that digits do not cancel."""
    n = polygon_offsets.size - 1
    out = np.zeros((n, 3))
    for p in range(n):
        if ring_offsets[polygon_offsets[p]] == ring_offsets[polygon_offsets[p + 1]]:
            out[p, 1] = out[p, 2] = np.nan
            continue
        ox = coords[ring_offsets[polygon_offsets[p]], 0]
        oy = coords[ring_offsets[polygon_offsets[p]], 1]
        area = cx = cy = 0.0
        x0 = x1 = y0 = y1 = 0.0
        for r in range(polygon_offsets[p], polygon_offsets[p + 1]):
            ring_area = ring_x = ring_y = 0.0
            for i in range(ring_offsets[r], ring_offsets[r + 1] - 1):
                ax, ay = coords[i, 0] - ox, coords[i, 1] - oy
                bx, by = coords[i + 1, 0] - ox, coords[i + 1, 1] - oy
                cross = ax * by - bx * ay
                ring_area += cross
                ring_x += (ax + bx) * cross
                ring_y += (ay + by) * cross
                x0, x1 = min(x0, ax), max(x1, ax)
                y0, y1 = min(y0, ay), max(y1, ay)
            # A part adds and a hole takes off, whatever way round the ring runs.
            sign = 1.0 if (ring_area > 0) == exterior[r] else -1.0
            area += sign * ring_area
            cx += sign * ring_x
            cy += sign * ring_y
        out[p, 0] = area / 2
        if area > 0:
            out[p, 1] = ox + cx / (3 * area)
            out[p, 2] = oy + cy / (3 * area)
        else:
            out[p, 1] = ox + (x0 + x1) / 2
            out[p, 2] = oy + (y0 + y1) / 2
    return out
