"""Cells that a user brings: outlines in a GeoParquet or GeoJSON file, the shapes element ``prior_cells``."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import shapely

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.shapes import ShapesTable, read_geoparquet
from cellquilt.core.transforms import Affine

#: Columns that name cells, the first there is; else they are numbered.
_IDS = ("cell_id", "EntityID", "id", "cell", "__index_level_0__", "index")
_POLYGONS = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)


def read_prior_cells(path: Path, transforms: Mapping[str, Affine]) -> ShapesTable:
    """Outlines of cells, in the order of the file.

    Parameters
    ----------
    path
        GeoParquet or GeoJSON of Polygons and MultiPolygons. Cells are named by the first column there is of
        ``cell_id``, ``EntityID``, ``id``, ``cell`` and the index, else by their number. With a column ``ZIndex``, as
        Vizgen's tools write it, they are outlines of cells in planes. The file's own word on its coordinate system is
        not heeded.
    transforms
        Coordinate system → (3, 3) map from the file's coordinates.

    Returns
    -------
    ShapesTable
        Columns ``entity_id``, the file's name of the cell, and ``z_plane`` (int32) where the file has planes.

    Raises
    ------
    CellquiltError
        ``prior-cells-unreadable``, ``prior-cells-invalid``, ``prior-cells-ids``, ``prior-cells-empty``.
    """
    geometry, columns = read_geojson(path) if path.suffix.lower() in (".geojson", ".json") else _geoparquet(path)
    hint = "give outlines of cells as Polygons or MultiPolygons"
    if not len(geometry):
        raise CellquiltError("prior-cells-empty", f"{path.name} holds no cells", hint)
    there = ~(shapely.is_missing(geometry) | shapely.is_empty(geometry))
    wrong = np.flatnonzero(there & ~np.isin(shapely.get_type_id(geometry), _POLYGONS))
    if wrong.size:
        raise CellquiltError(
            "prior-cells-invalid", f"{path.name}: cell {wrong[0] + 1} is a {geometry[wrong[0]].geom_type}", hint
        )
    xy, cell = shapely.get_coordinates(geometry, return_index=True)
    bad = cell[~np.isfinite(xy).all(axis=1)]
    if bad.size:
        raise CellquiltError(
            "prior-cells-invalid", f"{path.name}: cell {bad[0] + 1} has coordinates that are no numbers", hint
        )
    broken = there & ~shapely.is_valid(geometry)
    if broken.any():
        geometry = geometry.copy()
        geometry[broken] = shapely.make_valid(geometry[broken], method="structure", keep_collapsed=False)
        LOG.warning("%s: %d outlines cross themselves and were mended", path.name, broken.sum())
    there &= shapely.area(geometry) > 0
    if not there.any():
        raise CellquiltError("prior-cells-empty", f"{path.name}: no cell has an area", hint)
    if not there.all():
        LOG.warning("%s: %d of %d cells have no area and are left out", path.name, (~there).sum(), len(there))
    geometry, columns = geometry[there], columns.filter(pa.array(there))
    name = next((name for name in _IDS if name in columns.column_names), None)
    entity = np.arange(1, len(there) + 1)[there].astype(str)
    if name is not None:
        entity = np.asarray(columns.column(name).cast(pa.string()).fill_null("").to_pylist(), dtype=str)
    found = {"entity_id": entity}
    ids = entity
    if "ZIndex" in columns.column_names:
        plane = columns.column("ZIndex").cast(pa.int32()).to_numpy()
        found["z_plane"] = plane
        ids = np.char.add(np.char.add(entity, "_z"), plane.astype(str))
    values, counts = np.unique(ids, return_counts=True)
    twice = values[(counts > 1) | (values == "")]
    if twice.size:
        raise CellquiltError(
            "prior-cells-ids",
            f"{path.name}: {'a cell has no name' if not twice[0] else f'several cells are called {twice[0]!r}'} "
            f"in column {name}",
            "give each cell a name of its own, or leave the column out: cells are numbered then",
        )
    metadata = {"source": path.name, "n_without_outline": int((~there).sum()), "n_mended": int(broken.sum())}
    return ShapesTable(ids, geometry, found, dict(transforms), metadata)


def _geoparquet(path: Path) -> tuple[np.ndarray, pa.Table]:
    try:
        geometry, table, _ = read_geoparquet(path)
    except CellquiltError as error:
        raise CellquiltError(
            "prior-cells-unreadable", error.message, "give GeoParquet (.parquet) or GeoJSON (.geojson)"
        ) from error
    return geometry, table


def read_geojson(path: Path) -> tuple[np.ndarray, pa.Table]:
    """(n,) shapely geometries of a FeatureCollection, and their properties; objects among these as JSON text.

    Raises
    ------
    CellquiltError
        ``prior-cells-unreadable``.
    """
    import pyogrio
    from pyogrio.errors import DataLayerError, DataSourceError, FieldError

    hint = "give a FeatureCollection of Polygons"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            meta, fids, wkb, fields = pyogrio.raw.read(path, return_fids=True)
        geometry = np.asarray(shapely.from_wkb(wkb), dtype=object)
    except (DataSourceError, DataLayerError, FieldError, shapely.errors.ShapelyError, TypeError, OSError) as error:
        raise CellquiltError(
            "prior-cells-unreadable", f"{path.name} cannot be read as GeoJSON: {error}", hint
        ) from error
    columns = {name: pa.array(values, from_pandas=True) for name, values in zip(meta["fields"], fields, strict=True)}
    return geometry, pa.table(columns or {"fid": pa.array(fids)})
