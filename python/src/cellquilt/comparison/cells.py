"""The cells of a segmentation: their outlines, their neighbours, and which cells of two segmentations are the same."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray

from cellquilt.geometry.polygons import Rings
from cellquilt.resolve.pairs import box_pairs, overlap_areas
from cellquilt.simulate.scores import mutual_best

NEIGHBOURS = 6  # as many as a cell has on average where cells tile the plane


@dataclass(frozen=True)
class Segmentation:
    """One method's cells.

    Attributes
    ----------
    name
        The method's name.
    geometry
        (n,) object array of Polygons and MultiPolygons in µm; a missing or empty one is a cell without area.
    by_genes
        Whether the method itself assigned transcripts, by their genes too. What its cells tell about their genes is
        then no finding, so that is measured by the outlines.
    """

    name: str
    geometry: NDArray[np.object_]
    by_genes: bool = False

    def __len__(self) -> int:
        return len(self.geometry)

    @cached_property
    def outlines(self) -> NDArray[np.object_]:
        """(n,) the outlines, those that cross themselves mended."""
        return mended(self.geometry)

    @cached_property
    def rings(self) -> Rings:
        """The same as flat arrays."""
        return Rings.from_shapely(self.outlines)

    @cached_property
    def _measures(self) -> NDArray[np.float64]:
        return self.rings.measures()

    @property
    def areas_um2(self) -> NDArray[np.float64]:
        """(n,) float64."""
        return self._measures[:, 0]

    @property
    def centroids_um(self) -> NDArray[np.float64]:
        """(n, 2) float64; NaN for a cell without outline."""
        return self._measures[:, 1:]


def mended(geometry: NDArray[np.object_]) -> NDArray[np.object_]:
    """Outlines that cross themselves as valid polygons that cover the same; the others as they are."""
    geometry = np.asarray(geometry, dtype=object).ravel()
    crossed = ~(shapely.is_valid(geometry) | shapely.is_missing(geometry))
    if crossed.any():
        geometry = geometry.copy()
        # A buffer of nothing drops the lines and points that mending may leave over.
        geometry[crossed] = shapely.buffer(shapely.make_valid(geometry[crossed]), 0)
    return geometry


def solidity(geometry: NDArray[np.object_]) -> NDArray[np.float64]:
    """Area over the area of the convex hull: 1 for a convex outline, less the deeper its bays.

    Parameters
    ----------
    geometry
        (n,) valid polygons.

    Returns
    -------
    numpy.ndarray
        (n,) float64 in 0..1; NaN where there is no area.
    """
    area, hull = shapely.area(geometry), shapely.area(shapely.convex_hull(geometry))
    return np.divide(area, hull, out=np.full(len(geometry), np.nan), where=hull > 0)


def overlapping_cells(
    a: Segmentation, b: Segmentation
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """All pairs of a cell of one and a cell of the other that share area.

    Returns
    -------
    i, j
        (m,) int64 positions in `a` and in `b`, ordered by i, then j.
    iou
        (m,) float64 intersection over union.
    """
    n = len(a)
    if n == 0 or len(b) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    both = _joined(a.rings, b.rings)
    i, j = box_pairs(both.bounds(), np.repeat([0, 1], [n, len(b)]))
    shared = overlap_areas(both, i, j)
    areas = np.concatenate([a.areas_um2, b.areas_um2])
    iou = shared / np.maximum(areas[i] + areas[j] - shared, 1e-12)
    # What rounding leaves of outlines that only touch is no overlap.
    real = shared > 1e-9 * np.minimum(areas[i], areas[j])
    return i[real], j[real] - n, iou[real]


def _joined(a: Rings, b: Rings) -> Rings:
    return Rings(
        np.concatenate([a.coords, b.coords]),
        np.concatenate([a.ring_offsets, b.ring_offsets[1:] + a.ring_offsets[-1]]),
        np.concatenate([a.polygon_offsets, b.polygon_offsets[1:] + a.polygon_offsets[-1]]),
        np.concatenate([a.exterior, b.exterior]),
    )


def outline_f1(a: Segmentation, b: Segmentation, threshold: float = 0.5) -> float:
    """Agreement of two segmentations' outlines.

    Parameters
    ----------
    a, b
        The segmentations; which is which does not matter.
    threshold
        Intersection over union from which on two cells are the same.

    Returns
    -------
    float
        ``2 m / (n_a + n_b)``, where m counts pairs in which each is the other's best; NaN where neither has cells.
    """
    i, j, iou = overlapping_cells(a, b)
    same = np.count_nonzero(mutual_best(i, j, iou, len(a), len(b)) & (iou >= threshold))
    total = len(a) + len(b)
    return 2.0 * same / total if total else float("nan")


def neighbours(centroids: NDArray[np.float64], k: int = NEIGHBOURS) -> NDArray[np.int64]:
    """The nearest cells of every cell.

    Parameters
    ----------
    centroids
        (n, 2) float64; a cell without (NaN) has and is no neighbour.
    k
        How many.

    Returns
    -------
    numpy.ndarray
        (n, k) int64, nearest first, -1 where there are not as many.
    """
    from scipy.spatial import cKDTree

    out = np.full((len(centroids), k), -1, dtype=np.int64)
    known = np.flatnonzero(np.isfinite(centroids).all(axis=1))
    if known.size < 2:
        return out
    # In an order of their own, so that of equally near cells the same ones are taken however the cells come.
    known = known[np.lexsort(centroids[known].T)]
    width = min(k + 1, known.size)
    _, found = cKDTree(centroids[known]).query(centroids[known], k=width)
    own = found == np.arange(known.size)[:, None]
    # Cells on one spot may hide a cell from its own list; then the last one goes.
    own[~own.any(axis=1), -1] = True
    out[known, : width - 1] = known[found[~own].reshape(known.size, width - 1)]
    return out
