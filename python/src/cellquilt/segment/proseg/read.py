"""What proseg wrote, read back: the cell of every transcript, outlines, and counts.

Proseg moves transcripts, leaves out those that are far from any prior cell, and numbers genes and cells as it likes. So
transcripts are joined on their own ids, keep their own coordinates, and its counts are compared with ours.
"""

import gzip
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import shapely

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.parquet import arrow_array
from cellquilt.core.shapes import read_geoparquet
from cellquilt.geometry.polygonize import simple_cells
from cellquilt.patches.transcripts import TranscriptBundle
from cellquilt.segment.molecules import EXPECTED_SCHEMA, TRANSCRIPT_SCHEMA, borders
from cellquilt.segment.patchwise import PatchCells
from cellquilt.segment.proseg.command import CELLS, COUNTS, EXPECTED, GENES, STORE, TRANSCRIPTS
from cellquilt.segment.proseg.transcripts import Contents

_BATCH_ROWS = 1_000_000
_OUTLINES = Path(STORE) / "shapes" / "cell_boundaries" / "shapes.parquet"
#: Proseg's own measures of a cell, kept as ``proseg_<name>``.
_MEASURES = ("volume", "surface_area", "scale", "cluster")


@dataclass(frozen=True)
class Assignments:
    """The cells of a patch's transcripts, read together with their ids whenever they are iterated over.

    Attributes
    ----------
    bundle, record
        The patch.
    labels
        (n,) int32: the cell of every transcript in the order of the patch, 0 for none.
    """

    bundle: TranscriptBundle
    record: Mapping[str, Any]
    labels: np.ndarray

    def __iter__(self) -> Iterator[pa.Table]:
        start = 0
        for batch in self.bundle.batches(self.record, _BATCH_ROWS):
            stop = start + batch.num_rows
            patch = np.full(batch.num_rows, int(self.record["index"]), dtype=np.int32)
            columns = [batch.column("transcript_id"), arrow_array(patch), arrow_array(self.labels[start:stop])]
            yield pa.Table.from_arrays(columns, schema=TRANSCRIPT_SCHEMA)
            start = stop


def no_cells(bundle: TranscriptBundle, record: Mapping[str, Any]) -> PatchCells:
    """A patch without any cell."""
    columns = {name: np.empty(0, np.int32) for name in ("label", "prior_cell", "n_transcripts")}
    labels = np.zeros(int(record["n_transcripts"]), dtype=np.int32)
    return PatchCells(np.empty(0, object), columns, Assignments(bundle, record, labels), EXPECTED_SCHEMA.empty_table())


def read_output(
    folder: Path, bundle: TranscriptBundle, record: Mapping[str, Any], contents: Contents, *, voxel_um: float
) -> PatchCells:
    """Read the output of one run.

    Parameters
    ----------
    folder
        What proseg wrote.
    bundle, record
        The patch that was segmented.
    contents
        What was found in it.
    voxel_um
        Width of the largest voxels: a cell that comes so near to an inner side of the window is cut.

    Returns
    -------
    PatchCells
        A cell's label is proseg's number of it + 1. Cells whose outline is empty are left out.

    Raises
    ------
    CellquiltError
        ``proseg-output`` if files are missing or broken, transcripts are not those that were given, or proseg's counts
        are not those of its assignments.
    """
    try:
        return _read(folder, bundle, record, contents, voxel_um)
    except (OSError, KeyError, ValueError, pa.ArrowException, shapely.errors.ShapelyError) as error:
        raise _wrong(f"cannot be read: {error}") from error


