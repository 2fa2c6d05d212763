"""Split what two cells share along the line of equal distance, so that nothing is counted twice.

A square of the raster that several cells cover goes to the one whose own ground - the squares that it alone covers -
is nearest (exact distance between centres of squares); of equally near ones to the first in the given order. A cell
without own ground (a small one inside a large one) keeps all it covers, and the large one gets a hole.

Polygons on the lattice of the raster (those made from labels) stay on it. Of others, only the shared area is cut, at
the resolution of the raster; everything else of their outlines stays as it is.
"""

from collections.abc import Iterator

import numba
import numpy as np
import shapely
from numpy.typing import NDArray

from cellquilt.geometry.expand import squared_distance
from cellquilt.geometry.packed import Part, Polygons, polygons_of
from cellquilt.geometry.polygonize import labels_to_rings
from cellquilt.geometry.polygons import Rings, offsets_of, ranges
from cellquilt.geometry.rasterize import row_crossings
from cellquilt.resolve.pairs import box_pairs, neighbours_of, shared_areas

_CHUNK_PX = 4_000_000  # squares of windows held at once: bounds the memory to about 0.15 GB
_POLYGONAL = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)


def split_overlaps(
    geometry: NDArray[np.object_],
    *,
    step: float = 1.0,
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> NDArray[np.object_]:
    """Make polygons exclusive.

    Parameters
    ----------
    geometry
        (n,) valid Polygons and MultiPolygons. Their order decides ties.
    step
        Width of the raster's squares, in the units of the coordinates; the raster's lattice passes through (0, 0).
    pairs
        Positions of the polygons that overlap, if known. Default: found here.

    Returns
    -------
    numpy.ndarray
        (n,) in the same order; those without overlap are the same objects. Empty where nothing was left, which
        happens to the later one of two that cover the same squares.
    """
    return split_polygons(polygons_of(geometry), step=step, pairs=pairs).objects()


def split_polygons(
    polygons: Polygons, *, step: float = 1.0, pairs: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
) -> Polygons:
    """`split_overlaps` of polygons that need not be held as objects."""
    if not step > 0:
        raise ValueError(f"step must be positive, got {step}")
    first, second = overlapping_pairs(polygons) if pairs is None else pairs
    if len(first) == 0:
        return polygons.replaced([])
    involved, position = np.unique(np.concatenate([first, second]), return_inverse=True)
    a, b = np.sort(position.reshape(2, -1).astype(np.int64), axis=0)
    parts = _split(polygons.take(involved), a, b, step)
    return polygons.replaced((involved[cells], part) for cells, part in parts)


def overlapping_pairs(geometry: NDArray[np.object_] | Polygons) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of all pairs of polygons that share area (more than rounding makes)."""
    polygons = polygons_of(geometry)
    traits = polygons.traits
    a, b = box_pairs(traits.bounds)
    areas = traits.measures[:, 0]
    real = shared_areas(polygons, a, b) > 1e-9 * np.minimum(areas[a], areas[b])
    return a[real], b[real]


def _split(polygons: Polygons, a: NDArray[np.int64], b: NDArray[np.int64], step: float) -> Iterator[Part]:
    """What is left of the polygons, all of which overlap others, some thousand at a time."""
    n = len(polygons)
    windows = _windows(polygons.traits.bounds / step)
    offsets, partners = neighbours_of(n, a, b)
    # Neighbours in space are neighbours in the order of work, so that few windows are made twice.
    size = max(float((windows[:, 2:] - windows[:, :2]).max()), 1.0) * 16
    order = np.lexsort((windows[:, 0], windows[:, 1] // size))
    pixels = np.cumsum((windows[order, 2] - windows[order, 0]) * (windows[order, 3] - windows[order, 1]))
    chunk_of = pixels // _CHUNK_PX
    for chunk in np.split(order, np.flatnonzero(np.diff(chunk_of)) + 1):
        held = np.unique(np.concatenate([chunk, partners[ranges(offsets[chunk], offsets[chunk + 1])]]))
        there = np.unique(np.concatenate([held, partners[ranges(offsets[held], offsets[held + 1])]]))
        rings = polygons.rings(there)
        rings = Rings(rings.coords / step, rings.ring_offsets, rings.polygon_offsets, rings.exterior)
        number = np.full(n, -1, dtype=np.int64)
        number[there] = np.arange(there.size)
        sizes = (windows[held, 2] - windows[held, 0]) * (windows[held, 3] - windows[held, 1])
        slot = np.full(n, -1, dtype=np.int64)
        slot[held] = offsets_of(sizes)[:-1]
        distance = np.empty(int(sizes.sum()), dtype=np.int32)
        covered = np.empty(distance.size, dtype=np.bool_)
        _own_ground(
            rings.coords, rings.ring_offsets, rings.polygon_offsets, number, held, windows, offsets, partners, slot,
            distance, covered,
        )  # fmt: skip
        # A cell is traced on the lattice if it and all it overlaps lie there; other pairs are cut geometrically.
        on_lattice = np.zeros(n, dtype=bool)
        on_lattice[there] = rings.on_lattice()
        pure = on_lattice[chunk] & _all_partners(on_lattice, offsets, partners, chunk)
        lattice = chunk[pure]
        if lattice.size:
            place, shape = _shelves(windows[lattice])
            atlas = np.zeros(shape, dtype=np.int32)
            _keep(lattice, windows, offsets, partners, slot, distance, covered, place, atlas)
            ids, kept = labels_to_rings(atlas)
            shift = windows[lattice[ids - 1], :2] - place[ids - 1]
            vertices = np.diff(kept.ring_offsets[kept.polygon_offsets])
            coords = (kept.coords + np.repeat(shift, vertices, axis=0)) * step
            lost = np.ones(lattice.size, dtype=bool)
            lost[ids - 1] = False
            yield lattice[lost], np.full(int(lost.sum()), shapely.Polygon(), dtype=object)
            yield lattice[ids - 1], Rings(coords, kept.ring_offsets, kept.polygon_offsets, kept.exterior)
        rest = chunk[~pure]
        if rest.size:
            yield rest, _cut(polygons, rest, windows, offsets, partners, slot, distance, step)


def _cut(polygons, cells, windows, offsets, partners, slot, distance, step):
    """Take off each cell, neighbour by neighbour, the squares where the neighbour's ground is nearer."""
    n_partners = offsets[cells + 1] - offsets[cells]
    i = np.repeat(cells, n_partners)
    j = partners[ranges(offsets[cells], offsets[cells + 1])]
    shared = np.column_stack(
        [np.maximum(windows[i, :2], windows[j, :2]), np.minimum(windows[i, 2:], windows[j, 2:])]
    )  # the windows' common part holds all that the two share
    place, shape = _shelves(shared)
    atlas = np.zeros(shape, dtype=np.int32)
    _lost(i, j, shared, windows, slot, distance, place, atlas)
    ids, squares = labels_to_rings(atlas)
    shift = shared[ids - 1, :2] - place[ids - 1]
    vertices = np.diff(squares.ring_offsets[squares.polygon_offsets])
    coords = (squares.coords + np.repeat(shift, vertices, axis=0)) * step
    lost = Rings(coords, squares.ring_offsets, squares.polygon_offsets, squares.exterior).to_shapely()
    lost = shapely.intersection(lost, polygons.objects(j[ids - 1]))
    mixed = ~np.isin(shapely.get_type_id(lost), _POLYGONAL)
    lost[mixed] = shapely.buffer(lost[mixed], 0)  # drops the points and lines of a mixed collection
    out = polygons.objects(cells)
    owner = np.searchsorted(np.cumsum(n_partners), ids - 1, side="right")
    while owner.size:  # as many rounds as one cell has neighbours that overlap it
        first = np.ones(owner.size, dtype=bool)
        first[1:] = owner[1:] != owner[:-1]
        out[owner[first]] = shapely.difference(out[owner[first]], lost[first])
        owner, lost = owner[~first], lost[~first]
    return out


def _windows(bounds: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n, 4) x0, y0, x1, y1 of the squares that hold each polygon."""
    bounds = np.nan_to_num(bounds)
    return np.column_stack([np.floor(bounds[:, :2]), np.ceil(bounds[:, 2:])]).astype(np.int64)


def _all_partners(flag, offsets, partners, cells):
    counts = np.concatenate([[0], np.cumsum(~flag[partners])])
    return counts[offsets[cells + 1]] == counts[offsets[cells]]


def _shelves(windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """Places (x, y) for windows side by side in rows of one image, and that image's shape (h, w)."""
    width = windows[:, 2] - windows[:, 0]
    height = windows[:, 3] - windows[:, 1]
    place = np.empty((len(windows), 2), dtype=np.int64)
    shape = _fill_shelves(width, height, max(4096, int(width.max())), place)
    return place, shape


@numba.njit(cache=True, nogil=True)
def _fill_shelves(width, height, total, place):
    x = y = tallest = used = 0
    for k in range(width.size):
        if x + width[k] > total:
            y += tallest
            x = tallest = 0
        place[k, 0] = x
        place[k, 1] = y
        x += width[k]
        tallest = max(tallest, height[k])
        used = max(used, x)
    return y + tallest, used


@numba.njit(cache=True, nogil=True)
def _own_ground(
    coords, ring_offsets, polygon_offsets, number, held, windows, offsets, partners, slot, distance, covered
):  # fmt: skip
    """For each held cell, in its window: the squares it covers, and the squared distance to those it alone covers.

    -1 everywhere if it covers none alone. `number` is a cell's place among the polygons given.
    """
    starts = np.empty(1024, dtype=np.int64)
    xs = np.empty(256, dtype=np.float64)
    for c in held:
        x0, y0, x1, y1 = windows[c, 0], windows[c, 1], windows[c, 2], windows[c, 3]
        h, w = y1 - y0, x1 - x0
        if h + 1 > starts.size:
            starts = np.empty(2 * h + 2, dtype=np.int64)
        own = np.zeros((h, w), dtype=np.uint8)
        # The cell itself, then its neighbours over it.
        for k in range(offsets[c] - 1, offsets[c + 1]):
            p = c if k < offsets[c] else partners[k]
            q = number[p]
            row = max(windows[p, 1], y0)
            n_rows = min(windows[p, 3], y1) - row
            if n_rows <= 0:
                continue
            xs = row_crossings(
                coords, polygon_offsets[q], polygon_offsets[q + 1], ring_offsets, row, n_rows, starts, xs
            )
            for i in range(n_rows):
                for e in range(starts[i], starts[i + 1] - 1, 2):
                    left = max(int(np.ceil(xs[e] - 0.5)) - x0, 0)
                    right = min(int(np.ceil(xs[e + 1] - 0.5)) - x0, w)
                    for x in range(left, right):
                        own[row - y0 + i, x] = 1 if p == c else 0
            if p == c:
                at = slot[c]
                for y in range(h):
                    for x in range(w):
                        covered[at + y * w + x] = own[y, x] != 0
        out = distance[slot[c] : slot[c] + h * w].reshape(h, w)
        if own.any():
            squared_distance(own, out)
        else:
            out[:] = -1


@numba.njit(cache=True, nogil=True)
def _keep(cells, windows, offsets, partners, slot, distance, covered, place, atlas):
    """Paint each cell's window into the atlas with the squares it keeps: k + 1 for the k-th cell."""
    for k in range(cells.size):
        c = cells[k]
        x0, y0, x1, y1 = windows[c, 0], windows[c, 1], windows[c, 2], windows[c, 3]
        w = x1 - x0
        for y in range(y0, y1):
            for x in range(x0, x1):
                here = slot[c] + (y - y0) * w + x - x0
                if not covered[here]:
                    continue
                keeps = True
                for m in range(offsets[c], offsets[c + 1]):
                    p = partners[m]
                    if x < windows[p, 0] or x >= windows[p, 2] or y < windows[p, 1] or y >= windows[p, 3]:
                        continue
                    there = slot[p] + (y - windows[p, 1]) * (windows[p, 2] - windows[p, 0]) + x - windows[p, 0]
                    if covered[there] and (
                        distance[there] < distance[here] or (distance[there] == distance[here] and p < c)
                    ):
                        keeps = False
                        break
                if keeps:
                    atlas[place[k, 1] + y - y0, place[k, 0] + x - x0] = k + 1


@numba.njit(cache=True, nogil=True)
def _lost(i, j, shared, windows, slot, distance, place, atlas):
    """Paint, pair by pair, the squares of the common window where j's ground is nearer than i's: k + 1."""
    for k in range(i.size):
        a, b = i[k], j[k]
        for y in range(shared[k, 1], shared[k, 3]):
            for x in range(shared[k, 0], shared[k, 2]):
                da = distance[slot[a] + (y - windows[a, 1]) * (windows[a, 2] - windows[a, 0]) + x - windows[a, 0]]
                db = distance[slot[b] + (y - windows[b, 1]) * (windows[b, 2] - windows[b, 0]) + x - windows[b, 0]]
                if db < da or (db == da and b < a):
                    atlas[place[k, 1] + y - shared[k, 1], place[k, 0] + x - shared[k, 0]] = k + 1
