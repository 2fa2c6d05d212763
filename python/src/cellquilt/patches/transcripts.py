"""Transcript patches: what a transcript-based segmentation task needs of a slide, and nothing else.

A transcript bundle is a small Zarr group ``bundle_<nnn>.zarr``: one Parquet file a patch with the transcripts of its
window, their gene, their prior cell and whether they lie in a nucleus, and in the attribute ``cellquilt`` the patches'
windows, the genes, the method's settings and where the prior is from. A task that has it never stages the slide.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellquilt.core import zarr_json
from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.genes import GeneNames
from cellquilt.core.log import progress
from cellquilt.core.parquet import RISING, SCATTERED, ParquetWriter, arrow_array, encoding_of
from cellquilt.core.points import (
    batch_rows,
    bools,
    count_points,
    floats,
    iter_points,
    points_columns,
    points_transforms,
    require_columns,
)
from cellquilt.core.transforms import Affine
from cellquilt.patches.balance import CountGrid, Cut, balanced, of_width
from cellquilt.patches.priors import NoPrior, Nucleus, Prior, PriorCentres

FORMAT = 1
KIND = "transcripts"
#: The points element that is segmented.
POINTS = "transcripts"
#: Columns of a patch's transcripts. Rows are sorted by ``transcript_id``, the slide's own number of the row; ``gene``
#: is a position in the bundle's `genes`; ``prior_cell`` is 0 for none.
SCHEMA = pa.schema(
    [
        ("transcript_id", pa.uint64()),
        ("x_um", pa.float64()),
        ("y_um", pa.float64()),
        ("z_um", pa.float64()),
        ("gene", pa.int32()),
        ("prior_cell", pa.int32()),
        ("in_nucleus", pa.bool_()),
    ]
)
#: Of how many transcripts a prior cell has to be to count for how far prior cells are apart.
MIN_PRIOR_TRANSCRIPTS = 10
_FILE = "transcripts.parquet"
#: Patches written at a time: as many files are open, and their buffers share the memory.
_FILES_AT_A_TIME = 400
_BYTES_A_ROW = 41
_LARGEST_ROW_GROUP = 1 << 20
_ENCODING: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    **encoding_of(SCHEMA, {"transcript_id": RISING, "x_um": SCATTERED, "y_um": SCATTERED, "z_um": SCATTERED}),
}
#: Why a transcript is not segmented, by code; 0 is one that is.
REASONS = ("", "control", "low_quality", "without_coordinates")


def inner_sides(record: Mapping[str, Any]) -> tuple[bool, bool, bool, bool]:
    """Whether the left, top, right and bottom side of a patch's window lies inside the slide, that is, may cut cells.

    Parameters
    ----------
    record
        The patch's record: a window reaches beyond its core just where there are neighbours.
    """
    window = (record["x0"], record["y0"], record["x1"], record["y1"])
    x0, y0, x1, y1 = (bool(side != own) for side, own in zip(window, record["core"], strict=True))
    return x0, y0, x1, y1


@dataclass(frozen=True)
class TranscriptPatch:
    """A patch with its transcripts.

    Attributes
    ----------
    record
        ``index``; ``x0, y0, x1, y1`` of its window and ``core`` (x0, y0, x1, y1) of the part that is its own alone, in
        µm; ``n_transcripts`` of the window.
    table
        Columns as in `SCHEMA`.
    """

    record: dict[str, Any]
    table: pa.Table

    @property
    def index(self) -> int:
        """The patch's number within the slide."""
        return int(self.record["index"])


