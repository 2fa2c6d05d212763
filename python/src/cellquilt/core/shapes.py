"""Shapes: GeoParquet files and SpatialData shapes elements, written and read with pyarrow and shapely alone.

geopandas would do, but importing it costs more than a whole patch task may cost beside its engine.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from cellquilt.core import zarr_json
from cellquilt.core.errors import CellquiltError
from cellquilt.core.parquet import ParquetWriter, arrow_array
from cellquilt.core.privacy import scrub
from cellquilt.core.transforms import Affine, apply, element_transforms, to_ngff

METADATA_KEY = b"cellquilt"
_FILE = "shapes.parquet"
_BATCH_BYTES = 2 << 20  # of outlines in memory at a time where a file is read in parts: more takes longer
_GROUP_ROWS = 8192  # of a file that is written in parts


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


def mapped(geometry: np.ndarray, matrix: Affine) -> np.ndarray:
    """(n,) object array of the geometries after a (3, 3) affine map; themselves if it changes nothing."""
    if np.array_equal(matrix, np.eye(3)):
        return geometry
    return np.asarray(shapely.transform(geometry, lambda xy: apply(matrix, xy)), dtype=object)


@runtime_checkable
class UnheldGeometry(Protocol):
    """Outlines that are made when they are asked for, such as `geometry.packed.PackedPolygons`."""

    def __len__(self) -> int: ...

    def wkb(self, start: int, stop: int) -> pa.ChunkedArray:
        """(stop - start,) binary, those at these positions."""

    def extent(self) -> tuple[np.ndarray, np.ndarray]:
        """(4,) bounds of all, NaN if there are none, and the numbers that shapely gives their types, ascending."""


def write_geoparquet(
    path: Path,
    geometry: "np.ndarray | UnheldGeometry",
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
        (n,) object array of shapely geometries, or what makes some of them at a time.
    columns
        Column name → (n,) array.
    index
        Name and (n,) values of the column that geopandas is to use as index.
    metadata
        Plain data, stored as JSON under the file's metadata key ``cellquilt``.
    """
    if isinstance(geometry, UnheldGeometry):
        extent, parts = geometry.extent(), _parts(geometry)
    else:
        geometry = np.asarray(geometry, dtype=object)
        extent, parts = _extent(geometry), iter([arrow_array(shapely.to_wkb(geometry))])
    arrays: dict[str, pa.Array] = {name: arrow_array(values) for name, values in columns.items()}
    arrays["geometry"] = pa.nulls(0, pa.binary())  # `pa.array` would import pandas; see `arrow_array`
    if index is not None:
        arrays[index[0]] = pa.array(np.asarray(index[1], dtype=object).tolist(), type=pa.string())
    schema = pa.schema([pa.field(name, array.type) for name, array in arrays.items()])
    schema = _with_metadata(schema, _geo_metadata(*extent), None if index is None else index[0], metadata)
    writer = ParquetWriter(path, schema, compression="zstd")
    try:
        start = 0
        for part in parts:
            here = {name: array.slice(start, len(part)) for name, array in arrays.items()}
            here["geometry"] = part.cast(pa.binary())
            writer.write_table(pa.Table.from_arrays(list(here.values()), schema=schema))
            start += len(part)
        writer.close()
    except BaseException:
        writer.abandon()
        raise


def _parts(geometry: UnheldGeometry) -> Iterator[pa.ChunkedArray]:
    for start in range(0, max(len(geometry), 1), _GROUP_ROWS):  # of no rows one part, too: a file with its columns
        yield geometry.wkb(start, min(start + _GROUP_ROWS, len(geometry)))


