"""Shapes as GeoJSON, as QuPath reads and writes it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.parquet import arrow_array
from cellquilt.core.transforms import GLOBAL
from cellquilt.geometry.geojson import geometry_json, join_json, joined, string_json
from cellquilt.geometry.polygons import Rings
from cellquilt.readers.prior_cells import read_geojson as read_features
from cellquilt.spatial.elements import frame_in

if TYPE_CHECKING:
    import geopandas as gpd
    from spatialdata import SpatialData

#: What QuPath may take shapes for.
KINDS = ("annotation", "detection", "cell")
#: Columns that QuPath's own properties become.
NAME, CLASS = "name", "classification"


def write_geojson(
    sdata: "SpatialData",
    name: str,
    output: Path | str,
    *,
    coordinate_system: str = GLOBAL,
    class_key: str | None = None,
    kind: str = "annotation",
    overwrite: bool = False,
) -> Path:
    """Write shapes for QuPath (*File › Import objects from file*).

    Parameters
    ----------
    sdata
        Object with the shapes.
    name
        Name of the shapes; circles are written as polygons.
    output
        File to write.
    coordinate_system
        ``global``, the pixels of the main image, is what QuPath takes beside that image.
    class_key
        Column of the shapes that becomes QuPath's class. None: ``classification``, if it is there.
    kind
        ``annotation``, ``detection`` or ``cell``.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    CellquiltError
        ``element-unknown``, ``element-kind``, ``coordinate-system-unknown``, ``column-unknown``,
        ``geojson-kind-unknown``, ``output-exists``.
    """
    if kind not in KINDS:
        raise CellquiltError("geojson-kind-unknown", f'QuPath has no "{kind}"', did_you_mean(kind, KINDS))
    frame = frame_in(sdata, name, coordinate_system)
    if class_key is not None and class_key not in frame:
        raise CellquiltError(
            "column-unknown", f'"{name}" has no column "{class_key}"', did_you_mean(class_key, map(str, frame.columns))
        )
    geometry = np.asarray(frame.geometry.array, dtype=object)
    try:
        rings = Rings.from_shapely(geometry)
    except TypeError:
        raise CellquiltError("element-kind", f'"{name}" holds no polygons', "points have their own table") from None
    ids = frame.get(NAME, frame.index)
    said = joined(',"name":', string_json(pa.array([str(value) for value in ids], pa.string())))
    column = class_key or (CLASS if CLASS in frame else None)
    if column is not None:
        given = frame[column].astype(object)
        texts = pa.array([None if value is None or value != value else str(value) for value in given], pa.string())
        classes = joined(',"classification":{"name":', string_json(texts), "}")
        said = joined(said, pc.if_else(pc.is_valid(texts), classes, ""))
    features = joined(
        '{"type":"Feature","geometry":', geometry_json(rings), f',"properties":{{"objectType":"{kind}"', said, "}}"
    )
    there = ~(shapely.is_missing(geometry) | shapely.is_empty(geometry))
    with atomic_path(output, overwrite=overwrite) as aside:
        text = join_json(features.filter(arrow_array(there))) if there.any() else ""
        aside.write_text(f'{{"type":"FeatureCollection","features":[\n{text}\n]}}\n', encoding="utf-8")
    return Path(output)


def read_geojson(
    path: Path | str, sdata: "SpatialData | None" = None, like: str | None = None, *, name: str | None = None
) -> "gpd.GeoDataFrame":
    """Read shapes that QuPath, or who else writes GeoJSON, drew: a SpatialData shapes element.

    Parameters
    ----------
    path
        A FeatureCollection of polygons.
    sdata
        Object to add the shapes to; None adds them to nothing.
    like
        Element whose own coordinates these are, such as the image that was drawn on: the shapes get its place in all
        coordinate systems. None: they are in ``global``.
    name
        Name of the new element; None: that of the file.

    Returns
    -------
    geopandas.GeoDataFrame
        A valid shapes element. Columns are the file's properties; of QuPath's class its name, in ``classification``.

    Raises
    ------
    CellquiltError
        ``geojson-unreadable``, ``element-unknown``.
    """
    import geopandas as gpd
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity, get_transformation

    path = Path(path)
    try:
        geometry, columns = read_features(path)
    except CellquiltError as error:
        hint = "export it from QuPath as FeatureCollection"
        raise CellquiltError("geojson-unreadable", error.message, hint) from error
    polygonal = np.isin(shapely.get_type_id(geometry), (3, 6)) & ~shapely.is_empty(geometry)
    if not polygonal.any():
        raise CellquiltError("geojson-unreadable", f"{path.name} holds no polygons", "draw areas, not lines or points")
    frame = gpd.GeoDataFrame(columns.to_pandas(), geometry=geometry)[polygonal]
    if CLASS in frame:
        frame[CLASS] = [_class_name(value) for value in frame[CLASS]]
    maps: Any = {GLOBAL: Identity()}
    if like is not None:
        from cellquilt.spatial.elements import element_of

        if sdata is None:
            raise CellquiltError("element-unknown", f'"{like}" of no object', "give sdata as well")
        maps = dict(get_transformation(element_of(sdata, like), get_all=True))  # type: ignore[arg-type]
    frame = frame.reset_index(drop=True)
    frame.index = frame.index.astype(str)
    element = ShapesModel.parse(frame, transformations=maps)
    if sdata is not None:
        sdata[name or path.stem] = element
    return element


def _class_name(value: Any) -> str | None:
    """The name of a class, which QuPath writes as an object."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value if isinstance(value, str) else None
    try:
        return str(json.loads(value).get("name", "")) or None
    except ValueError:
        return value
