"""Cells of transcript-based methods from overlapping patches, and the one cell of every transcript.

Cells are chosen by the rules of `resolve.choose`. Every transcript is then assigned anew, once:

1. a cell that is kept keeps its own transcripts;
2. a transcript that several kept cells claim goes to the one whose patch sees it deepest, that is, furthest from what
   the patch did not see;
3. a transcript of a copy that was dropped, which no kept cell claims, goes to the copy's winner if it lies inside its
   outline;
4. one that is still free and lies in no outline goes to the winner of the copy that the patch which sees it deepest has
   it in, if that is near: of neighbours kept from two patches, either patch may have it in the copy that was dropped;
5. all others are in no cell.

Nothing here depends on the order of patches, files or rows.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellquilt.core.assignment import ASSIGNMENT, EXPECTED, EXPECTED_SCHEMA, NO_CELL, NOT_SEGMENTED, AssignmentWriter
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import progress
from cellquilt.core.parquet import ParquetWriter, arrow_array
from cellquilt.core.points import batch_rows, count_points, floats, iter_points, points_columns, points_transforms
from cellquilt.core.settings import Settings
from cellquilt.core.store import Store
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, apply
from cellquilt.geometry.locate import PolygonIndex
from cellquilt.geometry.packed import PackedPolygons
from cellquilt.geometry.spacing import outline_distances
from cellquilt.patches.transcripts import POINTS, usable
from cellquilt.resolve.choose import Resolution, Windows, raster_order, resolve_cells
from cellquilt.segment.molecules import (
    CELL_COLUMNS,
    MoleculeResult,
    TranscriptFiles,
    TranscriptsInStep,
    read_results,
    window_bounds,
)

#: Width of the squares (µm) by which an overlap of two outlines is shared out.
_STEP_UM = 0.5
#: Share of the memory for rows of results that are read and not yet needed.
_KEPT_SHARE = 8
#: How far (µm) from a cell's outline a transcript may lie that rule 4 gives to it.
_NEAR_UM = 5.0


@dataclass
class ResolvedMolecules:
    """What `resolve_molecules` decided.

    Attributes
    ----------
    geometry
        (n,) outlines in pixels of the main image, in raster order.
    columns
        Column name → (n,) array: ``patch, merged, cut, prior_cell, n_transcripts`` and the method's own.
    transforms
        Coordinate system → (3, 3) map from the outlines' coordinates.
    facts
        Numbers for the record.
    files
        What belongs into the folder of the shapes element; see `core.assignment`.
    """

    geometry: PackedPolygons
    columns: dict[str, np.ndarray]
    transforms: dict[str, Affine]
    facts: dict[str, Any]
    files: list[Path]

    def put_beside(self, element: Path) -> None:
        """Move the files into the shapes element's folder."""
        for file in self.files:
            shutil.move(file, element / file.name)


