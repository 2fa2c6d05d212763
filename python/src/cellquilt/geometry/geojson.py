"""Outlines as GeoJSON text, many at a time.

The text is put together by Arrow's string kernels, vertex, ring, part and polygon after each other: a polygon costs no
Python object, and the same outlines give the same bytes.
"""

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cellquilt.core.parquet import arrow_array
from cellquilt.geometry.polygons import Rings, offsets_of

_DECIMALS = 4  # 0.1 nm where coordinates are µm


def oriented(rings: Rings) -> Rings:
    """The same polygons with their outer rings counter-clockwise (x right, y up) and holes clockwise, as RFC 7946 asks.

    In an image, whose y points down, they look the other way round.
    """
    coords = rings.coords.copy()
    _orient(coords, rings.ring_offsets, rings.exterior)
    return Rings(coords, rings.ring_offsets, rings.polygon_offsets, rings.exterior)


def coordinates_json(rings: Rings) -> tuple[NDArray[np.bool_], pa.Array]:
    """The ``coordinates`` of GeoJSON geometries.

    Parameters
    ----------
    rings
        n polygons. Coordinates are rounded to 4 decimals.

    Returns
    -------
    several : numpy.ndarray
        (n,) bool, the geometry is a MultiPolygon; else a Polygon, without rings if it is empty.
    text : pyarrow.Array
        (n,) string.
    """
    rings = oriented(rings)
    xy = np.round(rings.coords, _DECIMALS) + 0.0  # no -0
    x, y = (arrow_array(np.ascontiguousarray(xy[:, axis])).cast(pa.string()) for axis in (0, 1))
    vertices = joined("[", x, ",", y, "]")
    ring_texts = _listed(vertices, rings.ring_offsets)
    starts = np.flatnonzero(rings.exterior)
    parts = _listed(ring_texts, np.append(starts, rings.exterior.size))
    n_parts = rings.n_parts()
    several = n_parts > 1
    parts_of = np.searchsorted(starts, rings.polygon_offsets)
    text = pc.binary_join(_lists(parts, parts_of), ",")
    text = pc.if_else(arrow_array(several), joined("[", text, "]"), text)
    return several, pc.if_else(arrow_array(n_parts == 0), "[]", text)


def geometry_json(rings: Rings) -> pa.Array:
    """(n,) string, GeoJSON geometries: a Polygon each, a MultiPolygon where there are several parts."""
    several, coordinates = coordinates_json(rings)
    kind = pc.if_else(arrow_array(several), "MultiPolygon", "Polygon")
    return joined('{"type":"', kind, '","coordinates":', coordinates, "}")


def joined(*parts: pa.Array | str) -> pa.Array:
    """(n,) string, texts one after the other; a plain one is the same for all."""
    return pc.binary_join_element_wise(*parts, "")


def string_json(values: pa.Array) -> pa.Array:
    """(n,) string, texts as JSON strings; control characters become blanks."""
    text = pc.replace_substring_regex(values, "[\x00-\x1f]", " ")
    for letter in ("\\", '"'):
        text = pc.replace_substring(text, letter, f"\\{letter}")
    return joined('"', text, '"')


def _lists(values: pa.Array, offsets: NDArray[np.integer]) -> pa.Array:
    return pa.ListArray.from_arrays(arrow_array(np.asarray(offsets, dtype=np.int32)), values)


def _listed(values: pa.Array, offsets: NDArray[np.integer]) -> pa.Array:
    """Runs of texts as JSON arrays."""
    return joined("[", pc.binary_join(_lists(values, offsets), ","), "]")


@numba.njit(cache=True, nogil=True)
def _orient(coords, ring_offsets, exterior):
    for r in range(exterior.size):
        first, last = ring_offsets[r], ring_offsets[r + 1]
        twice = 0.0
        ox, oy = coords[first, 0], coords[first, 1]
        for v in range(first, last - 1):
            ax, ay = coords[v, 0] - ox, coords[v, 1] - oy
            bx, by = coords[v + 1, 0] - ox, coords[v + 1, 1] - oy
            twice += ax * by - bx * ay
        if (twice > 0) != exterior[r]:
            for k in range((last - first) // 2):
                a, b = first + k, last - 1 - k
                for axis in range(2):
                    coords[a, axis], coords[b, axis] = coords[b, axis], coords[a, axis]


def join_json(features: pa.Array) -> str:
    """Objects of a JSON array as one text, a line each."""
    whole = pc.binary_join(_lists(features, offsets_of(np.array([len(features)], dtype=np.int64))), ",\n")
    return str(whole[0])
