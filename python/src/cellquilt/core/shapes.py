"""Shapes: GeoParquet files and SpatialData shapes elements, written and read with pyarrow and shapely alone.

geopandas would do, but importing it costs more than a whole patch task may cost beside its engine.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from cellquilt.core import zarr_json
from cellquilt.core.errors import CellquiltError
from cellquilt.core.parquet import arrow_array, write_parquet
from cellquilt.core.transforms import Affine, element_transforms, to_ngff

METADATA_KEY = b"cellquilt"
_FILE = "shapes.parquet"


@dataclass
class ShapesTable:
    """Polygons with an id and columns each.

    Attributes
    ----------
    ids
        (n,) str array; unique.
    geometry
        (n,) object array of shapely polygons in the element's own coordinates.
    columns
        Column name → (n,) array.
    transforms
        Coordinate system → (3, 3) map from the element's own coordinates.
    metadata
        Plain data kept beside the table (JSON).
    """

    ids: np.ndarray
    geometry: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    transforms: dict[str, Affine] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.geometry)

    def take(self, rows: np.ndarray) -> "ShapesTable":
        """The given rows (index or boolean mask), in their order."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return ShapesTable(self.ids[rows], self.geometry[rows], columns, dict(self.transforms), dict(self.metadata))


def write_geoparquet(
    path: Path,
    geometry: np.ndarray,
    columns: Mapping[str, np.ndarray],
    *,
    index: tuple[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write one GeoParquet 1.1 file (WKB, no CRS) that geopandas reads with the index given.

    Parameters
    ----------
    path
        The file to write; the caller makes it atomic.
    geometry
        (n,) object array of shapely geometries.
    columns
        Column name → (n,) array.
    index
        Name and (n,) values of the column that geopandas is to use as index.
    metadata
        Plain data, stored as JSON under the file's metadata key ``cellquilt``.
    """
    geometry = np.asarray(geometry, dtype=object)
    arrays: dict[str, pa.Array] = {name: arrow_array(values) for name, values in columns.items()}
    arrays["geometry"] = arrow_array(shapely.to_wkb(geometry)).cast(pa.binary())
    if index is not None:
        arrays[index[0]] = pa.array(np.asarray(index[1], dtype=object).tolist(), type=pa.string())
    table = pa.table(arrays)
    bbox = shapely.total_bounds(geometry).tolist() if len(geometry) else None
    types = sorted({_TYPE_NAMES[code] for code in np.unique(shapely.get_type_id(geometry)).tolist()})
    column_meta: dict[str, Any] = {"encoding": "WKB", "crs": None, "geometry_types": types}
    if bbox is not None:
        column_meta["bbox"] = bbox
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column_meta}}
    file_metadata = {b"geo": json.dumps(geo).encode()}
    if index is not None:
        file_metadata[b"pandas"] = _pandas_metadata(table, index[0])
    if metadata is not None:
        file_metadata[METADATA_KEY] = json.dumps(metadata, sort_keys=True).encode()
    write_parquet(path, table.replace_schema_metadata(file_metadata))


_TYPE_NAMES = {0: "Point", 1: "LineString", 3: "Polygon", 4: "MultiPoint", 6: "MultiPolygon", 7: "GeometryCollection"}


def _pandas_metadata(table: pa.Table, index: str) -> bytes:
    columns = [
        {"name": name, "field_name": name, "pandas_type": str(kind), "numpy_type": _numpy_name(kind), "metadata": None}
        for name, kind in zip(table.schema.names, table.schema.types, strict=True)
    ]
    document = {"index_columns": [index], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    return json.dumps(document).encode()


def _numpy_name(kind: pa.DataType) -> str:
    try:
        return str(np.dtype(kind.to_pandas_dtype()))
    except (NotImplementedError, TypeError):
        return "object"


def read_geoparquet(path: Path) -> tuple[np.ndarray, pa.Table, dict[str, Any]]:
    """Read a GeoParquet file.

    Returns
    -------
    geometry : numpy.ndarray
        (n,) object array of shapely geometries.
    table : pyarrow.Table
        All other columns.
    metadata : dict
        What `write_geoparquet` was given as metadata.

    Raises
    ------
    CellquiltError
        ``geoparquet-unreadable`` if the file is not Parquet or has no WKB geometry.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CellquiltError("geoparquet-unreadable", f"{path} cannot be read as GeoParquet: {error}") from error
    file_metadata = table.schema.metadata or {}
    geo = json.loads(file_metadata.get(b"geo", b"{}"))
    name = geo.get("primary_column", "geometry")
    if name not in table.schema.names:
        raise CellquiltError(
            "geoparquet-unreadable",
            f"{path} has no geometry column {name!r}; columns: {', '.join(table.schema.names)}",
            "write it with geopandas' to_parquet, or as GeoJSON",
        )
    try:
        geometry = np.asarray(shapely.from_wkb(table.column(name).to_numpy(zero_copy_only=False)), dtype=object)
    except (shapely.errors.ShapelyError, TypeError) as error:
        raise CellquiltError(
            "geoparquet-unreadable", f"{path}: column {name!r} holds no outlines (WKB): {error}"
        ) from error
    metadata = json.loads(file_metadata.get(METADATA_KEY, b"{}"))
    return geometry, table.drop_columns([name]), metadata


def write_shapes(element: Path, shapes: ShapesTable) -> None:
    """Write a SpatialData shapes element (folder with `zarr.json` and GeoParquet).

    Parameters
    ----------
    element
        The element's folder inside a store, for example ``store/shapes/cell_boundaries``.
    shapes
        What to write; ``shapes.ids`` becomes the index.
    """
    element.mkdir(parents=True)
    attributes = {
        "encoding-type": "ngff:shapes",
        "axes": ["x", "y"],
        "coordinateTransformations": to_ngff(shapes.transforms, ("x", "y")),
        "spatialdata_attrs": {"version": "0.3"},
    }
    zarr_json.write_group(element, attributes)
    write_geoparquet(
        element / _FILE, shapes.geometry, shapes.columns, index=("cell_id", shapes.ids), metadata=shapes.metadata
    )


def read_shapes(element: Path) -> ShapesTable:
    """Read a shapes element written by `write_shapes` or by spatialdata itself."""
    geometry, table, metadata = read_geoparquet(element / _FILE)
    index_name = _index_column(table)
    ids = (
        np.asarray(table.column(index_name).to_pylist(), dtype=str)
        if index_name
        else np.arange(len(geometry)).astype(str)
    )
    columns = {
        name: table.column(name).to_numpy(zero_copy_only=False) for name in table.schema.names if name != index_name
    }
    transforms = element_transforms(element)
    return ShapesTable(ids, geometry, columns, transforms, metadata)


def count_shapes(element: Path) -> int:
    """Number of rows of a shapes element, from the file's footer."""
    try:
        return int(pq.read_metadata(element / _FILE).num_rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise CellquiltError(
            "geoparquet-unreadable", f"{element / _FILE} cannot be read as GeoParquet: {error}"
        ) from error


def _index_column(table: pa.Table) -> str | None:
    pandas = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}"))
    names = [name for name in pandas.get("index_columns", []) if isinstance(name, str)]
    return names[0] if names and names[0] in table.schema.names else None
