"""The border-cell check: are there as many cells along patch borders as elsewhere in the tissue?

Doubled cells raise the density along borders, lost or merged ones lower it. The check needs no truth, so it runs on
every slide.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely

ZONE_UM = 10.0
#: Distances (µm) at which the report shows how density changes away from a border.
PROFILE_UM = (5.0, 10.0, 20.0, 30.0, 50.0, 80.0)


@dataclass(frozen=True)
class BorderCheck:
    """Cells near inner patch borders and elsewhere.

    Attributes
    ----------
    n_border, n_interior
        Cell centroids within the zone and farther away; both inside the tissue that was segmented.
    border_um2, interior_um2
        Areas of the two.
    profile
        One dict a ring of distances: ``from_um``, ``to_um`` (None: all beyond), ``n_cells``, ``area_um2``.
    """

    n_border: int
    n_interior: int
    border_um2: float
    interior_um2: float
    profile: tuple[dict[str, Any], ...] = ()

    @property
    def ratio(self) -> float | None:
        """Density in the zone over density in the interior; None where either has no area or the interior no cell."""
        if not (self.border_um2 > 0 and self.interior_um2 > 0 and self.n_interior):
            return None
        return (self.n_border / self.border_um2) / (self.n_interior / self.interior_um2)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the ratio if cells lay at random (Poisson counts, normal on the log scale)."""
        if self.ratio is None or not self.n_border:
            return None
        half = 1.96 * float(np.sqrt(1 / self.n_border + 1 / self.n_interior))
        return self.ratio * float(np.exp(-half)), self.ratio * float(np.exp(half))


def border_check(
    windows: np.ndarray,
    image_size: tuple[int, int],
    tissue: np.ndarray | None,
    xy_px: np.ndarray,
    pixel_size_um: float,
    *,
    zone_um: float = ZONE_UM,
) -> BorderCheck | None:
    """Compare cell densities near and away from inner patch borders.

    An inner border is a side of a patch's window (halo included) that is not the image's own side: where a cell may
    have been cut. The zone is everything within `zone_um` of one, along its whole length; zone and interior are
    limited to tissue inside patches, and each count is divided by its own area.

    Parameters
    ----------
    windows
        (p, 4) patch windows (x0, y0, x1, y1) in pixels.
    image_size
        (height, width) of the image in pixels.
    tissue
        (t,) polygons in pixels; None takes the whole image.
    xy_px
        (n, 2) centroids of cells in pixels.
    pixel_size_um
        Microns a pixel.
    zone_um
        Half width of the zone.

    Returns
    -------
    BorderCheck or None
        None where there is no inner border: one patch, or none.
    """
    sides = inner_sides(np.asarray(windows, dtype=np.float64).reshape(-1, 4), image_size)
    if not len(sides):
        return None
    searched = shapely.union_all(shapely.box(*np.asarray(windows, dtype=np.float64).T))
    searched = shapely.intersection(searched, shapely.box(0, 0, image_size[1], image_size[0]))
    if tissue is not None:
        searched = shapely.intersection(searched, shapely.union_all(np.asarray(tissue, dtype=object)))
    area_um2 = float(shapely.area(searched)) * pixel_size_um**2
    inside = _contains(searched, xy_px)
    xy = xy_px[inside]
    n_cells, n_border, border_um2 = len(xy), 0, 0.0
    rings: list[dict[str, Any]] = []
    before = (0.0, 0, 0.0)
    for distance in sorted({*PROFILE_UM, zone_um}):
        zone = shapely.intersection(searched, _near(sides, distance / pixel_size_um))
        count, area = int(_contains(zone, xy).sum()), float(shapely.area(zone)) * pixel_size_um**2
        if distance == zone_um:
            n_border, border_um2 = count, area
        if distance in PROFILE_UM:
            rings.append(_ring(before[0], distance, count - before[1], area - before[2]))
            before = (distance, count, area)
    rings.append(_ring(before[0], None, n_cells - before[1], max(area_um2 - before[2], 0.0)))
    return BorderCheck(n_border, n_cells - n_border, border_um2, max(area_um2 - border_um2, 0.0), tuple(rings))


def _ring(start: float, stop: float | None, n_cells: int, area_um2: float) -> dict[str, Any]:
    return {"from_um": start, "to_um": stop, "n_cells": n_cells, "area_um2": area_um2}


def inner_sides(windows: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """(s, 4) segments (x0, y0, x1, y1) of window sides that lie inside the image."""
    height, width = image_size
    x0, y0, x1, y1 = windows.T
    top = np.column_stack([x0, y0, x1, y0])[y0 > 0]
    bottom = np.column_stack([x0, y1, x1, y1])[y1 < height]
    left = np.column_stack([x0, y0, x0, y1])[x0 > 0]
    right = np.column_stack([x1, y0, x1, y1])[x1 < width]
    return np.unique(np.concatenate([top, bottom, left, right]), axis=0)


def _near(sides: np.ndarray, distance_px: float) -> Any:
    """The union of the strips within a distance of the segments, across them."""
    x0, y0, x1, y1 = sides.T
    across = np.where(y0 == y1, 0.0, distance_px), np.where(y0 == y1, distance_px, 0.0)
    return shapely.union_all(shapely.box(x0 - across[0], y0 - across[1], x1 + across[0], y1 + across[1]))


def _contains(area: Any, xy: np.ndarray) -> np.ndarray:
    if not len(xy) or shapely.is_empty(area):
        return np.zeros(len(xy), dtype=bool)
    shapely.prepare(area)
    return np.asarray(shapely.contains_xy(area, xy[:, 0], xy[:, 1]), dtype=bool)