def _extent(geometry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(4,) bounds of geometries, NaN if there are none, and their types, as shapely numbers them."""
    bounds = shapely.total_bounds(geometry) if len(geometry) else np.full(4, np.nan)
    return bounds, np.unique(shapely.get_type_id(geometry))


def _geo_metadata(bounds: np.ndarray, types: np.ndarray) -> dict[str, Any]:
    """What GeoParquet says of a column, from its (4,) bounds (NaN without rows) and shapely's numbers of its types."""
    column: dict[str, Any] = {"encoding": "WKB", "crs": None}
    column["geometry_types"] = sorted({_TYPE_NAMES[code] for code in types.tolist()})
    if types.size:
        column["bbox"] = bounds.tolist()
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def _with_metadata(
    schema: pa.Schema, geo: Mapping[str, Any], index: str | None, metadata: Mapping[str, Any] | None
) -> pa.Schema:
    found = {b"geo": json.dumps(geo).encode()}
    if index is not None:
        found[b"pandas"] = _pandas_metadata(schema, index)
    if metadata is not None:
        found[METADATA_KEY] = json.dumps(metadata, sort_keys=True).encode()
    return schema.with_metadata(found)


_TYPE_NAMES = {0: "Point", 1: "LineString", 3: "Polygon", 4: "MultiPoint", 6: "MultiPolygon", 7: "GeometryCollection"}


def _pandas_metadata(schema: pa.Schema, index: str) -> bytes:
    columns = [
        {"name": name, "field_name": name, "pandas_type": str(kind), "numpy_type": _numpy_name(kind), "metadata": None}
        for name, kind in zip(schema.names, schema.types, strict=True)
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
    with _readable(path):
        table = pq.read_table(path)
    name = _geometry_column(path, table.schema)
    geometry = _from_wkb(path, name, table.column(name))
    metadata = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    return geometry, table.drop_columns([name]), metadata


def _from_wkb(path: Path, name: str, wkb: pa.Array | pa.ChunkedArray) -> np.ndarray:
    try:
        return np.asarray(shapely.from_wkb(wkb.to_numpy(zero_copy_only=False)), dtype=object)
    except (shapely.errors.ShapelyError, TypeError) as error:
        raise CellquiltError(
            "geoparquet-unreadable", f"{path}: column {name!r} holds no outlines (WKB): {error}"
        ) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Damaged Parquet is an error of ours."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise CellquiltError("geoparquet-unreadable", f"{path} cannot be read as GeoParquet: {error}") from error


def _geometry_column(path: Path, schema: pa.Schema) -> str:
    geo = json.loads((schema.metadata or {}).get(b"geo", b"{}"))
    name = geo.get("primary_column", "geometry")
    if name not in schema.names:
        raise CellquiltError(
            "geoparquet-unreadable",
            f"{path} has no geometry column {name!r}; columns: {', '.join(schema.names)}",
            "write it with geopandas' to_parquet, or as GeoJSON",
        )
    return str(name)


def write_shapes(element: Path, shapes: ShapesTable) -> None:
    """Write a SpatialData shapes element (folder with `zarr.json` and GeoParquet).

    Parameters
    ----------
    element
        The element's folder inside a store, for example ``store/shapes/cell_boundaries``.
    shapes
        What to write; ``shapes.ids`` becomes the index.
    """
    write_outlines(element, shapes.geometry, shapes.ids, shapes.columns, shapes.transforms, shapes.metadata)


def write_outlines(
    element: Path,
    geometry: np.ndarray | UnheldGeometry,
    ids: np.ndarray,
    columns: Mapping[str, np.ndarray],
    transforms: Mapping[str, Affine],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """`write_shapes` from the parts of a `ShapesTable`, for outlines that are not held as objects."""
    _write_group(element, transforms)
    write_geoparquet(element / _FILE, geometry, columns, index=("cell_id", ids), metadata=scrub(metadata or {}))


def _write_group(element: Path, transforms: Mapping[str, Affine]) -> None:
    element.mkdir(parents=True)
    attributes = {
        "encoding-type": "ngff:shapes",
        "axes": ["x", "y"],
        "coordinateTransformations": to_ngff(transforms, ("x", "y")),
        "spatialdata_attrs": {"version": "0.3"},
    }
    zarr_json.write_group(element, attributes)


def read_shapes(element: Path) -> ShapesTable:
    """Read a shapes element written by `write_shapes` or by spatialdata itself."""
    geometry, table, metadata = read_geoparquet(element / _FILE)
    index_name = _index_column(table.schema)
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
    with _readable(element / _FILE):
        return int(pq.read_metadata(element / _FILE).num_rows)


class GeoParquetFile:
    """A GeoParquet file, for more outlines than memory holds as objects.

    Attributes
    ----------
    path
        The file.
    n_bytes
        Size of its rows when decompressed.
    schema
        Its columns.
    geometry, index
        Names of the column with the outlines and of that with the ids, if there is one.
    metadata
        What `write_geoparquet` was given as metadata.

    Raises
    ------
    CellquiltError
        ``geoparquet-unreadable``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _readable(path):
            footer = pq.read_metadata(path)
            self.schema = footer.schema.to_arrow_schema()
        self._n_rows = footer.num_rows
        self.n_bytes = sum(footer.row_group(k).total_byte_size for k in range(footer.num_row_groups))
        self.geometry, self.index = _geometry_column(path, self.schema), _index_column(self.schema)
        self.metadata: dict[str, Any] = json.loads((self.schema.metadata or {}).get(METADATA_KEY, b"{}"))

    def __len__(self) -> int:
        return self._n_rows

    def ids(self) -> np.ndarray:
        """(n,) str ids, as `read_shapes` gives them."""
        if self.index is None:
            return np.arange(len(self)).astype(str)
        names: list[str] = []
        for batch in self.batches([self.index]):
            names += batch.column(0).to_pylist()
        return np.asarray(names, dtype=str)

    def wkb(self) -> Iterator[pa.Array]:
        """The outlines (binary, a few MB at a time) in their order."""
        for batch in self.batches([self.geometry]):
            yield batch.column(0)

    def batches(self, columns: list[str] | None = None, rows: int | None = None) -> Iterator[pa.RecordBatch]:
        """Some columns, or all, so many rows at a time; by default so many that their outlines are a few MB."""
        with _readable(self.path):
            # Otherwise Arrow reads a whole column of a row group first.
            file = pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False)
        with file:
            few = self._rows_in(_BATCH_BYTES)
            batches = file.iter_batches(batch_size=rows or few, columns=columns, use_threads=False)
            while True:
                with _readable(self.path):  # not around `yield`: the caller's own errors are no damage here
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def _rows_in(self, size: int) -> int:
        return max(size * len(self) // max(self.n_bytes, 1), 1)

    def decode(self) -> None:
        """Make every outline once, to know that they can be.

        Raises
        ------
        CellquiltError
            ``geoparquet-unreadable``.
        """
        for wkb in self.wkb():
            _from_wkb(self.path, self.geometry, wkb)

    def write_head(self, path: Path, size: int) -> None:
        """Write the first rows, about `size` bytes of them, as a file that says the same of itself."""
        head = next(self.batches(rows=self._rows_in(size)))
        pq.write_table(pa.Table.from_batches([head]).replace_schema_metadata(self.schema.metadata), path)


class ShapesFile(GeoParquetFile):
    """The file of a shapes element.

    Parameters
    ----------
    element
        The element's folder.

    Attributes
    ----------
    transforms
        Coordinate system → (3, 3) map from the element's own coordinates.

    Raises
    ------
    CellquiltError
        ``geoparquet-unreadable``, ``element-unreadable``.
    """

    def __init__(self, element: Path) -> None:
        super().__init__(element / _FILE)
        self.transforms = element_transforms(element)


def copy_shapes(
    source: Path,
    target: Path,
    kept: np.ndarray,
    *,
    offset: tuple[float, float] = (0.0, 0.0),
    transforms: Mapping[str, Affine] | None = None,
) -> None:
    """Write some rows of a shapes element as an element of its own, never holding all of them.

    Parameters
    ----------
    source, target
        Folders of the element to read and of the one to write.
    kept
        (n,) bool, the rows to write.
    offset
        What is added to their x and y.
    transforms
        Of the new element; default: the source's.
    """
    file = ShapesFile(source)
    bounds, types = _extent_of_rows(file, kept)
    bounds = bounds + np.tile(offset, 2)
    names = [name for name in file.schema.names if name not in (file.geometry, file.index)]
    fields = [*(file.schema.field(name) for name in names), pa.field("geometry", pa.binary())]
    schema = _with_metadata(
        pa.schema([*fields, pa.field("cell_id", pa.string())]),
        _geo_metadata(bounds, types),
        "cell_id",
        file.metadata,
    )
    ids = pa.array(file.ids().tolist(), pa.string())
    _write_group(target, file.transforms if transforms is None else transforms)
    writer = ParquetWriter(target / _FILE, schema, compression="zstd")
    try:
        start = 0
        for batch in file.batches(rows=_GROUP_ROWS):
            columns = [batch.column(name) for name in names]
            columns += [batch.column(file.geometry).cast(pa.binary()), ids.slice(start, batch.num_rows)]
            here = arrow_array(kept[start : start + batch.num_rows])
            rows = pa.RecordBatch.from_arrays(columns, schema=schema).filter(here)
            writer.write_batch(rows if offset == (0.0, 0.0) else _moved(rows, offset))
            start += batch.num_rows
        writer.close()
    except BaseException:
        writer.abandon()
        raise


def _moved(rows: pa.RecordBatch, offset: tuple[float, float]) -> pa.RecordBatch:
    outlines = shapely.from_wkb(rows.column("geometry").to_numpy(zero_copy_only=False))
    wkb = shapely.to_wkb(shapely.transform(outlines, lambda xy: xy + offset))
    return rows.set_column(rows.schema.get_field_index("geometry"), "geometry", pa.array(wkb.tolist(), pa.binary()))


def _extent_of_rows(file: ShapesFile, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`_extent` of some rows of a file."""
    low, high, types, start = np.full(2, np.inf), np.full(2, -np.inf), np.zeros(0, np.int64), 0
    for wkb in file.wkb():
        wanted = wkb.filter(arrow_array(kept[start : start + len(wkb)]))
        bounds, here = _extent(shapely.from_wkb(wanted.to_numpy(zero_copy_only=False)))
        low, high = np.fmin(low, bounds[:2]), np.fmax(high, bounds[2:])
        types = np.union1d(types, here)
        start += len(wkb)
    return np.concatenate([low, high]), types


def _index_column(schema: pa.Schema) -> str | None:
    pandas = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
    names = [name for name in pandas.get("index_columns", []) if isinstance(name, str)]
    return names[0] if names and names[0] in schema.names else None
