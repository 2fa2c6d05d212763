"""What a transcript method made of a bundle: outlines of cells, and the cell of every transcript.

A result is a folder ``bundle_<nnn>.result``: ``cells.parquet`` (GeoParquet, outlines in µm; what is known of the task
is its metadata), ``transcripts.parquet`` (a row for every transcript of every patch that was segmented) and, where a
method has expected counts, ``expected.parquet`` in long form.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.parquet import RISING, ParquetWriter, encoding_of, write_parquet
from cellquilt.core.shapes import GeoParquetFile, write_geoparquet
from cellquilt.geometry.outlines import rings_of
from cellquilt.geometry.packed import PackedPolygons
from cellquilt.geometry.polygons import Rings
from cellquilt.patches.transcripts import inner_sides

CELLS, TRANSCRIPTS, EXPECTED = "cells.parquet", "transcripts.parquet", "expected.parquet"
#: Columns that every method gives for its cells.
CELL_COLUMNS = {"patch": np.int32, "label": np.int32, "prior_cell": np.int32, "n_transcripts": np.int32}
#: Columns that `write_result` adds.
BORDER_COLUMNS = {"cut": np.bool_, "depth_um": np.float32}
TRANSCRIPT_SCHEMA = pa.schema([("transcript_id", pa.uint64()), ("patch", pa.int32()), ("label", pa.int32())])
CONFIDENCE = pa.field("confidence", pa.float32())
#: Small, as only those groups are read that may hold the transcripts asked for.
_ROWS_PER_GROUP = 1 << 16
EXPECTED_SCHEMA = pa.schema(
    [
        ("patch", pa.int32()),
        ("label", pa.int32()),
        ("gene", pa.dictionary(pa.int32(), pa.string())),
        ("value", pa.float32()),
    ]
)


@dataclass
class MoleculeResult:
    """Cells and molecules of the patches of one bundle, or of several.

    Attributes
    ----------
    method
        The method's name.
    patches
        The patches' records as in the bundle, each with ``seconds`` (wall time) and ``error``: None, or ``code``,
        ``message`` and ``hint`` of what went wrong; a patch that failed has no cells and no transcripts here.
    geometry
        (n,) polygons in µm: an object array, or packed.
    cells
        Column → (n,) array: ``patch``, ``label`` (from 1 on, unique in its patch), ``prior_cell`` (0: none) and
        ``n_transcripts``, all int32, and what else the method tells, as floats. `write_result` adds ``cut`` (touches
        an inner side of its window) and ``depth_um`` (distance of its box to the nearest one, inf if there is none).
    transcripts
        Tables with ``transcript_id`` uint64, ``patch`` int32, ``label`` int32 (0: in no cell) and perhaps
        ``confidence`` float32: a row for every transcript of every patch that was segmented. May be read once or more
        often, as the iterable allows; from `read_results`, as often as one likes.
    expected
        ``patch, label, gene, value``: expected counts that are not 0. None where the method has none.
    record
        The task's `Record`, finished, or at least its ``versions`` and ``parameters``.
    """

    method: str
    patches: list[dict[str, Any]]
    geometry: np.ndarray | PackedPolygons
    cells: dict[str, np.ndarray]
    transcripts: Iterable[pa.Table]
    expected: pa.Table | None = None
    record: dict[str, Any] = field(default_factory=dict)


def write_result(folder: Path | str, result: MoleculeResult, *, overwrite: bool = False) -> Path:
    """Write a result, atomically.

    Parameters
    ----------
    folder
        ``bundle_<nnn>.result``.
    result
        What to write. Cells are sorted by patch and label; ``cut`` and ``depth_um`` are computed where not given.
    overwrite
        Replace an existing result.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    ValueError
        If columns are missing or cells have no label of their own.
    """
    geometry, columns = _checked_cells(result)
    metadata = {**result.record, "method": result.method, "patches": result.patches}
    metadata.setdefault("versions", {})
    metadata.setdefault("parameters", {})
    with atomic_path(folder, overwrite=overwrite) as aside:
        aside.mkdir()
        write_geoparquet(aside / CELLS, geometry, columns, metadata=metadata)
        _write_transcripts(aside / TRANSCRIPTS, result.transcripts)
        if result.expected is not None:
            write_parquet(aside / EXPECTED, result.expected.select(EXPECTED_SCHEMA.names).cast(EXPECTED_SCHEMA))
    return Path(folder)


def _checked_cells(result: MoleculeResult) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    outlines = result.geometry.objects() if isinstance(result.geometry, PackedPolygons) else result.geometry
    geometry = np.asarray(outlines, dtype=object).ravel()
    columns = dict(result.cells)
    missing = [name for name in CELL_COLUMNS if name not in columns]
    if missing:
        raise ValueError(f"{result.method}: cells lack the columns {', '.join(missing)}")
    for name, kind in CELL_COLUMNS.items():
        columns[name] = np.asarray(columns[name]).astype(kind)
    if any(len(values) != geometry.size for values in columns.values()):
        raise ValueError(f"{result.method}: columns of other lengths than {geometry.size} cells")
    if geometry.size and columns["label"].min() < 1:
        raise ValueError(f"{result.method}: labels of cells start at 1")
    columns = {**borders(geometry, columns["patch"], result.patches), **columns}
    order = np.lexsort((columns["label"], columns["patch"]))
    columns = {name: np.asarray(values)[order] for name, values in columns.items()}
    same = (np.diff(columns["patch"]) == 0) & (np.diff(columns["label"]) == 0)
    if same.any():
        raise ValueError(f"{result.method}: {int(same.sum())} labels occur more than once in their patch")
    return geometry[order], columns


def borders(geometry: np.ndarray, patch: np.ndarray, records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """How cells lie in their patches' windows.

    Parameters
    ----------
    geometry
        (n,) polygons in µm.
    patch
        (n,) index of each one's patch.
    records
        The patches' records.

    Returns
    -------
    dict
        ``cut`` (n,) bool: the box touches or crosses an inner side; ``depth_um`` (n,) float32: its distance to the
        nearest inner side, negative if it crosses it, inf where the window has none.
    """
    index, windows = window_bounds(records)
    row = np.searchsorted(index, patch)
    if len(patch) and (not index.size or (index[np.minimum(row, index.size - 1)] != patch).any()):
        raise ValueError("cells of patches that have no record")
    windows = windows[row]
    bounds = shapely.bounds(geometry).reshape(-1, 4)
    depth = np.minimum(bounds[:, :2] - windows[:, :2], windows[:, 2:] - bounds[:, 2:]).min(axis=1, initial=np.inf)
    return {"cut": depth <= 0, "depth_um": depth.astype(np.float32)}


def window_bounds(records: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The windows of patches.

    Returns
    -------
    index : numpy.ndarray
        (n,) int64, ascending.
    bounds : numpy.ndarray
        (n, 4) float64 x0, y0, x1, y1 in µm, infinite on the slide's own sides.
    """
    ordered = sorted(records, key=lambda record: int(record["index"]))
    index = np.array([record["index"] for record in ordered], dtype=np.int64)
    windows = np.array([[record[side] for side in ("x0", "y0", "x1", "y1")] for record in ordered], dtype=np.float64)
    inner = np.array([inner_sides(record) for record in ordered], dtype=bool).reshape(-1, 4)
    return index, np.where(inner, windows.reshape(-1, 4), [-np.inf, -np.inf, np.inf, np.inf])


