"""The shape of niches: connected cells of one domain, with outline, area, length, roundness and distances."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from cellquilt.geometry.delaunay import triangles_of
from cellquilt.geometry.neighbours import SpatialGraph
from cellquilt.geometry.polygons import Rings, offsets_of
from cellquilt.spatial.enrichment import undirected

if TYPE_CHECKING:
    import pandas as pd

#: Cells that make a niche.
MIN_CELLS = 10
#: Segments that a quarter of a round corner is drawn with.
_QUARTER = 4


@dataclass(frozen=True)
class Niches:
    """Niches of a slide, by domain, the largest first.

    Attributes
    ----------
    domains
        K names.
    domain
        (m,) int64 number of each niche's domain.
    n_cells
        (m,) int64 its cells.
    of_cell
        (n,) int64 each cell's niche, -1 for none.
    outlines
        (m,) object, shapely polygons in µm.
    nearest_um
        (m,) float64 distance of its outline to that of the nearest other niche of its domain; NaN without another.
    domain_cells
        (K,) int64 all cells of each domain, those in no niche, too.
    """

    domains: list[str]
    domain: NDArray[np.int64]
    n_cells: NDArray[np.int64]
    of_cell: NDArray[np.int64]
    outlines: NDArray[np.object_]
    nearest_um: NDArray[np.float64]
    domain_cells: NDArray[np.int64]

    def __len__(self) -> int:
        return self.domain.size

    @property
    def names(self) -> list[str]:
        """Names of the niches: that of their domain, and a number from 1 on."""
        first = np.searchsorted(self.domain, self.domain)
        number = np.arange(len(self)) - first + 1
        return [f"{self.domains[d]}:{k}" for d, k in zip(self.domain, number, strict=True)]

    @property
    def area_um2(self) -> NDArray[np.float64]:
        """(m,) area within the outline."""
        return np.asarray(shapely.area(self.outlines), dtype=np.float64)

    @property
    def length_um(self) -> NDArray[np.float64]:
        """(m,) length of the outline, holes included."""
        return np.asarray(shapely.length(self.outlines), dtype=np.float64)

    @property
    def roundness(self) -> NDArray[np.float64]:
        """(m,) 4π area / length²: 1 for a disc."""
        length = self.length_um
        return np.divide(4 * np.pi * self.area_um2, length**2, out=np.zeros_like(length), where=length > 0)

    def to_frame(self) -> "pd.DataFrame":
        """A row a niche: ``niche``, ``domain``, ``n_cells``, ``area_um2``, ``length_um``, ``roundness``, ``x_um``,
        ``y_um`` (centroid), ``nearest_um``.
        """
        import pandas as pd

        middle = shapely.centroid(self.outlines)
        return pd.DataFrame(
            {
                "niche": self.names,
                "domain": np.array(self.domains, dtype=object)[self.domain],
                "n_cells": self.n_cells,
                "area_um2": self.area_um2,
                "length_um": self.length_um,
                "roundness": self.roundness,
                "x_um": shapely.get_x(middle),
                "y_um": shapely.get_y(middle),
                "nearest_um": self.nearest_um,
            }
        )

    def by_domain(self) -> "pd.DataFrame":
        """A row a domain: ``domain``, ``n_cells``, ``n_niches``, ``share_in_niches``, ``area_um2`` (of all niches),
        ``mean_area_um2``, ``mean_length_um``, ``roundness`` (mean, by area), ``nearest_um`` (mean).
        """
        import pandas as pd

        k = len(self.domains)
        number = np.bincount(self.domain, minlength=k)

        def total(values: NDArray) -> NDArray[np.float64]:
            return np.bincount(self.domain, weights=np.nan_to_num(values), minlength=k)

        def over(values: NDArray, parts: NDArray) -> NDArray[np.float64]:
            return np.divide(values, parts, out=np.full(k, np.nan), where=parts > 0)

        area = total(self.area_um2)
        known = total(np.isfinite(self.nearest_um))
        return pd.DataFrame(
            {
                "domain": self.domains,
                "n_cells": self.domain_cells,
                "n_niches": number,
                "share_in_niches": over(total(self.n_cells), self.domain_cells),
                "area_um2": area,
                "mean_area_um2": over(area, number),
                "mean_length_um": over(total(self.length_um), number),
                "roundness": over(total(self.roundness * self.area_um2), area),
                "nearest_um": over(total(self.nearest_um), known),
            }
        )


def niches_of(
    xy_um: NDArray[np.floating],
    graph: SpatialGraph,
    codes: NDArray[np.integer],
    domains: list[str],
    *,
    min_cells: int = MIN_CELLS,
) -> Niches:
    """Find the niches of a slide and measure them.

    A niche is a set of cells of one domain that edges of the graph connect. Its outline runs around the triangles of
    the Delaunay triangulation whose corners are all in it and whose sides are no longer than the graph's longest edge,
    half a cell further out; gaps and tongues as narrow as two or three cells are smoothed away.

    Parameters
    ----------
    xy_um
        (n, 2) centres in µm, finite.
    graph
        Neighbours of the n cells.
    codes
        (n,) number of each cell's domain, -1 for none.
    domains
        Names.
    min_cells
        Fewer make no niche.
    """
    xy, own = np.asarray(xy_um, dtype=np.float64), np.asarray(codes, dtype=np.int64)
    part = _components(graph, own)
    size = np.bincount(part, minlength=int(part.max(initial=-1)) + 1)
    first = np.unique(part, return_index=True)[1]
    large = np.flatnonzero((size >= min_cells) & (own[first] >= 0)) if part.size else np.zeros(0, np.int64)
    x, y = (np.bincount(part, weights=axis)[large] / size[large] for axis in xy.T) if large.size else (large, large)
    order = np.lexsort((x, y, -size[large], own[first[large]]))
    large = large[order]
    number = np.full(size.size, -1, dtype=np.int64)
    number[large] = np.arange(large.size)
    of_cell = number[part] if part.size else part
    domain = own[first[large]]
    spacing = float(np.median(graph.distance_um)) if graph.distance_um.size else 0.0
    outlines = _outlines(xy, graph, of_cell, large.size, spacing)
    known = own[own >= 0]
    return Niches(
        domains, domain, size[large], of_cell, outlines, _nearest(outlines, domain),
        np.bincount(known, minlength=len(domains)),
    )  # fmt: skip


def _components(graph: SpatialGraph, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) number of the cells of one domain that each is connected with."""
    a, b = undirected(graph)
    same = codes[a] == codes[b]
    a, b = a[same], b[same]
    matrix = csr_matrix((np.ones(a.size, dtype=np.int8), (a, b)), shape=(codes.size, codes.size))
    return connected_components(matrix, directed=False)[1].astype(np.int64)


