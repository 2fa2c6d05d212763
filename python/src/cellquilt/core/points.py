"""Points: SpatialData points elements, written in parts and read in batches, never whole."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellquilt.core import zarr_json
from cellquilt.core.errors import CellquiltError
from cellquilt.core.parquet import RISING, SCATTERED, ParquetWriter, encoding_of
from cellquilt.core.transforms import Affine, element_transforms, to_ngff

_FOLDER = "points.parquet"
_ENCODING = {"x": SCATTERED, "y": SCATTERED, "z": SCATTERED, "transcript_id": RISING}
ROWS_PER_PART = 4_000_000
#: Bytes that one transcript takes while it is worked on, columns of the machine included.
_BYTES_A_TRANSCRIPT = 400
#: Transcripts at a time, at most: with more, finding room for them takes longer than it saves.
_MOST_ROWS = 1 << 18
_BUFFER_BYTES = 1 << 20


class PointsWriter:
    """Write a points element batch by batch.

    Parameters
    ----------
    element
        The element's folder inside a store, for example ``store/points/transcripts``.
    transforms
        Coordinate system → (3, 3) map from the element's own x, y (µm).
    feature_key
        Name of the gene column.

    Notes
    -----
    Every batch becomes one row group, and a new part starts after `ROWS_PER_PART` rows, so that readers can stream
    and dask can split. Dictionary columns are stored with one common dictionary a part by Parquet itself.
    """

    def __init__(self, element: Path, transforms: Mapping[str, Affine], feature_key: str = "gene") -> None:
        self.element = element
        self.transforms = transforms
        self.feature_key = feature_key
        self.n_rows = 0
        self._folder = element / _FOLDER
        self._folder.mkdir(parents=True)
        self._part = 0
        self._rows_in_part = 0
        self._writer: ParquetWriter | None = None
        self._schema: pa.Schema | None = None

    def write(self, table: pa.Table) -> None:
        """Append a batch; all batches have the same columns.

        An empty batch is written only if it is the first, so that an empty element keeps its columns.
        """
        if self._schema is None:
            self._schema = table.schema.remove_metadata()
        elif table.num_rows == 0:
            return
        table = table.replace_schema_metadata(None).cast(self._schema)
        if self._writer is None or self._rows_in_part >= ROWS_PER_PART:
            self._close_part()
            self._writer = ParquetWriter(
                self._folder / f"part.{self._part}.parquet",
                self._schema,
                compression="zstd",
                compression_level=1,
                **encoding_of(self._schema, _ENCODING),
            )
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self._rows_in_part += table.num_rows
        self.n_rows += table.num_rows

    def _close_part(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._part += 1
            self._rows_in_part = 0

    def __enter__(self) -> "PointsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._writer is not None:
                self._writer.abandon()
            return
        if self._schema is None:
            raise ValueError(f"{self.element}: a points element needs at least one (possibly empty) batch")
        self._close_part()
        axes = ("x", "y", "z") if "z" in self._schema.names else ("x", "y")
        zarr_json.write_group(
            self.element,
            {
                "encoding-type": "ngff:points",
                "axes": list(axes),
                "coordinateTransformations": to_ngff(self.transforms, axes),
                "spatialdata_attrs": {"feature_key": self.feature_key, "version": "0.2"},
            },
        )


def _parts(element: Path) -> list[Path]:
    folder = element / _FOLDER
    if folder.is_file():
        return [folder]
    parts = sorted(folder.glob("*.parquet"), key=lambda path: (len(path.name), path.name))
    if not parts:
        hint = "make the store anew; after --cleanup start without -resume"
        raise CellquiltError("points-unreadable", f"{element} has no points.parquet", hint)
    return parts


@contextmanager
def _readable(element: Path) -> Iterator[None]:
    """Damaged Parquet is an error of ours."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise CellquiltError(
            "points-unreadable", f"{element / _FOLDER} cannot be read: {error}", "make the store anew"
        ) from error


def iter_points(element: Path, columns: Sequence[str] | None = None, batch_rows: int = 1_000_000) -> Iterator[pa.Table]:
    """Read a points element in file order.

    Parameters
    ----------
    element
        The element's folder.
    columns
        Which columns; all by default.
    batch_rows
        At most so many rows at a time: the bound of the memory it takes.

    Raises
    ------
    CellquiltError
        ``points-unreadable`` if parts are missing or damaged.
    """
    parts, wanted, empty = _parts(element), list(columns) if columns else None, True
    for part in parts:
        with _readable(element):
            # Otherwise Arrow reads all columns of a row group first.
            file = pq.ParquetFile(
                part, read_dictionary=_string_columns(part), buffer_size=_BUFFER_BYTES, pre_buffer=False
            )
        with file:
            batches = file.iter_batches(batch_size=batch_rows, columns=wanted)
            while True:
                with _readable(element):  # not around `yield`: the caller's own errors are no damage here
                    batch = next(batches, None)
                if batch is None:
                    break
                empty = False
                yield pa.Table.from_batches([batch])
    if empty:
        # One batch without rows, so that whoever passes batches on passes the columns on.
        yield pq.read_table(parts[-1], columns=wanted, read_dictionary=_string_columns(parts[-1]))


def _string_columns(part: Path) -> list[str]:
    schema = pq.read_schema(part)
    return [
        field.name
        for field in schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type) or pa.types.is_dictionary(field.type)
    ]


def points_columns(element: Path) -> list[str]:
    """Names of the columns."""
    parts = _parts(element)
    with _readable(element):
        return [name for name in pq.read_schema(parts[0]).names if not name.startswith("__")]


def count_points(element: Path) -> int:
    """Number of rows, from the files' footers."""
    parts = _parts(element)
    with _readable(element):
        return sum(pq.read_metadata(part).num_rows for part in parts)


def points_transforms(element: Path) -> dict[str, Affine]:
    """The maps from the points' own coordinates."""
    return element_transforms(element)


def batch_rows(memory_mb: int) -> int:
    """How many transcripts to hold at a time, so that work on them takes at most a quarter of the memory given."""
    return int(min(max(memory_mb * 1_000_000 // (4 * _BYTES_A_TRANSCRIPT), 10_000), _MOST_ROWS))


def require_columns(batch: pa.Table, names: Iterable[str]) -> None:
    """Refuse transcripts without certain columns.

    Raises
    ------
    CellquiltError
        ``points-column-missing``.
    """
    missing = [name for name in names if name not in batch.column_names]
    if missing:
        raise CellquiltError(
            "points-column-missing",
            f"the transcripts have no column {', '.join(missing)}; columns: {', '.join(batch.column_names)}",
            "make the store anew with `cellquilt convert`",
        )


def floats(batch: pa.Table, name: str) -> NDArray[np.float64]:
    """A column of numbers as (n,) float64; null is NaN."""
    return np.ascontiguousarray(batch.column(name).to_numpy(), dtype=np.float64)


def bools(batch: pa.Table, name: str) -> NDArray[np.bool_]:
    """A column of booleans as (n,) bool; null is false."""
    column = batch.column(name)
    if column.null_count:
        column = column.fill_null(False)
    return np.ascontiguousarray(column.to_numpy(), dtype=bool)


def xy(table: pa.Table) -> np.ndarray:
    """The (n, 2) float64 coordinates of a batch."""
    return np.column_stack([table.column(axis).to_numpy().astype(np.float64, copy=False) for axis in ("x", "y")])