def _write_transcripts(path: Path, tables: Iterable[pa.Table]) -> None:
    writer: ParquetWriter | None = None
    try:
        for table in [tables] if isinstance(tables, pa.Table) else tables:
            if writer is None:
                fields = [*TRANSCRIPT_SCHEMA, *([CONFIDENCE] if CONFIDENCE.name in table.schema.names else [])]
                schema = pa.schema(fields)
                writer = ParquetWriter(
                    path, schema, compression="zstd", **encoding_of(schema, {"transcript_id": RISING})
                )
            writer.write_table(table.select(writer.schema.names).cast(writer.schema), row_group_size=_ROWS_PER_GROUP)
        if writer is None:
            writer = ParquetWriter(path, TRANSCRIPT_SCHEMA, compression="zstd")
        writer.close()
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise


@dataclass(frozen=True)
class TranscriptFiles:
    """The transcripts of several results, file by file, read anew whenever they are asked for.

    Attributes
    ----------
    files
        Their ``transcripts.parquet``.
    batch_rows
        At most so many rows at a time.
    """

    files: tuple[Path, ...]
    batch_rows: int = 1_000_000

    @property
    def n_rows(self) -> int:
        """Rows of all files."""
        return sum(pq.read_metadata(path).num_rows for path in self.files)

    def in_step(self, keep_bytes: int) -> "TranscriptsInStep":
        """A reader for whoever asks for transcripts in their order; it keeps that much at most."""
        return TranscriptsInStep(self, keep_bytes)

    @cached_property
    def spans(self) -> list[list[tuple[int, int]]]:
        """The first and the last transcript of each row group of each file."""
        spans = []
        for path in self.files:
            with _reading(path):
                metadata = pq.read_metadata(path)
                place = metadata.schema.names.index("transcript_id")
                groups = (metadata.row_group(k).column(place).statistics for k in range(metadata.num_row_groups))
                spans.append([(s.min, s.max) if s is not None and s.has_min_max else _ANYWHERE for s in groups])
        return spans

    def __iter__(self) -> Iterator[pa.Table]:
        for path in self.files:
            with _reading(path), pq.ParquetFile(path) as file:
                fields = [*TRANSCRIPT_SCHEMA, *([CONFIDENCE] if CONFIDENCE.name in file.schema_arrow.names else [])]
                schema = pa.schema(fields)
                for batch in file.iter_batches(self.batch_rows, columns=schema.names):
                    yield pa.Table.from_batches([batch]).cast(schema)


