"""How well a segmentation recovers the truth of a simulated slide."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from cellquilt.core.errors import CellquiltError
from cellquilt.core.points import iter_points
from cellquilt.core.shapes import ShapesTable, mapped, read_geoparquet, read_shapes
from cellquilt.core.store import Store

THRESHOLDS = (0.5, 0.75, 0.9)
_BATCH = 1_000_000


def truth_scores(
    found: Path | str | ShapesTable | np.ndarray,
    truth: Path | str,
    *,
    nuclei: ShapesTable | np.ndarray | None = None,
    inner_only: bool = False,
) -> dict[str, Any]:
    """Compare a segmentation with the truth.

    Parameters
    ----------
    found
        A published store (shapes `cell_boundaries` and `nucleus_boundaries`, points `transcripts` with `cell_id`), or
        the cells alone: a `ShapesTable`, or an (n,) object array of polygons in pixels.
    truth
        The slide's ``truth/`` folder.
    nuclei
        Nuclei, where `found` is not a store.
    inner_only
        Leave out true cells and nuclei cut by the canvas's edge (and what was found mostly inside them): what little
        is left of many of them nobody can find.

    Returns
    -------
    dict
        ``cells`` and, where there are any, ``nuclei``: ``n_true``, ``n_found``, ``mean_iou`` (best match of each true
        cell) and at each IoU of `THRESHOLDS` ``precision_0.5``, ``recall_0.5``, ``f1_0.5`` and so on. ``transcripts``
        (stores with transcripts only): ``share_in_true_cell`` (of all that came from a cell), ``share_assigned``,
        ``precision`` (assigned to the cell they came from, of all assigned) and ``ari`` (adjusted Rand index of the
        assignment of all transcripts that came from a cell; an unassigned one is a group of its own).

    Raises
    ------
    CellquiltError
        ``truth-missing`` if the folder is not a truth, ``truth-mismatch`` if the store has other transcripts than the
        truth.

    Notes
    -----
    A found and a true cell match if each is the other's best by IoU (Hubert and Arabie's index for ARI, J.
    Classification 1985).
    """
    truth = Path(truth)
    if not (truth / "cells.parquet").is_file():
        raise CellquiltError(
            "truth-missing", f"{truth} has no cells.parquet", "give the truth/ folder of a simulated slide"
        )
    store: Path | None = None
    if isinstance(found, Path | str):
        store = Path(found)
        cells, names = _from_store(store, "cell_boundaries")
        nuclei_found = _from_store(store, "nucleus_boundaries")[0] if _has(store, "nucleus_boundaries") else None
    else:
        cells, names = _polygons(found)
        nuclei_found = None if nuclei is None else _polygons(nuclei)[0]
    true_cells, table, _ = read_geoparquet(truth / "cells.parquet")
    pairs = overlapping(cells, true_cells)
    edge = table.column("cut_by_edge").to_numpy(zero_copy_only=False)
    scores: dict[str, Any] = {"cells": _scores(pairs, cells, true_cells, edge & inner_only)}
    if nuclei_found is not None:
        true_nuclei, nucleus_table, _ = read_geoparquet(truth / "nuclei.parquet")
        edge = nucleus_table.column("cut_by_edge").to_numpy(zero_copy_only=False)
        nucleus_pairs = overlapping(nuclei_found, true_nuclei)
        scores["nuclei"] = _scores(nucleus_pairs, nuclei_found, true_nuclei, edge & inner_only)
    truth_file = truth / "transcripts_truth.parquet"
    if store is not None and truth_file.is_file() and (store / "points" / "transcripts").is_dir():
        found, true, counts = _contingency(store, names, truth_file, table.column("cell_id").to_numpy())
        scores["transcripts"] = transcript_scores(found, true, counts, one_to_one(*pairs, len(cells), len(true_cells)))
    return scores


def _has(store: Path, name: str) -> bool:
    return Store(store).has("shapes", name)


def _from_store(store: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    if not _has(store, name):
        raise CellquiltError("element-missing", f"{store} has no shapes {name}", "score a published store")
    return _polygons(read_shapes(Store(store).element("shapes", name)))


def _polygons(found: ShapesTable | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Polygons in pixels, and their names."""
    if not isinstance(found, ShapesTable):
        geometry = np.asarray(found, dtype=object)
        return geometry, np.arange(len(geometry)).astype(str)
    return mapped(found.geometry, found.transforms.get("global", np.eye(3))), found.ids