def resolve_molecules(
    store: Store, folders: Sequence[Path], frame: dict[str, Affine] | None, settings: Settings, scratch: Path
) -> ResolvedMolecules:
    """Put the results of a transcript-based method together.

    Parameters
    ----------
    store
        The slide.
    folders
        The tasks' results, in any order.
    frame
        The main image's transforms; None where there is no image.
    settings
        Groups ``resolve`` and ``resources``.
    scratch
        Folder for the files.

    Raises
    ------
    CellquiltError
        ``molecule-result-invalid`` if the results are damaged or of another slide, and what the store says.
    """
    result = read_results(folders, packed=True)
    assert isinstance(result.geometry, PackedPolygons)
    points = store.element("points", POINTS)
    to_global = points_transforms(points)[GLOBAL]
    resolution = resolve_cells(
        result.geometry,
        result.cells["patch"],
        result.cells["cut"],
        result.cells["depth_um"],
        threshold=settings["resolve_threshold"],
        rule=settings["resolve_rule"],
        step=_STEP_UM,
        windows=Windows(*window_bounds([patch for patch in result.patches if patch.get("error") is None])),
        identity=result.cells["prior_cell"],
    )
    geometry = resolution.geometry.mapped(to_global)
    order = raster_order(geometry)
    claims = _Claims(result, resolution, order)
    paths = [scratch / ASSIGNMENT]
    counts, n_transcripts = _assign(claims, points, paths[0], settings)
    if result.expected is not None:
        paths.append(scratch / EXPECTED)
        _write_expected(paths[1], claims, n_transcripts)
    source = resolution.source[order]
    columns = {
        "patch": result.cells["patch"][source],
        "merged": resolution.merged[order],
        "cut": resolution.cut[order],
        "prior_cell": result.cells["prior_cell"][source],
        "n_transcripts": n_transcripts.astype(np.int32),
        **{name: result.cells[name][source] for name in result.cells if name not in (*CELL_COLUMNS, "cut", "depth_um")},
    }
    if frame is None:
        to_um = points_transforms(points).get(MICRONS, np.eye(3))
        frame = {GLOBAL: np.eye(3), MICRONS: to_um @ np.linalg.inv(to_global)}
    facts = {
        "method": result.method,
        "n_segmented": len(result.geometry),
        **resolution.facts(),
        "patches": [_in_pixels(patch, to_global) for patch in result.patches],
        "tasks": result.record["tasks"],
        **counts,
    }
    return ResolvedMolecules(geometry.take(order), columns, frame, facts, paths)


def _in_pixels(patch: dict[str, Any], to_global: Affine) -> dict[str, Any]:
    """A patch's record as those of image-based methods are: its window in pixels of the main image."""
    corners = apply(to_global, np.array([[patch["x0"], patch["y0"]], [patch["x1"], patch["y1"]]]))
    (x0, y0), (x1, y1) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return {**{name: value for name, value in patch.items() if name != "core"}, "x0": x0, "y0": y0, "x1": x1, "y1": y1}


