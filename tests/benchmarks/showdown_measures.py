"""What the showdown counts in a tool's result, by the same functions for both tools: from outlines, table and truth."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from cellquilt.simulate.scores import mutual_best, one_to_one, overlapping

#: Two outlines of a result are one cell twice from this overlap / smaller area on.
TWICE = 0.5
#: A true nucleus is found from this IoU on.
FOUND_IOU = 0.5
_POINTS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Result:
    """What a tool made of the slide.

    Attributes
    ----------
    outlines
        (n,) polygons in pixels of the image, that of each row of the table.
    counts
        (n, g) sparse counts.
    genes
        (g,) their names.
    sides
        (s, 4) inner sides of the tool's patches in pixels: x0, y0, x1, y1.
    parts
        Name → bytes of everything that must be the same after a kill, rows in the tool's own order.
    """

    outlines: np.ndarray
    counts: Any
    genes: np.ndarray
    sides: np.ndarray
    parts: dict[str, bytes]


def read_result(store: Path, outlines: str, image_size: tuple[int, int], table: str = "table") -> Result:
    """Read a SpatialData store, whoever wrote it.

    Parameters
    ----------
    store
        The store; its patches are ``image_patches``.
    outlines
        Name of the shapes that the table is about.
    image_size
        (height, width) of the image in pixels.
    table
        Name of the table.
    """
    import anndata
    from cellquilt.core.shapes import mapped, read_shapes
    from cellquilt.report.borders import inner_sides

    counted = anndata.read_zarr(store / "tables" / table)
    shapes = read_shapes(store / "shapes" / outlines)
    place = {name: row for row, name in enumerate(shapes.ids)}
    key = counted.uns["spatialdata_attrs"]["instance_key"]
    rows = np.array([place[str(name)] for name in counted.obs[key]], dtype=np.int64)
    geometry = mapped(shapes.geometry, shapes.transforms["global"])[rows]
    patches = read_shapes(store / "shapes" / "image_patches")
    boxes = shapely.bounds(mapped(patches.geometry, patches.transforms["global"])).reshape(-1, 4)
    counts = counted.X.tocsr()
    counts.sort_indices()
    parts = {
        "counts": counts.toarray().tobytes(),
        "genes": "\n".join(counted.var_names).encode(),
        "cell ids": "\n".join(counted.obs_names).encode(),
        "columns of cells": counted.obs.to_csv(index=False).encode(),
        "positions": np.ascontiguousarray(counted.obsm["spatial"]).tobytes(),
        "outlines": b"".join(shapely.to_wkb(shapes.geometry[rows])),
    }
    if "intensities" in counted.obsm:
        parts["intensities"] = np.ascontiguousarray(np.asarray(counted.obsm["intensities"])).tobytes()
    genes = np.asarray(counted.var_names, dtype=str)
    return Result(np.asarray(geometry, dtype=object), counts, genes, inner_sides(boxes, image_size), parts)


# --- the same after a kill?


def differing(before: Result, after: Result) -> list[str]:
    """Names of the parts that are not byte for byte the same."""
    names = sorted(before.parts.keys() | after.parts.keys())
    return [name for name in names if before.parts.get(name) != after.parts.get(name)]


def same_but_for_order(before: Result, after: Result) -> bool:
    """Whether both have the same outlines with the same counts, in whatever order and by whatever names."""
    if not np.array_equal(before.genes, after.genes):
        return False
    return _unordered(before) == _unordered(after)


def _unordered(result: Result) -> list[bytes]:
    rows = result.counts.toarray()
    return sorted(
        hashlib.sha256(wkb + row.tobytes()).digest()
        for wkb, row in zip(shapely.to_wkb(result.outlines), rows, strict=True)
    )


# --- transcripts


@dataclass(frozen=True)
class Transcripts:
    """The slide's transcripts that a count may be made of.

    Attributes
    ----------
    xy
        (m, 2) float64 positions in pixels.
    cell
        (m,) int64 row of the true cell they came from, -1 for none.
    """

    xy: np.ndarray
    cell: np.ndarray


def read_transcripts(bundle: Path, genes: Sequence[str], min_qv: float, pixel_size_um: float) -> Transcripts:
    """Transcripts of a simulated Xenium bundle: of the given genes, of at least this quality."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(bundle / "transcripts.parquet", columns=["x_location", "y_location", "feature_name", "qv"])
    truth = pq.read_table(bundle / "truth" / "transcripts_truth.parquet", columns=["cell_id"])
    cells = pq.read_table(bundle / "truth" / "cells.parquet", columns=["cell_id"]).column("cell_id").to_numpy()
    kept = pc.and_(
        pc.is_in(table["feature_name"], value_set=pa.array(list(genes))), pc.greater_equal(table["qv"], min_qv)
    ).to_numpy()
    xy = np.column_stack([table[name].to_numpy()[kept] for name in ("x_location", "y_location")])
    names = truth.column("cell_id").to_numpy()[kept]
    order = np.argsort(cells)
    place = np.minimum(np.searchsorted(cells[order], names), len(cells) - 1)
    row = np.where(cells[order][place] == names, order[place], -1)
    return Transcripts(xy.astype(np.float64) / pixel_size_um, row.astype(np.int64))


