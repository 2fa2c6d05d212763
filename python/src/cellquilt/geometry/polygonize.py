"""Label images to polygons along pixel edges, exactly.

The outline of a label runs on the pixel lattice: vertices are whole numbers, an n × n square has area n², and
rasterising the polygon by pixel centres (`geometry.rasterize`) gives the label back. Outlines are found by crack
following in one pass over the image; the work grows with the pixels and the length of the outlines, not with the
number of labels.

A part of a label is a 4-connected set of pixels. Where a part touches itself at a corner, its outline is split there
into an outer ring and a hole that share the corner, which is the form that makes a valid polygon; parts that touch at
a corner stay two polygons of one MultiPolygon.
"""

import numba
import numpy as np
import shapely
from numpy.typing import NDArray

from cellquilt.geometry.polygons import Rings, offsets_of, ranges


def labels_to_polygons(
    labels: NDArray[np.integer], origin_xy: tuple[float, float] = (0, 0)
) -> tuple[NDArray[np.int32], NDArray[np.object_]]:
    """The outline of every label.

    Parameters
    ----------
    labels
        (h, w) integers; 0 is background, every other number a label.
    origin_xy
        Position of the image's upper left corner, in pixels.

    Returns
    -------
    ids
        (n,) int32, the labels present, ascending.
    geometry
        (n,) Polygons, MultiPolygons where a label has several 4-connected parts; x right, y down, in pixels.
        Holes are kept, no vertex lies between two in line with it. Outer rings run counter-clockwise and holes
        clockwise in shapely's sense (y taken upwards).

    Raises
    ------
    ValueError
        If `labels` is not a plane of integers that fit 32 bits.
    """
    ids, rings = labels_to_rings(labels, origin_xy)
    return ids, rings.to_shapely()


def labels_to_rings(
    labels: NDArray[np.integer], origin_xy: tuple[float, float] = (0, 0)
) -> tuple[NDArray[np.int32], Rings]:
    """As `labels_to_polygons`, without making shapely objects."""
    return parts_to_rings(*connected_parts(_as_int32(labels)), origin_xy)


def parts_to_rings(
    parts: NDArray[np.int32], part_label: NDArray[np.int32], origin_xy: tuple[float, float] = (0, 0)
) -> tuple[NDArray[np.int32], Rings]:
    """As `labels_to_rings`, from the numbered parts of `connected_parts`."""
    vertices, ring_length, ring_part = _trace(parts)
    # Rings come in raster order of their first pixel, so a part's outer ring precedes its holes; a stable sort by
    # label, then part, keeps that.
    ring_label = part_label[ring_part]
    order = np.lexsort((ring_part, ring_label))
    starts = offsets_of(ring_length)
    coords = vertices[ranges(starts[order], starts[order + 1])].astype(np.float64)
    coords += np.asarray(origin_xy, dtype=np.float64)
    ids, first = np.unique(ring_label[order], return_index=True)
    part = ring_part[order]
    exterior = np.ones(part.size, dtype=bool)
    exterior[1:] = part[1:] != part[:-1]
    rings = Rings(coords, offsets_of(ring_length[order]), np.append(first, part.size).astype(np.int64), exterior)
    return ids.astype(np.int32), rings


def simple_cells(geometry: NDArray[np.object_]) -> NDArray[np.object_]:
    """Keep the largest part of every polygon and fill its holes.

    A cell that lay in a hole of another overlaps it afterwards. Of parts of the same size the first is kept.

    Parameters
    ----------
    geometry
        (n,) Polygons and MultiPolygons.

    Returns
    -------
    numpy.ndarray
        (n,) Polygons without holes; an empty one stays empty.
    """
    geometry = np.asarray(geometry, dtype=object).ravel()
    changed = (shapely.get_type_id(geometry) != shapely.GeometryType.POLYGON) | (
        shapely.get_num_interior_rings(geometry) > 0
    )
    out = geometry.copy()
    if changed.any():
        out[changed] = simple_rings(Rings.from_shapely(geometry[changed])).to_shapely()
    return out