class _Claims:
    """Which copy claims a transcript, and what became of the copy.

    Attributes
    ----------
    files
        The transcripts with their patch and label.
    cell_of_copy
        (n_copies,) int64 row of the cell that each copy is or is merged into; -1 if it was dropped.
    patches, windows
        (n_patches,) their numbers, ascending; (n_patches, 4) what they saw, infinite on the slide's own sides.
    first_copy
        (n_patches + 1,) int64 where the copies of each patch start; of one patch they are in the order of their labels.
    labels
        (n_copies,) int32 label of each copy in its patch.
    outlines, cells
        The cells' outlines, in µm, and their index: about 1 kB a cell of 25 vertices.
    winner_of_copy
        (n_copies,) int64 the cell, of lowest rank, that each copy was dropped because of; -1 for others.
    rank
        (n_cells,) int64: of cells that see a transcript equally deep the one with the lower rank gets it.
    """

    def __init__(
        self, result: MoleculeResult, resolution: Resolution[PackedPolygons], order: NDArray[np.int64]
    ) -> None:
        assert isinstance(result.transcripts, TranscriptFiles)
        self.result, self.files = result, result.transcripts
        place = np.empty(len(order) + 1, dtype=np.int64)
        place[order], place[-1] = np.arange(len(order)), -1
        self.cell_of_copy = place[resolution.member]
        self.outlines = resolution.geometry.rings(order)
        self.cells = PolygonIndex(self.outlines)
        source = resolution.source[order]
        best_first = np.lexsort((-result.cells["depth_um"][source], resolution.cut[order]))
        self.rank = np.empty(len(order), dtype=np.int64)
        self.rank[best_first] = np.arange(len(order))
        self.patches, self.windows = window_bounds(result.patches)
        self._keys = _key(result.cells["patch"], result.cells["label"])
        self.first_copy = np.append(np.searchsorted(result.cells["patch"], self.patches), len(self.cell_of_copy))
        self.labels = np.ascontiguousarray(result.cells["label"], dtype=np.int32)
        a, b = resolution.pairs.T
        loser, winner = np.concatenate([a, b]), np.concatenate([b, a])
        lost = (self.cell_of_copy[loser] < 0) & (self.cell_of_copy[winner] >= 0)
        self._n_cells = max(len(order), 1)
        self._lost = np.unique(loser[lost] * self._n_cells + self.cell_of_copy[winner[lost]])
        copy, cell = np.divmod(self._lost, self._n_cells)
        worst_first = np.argsort(-self.rank[cell])
        self.winner_of_copy = np.full(len(self.cell_of_copy), -1, dtype=np.int64)
        self.winner_of_copy[copy[worst_first]] = cell[worst_first]

    def copy_of(self, patch: NDArray[np.integer], label: NDArray[np.integer]) -> NDArray[np.int64]:
        """(n,) int64 position of the copy of each (patch, label), -1 where there is none."""
        key = _key(patch, label)
        at = np.searchsorted(self._keys, key)
        found = at < self._keys.size
        found[found] = self._keys[at[found]] == key[found]
        return np.where(found, at, -1)

    def lost_to(self, copy: NDArray[np.int64], cell: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,) bool: whether a copy was dropped because of a cell."""
        key = copy * self._n_cells + cell
        at = np.searchsorted(self._lost, key)
        found = (cell >= 0) & (at < self._lost.size)
        found[found] = self._lost[at[found]] == key[found]
        return found


def _key(patch: NDArray[np.integer], label: NDArray[np.integer]) -> NDArray[np.int64]:
    return (np.asarray(patch, dtype=np.int64) << 32) | np.asarray(label, dtype=np.int64)


def _assign(
    claims: _Claims, points: Path, output: Path, settings: Settings
) -> tuple[dict[str, int], NDArray[np.int64]]:
    """Write the cell of every transcript; returns what happened to how many, and the transcripts of each cell."""
    rows = batch_rows(settings["memory_mb"])
    there = points_columns(points)
    columns = [name for name in ("transcript_id", "x", "y", "z", "is_control", "passes_qv") if name in there]
    n_cells = len(claims.rank)
    n_transcripts = np.zeros(n_cells, dtype=np.int64)
    names = ("n_assigned_molecules", "n_contested", "n_taken_over", "n_not_segmented", "n_claims")
    totals = dict.fromkeys(names, 0)
    reader = claims.files.in_step(settings["memory_mb"] * 1_000_000 // _KEPT_SHARE)
    with AssignmentWriter(output) as writer:
        for batch in progress(iter_points(points, columns, rows), "transcripts", max(count_points(points) // rows, 1)):
            ids = batch.column("transcript_id").to_numpy().astype(np.uint64, copy=False)
            x, y = floats(batch, "x"), floats(batch, "y")
            cell, numbers = _assign_batch(claims, reader, ids, x, y, settings["threads"])
            numbers["n_not_segmented"], numbers["n_assigned_molecules"] = _count(usable(batch), cell, n_transcripts)
            writer.write(ids, cell)
            for name, number in numbers.items():
                totals[name] += number
    if totals.pop("n_claims") != claims.files.n_rows:
        raise CellquiltError(
            "molecule-result-invalid",
            f"the results are about transcripts that {points} does not have",
            "resolve them with the slide that they were made from",
        )
    return totals, n_transcripts


def _assign_batch(
    claims: _Claims,
    reader: TranscriptsInStep,
    ids: NDArray[np.uint64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    threads: int,
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Row of each transcript's cell, `NO_CELL`, or `NOT_SEGMENTED` where no patch has it."""
    # Readers number transcripts as they come: then nothing has to be put in order.
    order = np.empty(0, dtype=np.int64) if (ids[1:] > ids[:-1]).all() else np.argsort(ids, kind="stable")
    ordered = ids[order] if order.size else ids
    cell = np.full(len(ids), NOT_SEGMENTED, dtype=np.int64)
    # How deep whoever has a transcript sees it, and of all patches that have it, whatever they made of it.
    depth = np.full((len(ids), 2), -np.inf)
    contested = np.zeros(len(ids), dtype=np.bool_)
    left: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    n_claims = 0
    for own, patch, label in reader.between(int(ordered[0]), int(ordered[-1])) if len(ids) else ():
        n, *dropped = _claim(
            own, patch, label, claims.patches, claims.windows, claims.first_copy, claims.labels, claims.cell_of_copy,
            claims.rank, ordered, order, x, y, cell, depth, contested,
        )  # fmt: skip
        if n < 0:
            raise CellquiltError(
                "molecule-result-invalid",
                "the results have transcripts of a patch that they do not name",
                "segment the bundles again",
            )
        n_claims += n
        left.append((dropped[0], dropped[1], dropped[2]))
    taken = 0
    if left:
        row, copy, deep = (np.concatenate(parts) for parts in zip(*left, strict=True))
        free = cell[row] == NO_CELL
        row, copy, deep = row[free], copy[free], deep[free]
        inside = claims.cells.locate_columns(x[row], y[row], threads=threads)
        won = claims.lost_to(copy, inside)
        cell[row[won]] = inside[won]
        between = np.flatnonzero((inside < 0) & (deep == depth[row, 1]) & (claims.winner_of_copy[copy] >= 0))
        winner = claims.winner_of_copy[copy[between]]
        near = outline_distances(claims.outlines, winner, x[row[between]], y[row[between]]) <= _NEAR_UM
        # Where two patches see it equally deep, the copy that comes first has it: it is written last.
        last_first = between[near][np.argsort(-copy[between[near]], kind="stable")]
        cell[row[last_first]] = claims.winner_of_copy[copy[last_first]]
        taken = np.unique(np.append(row[won], row[last_first])).size
    return cell, {"n_contested": int(contested.sum()), "n_taken_over": taken, "n_claims": n_claims}


