"""Nuclei to cells: grow every nucleus by a distance, up to the line half-way to its neighbours."""

from collections.abc import Iterator
from typing import cast

import numba
import numpy as np
import shapely
from numpy.typing import NDArray

from cellquilt.geometry.expand import expand_labels
from cellquilt.geometry.packed import HeldPolygons, PackedPolygons, Part, Polygons, polygons_of
from cellquilt.geometry.polygonize import connected_parts, parts_to_rings
from cellquilt.geometry.polygons import ranges
from cellquilt.geometry.rasterize import polygons_to_labels
from cellquilt.resolve.pairs import box_pairs, neighbours_of


def expand_nuclei[Geometry: (NDArray[np.object_], PackedPolygons)](
    geometry: Geometry,
    distance_px: float,
    *,
    bounds: tuple[int, int] | None = None,
    tile_px: int = 2048,
) -> Geometry:
    """A cell around every nucleus: the pixels within a distance that are nearer to it than to any other nucleus.

    Parameters
    ----------
    geometry
        (n,) nuclei as Polygons or MultiPolygons in pixels; exclusive (where two overlap, the first has the pixels).
    distance_px
        How far the outline moves; 0 returns the nuclei as they are.
    bounds
        Height and width of the image; cells are clipped to it. Default: not clipped.
    tile_px
        The work goes tile by tile; a cell is made in the tile of its nucleus' upper left corner, in a window that
        holds all of it and all nuclei that can limit it. So the result does not depend on this number, and memory
        grows with a tile (some 20 bytes a pixel), not with the image. Tiles without nuclei cost nothing.

    Returns
    -------
    numpy.ndarray
        (n,) cells in the same order, exclusive. On the pixel lattice if the nuclei are; else each cell is united with
        its nucleus and the other nuclei are taken off, so that it contains its own and none of another.
        Empty where the nucleus is, lies outside the image or has no pixel of its own.

    Notes
    -----
    Distances are those of `geometry.expand.expand_labels`, between pixel centres. Pixels that are cut off from their
    nucleus by another cell (a few at sharp corners) belong to no cell, so a nucleus in one piece makes a cell in one.
    """
    nuclei = polygons_of(geometry)
    if not distance_px >= 0:
        raise ValueError(f"distance_px must be 0 or more, got {distance_px}")
    if distance_px == 0 or len(nuclei) == 0:
        cells = nuclei.replaced([])
    else:
        cells = nuclei.blank().replaced(_grow(nuclei, distance_px, bounds, tile_px))
    return cast(Geometry, cells.objects() if isinstance(cells, HeldPolygons) else cells)


def _grow(nuclei: Polygons, distance_px: float, bounds: tuple[int, int] | None, tile_px: int) -> Iterator[Part]:
    """The cells of one tile after the other."""
    boxes, whole = nuclei.traits.bounds, bool(nuclei.traits.on_lattice.all())
    there = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    if there.size == 0:
        return
    reach = int(np.ceil(distance_px))
    tile = np.floor(boxes[there, :2] / tile_px).astype(np.int64)
    order = np.lexsort((there, tile[:, 0], tile[:, 1]))
    new_tile = np.ones(there.size, dtype=bool)
    new_tile[1:] = (np.diff(tile[order], axis=0) != 0).any(axis=1)
    starts = np.append(np.flatnonzero(new_tile), there.size)
    members = there[order]
    extents = np.column_stack(
        [
            np.floor(np.minimum.reduceat(boxes[members, :2], starts[:-1], axis=0)) - 2 * reach - 2,
            np.ceil(np.maximum.reduceat(boxes[members, 2:], starts[:-1], axis=0)) + 2 * reach + 2,
        ]
    ).astype(np.int64)
    # Tiles whose windows meet hold the nuclei that may limit each other's.
    n_tiles = len(extents)
    offsets, partners = neighbours_of(n_tiles, *box_pairs(extents.astype(np.float64)))
    planes = _Planes()
    for k in range(n_tiles):
        own = members[starts[k] : starts[k + 1]]
        x0, y0, x1, y1 = (int(v) for v in extents[k])
        if bounds is not None:
            x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, bounds[1]), min(y1, bounds[0])
        if x1 <= x0 or y1 <= y0:
            continue
        nearby = partners[offsets[k] : offsets[k + 1]]
        others = members[ranges(starts[nearby], starts[nearby + 1])]
        meets = (boxes[others, 0] < x1) & (boxes[others, 2] > x0) & (boxes[others, 1] < y1) & (boxes[others, 3] > y0)
        subset = np.sort(np.concatenate([own, others[meets]]))  # the order of the input decides overlaps
        window, shape = (y0, y1, x0, x1), (y1 - y0, x1 - x0)
        seeds = polygons_to_labels(nuclei.rings(subset), np.arange(1, subset.size + 1), window, out=planes.of(0, shape))
        is_own = np.zeros(subset.size + 1, dtype=bool)
        is_own[np.searchsorted(subset, own) + 1] = True
        labels = expand_labels(seeds, distance_px, out=planes.of(1, shape), scratch=planes.of(2, shape))
        _keep_labels(labels, is_own)
        parts, part_label = connected_parts(labels, out=planes.of(2, (shape[0] + 2, shape[1] + 2)))
        _drop_parts_without_seed(parts, part_label, seeds)
        ids, outlines = parts_to_rings(parts, part_label, (x0, y0))
        if whole:
            yield subset[ids - 1], outlines
        else:
            cells = np.full(subset.size, shapely.Polygon(), dtype=object)
            cells[ids - 1] = outlines.to_shapely()
            owned = np.flatnonzero(is_own[1:])
            yield subset[owned], _unite_with_nuclei(cells[owned], owned, nuclei.objects(subset), bounds)