def simple_rings(rings: Rings) -> Rings:
    """As `simple_cells`, for polygons as arrays."""
    largest = _largest_exterior(rings.coords, rings.ring_offsets, rings.polygon_offsets, rings.exterior)
    there = largest >= 0
    keep = largest[there]
    return Rings(
        rings.coords[ranges(rings.ring_offsets[keep], rings.ring_offsets[keep + 1])],
        offsets_of(rings.ring_offsets[keep + 1] - rings.ring_offsets[keep]),
        offsets_of(there.astype(np.int64)),
        np.ones(keep.size, dtype=bool),
    )


def connected_parts(
    labels: NDArray[np.int32], *, out: NDArray[np.int32] | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Number the 4-connected parts of all labels.

    Parameters
    ----------
    labels
        (h, w) int32, 0 is background.
    out
        (h + 2, w + 2) int32 to use for the parts; its values do not matter. Default: made here.

    Returns
    -------
    parts
        (h + 2, w + 2) int32: a rim of -1 around the image, -1 for background, else the part's number, in raster order
        of the parts' first pixels.
    part_label
        (n_parts,) int32, the label of each part.
    """
    h, w = labels.shape
    parts = np.empty((h + 2, w + 2), dtype=np.int32) if out is None else out
    return parts, _connected_parts(np.ascontiguousarray(labels, dtype=np.int32), parts)


def _as_int32(labels: NDArray[np.integer]) -> NDArray[np.int32]:
    labels = np.asarray(labels)
    if labels.ndim != 2 or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        raise ValueError(f"labels must be a plane (h, w) of integers, got {labels.dtype} of shape {labels.shape}")
    if labels.dtype.itemsize >= 4 and labels.dtype != np.int32 and labels.size:
        limits = np.iinfo(np.int32)
        if labels.max() > limits.max or labels.min() < limits.min:
            raise ValueError("labels must fit 32 bits; number them anew")
    return np.ascontiguousarray(labels, dtype=np.int32)


@numba.njit(cache=True, nogil=True)
def root_of(parent, i):
    """Root of a union-find forest's node; the path to it is halved on the way."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@numba.njit(cache=True, nogil=True)
def _connected_parts(labels, parts):
    """Two passes with union-find; the smaller number is the root, so roots appear in raster order."""
    h, w = labels.shape
    parts[:] = -1
    parent = np.empty(h * w, dtype=np.int32)
    n = 0
    for y in range(h):
        for x in range(w):
            label = labels[y, x]
            if label == 0:
                continue
            up = parts[y, x + 1] if y > 0 and labels[y - 1, x] == label else -1
            left = parts[y + 1, x] if x > 0 and labels[y, x - 1] == label else -1
            if up < 0 and left < 0:
                parent[n] = n
                parts[y + 1, x + 1] = n
                n += 1
            elif up < 0:
                parts[y + 1, x + 1] = left
            elif left < 0 or left == up:
                parts[y + 1, x + 1] = up
            else:
                a = root_of(parent, up)
                b = root_of(parent, left)
                if a < b:
                    parent[b] = a
                else:
                    parent[a] = b
                parts[y + 1, x + 1] = min(a, b)
    # Final numbers: roots in order; every other points to a smaller number, already final.
    n_parts = 0
    for i in range(n):
        if parent[i] == i:
            parent[i] = n_parts
            n_parts += 1
        else:
            parent[i] = parent[parent[i]]
    part_label = np.empty(n_parts, dtype=np.int32)
    for y in range(h):
        for x in range(w):
            if labels[y, x] != 0:
                part = parent[parts[y + 1, x + 1]]
                parts[y + 1, x + 1] = part
                part_label[part] = labels[y, x]
    return part_label


@numba.njit(cache=True, nogil=True)
def _trace(parts):
    """Follow the cracks around all parts, the part on the right hand (y down).

    Directions 0 east, 1 south, 2 west, 3 north. At a lattice point, looking ahead: if the pixel ahead on the left is
    of the part, turn left (this also splits a ring where its part touches itself at the point); else if the one ahead
    on the right is, go straight; else turn right. Every ring has a step east along the upper edge of one of its
    pixels, so a scan for upper edges not yet passed finds all rings, each first at a corner.
    """
    h, w = parts.shape[0] - 2, parts.shape[1] - 2
    passed = np.zeros((h, w), dtype=np.uint8)
    vertices = np.empty((1024, 2), dtype=np.int32)
    ring_length = np.empty(256, dtype=np.int64)
    ring_part = np.empty(256, dtype=np.int32)
    n_vertices = 0
    n_rings = 0
    # From the lattice point (x, y), the padded pixel ahead on the left, by direction;
    # the one ahead on the right is the next direction's.
    left_y = (0, 1, 1, 0)
    left_x = (1, 1, 0, 0)
    step_x = (1, 0, -1, 0)
    step_y = (0, 1, 0, -1)
    for y0 in range(h):
        for x0 in range(w):
            part = parts[y0 + 1, x0 + 1]
            if part < 0 or parts[y0, x0 + 1] == part or passed[y0, x0]:
                continue
            first = n_vertices
            x, y, d = x0, y0, 0
            while True:
                # A corner at (x, y), leaving in direction d.
                if n_vertices + 2 > vertices.shape[0]:
                    grown = np.empty((vertices.shape[0] * 2, 2), dtype=np.int32)
                    grown[:n_vertices] = vertices[:n_vertices]
                    vertices = grown
                vertices[n_vertices, 0] = x
                vertices[n_vertices, 1] = y
                n_vertices += 1
                while True:
                    if d == 0:
                        passed[y, x] = 1
                    x += step_x[d]
                    y += step_y[d]
                    if parts[y + left_y[d], x + left_x[d]] == part:
                        d = (d + 3) & 3
                        break
                    right = (d + 1) & 3
                    if parts[y + left_y[right], x + left_x[right]] != part:
                        d = right
                        break
                if x == x0 and y == y0 and d == 0:
                    break
            vertices[n_vertices, 0] = x0
            vertices[n_vertices, 1] = y0
            n_vertices += 1
            if n_rings == ring_length.size:
                longer = np.empty(n_rings * 2, dtype=np.int64)
                longer[:n_rings] = ring_length
                ring_length = longer
                more = np.empty(n_rings * 2, dtype=np.int32)
                more[:n_rings] = ring_part
                ring_part = more
            ring_length[n_rings] = n_vertices - first
            ring_part[n_rings] = part
            n_rings += 1
    return vertices[:n_vertices].copy(), ring_length[:n_rings].copy(), ring_part[:n_rings].copy()


@numba.njit(cache=True, nogil=True)
def _largest_exterior(coords, ring_offsets, polygon_offsets, exterior):
    """For each polygon its outer ring with the most net area (holes taken off), -1 for an empty polygon."""
    n = polygon_offsets.size - 1
    out = np.full(n, -1, dtype=np.int64)
    for p in range(n):
        best = -1.0
        part = -1
        area = 0.0
        for r in range(polygon_offsets[p], polygon_offsets[p + 1] + 1):
            last = r == polygon_offsets[p + 1]
            if (last or exterior[r]) and part >= 0 and area > best:
                best = area
                out[p] = part
            if last:
                break
            ring = 0.0
            ox, oy = coords[ring_offsets[r], 0], coords[ring_offsets[r], 1]
            for i in range(ring_offsets[r], ring_offsets[r + 1] - 1):
                ring += (coords[i, 0] - ox) * (coords[i + 1, 1] - oy) - (coords[i + 1, 0] - ox) * (coords[i, 1] - oy)
            if exterior[r]:
                part = r
                area = abs(ring)
            else:
                area -= abs(ring)
    return out