class TranscriptsInStep:
    """The rows of results about some transcripts, for whoever asks for these in the order of their numbers.

    Row groups that are needed further on are kept, so that each is read once as long as there is room.

    Parameters
    ----------
    files
        The results' transcripts.
    keep_bytes
        Most bytes of rows that are kept; what does not fit is read again.
    """

    def __init__(self, files: TranscriptFiles, keep_bytes: int) -> None:
        self._files, self._keep_bytes, self._kept_bytes = files, keep_bytes, 0
        self._kept: dict[tuple[int, int], _Rows] = {}

    def between(self, low: int, high: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int32]]]:
        """``transcript_id, patch, label`` of transcripts `low` to `high`, and perhaps of others, file by file."""
        for number, (path, groups) in enumerate(zip(self._files.files, self._files.spans, strict=True)):
            wanted = [k for k, (first, last) in enumerate(groups) if first <= high and last >= low]
            to_read = [k for k in wanted if (number, k) not in self._kept]
            read = _read_groups(path, to_read)
            for k in wanted:
                rows = self._kept.pop((number, k), None)
                if rows is None:
                    rows = next(read)
                else:
                    self._kept_bytes -= rows.n_bytes
                if groups[k][1] > high and self._kept_bytes + rows.n_bytes <= self._keep_bytes:
                    self._kept[number, k] = rows
                    self._kept_bytes += rows.n_bytes
                yield rows.between(low, high)


class _Rows:
    """A row group."""

    def __init__(self, table: pa.Table) -> None:
        self._columns = [table.column(name).to_numpy() for name in TRANSCRIPT_SCHEMA.names]
        ids = self._columns[0]
        self._sorted = bool((ids[1:] >= ids[:-1]).all())
        self.n_bytes = sum(column.nbytes for column in self._columns)

    def between(self, low: int, high: int) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int32]]:
        """The columns; only these transcripts, where they are in order."""
        ids, patch, label = self._columns
        if not self._sorted:
            return ids, patch, label
        first, last = np.searchsorted(ids, np.uint64(low)), np.searchsorted(ids, np.uint64(high), side="right")
        return ids[first:last], patch[first:last], label[first:last]


def _read_groups(path: Path, groups: Sequence[int]) -> Iterator[_Rows]:
    """Row groups of a file, one at a time."""
    if groups:
        with _reading(path), pq.ParquetFile(path) as file:
            for k in groups:
                table = file.read_row_group(k, columns=TRANSCRIPT_SCHEMA.names, use_threads=False)
                yield _Rows(table.cast(TRANSCRIPT_SCHEMA))