def _read(
    folder: Path, bundle: TranscriptBundle, record: Mapping[str, Any], contents: Contents, voxel_um: float
) -> PatchCells:
    cells = pq.read_table(folder / CELLS)
    n_cells = cells.num_rows
    if not np.array_equal(cells.column("cell").to_numpy(), np.arange(n_cells)):
        raise _wrong("numbers cells in another way than is known")
    prior = cells.column("original_cell_id").cast(pa.int32()).to_numpy()
    gene_of = pq.read_table(folder / GENES, columns=["gene"]).column("gene").cast(pa.int32()).to_numpy()

    geometry = _outlines(folder / _OUTLINES, n_cells, contents.origin)
    labels, n_far = _labels(folder / TRANSCRIPTS, bundle, record, n_cells)
    n_transcripts = np.bincount(labels, minlength=n_cells + 1)[1:].astype(np.int32)
    _compare_counts(folder / COUNTS, bundle, record, labels, gene_of, n_cells)

    keep = ~shapely.is_empty(geometry)
    if not keep.all():
        lost = int(n_transcripts[~keep].sum())
        LOG.warning("%d cells have no outline and are left out, with %d transcripts", int((~keep).sum()), lost)
        labels[np.append(False, ~keep)[labels]] = 0
    number = np.flatnonzero(keep)
    columns = {
        "label": (number + 1).astype(np.int32),
        "prior_cell": prior[keep],
        "n_transcripts": n_transcripts[keep],
        **border_columns(geometry[keep], prior[keep], record, contents, voxel_um),
        **{f"proseg_{name}": cells.column(name).to_numpy()[keep].astype(np.float32) for name in _MEASURES},
    }
    facts = {"n_too_far": n_far, "n_without_outline": int((~keep).sum())}
    expected = _expected(folder / EXPECTED, bundle, record, gene_of, keep)
    return PatchCells(geometry[keep], columns, Assignments(bundle, record, labels), expected, facts)


def _outlines(path: Path, n_cells: int, origin: np.ndarray) -> np.ndarray:
    """(n_cells,) valid polygons in µm, one part each; empty where proseg gives none."""
    geometry, table, _ = read_geoparquet(path)
    out = np.full(n_cells, shapely.Polygon(), dtype=object)
    there = ~(shapely.is_missing(geometry) | shapely.is_empty(geometry))
    out[table.column("cell").to_numpy()[there]] = geometry[there]
    crossed = ~shapely.is_valid(out)
    out[crossed] = shapely.make_valid(out[crossed], method="structure")
    return np.asarray(shapely.transform(simple_cells(out), lambda xy: xy + origin), dtype=object)


def _labels(path: Path, bundle: TranscriptBundle, record: Mapping[str, Any], n_cells: int) -> tuple[np.ndarray, int]:
    """The cell of every transcript in the order of the patch, and how many transcripts proseg left out."""
    ids = np.concatenate(
        [np.empty(0, np.uint64), *(b.column("transcript_id").to_numpy() for b in bundle.batches(record, _BATCH_ROWS))]
    )
    labels = np.zeros(ids.size, dtype=np.int32)
    seen = np.zeros(ids.size, dtype=bool)
    n_rows = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=["transcript_id", "assignment", "background"]):
            own = batch.column("transcript_id").to_numpy()
            row = np.searchsorted(ids, own)
            if (ids[np.minimum(row, ids.size - 1)] != own).any():
                raise _wrong("holds transcripts that were not given")
            cell = batch.column("assignment").fill_null(n_cells).to_numpy().astype(np.int64)
            cell[batch.column("background").to_numpy(zero_copy_only=False)] = n_cells
            if (cell > n_cells).any():
                raise _wrong("holds transcripts of cells that there are not")
            labels[row] = np.where(cell < n_cells, cell + 1, 0)
            seen[row] = True
            n_rows += batch.num_rows
    if int(seen.sum()) != n_rows:
        raise _wrong("holds a transcript twice")
    return labels, ids.size - n_rows