def _outlines(
    xy: NDArray[np.float64], graph: SpatialGraph, of_cell: NDArray[np.int64], n_niches: int, spacing: float
) -> NDArray[np.object_]:
    places, first = np.unique(xy, axis=0, return_index=True)
    corners, twins = triangles_of(places)
    niche = of_cell[first][corners]
    reach = float(graph.distance_um.max(initial=0))
    sides = np.linalg.norm(places[corners] - places[np.roll(corners, -1, axis=1)], axis=2).max(axis=1, initial=0)
    inside = (niche[:, 0] >= 0) & (niche == niche[:, :1]).all(axis=1) & (sides <= reach * (1 + 1e-6))
    rings = _rings(places, corners, twins, inside, niche[:, 0], n_niches)
    out = rings.to_shapely()
    bare = np.flatnonzero(rings.n_parts() == 0)
    if bare.size:
        _threads(xy, graph, of_cell, bare, out)
    # Cells lie at random: what is narrower than a few of them, gap or tongue, is no feature of the outline.
    wide = shapely.buffer(out, 1.5 * spacing, quad_segs=_QUARTER)
    smooth = shapely.buffer(shapely.buffer(wide, -2 * spacing, quad_segs=_QUARTER), spacing, quad_segs=_QUARTER)
    thin = shapely.is_empty(smooth)
    return np.where(thin, shapely.buffer(wide, -spacing, quad_segs=_QUARTER), smooth)


