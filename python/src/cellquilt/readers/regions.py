"""Regions that split a slide: the shapes element ``regions``."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import shapely

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.regions import RegionFeature, read_features
from cellquilt.core.shapes import ShapesTable, mapped
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, identity

_POLYGONS = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)
#: Of the smaller region, what neighbours may share: they were drawn by hand along one line.
_SHARED = 0.01


def read_regions(
    path: Path, transforms: Mapping[str, Affine], image_size: tuple[int, int] | None = None
) -> ShapesTable:
    """Regions of a slide, in the order of the file.

    Parameters
    ----------
    path
        GeoJSON of Polygons and MultiPolygons with names; see `core.regions.read_features`.
    transforms
        Coordinate system → (3, 3) map from the file's coordinates.
    image_size
        (height, width) of the main image in pixels; regions are cut to it. None: there is none.

    Returns
    -------
    ShapesTable
        In pixels of the main image; ids are what a sample's name gets of the regions' names, the column ``name`` has
        these as the file has them.

    Raises
    ------
    CellquiltError
        ``regions-unreadable``, ``regions-empty``, ``regions-name``, ``regions-twice``, ``regions-geometry``,
        ``regions-outside``, ``regions-overlap``.
    """
    features = read_features(path)
    names = [feature.name for feature in features]
    geometry = np.array([_polygon(path, feature) for feature in features], dtype=object)
    geometry = mapped(geometry, transforms[GLOBAL])
    if image_size is not None:
        geometry = _on_image(path, names, geometry, image_size)
    _refuse_overlaps(path, names, geometry)
    ids = np.array([feature.slug for feature in features])
    found = {GLOBAL: identity(), MICRONS: transforms[MICRONS] @ np.linalg.inv(transforms[GLOBAL])}
    return ShapesTable(ids, geometry, {"name": np.array(names, dtype=object)}, found, {"source": path.name})


def _polygon(path: Path, feature: RegionFeature) -> shapely.Geometry:
    def wrong(what: str) -> CellquiltError:
        return CellquiltError(
            "regions-geometry", f'{path.name}: region "{feature.name}" {what}', "draw it as a polygon"
        )

    try:
        found = shapely.geometry.shape(feature.geometry)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, shapely.errors.ShapelyError) as error:
        raise wrong(f"has no outline: {error}") from error
    if shapely.get_type_id(found) not in _POLYGONS:
        raise wrong(f"is a {found.geom_type}")
    if not np.isfinite(shapely.get_coordinates(found)).all():
        raise wrong("has coordinates that are no numbers")
    if not shapely.is_valid(found):
        found = shapely.make_valid(found, method="structure", keep_collapsed=False)
        LOG.warning('%s: the outline of region "%s" crosses itself and was mended', path.name, feature.name)
    if not shapely.area(found):
        raise wrong("has no area")
    return found


def _on_image(path: Path, names: list[str], geometry: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    height, width = image_size
    cut = np.asarray(shapely.intersection(geometry, shapely.box(0, 0, width, height)), dtype=object)
    there = shapely.area(cut)
    outside = np.flatnonzero(there == 0)
    if outside.size:
        x0, y0, x1, y1 = shapely.bounds(geometry[outside[0]])
        raise CellquiltError(
            "regions-outside",
            f'{path.name}: region "{names[outside[0]]}" (x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f} px) lies '
            f"outside the image of {width} × {height} px",
            "is regions_unit right? QuPath's coordinates are pixels (px), Xenium Explorer's µm (um)",
        )
    for number in np.flatnonzero(there < shapely.area(geometry) * (1 - 1e-9)).tolist():
        LOG.warning('%s: region "%s" reaches beyond the image and is cut', path.name, names[number])
    # Where an outline only touches the edge, lines are left over.
    lines = ~np.isin(shapely.get_type_id(cut), _POLYGONS)
    cut[lines] = [shapely.multipolygons([p for p in shapely.get_parts(one) if p.area]) for one in cut[lines]]
    return cut


def _refuse_overlaps(path: Path, names: list[str], geometry: np.ndarray) -> None:
    first, second = shapely.STRtree(geometry).query(geometry, predicate="intersects")
    first, second = first[first < second], second[first < second]
    shared = shapely.area(shapely.intersection(geometry[first], geometry[second]))
    smaller = np.minimum(shapely.area(geometry[first]), shapely.area(geometry[second]))
    for pair in np.lexsort((second, first)):
        if shared[pair] > _SHARED * smaller[pair]:
            raise CellquiltError(
                "regions-overlap",
                f'{path.name}: regions "{names[first[pair]]}" and "{names[second[pair]]}" overlap by '
                f"{shared[pair]:.0f} px², {shared[pair] / smaller[pair]:.0%} of the smaller one",
                "each cell is of one region at most: draw them apart",
            )
