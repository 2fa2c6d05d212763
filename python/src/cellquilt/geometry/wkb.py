"""Outlines from WKB straight to coordinate arrays.

A polygon as an object of shapely costs microseconds and a few hundred bytes beside its coordinates, and the way to it
a copy of them as Python bytes. What a GeoParquet file holds is nearly always plain polygons, whose coordinates lie in
the file as the arrays need them.
"""

import numba
import numpy as np
import pyarrow as pa
import shapely

from cellquilt.geometry.polygons import Rings, offsets_of

_POLYGON, _MULTIPOLYGON = 3, 6


def rings_from_wkb(wkb: pa.Array) -> Rings:
    """Flatten polygons, as `Rings.from_shapely` does for shapely's objects.

    Parameters
    ----------
    wkb
        (n,) binary array of Polygons and MultiPolygons. A missing one becomes a polygon without rings.

    Raises
    ------
    shapely.errors.ShapelyError
        If a value is no WKB.
    TypeError
        If the array is not binary, or a geometry is neither Polygon nor MultiPolygon.
    """
    if not (pa.types.is_binary(wkb.type) or pa.types.is_large_binary(wkb.type)):
        raise TypeError(f"outlines of type {wkb.type}, expected WKB")
    if wkb.null_count == 0 and len(wkb):
        _, places, values = wkb.buffers()
        offsets = np.frombuffer(places, np.int32 if pa.types.is_binary(wkb.type) else np.int64)
        offsets = offsets[wkb.offset : wkb.offset + len(wkb) + 1].astype(np.int64)
        data = np.frombuffer(values, np.uint8) if values is not None else np.empty(0, np.uint8)
        n_rings, n_vertices = np.zeros(len(wkb), np.int64), np.zeros(len(wkb), np.int64)
        if _scan(data, offsets, n_rings, n_vertices):
            coords = np.empty((int(n_vertices.sum()), 2))
            ring_offsets = np.zeros(int(n_rings.sum()) + 1, np.int64)
            exterior = np.zeros(ring_offsets.size - 1, bool)
            _fill(data, offsets, coords.reshape(-1).view(np.uint8), ring_offsets, exterior)
            return Rings(coords, ring_offsets, offsets_of(n_rings), exterior)
    # Another byte order, a third coordinate, a missing value, damage: shapely knows them all.
    return Rings.from_shapely(np.asarray(shapely.from_wkb(wkb.to_numpy(zero_copy_only=False)), dtype=object))


def wkb_of_rings(rings: Rings, *, multi: bool = False) -> pa.Array:
    """(n,) binary array, byte for byte what shapely makes of the polygons of `Rings.to_shapely`.

    With `multi` a polygon of one part is a MultiPolygon, too; an empty one is a Polygon all the same.
    """
    n_parts = rings.n_parts()
    least = 1 if multi else 2  # parts of a MultiPolygon
    n_rings = np.diff(rings.polygon_offsets)
    n_vertices = np.diff(rings.ring_offsets[rings.polygon_offsets])
    # A head of 9 bytes for each part or empty polygon, and one for a MultiPolygon as a whole; a ring has 4.
    sizes = 9 * np.maximum(n_parts, 1) + 9 * (n_parts >= least) + 4 * n_rings + 16 * n_vertices
    offsets = offsets_of(sizes)
    kind, width = (pa.binary(), np.int32) if offsets[-1] < 2**31 else (pa.large_binary(), np.int64)
    data = np.empty(int(offsets[-1]), np.uint8)
    coords = np.ascontiguousarray(rings.coords).reshape(-1).view(np.uint8)
    _write(coords, rings.ring_offsets, rings.polygon_offsets, rings.exterior, n_parts, least, data)
    return pa.Array.from_buffers(kind, len(rings), [None, pa.py_buffer(offsets.astype(width)), pa.py_buffer(data)])


@numba.njit(cache=True, nogil=True)
def _put(data, at, kind, count):
    """Byte order, type and how many parts or rings follow; gives the place after it."""
    data[at] = 1
    _put_number(data, at + 1, kind)
    _put_number(data, at + 5, count)
    return at + 9


@numba.njit(cache=True, nogil=True)
def _put_number(data, at, number):
    for k in range(4):
        data[at + k] = (number >> (8 * k)) & 255


@numba.njit(cache=True, nogil=True)
def _write(coords, ring_offsets, polygon_offsets, exterior, n_parts, least, data):
    at = 0
    for p in range(n_parts.size):
        if n_parts[p] >= least:
            at = _put(data, at, _MULTIPOLYGON, n_parts[p])
        if n_parts[p] == 0:
            at = _put(data, at, _POLYGON, 0)
        last = polygon_offsets[p + 1]
        for r in range(polygon_offsets[p], last):
            if exterior[r]:
                end = r + 1
                while end < last and not exterior[end]:
                    end += 1
                at = _put(data, at, _POLYGON, end - r)
            first, stop = ring_offsets[r], ring_offsets[r + 1]
            _put_number(data, at, stop - first)
            at += 4
            data[at : at + 16 * (stop - first)] = coords[16 * first : 16 * stop]
            at += 16 * (stop - first)


@numba.njit(cache=True, nogil=True)
def _number(data, at):
    """The unsigned 32-bit number at a place; WKB aligns nothing."""
    return (
        np.int64(data[at])
        | np.int64(data[at + 1]) << 8
        | np.int64(data[at + 2]) << 16
        | np.int64(data[at + 3]) << 24
    )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _scan(data, offsets, n_rings, n_vertices):
    """Count rings and vertices of each polygon; False where one is not a whole, plain, little-endian (Multi)Polygon."""
    for i in range(offsets.size - 1):
        at, stop = offsets[i], offsets[i + 1]
        if at + 9 > stop or data[at] != 1:
            return False
        kind = _number(data, at + 1)
        n_parts = 1
        if kind == _MULTIPOLYGON:
            n_parts = _number(data, at + 5)
            at += 9
        elif kind != _POLYGON:
            return False
        for _ in range(n_parts):
            if at + 9 > stop or data[at] != 1 or _number(data, at + 1) != _POLYGON:
                return False
            rings = _number(data, at + 5)
            at += 9
            for _ in range(rings):
                if at + 4 > stop:
                    return False
                vertices = _number(data, at)
                first = at + 4
                at = first + 16 * vertices
                if vertices < 4 or at > stop:
                    return False
                for k in range(16):  # a ring that does not close is shapely's to judge
                    if data[first + k] != data[at - 16 + k]:
                        return False
                n_rings[i] += 1
                n_vertices[i] += vertices
        if at != stop:
            return False
    return True


@numba.njit(cache=True, nogil=True)
def _fill(data, offsets, coords, ring_offsets, exterior):
    """Copy the coordinates, as bytes, of polygons that `_scan` has accepted."""
    ring = end = 0
    for i in range(offsets.size - 1):
        at = offsets[i]
        n_parts = 1
        if _number(data, at + 1) == _MULTIPOLYGON:
            n_parts = _number(data, at + 5)
            at += 9
        for _ in range(n_parts):
            rings = _number(data, at + 5)
            at += 9
            for r in range(rings):
                size = 16 * _number(data, at)
                at += 4
                coords[end : end + size] = data[at : at + size]
                at += size
                end += size
                exterior[ring] = r == 0
                ring += 1
                ring_offsets[ring] = end // 16