def _rings(
    places: NDArray[np.float64],
    corners: NDArray[np.int32],
    twins: NDArray[np.int32],
    inside: NDArray[np.bool_],
    niche: NDArray[np.int64],
    n_niches: int,
) -> Rings:
    """Outlines of the triangles of each niche."""
    inner = np.flatnonzero(inside[np.arange(twins.size) // 3] & (twins >= 0))
    inner = inner[inside[twins[inner] // 3]]
    beside = csr_matrix(
        (np.ones(inner.size, dtype=np.int8), (inner // 3, twins[inner] // 3)), shape=(len(corners), len(corners))
    )
    patch = connected_components(beside, directed=False)[1]
    kernel: Any = _trace
    vertices, offsets, triangle = kernel(corners.ravel(), twins, inside)
    coords = places[vertices]
    # Twice the signed area; the outer ring of a patch runs counter-clockwise.
    cross = coords[:-1, 0] * coords[1:, 1] - coords[1:, 0] * coords[:-1, 1] if len(coords) else np.zeros(0)
    ends = np.zeros(len(coords), dtype=bool)
    ends[offsets[1:] - 1] = True
    cross = np.append(cross, 0.0)
    cross[ends] = 0
    outer = np.add.reduceat(cross, offsets[:-1]) > 0 if offsets.size > 1 else np.zeros(0, dtype=bool)
    order = np.lexsort((~outer, patch[triangle], niche[triangle]))
    lengths = np.diff(offsets)[order]
    take = np.repeat(offsets[:-1][order] - offsets_of(lengths)[:-1], lengths) + np.arange(int(lengths.sum()))
    of_niche = np.bincount(niche[triangle], minlength=n_niches) if triangle.size else np.zeros(n_niches, np.int64)
    return Rings(coords[take], offsets_of(lengths), offsets_of(of_niche), outer[order])


def _threads(
    xy: NDArray[np.float64],
    graph: SpatialGraph,
    of_cell: NDArray[np.int64],
    niches: NDArray[np.int64],
    out: NDArray[np.object_],
) -> None:
    """Niches that are rows of cells, without a triangle: their edges stand for them."""
    a, b = undirected(graph)
    own = (of_cell[a] == of_cell[b]) & np.isin(of_cell[a], niches)
    a, b = a[own], b[own]
    order = np.argsort(of_cell[a], kind="stable")
    a, b = a[order], b[order]
    lines: Any = shapely.linestrings(np.stack([xy[a], xy[b]], axis=1))
    shapely.multilinestrings(lines, indices=of_cell[a], out=out)


def _nearest(outlines: NDArray[np.object_], domain: NDArray[np.int64]) -> NDArray[np.float64]:
    out = np.full(domain.size, np.nan)
    for own in np.unique(domain):
        members = np.flatnonzero(domain == own)
        if members.size > 1:
            tree = shapely.STRtree(outlines[members])
            (asked, _), far = tree.query_nearest(
                outlines[members], exclusive=True, return_distance=True, all_matches=False
            )
            out[members[asked]] = far
    return out


@numba.njit(cache=True, nogil=True)
def _trace(corners, twins, inside):
    """Rings around the triangles that are inside, these to the left: vertices (the last repeats the first), where each
    ring begins, and a triangle of each.
    """
    n = twins.size
    border = np.zeros(n, dtype=np.bool_)
    n_border = 0
    for h in range(n):
        if inside[h // 3] and (twins[h] < 0 or not inside[twins[h] // 3]):
            border[h] = True
            n_border += 1
    vertices = np.empty(2 * n_border, dtype=np.int64)
    offsets, triangle = np.zeros(n_border + 1, dtype=np.int64), np.empty(n_border, dtype=np.int64)
    size, n_rings = 0, 0
    for start in range(n):
        if not border[start]:
            continue
        h = start
        while border[h]:
            border[h] = False
            vertices[size] = corners[h]
            size += 1
            # Around the corner where this edge ends, from triangle to triangle, to the next edge of the border.
            g = h - 2 if h % 3 == 2 else h + 1
            while twins[g] >= 0 and inside[twins[g] // 3]:
                g = twins[g]
                g = g - 2 if g % 3 == 2 else g + 1
            h = g
        vertices[size] = corners[start]
        size += 1
        triangle[n_rings] = start // 3
        n_rings += 1
        offsets[n_rings] = size
    return vertices[:size], offsets[: n_rings + 1], triangle[:n_rings]