_ANYWHERE = (0, 2**64 - 1)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Damaged Parquet is an error of ours."""
    try:
        yield
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise _invalid(path, f"cannot be read: {error}") from error


def read_results(folders: Sequence[Path | str], *, packed: bool = False) -> MoleculeResult:
    """Read the results of a slide's tasks as one.

    Parameters
    ----------
    folders
        The tasks' results, in any order; what is read does not depend on it.
    packed
        Leave the outlines packed: of many cells objects take several times as much.

    Returns
    -------
    MoleculeResult
        Cells sorted by patch and label; patches by index; ``record["tasks"]`` what each task says of itself. The
        transcripts stay on disk and are streamed.

    Raises
    ------
    CellquiltError
        ``molecule-result-invalid``: not a result, columns missing, results of two methods, or a patch twice.
    """
    parts = sorted((_open_cells(Path(folder)) for folder in folders), key=lambda part: part.order)
    methods = sorted({part.metadata["method"] for part in parts})
    if len(methods) > 1:
        raise CellquiltError(
            "molecule-result-invalid",
            f"results of {' and '.join(methods)} in one slide",
            "resolve each method's results by themselves",
        )
    patches = sorted((patch for part in parts for patch in part.metadata["patches"]), key=lambda patch: patch["index"])
    index = [patch["index"] for patch in patches]
    double = sorted({number for number in index if index.count(number) > 1}) if len(set(index)) < len(index) else []
    if double:
        raise CellquiltError(
            "molecule-result-invalid",
            f"patch {double[0]} is in more than one of the results",
            "give the results of one run only",
        )
    columns: dict[str, list[np.ndarray]] = {name: [np.empty(0, kind)] for name, kind in _common_columns(parts)}
    outlines = PackedPolygons.of(_outlines(parts, columns))
    cells = {name: np.concatenate(values) for name, values in columns.items()}
    order = np.lexsort((cells["label"], cells["patch"]))
    geometry = outlines.take(order)
    expected = [_read_expected(part.folder / EXPECTED) for part in parts if (part.folder / EXPECTED).is_file()]
    tasks = [{key: value for key, value in part.metadata.items() if key != "patches"} for part in parts]
    return MoleculeResult(
        methods[0] if methods else "",
        patches,
        geometry if packed else geometry.objects(),
        {name: values[order] for name, values in cells.items()},
        TranscriptFiles(tuple(part.folder / TRANSCRIPTS for part in parts)),
        pa.concat_tables(expected).unify_dictionaries() if expected else None,
        {"tasks": tasks},
    )


@dataclass(frozen=True)
class _Part:
    folder: Path
    file: GeoParquetFile

    @property
    def metadata(self) -> dict[str, Any]:
        return self.file.metadata

    @property
    def order(self) -> tuple[int, str]:
        """A key that depends on what the part holds, not on where it lies."""
        first = min((int(patch["index"]) for patch in self.metadata["patches"]), default=-1)
        return first, json.dumps(self.metadata, sort_keys=True)


def _open_cells(folder: Path) -> _Part:
    if not (folder / CELLS).is_file() or not (folder / TRANSCRIPTS).is_file():
        raise _invalid(folder, f"is no result of a transcript method: it has no {CELLS} or no {TRANSCRIPTS}")
    file = GeoParquetFile(folder / CELLS)
    missing = [name for name in (*CELL_COLUMNS, *BORDER_COLUMNS) if name not in file.schema.names]
    if missing or "method" not in file.metadata or "patches" not in file.metadata:
        lacking = ", ".join(missing) if missing else "method and patches in its metadata"
        raise _invalid(folder / CELLS, f"lacks {lacking}")
    return _Part(folder, file)


def _outlines(parts: Sequence[_Part], columns: Mapping[str, list[np.ndarray]]) -> Iterator[Rings]:
    """The outlines of all parts, some thousand at a time; fills the columns on the way."""
    for part in parts:
        for batch in part.file.batches() if len(part.file) else ():
            for name, values in columns.items():
                values.append(batch.column(name).to_numpy(zero_copy_only=False))
            yield rings_of(part.file, batch.column(part.file.geometry))


def _common_columns(parts: Sequence[_Part]) -> list[tuple[str, Any]]:
    """Columns that all results with cells have, and their types; those that every result has first."""
    own = [(name, kind) for name, kind in (CELL_COLUMNS | BORDER_COLUMNS).items()]
    filled = [part.file for part in parts if len(part.file)]
    others = set.intersection(*({*file.schema.names} - {file.geometry} for file in filled)) if filled else set()
    return own + [(name, np.float32) for name in sorted(others) if name not in CELL_COLUMNS | BORDER_COLUMNS]


def _read_expected(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path, read_dictionary=["gene"])
        table = table.select(EXPECTED_SCHEMA.names).cast(EXPECTED_SCHEMA)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise _invalid(path, f"cannot be read: {error}") from error
    return table.filter(pc.not_equal(table.column("value"), 0))


def _invalid(path: Path, what: str) -> CellquiltError:
    return CellquiltError("molecule-result-invalid", f"{path} {what}", "segment the bundle again")