class _Planes:
    """Planes that one tile uses after the other: fresh ones would cost the system more than the work on them."""

    def __init__(self) -> None:
        self._buffers = [np.empty(0, dtype=np.int32)] * 3

    def of(self, number: int, shape: tuple[int, int]) -> NDArray[np.int32]:
        """Plane 0, 1 or 2 in a shape; it holds anything."""
        size = shape[0] * shape[1]
        if self._buffers[number].size < size:
            self._buffers[number] = np.empty(size, dtype=np.int32)
        return self._buffers[number][:size].reshape(shape)


def _unite_with_nuclei(
    cells: NDArray[np.object_],
    own: NDArray[np.int64],
    nuclei: NDArray[np.object_],
    bounds: tuple[int, int] | None,
) -> NDArray[np.object_]:
    """Nuclei off the lattice: a cell contains its own nucleus exactly and nothing of another one."""
    nuclei = nuclei.copy()
    nuclei[shapely.is_missing(nuclei)] = shapely.Polygon()
    if bounds is not None:
        nuclei = shapely.intersection(nuclei, shapely.box(0, 0, bounds[1], bounds[0]))
    out = cells.copy()
    uncovered = np.flatnonzero(~shapely.covers(cells, nuclei[own]))
    out[uncovered] = shapely.union(cells[uncovered], nuclei[own[uncovered]])
    tree = shapely.STRtree(nuclei)
    cell, nucleus = tree.query(out, predicate="intersects")
    order = np.lexsort((nucleus, cell))
    cell, nucleus = cell[order], nucleus[order]
    other = (own[cell] != nucleus) & ~shapely.touches(out[cell], nuclei[nucleus])
    cell, nucleus = cell[other], nucleus[other]
    while cell.size:  # once for every further nucleus that reaches into a cell: rarely more than two
        first = np.ones(cell.size, dtype=bool)
        first[1:] = cell[1:] != cell[:-1]
        out[cell[first]] = shapely.difference(out[cell[first]], nuclei[nucleus[first]])
        cell, nucleus = cell[~first], nucleus[~first]
    return out


@numba.njit(cache=True, nogil=True)
def _keep_labels(labels, keep):
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            if not keep[labels[y, x]]:
                labels[y, x] = 0


@numba.njit(cache=True, nogil=True)
def _drop_parts_without_seed(parts, part_label, seeds):
    """Parts of cells (rim of 1) without a pixel of their nucleus become background."""
    seeded = np.zeros(part_label.size, dtype=np.bool_)
    h, w = seeds.shape
    for y in range(h):
        for x in range(w):
            part = parts[y + 1, x + 1]
            if part >= 0 and seeds[y, x] == part_label[part]:
                seeded[part] = True
    for y in range(h):
        for x in range(w):
            part = parts[y + 1, x + 1]
            if part >= 0 and not seeded[part]:
                parts[y + 1, x + 1] = -1
