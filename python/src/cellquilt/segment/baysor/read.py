"""What Baysor wrote, read back: the cell of every molecule, and the cells' outlines.

Baysor drops molecules of rare genes, names cells by a random run and numbers them as it likes. So molecules are joined
on the row number that they were given, and cells are numbered by their first molecule: the same segmentation gives the
same labels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import shapely

from cellquilt.core.errors import CellquiltError
from cellquilt.geometry.polygonize import simple_cells
from cellquilt.segment.baysor.call import CELL_STATS, OUTPUT, POLYGONS

#: Column of the molecules' table with the row number, which Baysor passes on.
ROW = "row"
#: Baysor's own measures of a cell, kept as ``baysor_<name>``.
_MEASURES = ("avg_confidence", "avg_assignment_confidence", "elongation", "lifespan", "max_cluster_frac")
#: How far the outline of a cell that has none of Baysor's reaches beyond its molecules, in µm.
_MARGIN_UM = 0.5
#: From so many molecules on, an outline through molecules encloses something.
_FEWEST_FOR_OUTLINE = 3


@dataclass(frozen=True)
class Found:
    """The cells of one patch.

    Attributes
    ----------
    labels
        (n,) int32: the cell of every molecule that Baysor was given, 0 for none.
    confidence
        (n,) float32: Baysor's confidence in that; NaN for molecules that Baysor left out.
    geometry
        (n_cells,) polygons in µm; the cell with label k stands at k - 1.
    columns
        Column → (n_cells,): ``label`` and ``n_transcripts`` int32, ``baysor_…`` float32.
    n_from_molecules
        Cells whose outline is drawn around their molecules, Baysor having none that encloses an area.
    """

    labels: np.ndarray
    confidence: np.ndarray
    geometry: np.ndarray
    columns: dict[str, np.ndarray]
    n_from_molecules: int

    @property
    def spacing_um(self) -> float:
        """How far molecules are from each other in a cell, in µm; 0 where no cell is large enough to tell."""
        counts = self.columns["n_transcripts"]
        large = counts >= _FEWEST_FOR_OUTLINE
        return float(np.median(np.sqrt(shapely.area(self.geometry[large]) / counts[large]))) if large.any() else 0.0

    def at_least(self, area_um2: float) -> "Found":
        """Only the cells of this area, numbered anew; the molecules of the others are in no cell."""
        keep = shapely.area(self.geometry) >= area_um2
        number = np.concatenate([[0], np.where(keep, np.cumsum(keep), 0)]).astype(np.int32)
        columns = {name: values[keep] for name, values in self.columns.items()}
        columns["label"] = number[1:][keep]
        return Found(number[self.labels], self.confidence, self.geometry[keep], columns, self.n_from_molecules)


def no_cells(n: int) -> Found:
    """What is found where no cell is, among `n` molecules."""
    columns = {name: np.empty(0, np.int32) for name in ("label", "n_transcripts")}
    confidence = np.full(n, np.nan, dtype=np.float32)
    return Found(np.zeros(n, dtype=np.int32), confidence, np.empty(0, object), columns, 0)


def read_output(folder: Path, contract: str, xy: np.ndarray) -> Found:
    """Read the output of one call.

    Parameters
    ----------
    folder
        Where Baysor wrote.
    contract
        The version's contract.
    xy
        (n, 2) float64: the molecules in µm, by their row number.

    Raises
    ------
    CellquiltError
        ``baysor-output`` if a file is missing, cut short, or contradicts another.
    """
    table = _read_csv(folder / OUTPUT, {ROW: pa.float64(), "cell": pa.string(), "assignment_confidence": pa.float64()})
    rows = _row_numbers(table, len(xy), folder / OUTPUT)
    names, cell = np.unique(_texts(table, "cell"), return_inverse=True)
    # Cells in the order of their first molecule; no name is no cell.
    first = np.full(len(names), len(xy), dtype=np.int64)
    np.minimum.at(first, cell, rows)
    first[names == ""] = -1
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(names), dtype=np.int32)
    rank[order] = np.arange(len(names)) + (0 if "" in names else 1)
    names = names[order][int((rank == 0).any()) :]
    labels = np.zeros(len(xy), dtype=np.int32)
    labels[rows] = rank[cell]
    confidence = np.full(len(xy), np.nan, dtype=np.float32)
    if "assignment_confidence" in table.schema.names:
        confidence[rows] = table.column("assignment_confidence").to_numpy()
    counts = np.bincount(labels, minlength=len(names) + 1)[1:].astype(np.int32)
    columns = {"label": np.arange(1, len(names) + 1, dtype=np.int32), "n_transcripts": counts}
    columns.update(_measures(folder / CELL_STATS, names, counts))
    outlines = _outlines(folder / POLYGONS[contract], names)
    outlines[counts < _FEWEST_FOR_OUTLINE] = None
    geometry, n_drawn = _complete(outlines, labels, xy)
    return Found(labels, confidence, geometry, columns, n_drawn)


def _invalid(path: Path, what: str) -> CellquiltError:
    return CellquiltError(
        "baysor-output", f"Baysor's {path.name} {what}", "see the log beside the output; was the disk full?"
    )


def _read_csv(path: Path, types: dict[str, pa.DataType]) -> pa.Table:
    try:
        with pcsv.open_csv(path) as stream:
            there = set(stream.schema.names)
        wanted = [name for name in types if name in there]
        options = pcsv.ConvertOptions(include_columns=wanted, column_types=types)
        return pcsv.read_csv(path, pcsv.ReadOptions(use_threads=False), convert_options=options)
    except FileNotFoundError as error:
        raise _invalid(path, "is missing") from error
    except pa.ArrowException as error:
        raise _invalid(path, f"cannot be read: {error}") from error


def _texts(table: pa.Table, name: str) -> np.ndarray:
    """(n,) str; a missing value is an empty text."""
    return np.asarray(table.column(name).fill_null("").to_numpy(), dtype=str)


def _row_numbers(table: pa.Table, n: int, path: Path) -> np.ndarray:
    missing = [name for name in (ROW, "cell") if name not in table.schema.names]
    if missing:
        raise _invalid(path, f"has no column {missing[0]}")
    # As floats, because that is what Baysor may make of whole numbers; below 2^53 they are exact.
    rows = table.column(ROW).to_numpy()
    whole = np.isfinite(rows) & (rows == np.floor(rows)) & (rows >= 0) & (rows < n)
    if not whole.all():
        raise _invalid(path, f"has {rows[~whole][0]} in column {ROW}; expected 0 to {n - 1}")
    rows = rows.astype(np.int64)
    if np.bincount(rows, minlength=1).max() > 1:
        raise _invalid(path, f"has a number twice in column {ROW}")
    return rows


def _measures(path: Path, names: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Baysor's measures of the cells, which must be the cells that the molecules name."""
    kinds = {"cell": pa.string(), "n_transcripts": pa.int64(), **dict.fromkeys(_MEASURES, pa.float64())}
    table = _read_csv(path, kinds)
    if not {"cell", "n_transcripts"} <= set(table.schema.names):
        raise _invalid(path, "lacks cell or n_transcripts")
    listed = _texts(table, "cell")
    order = np.argsort(listed)
    by_name = np.argsort(names)
    if len(listed) != len(names) or (listed[order] != names[by_name]).any():
        raise _invalid(path, f"lists {len(listed)} cells, {OUTPUT} has molecules of {len(names)}")
    row = np.empty(len(names), dtype=np.int64)
    row[by_name] = order
    stated = table.column("n_transcripts").to_numpy()[row]
    if (stated != counts).any():
        wrong = int(np.flatnonzero(stated != counts)[0])
        raise _invalid(path, f"counts {stated[wrong]} molecules in {names[wrong]}, {OUTPUT} has {counts[wrong]}")
    return {
        f"baysor_{name}": table.column(name).to_numpy()[row].astype(np.float32)
        for name in _MEASURES
        if name in table.schema.names
    }