def overlapping(found: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All overlapping pairs: index found, index true ((m,) int64) and IoU ((m,) float64)."""
    if len(found) == 0 or len(true) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    crossed = ~shapely.is_valid(found)
    if crossed.any():
        found = found.copy()
        found[crossed] = shapely.make_valid(found[crossed])
    f, t = shapely.STRtree(true).query(found, predicate="intersects")
    shared = shapely.area(shapely.intersection(found[f], true[t]))
    iou = shared / np.maximum(shapely.area(found)[f] + shapely.area(true)[t] - shared, 1e-12)
    keep = shared > 0
    return f[keep], t[keep], iou[keep]


def mutual_best(f: np.ndarray, t: np.ndarray, weight: np.ndarray, n_found: int, n_true: int) -> np.ndarray:
    """Pairs in which each is the other's best.

    Parameters
    ----------
    f, t
        (m,) int64 members of the pairs; every pair once.
    weight
        (m,) what the best has most of. Ties go to the lower index.
    n_found, n_true
        How many members there are on either side.

    Returns
    -------
    numpy.ndarray
        (m,) bool.
    """

    def best(side: np.ndarray, other: np.ndarray, n: int) -> np.ndarray:
        order = np.lexsort((other, -weight, side))
        first = np.full(n, -1, np.int64)
        leading = np.concatenate([[True], side[order][1:] != side[order][:-1]]) if len(order) else np.zeros(0, bool)
        first[side[order][leading]] = order[leading]
        return first

    rows = np.arange(len(f))
    return (best(f, t, n_found)[f] == rows) & (best(t, f, n_true)[t] == rows)


def _scores(
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray], found: np.ndarray, true: np.ndarray, ignored: np.ndarray
) -> dict[str, float]:
    f, t, iou = pairs
    keep = mutual_best(f, t, iou, len(found), len(true))
    left_out = np.zeros(len(found), bool)
    if ignored.any():
        order = np.lexsort((iou, f))
        last = np.concatenate([f[order][1:] != f[order][:-1], [True]]) if len(order) else np.zeros(0, bool)
        left_out[f[order][last]] = ignored[t[order][last]]
    counts = keep & ~ignored[t] & ~left_out[f]
    n_true, n_found = int((~ignored).sum()), int((~left_out).sum())
    result: dict[str, float] = {"n_true": n_true, "n_found": n_found, "mean_iou": 0.0}
    best = np.zeros(len(true))
    np.maximum.at(best, t, iou)
    result["mean_iou"] = float(best[~ignored].mean()) if n_true else 0.0
    for threshold in THRESHOLDS:
        hits = int(np.count_nonzero(counts & (iou >= threshold)))
        result[f"precision_{threshold}"] = hits / n_found if n_found else 0.0
        result[f"recall_{threshold}"] = hits / n_true if n_true else 0.0
        result[f"f1_{threshold}"] = 2 * hits / (n_found + n_true) if n_found + n_true else 0.0
    return result


def _assignments(store: Path, names: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of row number of the transcript and index of its cell; unassigned is ``len(names)``."""
    order = np.argsort(names)
    ordered = np.concatenate([names[order], [""]]) if len(names) else np.array([""])
    for batch in iter_points(store / "points" / "transcripts", ["transcript_id", "cell_id"], _BATCH):
        column = batch.column("cell_id").combine_chunks()
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        words = np.asarray([word or "" for word in column.dictionary.to_pylist()], dtype=str)
        place = np.searchsorted(ordered[:-1], words) if len(words) else np.zeros(0, np.int64)
        known = ordered[np.minimum(place, len(ordered) - 1)] == words if len(words) else np.zeros(0, bool)
        known &= place < len(names)
        code = np.where(known, np.concatenate([order, [0]])[place], len(names)) if len(words) else place
        codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        cell = np.where(codes < 0, len(names), np.concatenate([code, [len(names)]])[codes])
        yield batch.column("transcript_id").to_numpy().astype(np.int64), cell.astype(np.int64)


def one_to_one(f: np.ndarray, t: np.ndarray, iou: np.ndarray, n_found: int, n_true: int) -> np.ndarray:
    """(n_found + 1,) int64: the true cell that each found one matches, -1 for none; the last is that of no cell."""
    keep = mutual_best(f, t, iou, n_found, n_true)
    match = np.full(n_found + 1, -1, np.int64)
    match[f[keep]] = t[keep]
    return match


def _contingency(
    store: Path, names: np.ndarray, truth_file: Path, true_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Found cell (``len(names)`` for none), true cell (-1 for none) and how many transcripts are in both."""
    true_cell = pq.read_table(truth_file, columns=["cell_id"]).column("cell_id").to_numpy()
    order = np.argsort(true_ids)
    rank = np.append(order, -1)[np.searchsorted(true_ids[order], true_cell)]
    rank[~np.isin(true_cell, true_ids)] = -1
    width = len(true_ids) + 1
    rows = 0
    keys: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for row, cell in _assignments(store, names):
        rows += len(row)
        if len(row) and row.max() >= len(true_cell):
            break
        key, count = np.unique(cell * width + rank[row] + 1, return_counts=True)
        keys.append(key)
        counts.append(count)
    if rows != len(true_cell):
        raise CellquiltError(
            "truth-mismatch", f"{store} has other transcripts than {truth_file}", "give the truth of this very slide"
        )
    key, place = np.unique(np.concatenate(keys), return_inverse=True)
    return key // width, key % width - 1, np.bincount(place, weights=np.concatenate(counts)).astype(np.int64)


def transcript_scores(found: np.ndarray, true: np.ndarray, counts: np.ndarray, match: np.ndarray) -> dict[str, float]:
    """How well transcripts are assigned.

    Parameters
    ----------
    found, true, counts
        (m,) found cell (``len(match) - 1`` for none), true cell (-1 for none) and number of transcripts in both;
        every pair once.
    match
        What `one_to_one` returns.

    Returns
    -------
    dict
        ``share_in_true_cell, share_assigned, precision, ari``, as in `truth_scores`.
    """
    unassigned = len(match) - 1
    inside = true >= 0
    right = int(counts[inside & (match[found] == true)].sum())
    n_assigned = int(counts[found != unassigned].sum())
    return {
        "share_in_true_cell": right / max(int(counts[inside].sum()), 1),
        "share_assigned": n_assigned / max(int(counts.sum()), 1),
        "precision": right / max(n_assigned, 1),
        "ari": adjusted_rand(found[inside], true[inside], counts[inside], found[inside] == unassigned),
    }


def adjusted_rand(
    rows: np.ndarray,
    columns: np.ndarray,
    counts: np.ndarray,
    alone: np.ndarray | None = None,
    alone_in_columns: np.ndarray | None = None,
) -> float:
    """Adjusted Rand index of two groupings from their sparse contingency table.

    Parameters
    ----------
    rows, columns, counts
        (m,) group in one, group in the other, number of items in both; every pair once.
    alone, alone_in_columns
        (m,) bool: entries whose items are each a group of their own in the first grouping; in the second.
    """
    together = np.ones(len(counts), bool) if alone is None else ~alone
    also = np.ones(len(counts), bool) if alone_in_columns is None else ~alone_in_columns

    def choose_two(n: np.ndarray) -> float:
        return float((n * (n - 1.0) / 2.0).sum())

    total = float(counts.sum())
    if total < 2:
        return 1.0
    both = choose_two(counts[together & also])
    one = choose_two(np.bincount(np.unique(rows[together], return_inverse=True)[1], weights=counts[together]))
    two = choose_two(np.bincount(np.unique(columns[also], return_inverse=True)[1], weights=counts[also]))
    expected = one * two / (total * (total - 1.0) / 2.0)
    best = (one + two) / 2.0
    return 1.0 if best == expected else (both - expected) / (best - expected)