def _compare_counts(
    path: Path,
    bundle: TranscriptBundle,
    record: Mapping[str, Any],
    labels: np.ndarray,
    gene_of: np.ndarray,
    n_cells: int,
) -> None:
    """Refuse counts that are not those of the assignments."""
    n_genes = len(bundle.genes)
    keys, start = [np.empty(0, np.int64)], 0
    for batch in bundle.batches(record, _BATCH_ROWS):
        label = labels[start : start + batch.num_rows].astype(np.int64)
        start += batch.num_rows
        inside = label > 0
        keys.append((label[inside] - 1) * n_genes + batch.column("gene").to_numpy()[inside])
    ours, counts = np.unique(np.concatenate(keys), return_counts=True)
    cell, gene, value = _matrix(path, n_cells, gene_of)
    theirs = cell * n_genes + gene
    order = np.argsort(theirs)
    if not (np.array_equal(ours, theirs[order]) and np.array_equal(counts, value[order])):
        n, n_ours = int(value.sum()), int(counts.sum())
        raise _wrong(f"counts {n} transcripts ({theirs.size} entries), but assigns {n_ours} ({ours.size} entries)")


def _matrix(path: Path, n_cells: int, gene_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cell (from 0), gene (position in the bundle's) and value (float64) of each entry of a matrix."""
    with gzip.open(path, "rt", encoding="ascii") as stream:
        stream.readline()
        rows, columns, entries = (int(part) for part in stream.readline().split())
    if (rows, columns) != (n_cells, gene_of.size):
        raise _wrong(f"has {rows} cells and {columns} genes in {path.name}, but {n_cells} and {gene_of.size} elsewhere")
    if not entries:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    table = pcsv.read_csv(
        path,
        read_options=pcsv.ReadOptions(skip_rows=2, column_names=["cell", "gene", "value"], block_size=1 << 24),
        parse_options=pcsv.ParseOptions(delimiter=" "),
        convert_options=pcsv.ConvertOptions(
            column_types={"cell": pa.int64(), "gene": pa.int64(), "value": pa.float64()}
        ),
    )
    cell, gene, value = (column.to_numpy() for column in table.columns)
    return cell - 1, gene_of[gene - 1].astype(np.int64), value


def _expected(
    path: Path, bundle: TranscriptBundle, record: Mapping[str, Any], gene_of: np.ndarray, keep: np.ndarray
) -> pa.Table:
    """Expected counts of the cells that are kept, sorted by cell and gene."""
    cell, gene, value = _matrix(path, keep.size, gene_of)
    kept = keep[cell] & (value > 0)
    cell, gene, value = cell[kept], gene[kept], value[kept]
    order = np.lexsort((gene, cell))
    names = pa.DictionaryArray.from_arrays(
        arrow_array(gene[order].astype(np.int32)), pa.array(bundle.genes, pa.string())
    )
    patch = np.full(order.size, int(record["index"]), dtype=np.int32)
    label, value = (cell[order] + 1).astype(np.int32), value[order].astype(np.float32)
    return pa.Table.from_arrays(
        [arrow_array(patch), arrow_array(label), names, arrow_array(value)], schema=EXPECTED_SCHEMA
    )


def border_columns(
    geometry: np.ndarray, prior: np.ndarray, record: Mapping[str, Any], contents: Contents, voxel_um: float
) -> dict[str, np.ndarray]:
    """``cut`` and ``depth_um`` of cells, by the box around a cell and the transcripts of its prior cell.

    A window takes from the cells on its border transcripts that proseg does not know of, so they end at the last voxel
    with transcripts, which is rarely the border itself.

    Parameters
    ----------
    geometry, prior
        (n,) outlines in µm, and the number of the prior cell of each.
    record, contents
        The patch.
    voxel_um
        A box this near to an inner side is cut.
    """
    boxes = shapely.bounds(geometry).reshape(-1, 4)
    row = np.searchsorted(contents.prior_cells, prior)
    own = contents.prior_boxes[np.minimum(row, contents.prior_cells.size - 1)]
    low, high = np.minimum(boxes[:, :2], own[:, :2]), np.maximum(boxes[:, 2:], own[:, 2:])
    around = np.asarray(shapely.box(*low.T, *high.T), dtype=object)
    depth = borders(around, np.full(len(geometry), int(record["index"])), [record])["depth_um"]
    return {"cut": depth <= voxel_um, "depth_um": depth}


def _wrong(what: str) -> CellquiltError:
    return CellquiltError(
        "proseg-output", f"what proseg wrote {what}", "this may be another version of proseg; use 3.2.0"
    )