class TranscriptBundle:
    """A transcript bundle on disk.

    Parameters
    ----------
    path
        Its folder.

    Attributes
    ----------
    attributes
        All that is known of it, plain data.
    patches
        The patches' records, by index.

    Raises
    ------
    CellquiltError
        ``bundle-unreadable`` if it is not a transcript bundle.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.attributes: dict[str, Any] = zarr_json.read_attributes(self.path)["cellquilt"]
            if self.attributes["kind"] != KIND:
                raise KeyError("kind")
            self.patches: list[dict[str, Any]] = list(self.attributes["patches"])
        except (KeyError, OSError, ValueError, TypeError) as error:
            raise CellquiltError(
                "bundle-unreadable",
                f"{self.path} is not a bundle of transcript patches",
                "make one with `cellquilt patchify transcripts`",
            ) from error

    @property
    def sample(self) -> str:
        """The sample's name."""
        return self.attributes["sample"]

    @property
    def engine(self) -> dict[str, Any]:
        """Method and settings of the engine."""
        return dict(self.attributes["engine"])

    @property
    def prior(self) -> dict[str, Any]:
        """Where the prior cells of the slide are from, how many there are and how far apart.

        ``from``, ``name``, ``n_cells``; ``spacing_um``, see `PriorCentres`, of the slide's cells with at least
        ``min_transcripts``: the same number in all its bundles, None where it is not known.
        """
        return dict(self.attributes["prior"])

    @property
    def pixel_size_um(self) -> float | None:
        """Size of a pixel of the main image in µm; None where there is no image."""
        return self.attributes["pixel_size_um"]

    @cached_property
    def genes(self) -> list[str]:
        """Names of the genes, sorted."""
        return list(self.attributes["genes"])

    @cached_property
    def transforms(self) -> dict[str, Affine]:
        """Coordinate system → (3, 3) map from x, y in µm."""
        return {name: np.asarray(matrix, dtype=np.float64) for name, matrix in self.attributes["transforms"].items()}

    def __len__(self) -> int:
        return len(self.patches)

    def file(self, record: Mapping[str, Any]) -> Path:
        """The Parquet file of a patch, for whoever streams it."""
        return self.path / _name(record) / _FILE

    def read(self, record: Mapping[str, Any]) -> pa.Table:
        """The transcripts of a patch, columns as in `SCHEMA`."""
        return pa.Table.from_batches(self.batches(record), SCHEMA)

    def batches(self, record: Mapping[str, Any], batch_rows: int = 1_000_000) -> Iterator[pa.RecordBatch]:
        """The transcripts of a patch, at most so many rows at a time."""
        try:
            with pq.ParquetFile(self.file(record)) as file:
                for batch in file.iter_batches(batch_size=batch_rows):
                    yield batch.cast(SCHEMA)
        except (OSError, pa.ArrowException) as error:
            raise CellquiltError(
                "bundle-unreadable",
                f"{self.path}: transcripts of patch {record['index']} cannot be read: {error}",
                "make the bundles anew with `cellquilt patchify transcripts`; after --cleanup start without -resume",
            ) from error

    def __iter__(self) -> Iterator[TranscriptPatch]:
        for record in self.patches:
            yield TranscriptPatch(record, self.read(record))


def _name(record: Mapping[str, Any]) -> str:
    return f"patch_{int(record['index']):06d}"


def usable(batch: pa.Table) -> NDArray[np.int8]:
    """Which transcripts are to be segmented.

    Parameters
    ----------
    batch
        Columns ``x, y, is_control`` and, if there are any, ``z`` and ``passes_qv``.

    Returns
    -------
    numpy.ndarray
        (n,) int8 position in `REASONS`; 0 is to be segmented.
    """
    require_columns(batch, ("x", "y", "is_control"))
    finite = np.isfinite(floats(batch, "x")) & np.isfinite(floats(batch, "y"))
    if "z" in batch.column_names:
        finite &= np.isfinite(floats(batch, "z"))
    out = np.where(finite, 0, 3).astype(np.int8)
    if "passes_qv" in batch.column_names:
        out[~bools(batch, "passes_qv")] = 2
    out[bools(batch, "is_control")] = 1
    return out


