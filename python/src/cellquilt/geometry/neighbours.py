"""Which cells are neighbours: Delaunay edges up to a length, nearest neighbours, or the neighbours in a grid."""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.spatial import Delaunay, QhullError, cKDTree

from cellquilt.geometry.delaunay import triangulate
from cellquilt.geometry.polygons import offsets_of

MODES = ("auto", "delaunay", "knn", "grid")
#: Neighbours in a grid farther than this times the median distance of the nearest are not neighbours: the grid ends.
_GRID_REACH = 1.3
#: Places by which a grid is recognised, and fewest.
_GRID_SAMPLE, _LEAST_PLACES = 20_000, 30
#: Of a grid so large a share of places has a neighbour as near as usual, up to this: coordinates are rounded to pixels.
_GRID_SHARE, _GRID_TOLERANCE = 0.9, 0.05
#: Angles between neighbours are whole parts of a turn: 1 where they all are, 0 where they are any.
_GRID_ORDER = 0.9


@dataclass(frozen=True)
class SpatialGraph:
    """Undirected edges between cells, each stored in both directions.

    Attributes
    ----------
    indptr
        (n + 1,) int64: the neighbours of cell i are ``indices[indptr[i]:indptr[i + 1]]``.
    indices
        (n_edges,) int32, ascending in each row.
    distance_um
        (n_edges,) float32, above 0.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    distance_um: NDArray[np.float32]

    def __len__(self) -> int:
        return self.indptr.size - 1

    @property
    def degree(self) -> NDArray[np.int64]:
        """(n,) number of neighbours."""
        return np.diff(self.indptr)

    def to_csr(self) -> csr_matrix:
        """(n, n) matrix of distances in µm."""
        return csr_matrix((self.distance_um, self.indices, self.indptr), shape=(len(self), len(self)))

    @classmethod
    def from_csr(cls, matrix: csr_matrix) -> "SpatialGraph":
        """From a symmetric (n, n) matrix of distances; its diagonal is left out."""
        found = matrix.tocoo()
        return _graph(found.row, found.col, found.data, matrix.shape[0])

    @classmethod
    def of_edges(cls, a: NDArray[np.integer], b: NDArray[np.integer], xy_um: NDArray[np.floating]) -> "SpatialGraph":
        """From undirected edges, in any order and direction, perhaps several times.

        Cells in one place are a tenth of the smallest other distance apart, so that their edge is not lost.
        """
        a, b = np.asarray(a, dtype=np.int64), np.asarray(b, dtype=np.int64)
        length = np.linalg.norm(np.asarray(xy_um, dtype=np.float64)[a] - xy_um[b], axis=1)
        some = length > 0
        length[~some] = 0.1 * length[some].min() if some.any() else 0.1
        return _graph(np.concatenate([a, b]), np.concatenate([b, a]), np.concatenate([length, length]), len(xy_um))


def _graph(row: NDArray[np.integer], column: NDArray[np.integer], length: NDArray[np.floating], n: int) -> SpatialGraph:
    kernel: Any = _rows
    other = row != column
    parts = row[other].astype(np.int32), column[other].astype(np.int32), length[other].astype(np.float32)
    return SpatialGraph(*kernel(*parts, offsets_of(np.bincount(parts[0], minlength=n))))


@numba.njit(cache=True, nogil=True)
def _rows(row, column, length, offsets):
    """The entries of each row by ascending column, those that are there several times once."""
    n = offsets.size - 1
    free = offsets[:-1].copy()
    indices, lengths = np.empty(row.size, dtype=np.int32), np.empty(row.size, dtype=np.float32)
    for e in range(row.size):  # a row's entries are sorted as they come: they are few
        k = free[row[e]]
        while k > offsets[row[e]] and indices[k - 1] > column[e]:
            indices[k], lengths[k] = indices[k - 1], lengths[k - 1]
            k -= 1
        indices[k], lengths[k] = column[e], length[e]
        free[row[e]] += 1
    indptr = np.zeros(n + 1, dtype=np.int64)
    size = 0
    for i in range(n):
        for k in range(offsets[i], offsets[i + 1]):
            if k == offsets[i] or indices[k] != indices[k - 1]:
                column_here, length_here = indices[k], lengths[k]
                indices[size], lengths[size] = column_here, length_here
                size += 1
        indptr[i + 1] = size
    return indptr, indices[:size].copy(), lengths[:size].copy()


def neighbour_graph(
    xy_um: NDArray[np.floating],
    *,
    mode: str = "auto",
    radius_um: float | None = None,
    n_neighbours: int | None = None,
) -> SpatialGraph:
    """Neighbours of cells in the plane.

    Parameters
    ----------
    xy_um
        (n, 2) centres in µm, finite.
    mode
        ``delaunay``: edges of the Delaunay triangulation. ``knn``: the nearest cells, of either; ``grid``: the nearest
        that are not much farther than the very nearest usually are, as spots and bins have them. ``auto``: ``grid`` for
        places on one (`neighbours_in_grid`), else ``delaunay``.
    radius_um
        Longest edge; None keeps all. In a grid its pitch says who is near.
    n_neighbours
        For ``knn``, default 6, and ``grid``, by default 8 in a grid of squares and 6 in others.

    Returns
    -------
    SpatialGraph
        The same whatever the order of the cells but for ties (four cells on a circle, equal distances).
    """
    xy: NDArray[np.float64] = np.asarray(xy_um, dtype=np.float64)
    n = len(xy)
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}, expected one of {', '.join(MODES)}")
    if not np.isfinite(xy).all():
        raise ValueError("coordinates must be finite")
    if n < 2:
        return SpatialGraph(np.zeros(n + 1, dtype=np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
    in_grid = neighbours_in_grid(xy) if mode in ("auto", "grid") else 0
    if mode == "auto":
        mode = "grid" if in_grid else "delaunay"
    a, b = _delaunay(xy) if mode == "delaunay" else _nearest(xy, n_neighbours or in_grid or 6, mode == "grid")
    if radius_um is not None and mode != "grid":
        near = np.linalg.norm(xy[a] - xy[b], axis=1) <= radius_um
        a, b = a[near], b[near]
    return SpatialGraph.of_edges(a, b, xy)


def neighbours_in_grid(xy: NDArray[np.floating]) -> int:
    """How many neighbours places have if they lie on a grid: 8 on one of squares, 6 on one of triangles, 0 on none.

    The grid may be turned, mirrored, and lack places. Looked at are distances to the nearest places, all of which must
    be the same, and directions, all of which must be a quarter or a sixth of a turn from each other.

    Parameters
    ----------
    xy
        (n, 2) places, finite, in any unit.
    """
    if len(xy) < _LEAST_PLACES:
        return 0
    if len(xy) > _GRID_SAMPLE:  # a strip in the middle
        far = np.abs(xy[:, 0] - np.median(xy[:, 0]))
        xy = xy[np.argpartition(far, _GRID_SAMPLE)[:_GRID_SAMPLE]]
    length, found = cKDTree(xy).query(xy, k=7)
    pitch = float(np.median(length[:, 1]))
    if not pitch or (np.abs(length[:, 1] / pitch - 1) <= _GRID_TOLERANCE).mean() < _GRID_SHARE:
        return 0
    place, which = np.nonzero(np.abs(length / pitch - 1) <= 2 * _GRID_TOLERANCE)
    if place.size < 2 * len(xy):  # on a line
        return 0
    x, y = (xy[found[place, which]] - xy[place]).T
    angle = np.arctan2(y, x)
    for turn, neighbours in ((4, 8), (6, 6)):
        if np.abs(np.exp(1j * turn * angle).mean()) >= _GRID_ORDER:
            return neighbours
    return 0


def _delaunay(xy: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Edges of the triangulation; of cells in one place all others hang on the first."""
    _, first, inverse = np.unique(xy, axis=0, return_index=True, return_inverse=True)
    leader = first[inverse.ravel()]
    same = np.flatnonzero(leader != np.arange(len(xy)))
    own = np.sort(first)  # the triangulation of ties depends on the order: that of the cells
    places = xy[own]
    edges = triangulate(places) if len(places) > 2 else None
    if edges is not None:
        i, j = edges.T
    else:
        i, j = _by_qhull(places)
    return np.concatenate([leader[same], own[i]]), np.concatenate([same, own[j]])


def _by_qhull(places: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Edges where points are as regular as a grid, or on a line."""
    try:
        corners = Delaunay(places).simplices if len(places) > 2 else np.empty((0, 3), np.int64)
    except QhullError:
        corners = np.empty((0, 3), np.int64)  # all on one line
    if len(corners):
        return corners.ravel(), corners[:, [1, 2, 0]].ravel()
    along = np.argsort(places @ _direction(places), kind="stable")
    return along[:-1], along[1:]


def _direction(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linalg.svd(xy - xy.mean(axis=0), full_matrices=False)[2][0]


def _nearest(xy: NDArray[np.float64], k: int, grid: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    k = min(k, len(xy) - 1)
    length, found = cKDTree(xy).query(xy, k=k + 1)
    a = np.repeat(np.arange(len(xy)), k + 1)
    b, length = found.ravel(), length.ravel()
    other = a != b
    a, b, length = a[other], b[other], length[other]
    if grid:
        nearest = np.full(len(xy), np.inf)
        np.minimum.at(nearest, a, length)
        reach = _GRID_REACH * np.median(nearest) * (np.sqrt(2) if k >= 8 else 1.0)
        a, b = a[length <= reach], b[length <= reach]
    return a, b