def _outlines(path: Path, names: np.ndarray) -> np.ndarray:
    """(n,) object array: the polygon of every cell, valid and of one part; None where none has an area."""
    try:
        collection = json.loads(path.read_text(encoding="utf-8"))["geometries"]
        cells = [item["cell"] for item in collection]
        rings = [item["coordinates"][0] for item in collection]
        lengths = np.fromiter(map(len, rings), dtype=np.int64, count=len(rings))
        points = np.array(list(chain.from_iterable(rings)), dtype=np.float64).reshape(-1, 2)
        row = _rows_of(cells, names)
    except FileNotFoundError as error:
        raise _invalid(path, "is missing") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _invalid(path, f"is no collection of outlines: {error!r}") from error
    found: np.ndarray = np.full(len(names), None, dtype=object)
    ring = np.repeat(np.arange(len(rings)), lengths)
    finite = np.bincount(ring[~np.isfinite(points).all(axis=1)], minlength=len(rings)) == 0
    # Some rings repeat their first vertex, some do not.
    stops = np.cumsum(lengths)
    filled = lengths > 0
    closed = np.zeros(len(rings), dtype=np.int64)
    closed[filled] = (points[(stops - lengths)[filled]] == points[stops[filled] - 1]).all(axis=1)
    good = (row >= 0) & (lengths - closed >= _FEWEST_FOR_OUTLINE) & finite
    if good.any():
        number = np.cumsum(good) - 1
        used = good[ring]
        polygons = shapely.polygons(shapely.linearrings(points[used], indices=number[ring[used]]))
        polygons = simple_cells(shapely.make_valid(polygons, method="structure", keep_collapsed=False))
        polygons[shapely.area(polygons) <= 0] = None
        found[row[good]] = polygons
    return found


def _rows_of(cells: Sequence[Any], names: np.ndarray) -> np.ndarray:
    """Position in `names` of the cells that an outline file names: in full, or by number alone (0.6). -1: none."""
    if not cells or not len(names):
        return np.full(len(cells), -1, dtype=np.int64)
    if isinstance(cells[0], str):
        keys, wanted = names, np.asarray(cells, dtype=str)
    else:
        keys, wanted = np.char.rpartition(names, "-")[:, 2].astype(np.int64), np.asarray(cells, dtype=np.int64)
    order = np.argsort(keys)
    at = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    return np.where(keys[at] == wanted, at, -1)


def _complete(outlines: np.ndarray, labels: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, int]:
    """Outlines with hulls of the molecules, a little wider, where there is none; and how many that are."""
    bare = shapely.is_missing(outlines)
    if not bare.any():
        return outlines, 0
    number = np.cumsum(bare) - 1
    inside = np.flatnonzero(labels > 0)
    inside = inside[bare[labels[inside] - 1]]
    inside = inside[np.argsort(labels[inside], kind="stable")]
    molecules = shapely.multipoints(shapely.points(xy[inside]), indices=number[labels[inside] - 1])
    outlines = outlines.copy()
    outlines[bare] = shapely.buffer(shapely.convex_hull(molecules), _MARGIN_UM, quad_segs=4)
    return outlines, int(bare.sum())