@dataclass(frozen=True)
class Cutting:
    """How a slide of transcripts is cut.

    Attributes
    ----------
    transcripts_per_patch
        At most so many transcripts in the window of a patch.
    width_um
        Cut into patches of this width instead; one patch if it is not above 0.
    overlap_um
        Width of the strip that two neighbours share.
    min_transcripts
        Patches with fewer are sparse: put together with a neighbour where the patches are of one width, and else named
        as sparse.
    patches_per_task
        Patches in one bundle.
    """

    transcripts_per_patch: int = 1_000_000
    width_um: float | None = None
    overlap_um: float = 50.0
    min_transcripts: int = 4000
    patches_per_task: int = 1

    def cut(self, grid: CountGrid) -> Cut:
        """The patches of a slide.

        Raises
        ------
        CellquiltError
            ``transcript-patch-narrow`` if patches are no wider than what they share.
        """
        if self.width_um is None:
            return balanced(grid, self.transcripts_per_patch, self.overlap_um)
        if self.width_um <= 0:
            return of_width(grid, np.inf, self.overlap_um)
        if self.width_um <= self.overlap_um:
            raise CellquiltError(
                "transcript-patch-narrow",
                f"patches of {self.width_um:g} µm overlap by {self.overlap_um:g} µm",
                "make transcripts_patch_width_um several times transcripts_patch_overlap_um",
            )
        return of_width(grid, self.width_um, self.overlap_um, self.min_transcripts)


@dataclass(frozen=True)
class TranscriptPatches:
    """What `write_transcript_bundles` made.

    Attributes
    ----------
    bundles
        Their folders, in the order of their patches.
    records
        The patches' records, by index.
    facts
        Numbers for the stage's record: ``n_transcripts`` rows of the slide; ``n_control``, ``n_low_quality`` and
        ``n_without_coordinates`` of them left out (each row once, in that order); ``n_to_segment`` the others;
        ``n_with_prior`` and ``n_in_nucleus`` of these, in ``n_prior_with_transcripts`` prior cells; ``n_patches``,
        ``n_bundles``; ``n_sparse_patches`` and the ``n_transcripts_in_sparse_patches``; ``n_full_patches``, those that
        hold more than they should because they are too narrow to cut; ``prior``.
    """

    bundles: list[Path]
    records: list[dict[str, Any]]
    facts: dict[str, Any]