def inside(xy: np.ndarray, outlines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a transcript and an outline that it lies in: two (p,) int64 arrays, row of each."""
    tree = shapely.STRtree(outlines)
    rows: list[np.ndarray] = [np.zeros(0, np.int64)]
    cells: list[np.ndarray] = [np.zeros(0, np.int64)]
    for start in range(0, len(xy), _POINTS_AT_ONCE):
        row, cell = tree.query(shapely.points(xy[start : start + _POINTS_AT_ONCE]), predicate="intersects")
        rows.append(row + start)
        cells.append(cell)
    return np.concatenate(rows), np.concatenate(cells)


def counting(result: Result, pairs: tuple[np.ndarray, np.ndarray]) -> dict[str, int]:
    """How often transcripts were counted.

    Parameters
    ----------
    result
        A tool's result.
    pairs
        Its transcripts and outlines, see `inside`.

    Returns
    -------
    dict
        ``counted``: sum of the table. ``in_cells``: transcripts that lie in an outline. ``in_several``: those that
        lie in two or more. ``twice``: counts beyond one a transcript, that is ``counted`` less ``in_cells`` where it
        is more.
    """
    times = np.bincount(pairs[0]) if len(pairs[0]) else np.zeros(1, np.int64)
    counted, in_cells = int(result.counts.sum()), int(np.count_nonzero(times))
    return {
        "counted": counted,
        "in_cells": in_cells,
        "in_several": int(np.count_nonzero(times > 1)),
        "twice": max(counted - in_cells, 0),
    }


def placement(pairs: tuple[np.ndarray, np.ndarray], true_cell: np.ndarray, match: np.ndarray) -> dict[str, float]:
    """Whether counts are in the cell that they came from.

    Parameters
    ----------
    pairs
        (p,) transcript and (p,) found cell: what the table's counts are made of.
    true_cell
        (m,) true cell of each transcript, -1 for none.
    match
        (n,) true cell that each found one is, -1 for none.

    Returns
    -------
    dict
        ``contamination``: share of counts that are in another cell than the one they came from, those from no cell
        and those in found cells that are no true one among them. ``in_right_cell``: share of the transcripts of all
        true cells that are counted in theirs.
    """
    row, cell = pairs
    right = (match[cell] >= 0) & (match[cell] == true_cell[row])
    from_cells = int(np.count_nonzero(true_cell >= 0))
    return {
        "contamination": 1.0 - float(right.mean()) if len(row) else 0.0,
        "in_right_cell": len(np.unique(row[right])) / max(from_cells, 1),
    }


def matched(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(n,) int64: the true cell that each found one is (each the other's best by IoU), -1 for none."""
    return one_to_one(*overlapping(found, true), len(found), len(true))[:-1]


# --- borders


def doubles(outlines: np.ndarray) -> dict[str, int]:
    """Pairs of a result's outlines that overlap at all, and those that are one cell twice."""
    outlines = np.asarray(shapely.make_valid(outlines))
    a, b = shapely.STRtree(outlines).query(outlines, predicate="intersects")
    a, b = a[a < b], b[a < b]
    area = shapely.area(outlines)
    share = shapely.area(shapely.intersection(outlines[a], outlines[b])) / np.minimum(area[a], area[b])
    return {"overlapping": int(np.count_nonzero(share > 0.01)), "doubles": int(np.count_nonzero(share >= TWICE))}


def found_at_borders(found: np.ndarray, true: np.ndarray, sides: np.ndarray, distance_px: float) -> dict[str, float]:
    """Recall of true nuclei near patch borders and elsewhere.

    Parameters
    ----------
    found, true
        Outlines in pixels.
    sides
        (s, 4) inner sides of the patches.
    distance_px
        A nucleus is near if it comes so close to a side.

    Returns
    -------
    dict
        ``n_near``, ``recall_near``, ``recall_far`` (at IoU `FOUND_IOU`).
    """
    f, t, iou = overlapping(found, true)
    hit = np.zeros(len(true), bool)
    hit[t[mutual_best(f, t, iou, len(found), len(true)) & (iou >= FOUND_IOU)]] = True
    near = np.zeros(len(true), bool)
    if len(sides):
        lines = shapely.linestrings(sides.reshape(-1, 2, 2))
        near[np.unique(shapely.STRtree(true).query(lines, predicate="dwithin", distance=distance_px)[1])] = True
    return {
        "n_near": int(near.sum()),
        "recall_near": float(hit[near].mean()) if near.any() else 0.0,
        "recall_far": float(hit[~near].mean()) if not near.all() else 0.0,
    }


def choose_windows(
    sides: Sequence[np.ndarray], true: np.ndarray, image_size: tuple[int, int], width_px: int, number: int
) -> list[tuple[int, int, int, int]]:
    """Windows in which all tools have a patch border, those with most true nuclei on the borders first.

    Results are not looked at, so that the choice favours nobody.

    Parameters
    ----------
    sides
        Inner sides of each tool's patches.
    true
        True nuclei in pixels.
    image_size
        (height, width) in pixels.
    width_px
        Width of a window.
    number
        At most so many, no two of which overlap.

    Returns
    -------
    list of (y0, y1, x0, x1)
    """
    lines = [shapely.linestrings(of_tool.reshape(-1, 2, 2)) for of_tool in sides if len(of_tool)]
    if len(lines) < len(sides) or not lines:
        return []
    height, width = image_size
    step = max(width_px // 4, 1)
    tops, lefts = (np.arange(0, max(length - width_px, 0) + 1, step) for length in (height, width))
    y, x = np.meshgrid(tops, lefts, indexing="ij")
    y, x = y.ravel(), x.ravel()
    boxes = shapely.box(x, y, x + width_px, y + width_px)
    # A border must run well inside the window, not along its rim.
    middle = shapely.buffer(boxes, -width_px / 6, join_style="mitre")
    shows_all = np.ones(len(boxes), bool)
    for of_tool in lines:
        shows_all &= np.isin(np.arange(len(boxes)), shapely.STRtree(of_tool).query(middle, predicate="intersects")[0])
    borders = np.concatenate(lines)
    on_border = np.unique(shapely.STRtree(true).query(borders, predicate="intersects")[1])
    centres = shapely.centroid(true[on_border])
    score = np.bincount(shapely.STRtree(centres).query(boxes, predicate="intersects")[0], minlength=len(boxes))
    best = np.lexsort((np.arange(len(boxes)), -score))
    return list(_apart(best[shows_all[best]], y, x, width_px, number))


def _apart(
    order: np.ndarray, y: np.ndarray, x: np.ndarray, width_px: int, number: int
) -> Iterator[tuple[int, int, int, int]]:
    left = order
    for _ in range(number):
        if not len(left):
            return
        y0, x0 = int(y[left[0]]), int(x[left[0]])
        yield y0, y0 + width_px, x0, x0 + width_px
        left = left[(abs(y[left] - y0) >= width_px) | (abs(x[left] - x0) >= width_px)]