@numba.njit(cache=True, nogil=True)
def _count(reason, cell, n_transcripts):
    """Keep the cells of transcripts that are to be segmented, and count them; those that no patch has are in no cell.

    Returns how many of these there are, and how many are in a cell.
    """
    n_missed = n_assigned = 0
    for i in range(cell.size):
        if reason[i] != 0:
            cell[i] = NOT_SEGMENTED
        elif cell[i] == NOT_SEGMENTED:
            cell[i] = NO_CELL
            n_missed += 1
        elif cell[i] >= 0:
            n_transcripts[cell[i]] += 1
            n_assigned += 1
    return n_missed, n_assigned


@numba.njit(cache=True, nogil=True)
def _place(value, ordered, low, high, guess):
    """Where a value is among ordered[low:high], -1 if it is not there; at once where the guess is right."""
    if low <= guess < high and ordered[guess] == value:
        return guess
    stop = high
    while low < high:
        middle = (low + high) // 2
        if ordered[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low if low < stop and ordered[low] == value else -1


@numba.njit(cache=True, nogil=True)
def _claim(
    ids, patch, label, patches, windows, first_copy, labels, cell_of_copy, rank, ordered, order, x, y, cell, depth,
    contested,
):  # fmt: skip
    """Let the cells of some rows of a result have their transcripts, where they see them deeper than who has them.

    Returns how many rows are about transcripts of this batch (-1 if a patch is not known), and those among them whose
    copy was dropped: row in the batch, copy, depth.
    """
    rows = np.empty(ids.size, dtype=np.int64)
    copies = np.empty(ids.size, dtype=np.int64)
    depths = np.empty(ids.size, dtype=np.float64)
    n_found = n_dropped = 0
    # Numbers of rows without a gap: then the place of one is how far it is from the first.
    without_gap = ordered[-1] - ordered[0] == ordered.size - 1
    p = -1
    left = top = right = bottom = 0.0
    low = high = 0
    for k in range(ids.size):
        if ids[k] < ordered[0] or ids[k] > ordered[-1]:
            continue
        at = np.int64(ids[k] - ordered[0])
        if not without_gap:
            at = _place(ids[k], ordered, 0, ordered.size, at)
            if at < 0:
                continue
        n_found += 1
        if p < 0 or patches[p] != patch[k]:
            p = _place(patch[k], patches, 0, patches.size, p + 1)
            if p < 0:
                return -1, rows[:0], copies[:0], depths[:0]
            left, top, right, bottom = windows[p]
            low, high = first_copy[p], first_copy[p + 1]
        i = order[at] if order.size else at
        deep = min(x[i] - left, y[i] - top, right - x[i], bottom - y[i])
        depth[i, 1] = max(depth[i, 1], deep)
        copy = _place(label[k], labels, low, high, low + label[k] - 1) if label[k] > 0 else -1
        new = cell_of_copy[copy] if copy >= 0 else -1
        if new < 0:
            cell[i] = max(cell[i], -1)  # a patch had it, whatever it made of it
            if copy >= 0:
                rows[n_dropped], copies[n_dropped], depths[n_dropped] = i, copy, deep
                n_dropped += 1
            continue
        old = cell[i]
        if old >= 0 and old != new:
            contested[i] = True
        if old < 0 or deep > depth[i, 0] or (deep == depth[i, 0] and rank[new] < rank[old]):
            cell[i], depth[i, 0] = new, deep
    return n_found, rows[:n_dropped].copy(), copies[:n_dropped].copy(), depths[:n_dropped].copy()


def _write_expected(path: Path, claims: _Claims, n_transcripts: NDArray[np.int64]) -> None:
    """Expected counts of the cells that are left.

    Copies that are merged saw part of the cell's transcripts twice: their sum is scaled to what the cell has.
    """
    from scipy.sparse import coo_matrix

    result = claims.result
    table = result.expected
    assert table is not None
    table = table.combine_chunks()
    copy = claims.copy_of(table.column("patch").to_numpy(), table.column("label").to_numpy())
    cell = np.append(claims.cell_of_copy, -1)[copy]
    gene = table.column("gene").combine_chunks()
    gene = gene.chunk(0) if isinstance(gene, pa.ChunkedArray) else gene
    names = np.array(gene.dictionary.to_pylist(), dtype=object)
    by_name = np.argsort(names, kind="stable")
    column = np.argsort(by_name)[gene.indices.to_numpy()] if len(gene) else np.zeros(0, dtype=np.int64)
    value = table.column("value").to_numpy().astype(np.float64)
    kept = cell >= 0
    n_cells = len(n_transcripts)
    copies = claims.cell_of_copy >= 0
    owner = claims.cell_of_copy[copies]
    seen = np.bincount(owner, minlength=n_cells)
    total = np.bincount(owner, result.cells["n_transcripts"][copies], minlength=n_cells)
    factor = np.where((seen > 1) & (total > 0), n_transcripts / np.maximum(total, 1), 1.0)
    matrix = coo_matrix((value[kept], (cell[kept], column[kept])), shape=(n_cells, max(len(names), 1))).tocsr()
    matrix.sort_indices()
    row = np.repeat(np.arange(n_cells), np.diff(matrix.indptr))
    genes = pa.DictionaryArray.from_arrays(
        pa.array(matrix.indices.astype(np.int32)), pa.array(names[by_name].tolist(), pa.string())
    )
    values = arrow_array((matrix.data * factor[row]).astype(np.float32))
    writer = ParquetWriter(path, EXPECTED_SCHEMA, compression="zstd")
    try:
        writer.write_table(
            pa.Table.from_arrays([arrow_array(row.astype(np.int32)), genes, values], EXPECTED_SCHEMA.names)
        )
        writer.close()
    except BaseException:
        writer.abandon()
        raise