def write_transcript_bundles(
    points: Path,
    output: Path,
    *,
    sample: str,
    engine: Mapping[str, Any],
    prior: Prior | None = None,
    nucleus: Nucleus | None = None,
    cutting: Cutting | None = None,
    pixel_size_um: float | None = None,
    min_prior_transcripts: int = MIN_PRIOR_TRANSCRIPTS,
    memory_mb: int = 1500,
) -> TranscriptPatches:
    """Cut the transcripts of a slide into bundles.

    Two passes over the points: one that counts where they are (coordinates and genes only), one that writes. Memory is
    bounded by `memory_mb`, whatever the slide; prior cells take more by their number: 24 bytes each for where they are,
    40 more in the end. There is always at least one bundle; it holds no patch where there is nothing to segment. What a
    patch holds does not depend on the order of the points or how they are stored.

    Parameters
    ----------
    points
        The points element.
    output
        Folder for the bundles.
    sample
        The sample's name.
    engine
        Method and settings, plain data.
    prior
        Source of prior cells; None has none.
    nucleus
        How to tell transcripts in nuclei; None tells none.
    cutting
        How to cut.
    pixel_size_um
        Of the main image, where there is one.
    min_prior_transcripts
        Prior cells with fewer transcripts do not count for how far prior cells are apart.
    memory_mb
        Memory for data.

    Raises
    ------
    CellquiltError
        ``points-column-missing``, ``gene-missing``, ``transcripts-far-away``, ``transcript-patch-narrow``, and what
        the prior refuses.
    """
    cutting = cutting or Cutting()
    source = _Source(points, prior or NoPrior(), nucleus, batch_rows(memory_mb))
    cut = cutting.cut(source.look())
    n_bundles = max(1, -(-len(cut) // cutting.patches_per_task))
    edges = [k * len(cut) // n_bundles for k in range(n_bundles + 1)]
    attributes = {
        "format": FORMAT,
        "kind": KIND,
        "sample": sample,
        "n_bundles": n_bundles,
        "n_patches": len(cut),
        "pixel_size_um": pixel_size_um,
        "transforms": {name: np.asarray(m).tolist() for name, m in points_transforms(points).items()},
        "engine": dict(engine),
        "genes": source.genes,
    }
    paths = [Path(output) / f"bundle_{number:03d}.zarr" for number in range(n_bundles)]
    records: list[dict[str, Any]] = []
    at_a_time = max(_FILES_AT_A_TIME // max(cutting.patches_per_task, 1), 1)
    for first in range(0, n_bundles, at_a_time):
        numbers = range(first, min(first + at_a_time, n_bundles))
        with ExitStack() as stack:
            folders = {number: stack.enter_context(atomic_path(paths[number])) for number in numbers}
            files: list[Path] = []
            for number, folder in folders.items():
                zarr_json.write_group(folder)
                for index in range(edges[number], edges[number + 1]):
                    (folder / _name({"index": index})).mkdir()
                    files.append(folder / _name({"index": index}) / _FILE)
            held = _write_patches(source, cut, edges[numbers[0]], files, memory_mb)
            if first == 0:  # all transcripts came by
                attributes["prior"] = {
                    "from": source.prior.kind,
                    "name": source.prior.name,
                    "n_cells": source.prior.n_cells,
                    "spacing_um": source.centres.spacing_um(min_prior_transcripts),
                    "min_transcripts": min_prior_transcripts,
                }
            made = [_record(cut, edges[numbers[0]] + k, n, cutting.min_transcripts) for k, n in enumerate(held)]
            records += made
            for number, folder in folders.items():
                members = records[edges[number] : edges[number + 1]]
                counts = [record["n_transcripts"] for record in members]
                size = {"transcripts": sum(counts), "patch_transcripts": max(counts, default=0)}
                own = {"bundle": number, "patches": members, "size": size}
                zarr_json.write_group(folder, {"cellquilt": {**attributes, **own}})
    return TranscriptPatches(paths, records, _facts(source, records, cutting, attributes))


def _record(cut: Cut, index: int, n_transcripts: int, at_least: int) -> dict[str, Any]:
    x0, y0, x1, y1 = cut.window_um[index].tolist()
    return {
        "index": index,
        "x0": x0,
        "y0": y0,
        "x1": x1,
        "y1": y1,
        "core": cut.core_um[index].tolist(),
        "n_transcripts": n_transcripts,
        "sparse": n_transcripts < at_least,
    }


def _facts(
    source: "_Source", records: list[dict[str, Any]], cutting: Cutting, attributes: dict[str, Any]
) -> dict[str, Any]:
    sparse = [record["n_transcripts"] for record in records if record["sparse"]]
    limit = cutting.transcripts_per_patch if cutting.width_um is None else np.inf
    return {
        **source.numbers,
        "n_prior_with_transcripts": int((source.centres.n_transcripts > 0).sum()),
        "n_patches": attributes["n_patches"],
        "n_bundles": attributes["n_bundles"],
        "n_sparse_patches": len(sparse),
        "n_transcripts_in_sparse_patches": sum(sparse),
        "n_full_patches": sum(record["n_transcripts"] > limit for record in records),
        "largest_patch": max((record["n_transcripts"] for record in records), default=0),
        "prior": {**attributes["prior"], "in_nucleus_from": source.nucleus.name if source.nucleus else ""},
    }


@dataclass
class _Source:
    """The transcripts of a slide that are to be segmented, batch by batch."""

    points: Path
    prior: Prior
    nucleus: Nucleus | None
    rows: int
    grid: CountGrid = field(default_factory=CountGrid)
    names: GeneNames = field(default_factory=GeneNames)
    numbers: dict[str, int] = field(default_factory=dict)
    centres: PriorCentres = field(default_factory=lambda: PriorCentres(0))

    def look(self) -> CountGrid:
        """The first pass: where the transcripts are, which genes and which prior cells there are."""
        left_out = np.zeros(len(REASONS), dtype=np.int64)
        for batch, reason in self._batches("gene", *self.prior.columns):
            left_out += np.bincount(reason, minlength=len(REASONS))
            self.grid.add(floats(batch, "x"), floats(batch, "y"))
            self.names.encode(batch.column("gene"), np.zeros(batch.num_rows, dtype=bool))
            self.prior.scan(batch)
        self.genes, self._column = self.names.sorted_columns()
        self.numbers = {"n_transcripts": int(left_out.sum())}
        self.numbers |= {f"n_{REASONS[k]}": int(left_out[k]) for k in range(1, len(REASONS))}
        self.numbers |= {"n_to_segment": int(left_out[0]), "n_with_prior": 0, "n_in_nucleus": 0}
        self.centres = PriorCentres(self.prior.n_cells)
        return self.grid

    def columns(self, *, count: bool) -> Iterator[dict[str, NDArray[Any]]]:
        """The second pass: columns as in `SCHEMA`. `count` adds to the numbers on the way."""
        further = ("gene", "transcript_id", *self.prior.columns, *(self.nucleus.columns if self.nucleus else ()))
        for batch, _ in self._batches(*further):
            n = batch.num_rows
            codes = self.names.encode(batch.column("gene"), np.zeros(n, dtype=bool))
            columns = {
                "transcript_id": batch.column("transcript_id").to_numpy().astype(np.uint64),
                "x_um": floats(batch, "x"),
                "y_um": floats(batch, "y"),
                "z_um": floats(batch, "z") if "z" in batch.column_names else np.zeros(n),
                "gene": self._column[codes],
                "prior_cell": self.prior.assign(batch),
                "in_nucleus": self.nucleus.test(batch) if self.nucleus else np.zeros(n, dtype=bool),
            }
            if count:
                self.numbers["n_with_prior"] += int((columns["prior_cell"] > 0).sum())
                self.centres.add(columns["prior_cell"], columns["x_um"], columns["y_um"])
                self.numbers["n_in_nucleus"] += int(columns["in_nucleus"].sum())
            yield columns

    def _batches(self, *further: str) -> Iterator[tuple[pa.Table, NDArray[np.int8]]]:
        there = points_columns(self.points)
        needed = ["x", "y", "is_control", *dict.fromkeys(further)]
        optional = [name for name in ("z", "passes_qv") if name in there and name not in needed]
        require_columns(pa.table({name: [] for name in there}), needed)
        total = max(count_points(self.points) // self.rows, 1)
        batches = iter_points(self.points, [*needed, *optional], self.rows)
        for batch in progress(batches, "transcripts", total):
            reason = usable(batch)
            yield (batch.filter(pa.array(reason == 0)) if reason.any() else batch), reason


def _write_patches(source: _Source, cut: Cut, first: int, files: list[Path], memory_mb: int) -> list[int]:
    """Write consecutive patches from number `first` on, each to its file; returns how many transcripts each holds."""
    if not files:
        return []
    budget = memory_mb * 1_000_000 // 4
    group_rows = min(max(budget // (_BYTES_A_ROW * len(files)), 1024), _LARGEST_ROW_GROUP)
    offsets, neighbours = _neighbours(cut)
    with ExitStack() as stack:
        writers = [stack.enter_context(_PatchWriter(path, group_rows, budget)) for path in files]
        for columns in source.columns(count=first == 0):
            starts, rows = _spread(
                columns["x_um"], columns["y_um"], 1.0 / source.grid.step_um, *source.grid.first, cut.core_of,
                cut.window_um, offsets, neighbours, first, first + len(files),
            )  # fmt: skip
            for writer, start, stop in zip(writers, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
                if stop > start:
                    writer.add({name: values[rows[start:stop]] for name, values in columns.items()})
        return [writer.n_rows for writer in writers]


def _neighbours(cut: Cut) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each core the other patches whose window reaches into it, as offsets and a flat list."""
    import shapely

    windows = np.asarray(shapely.box(*cut.window_um.T), dtype=object)
    core, window = shapely.STRtree(windows).query(np.asarray(shapely.box(*cut.core_um.T), dtype=object))
    other = core != window
    core, window = core[other], window[other]
    order = np.lexsort((window, core))
    offsets = np.searchsorted(core[order], np.arange(len(cut) + 1))
    return offsets.astype(np.int64), window[order].astype(np.int64)


@numba.njit(cache=True, nogil=True)
def _holds(window, x, y):
    return window[0] <= x < window[2] and window[1] <= y < window[3]


@numba.njit(cache=True, nogil=True)
def _spread(x, y, per_um, first_column, first_row, core_of, windows, offsets, neighbours, low, high):
    """Rows of a batch in each of the patches low .. high - 1: where each patch's rows start, and the rows."""
    starts = np.zeros(high - low + 1, dtype=np.int64)
    core = np.empty(x.size, dtype=np.int64)
    for i in range(x.size):
        core[i] = core_of[int(np.floor(y[i] * per_um)) - first_row, int(np.floor(x[i] * per_um)) - first_column]
        if low <= core[i] < high:
            starts[core[i] - low + 1] += 1
        for k in range(offsets[core[i]], offsets[core[i] + 1]):
            p = neighbours[k]
            if low <= p < high and _holds(windows[p], x[i], y[i]):
                starts[p - low + 1] += 1
    for p in range(high - low):
        starts[p + 1] += starts[p]
    place = starts.copy()
    rows = np.empty(starts[-1], dtype=np.int64)
    for i in range(x.size):
        if low <= core[i] < high:
            rows[place[core[i] - low]] = i
            place[core[i] - low] += 1
        for k in range(offsets[core[i]], offsets[core[i] + 1]):
            p = neighbours[k]
            if low <= p < high and _holds(windows[p], x[i], y[i]):
                rows[place[p - low]] = i
                place[p - low] += 1
    return starts, rows


class _PatchWriter:
    """Writes the transcripts of one patch, in row groups of one size, sorted by transcript in the end."""

    def __init__(self, path: Path, group_rows: int, budget: int) -> None:
        self.path, self.n_rows = path, 0
        self._budget, self._group_rows = budget, group_rows
        self._buffer = {field.name: np.empty(group_rows, field.type.to_pandas_dtype()) for field in SCHEMA}
        self._held, self._last, self._sorted = 0, -1, True
        self._writer = ParquetWriter(path, SCHEMA, **_ENCODING)

    def add(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Append rows."""
        ids = columns["transcript_id"]
        self._sorted &= int(ids[0]) > self._last and bool((ids[1:] > ids[:-1]).all())
        self._last = int(ids[-1])
        self.n_rows += len(ids)
        done = 0
        while done < len(ids):
            n = min(self._group_rows - self._held, len(ids) - done)
            for name, values in columns.items():
                self._buffer[name][self._held : self._held + n] = values[done : done + n]
            self._held, done = self._held + n, done + n
            if self._held == self._group_rows:
                self._flush()

    def _flush(self) -> None:
        arrays = [arrow_array(self._buffer[name][: self._held]) for name in SCHEMA.names]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), row_group_size=self._group_rows)
        self._held = 0

    def __enter__(self) -> "_PatchWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._writer.abandon()
            return
        self._flush()
        self._writer.close()
        self._buffer = {}
        if not self._sorted:
            self._sort()

    def _sort(self) -> None:
        """Sort a file whose rows came in another order, piece by piece where it is large."""
        ids = np.sort(pq.read_table(self.path, columns=["transcript_id"]).column(0).to_numpy())
        piece = max(self._budget // (4 * _BYTES_A_ROW), 1)
        aside = self.path.with_name("sorted.parquet")
        writer = ParquetWriter(aside, SCHEMA, **_ENCODING)
        try:
            for start in range(0, len(ids), piece):
                low, high = ids[start], ids[min(start + piece, len(ids)) - 1]
                within = [("transcript_id", ">=", low), ("transcript_id", "<=", high)]
                part = pq.read_table(self.path, filters=within, schema=SCHEMA)
                writer.write_table(part.sort_by("transcript_id"), row_group_size=self._group_rows)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        aside.replace(self.path)
