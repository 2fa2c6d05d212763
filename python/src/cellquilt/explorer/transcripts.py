"""``transcripts.zarr.zip``: transcripts in a pyramid of square tiles, and their densities.

A tile of level k is 250 µm × 2^k wide and holds a part of the transcripts, 4^-k of them, drawn by a hash of their
numbers: what a level shows does not depend on the order of the rows, and is part of what the level before shows. The
transcripts are sorted once, by their tile on a curve in Z. On it the tiles of every level lie together, so that all
levels are written in one go, and what does not fit in memory is sorted range by range.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.genes import GeneNames
from cellquilt.core.log import LOG, progress
from cellquilt.core.points import (
    batch_rows,
    bools,
    count_points,
    floats,
    iter_points,
    points_columns,
    points_transforms,
)
from cellquilt.core.transforms import Affine
from cellquilt.core.xenium import MIN_QV
from cellquilt.core.zarr_zip import Column, ZarrZip
from cellquilt.explorer.buckets import Buckets, bounds_of
from cellquilt.explorer.slide import ViewedSlide

TILE_UM = 250.0
DENSITY_UM, METRICS_UM = 10.0, 20.0
#: Farther than this from the slide's corner (µm) nothing can be: a slide is 76 mm long.
FARTHEST_UM = 200_000.0
MOST_GENES = 65_535  # the last number of 16 bits means none
_NONE = 65_535
_QV = 40.0  # of transcripts whose machine gives none
_MOST_LEVELS = 15
_ROW = np.dtype(
    [("tile", "<u4"), ("location", "<f4", 3), ("gene", "<u4"), ("qv", "<f4"), ("id", "<u8"), ("valid", "u1")]
)
_Batch = tuple[NDArray, NDArray[np.bool_], int]
_COPIES = 3  # of the rows of a part while it is sorted
_OUTSIDE = 2**32 - 1
_NAMELESS = "unnamed"
#: Columns of `gene_category`, and what names of controls of each look like; the first that fits counts.
CATEGORIES = 9
_CATEGORY = (
    (2, r"negcontrolcodeword"),
    (8, r"intergenic|genomic"),
    (7, r"antisense"),
    (3, r"deprecated"),
    (5, r"unassigned"),
    (6, r"blank|falsecode|systemcontrol"),
)


@dataclass
class TranscriptSummary:
    """What became of a slide's transcripts.

    Attributes
    ----------
    n_written
        Transcripts in the file.
    n_outside
        Those left out: left of or above the image, where the viewer has no tiles, or without coordinates.
    n_levels
        Levels of the pyramid.
    """

    n_written: int = 0
    n_outside: int = 0
    n_levels: int = 0


@dataclass
class _Survey:
    """What one pass over the transcripts finds."""

    tiles: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    low: NDArray[np.float64] = field(default_factory=lambda: np.full(2, np.inf))
    high: NDArray[np.float64] = field(default_factory=lambda: np.full(2, -np.inf))
    by_gene: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    control_by_gene: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    n_outside: int = 0

    def look(self, batches: Iterator[_Batch], most: int) -> list[NDArray] | None:
        """Take all batches in, and give them back if they are at most so many rows."""
        held: list[NDArray] | None = []
        tiles, counts, n_rows = [self.tiles], [self.counts], 0
        for rows, control, n_outside in batches:
            self.n_outside += n_outside
            if not len(rows):
                continue
            place = rows["location"]
            for axis in (0, 1):
                self.low[axis] = min(float(place[:, axis].min()), float(self.low[axis]))
                self.high[axis] = max(float(place[:, axis].max()), float(self.high[axis]))
            tile, n = _distinct(rows["tile"])
            tiles.append(tile)
            counts.append(n)
            known = int(rows["gene"].max(initial=0)) + 1
            for name, gene in (("by_gene", rows["gene"]), ("control_by_gene", rows["gene"][control])):
                total = getattr(self, name)
                wider = np.zeros(max(known, total.size), np.int64)
                wider[: total.size] = total
                setattr(self, name, wider + np.bincount(gene, minlength=wider.size))
            n_rows += len(rows)
            if held is not None:
                held = [*held, rows] if n_rows <= most else None
        self.tiles, inverse = np.unique(np.concatenate(tiles), return_inverse=True)
        self.counts = np.bincount(inverse, np.concatenate(counts), len(self.tiles)).astype(np.int64)
        return held


def _distinct(tile: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The tiles that occur, ascending, and how often."""
    last = int(tile.max(initial=0))
    if last > 1 << 20:
        return np.unique(tile, return_counts=True)
    counts = np.bincount(tile, minlength=last + 1)
    found = np.flatnonzero(counts)
    return found.astype(np.uint32), counts[found]


def write_transcripts(slide: ViewedSlide, path: Path, *, memory_mb: int = 1500) -> TranscriptSummary:
    """Write the slide's transcripts, all of them, also controls and those of low quality (which are not ``valid``).

    Parameters
    ----------
    slide
        The slide.
    path
        File to write; rows that do not fit in memory lie beside it meanwhile. Nothing is written if there are none.
    memory_mb
        Memory for rows.

    Raises
    ------
    CellquiltError
        ``explorer-coordinates``, ``explorer-genes``.
    """
    assert slide.points is not None
    matrix = slide.map_of(points_transforms(slide.points), "transcripts")
    budget = memory_mb * 1_000_000 // 3
    genes, found = GeneNames(), _Survey()
    held = found.look(_batches(slide, matrix, genes, memory_mb), budget // (_COPIES * _ROW.itemsize))
    summary = TranscriptSummary(int(found.counts.sum()), found.n_outside)
    if found.n_outside:
        LOG.warning(
            "%s: %d transcripts lie left of or above the image, where the viewer shows none; left out",
            slide.store.name, found.n_outside,
        )  # fmt: skip
    if summary.n_written == 0:
        return summary
    ordered, column = _ordered(genes.names(), bool(found.by_gene[0]))
    if len(ordered) > MOST_GENES:
        raise CellquiltError(
            "explorer-genes", f"{slide.points} has {len(ordered)} genes; the viewer's format has room for {MOST_GENES}",
            "leave transcripts out with mode=-t",
        )  # fmt: skip
    by_gene, controls = np.zeros((2, len(ordered)), np.int64)
    for total, counts in ((by_gene, found.by_gene), (controls, found.control_by_gene)):
        place = column[: counts.size]  # names that only rows left out have are behind them
        total[place[place >= 0]] = counts[place >= 0]
    category = categories(ordered, 2 * controls > by_gene)
    bounds = bounds_of(found.tiles, found.counts, budget // (_COPIES * _ROW.itemsize))
    rows = Buckets(path.parent, path.name, bounds if held is None else bounds[:1], _ROW)
    density = _Density(found, by_gene, category, path, budget)
    parts = held if held is not None else (part for part, _, _ in _batches(slide, matrix, genes, memory_mb))
    try:
        for part in parts:
            # Numbers as they came become places in the list of names; the last one is that of rows without a name.
            part["gene"] = column[part["gene"]]
            rows.add(part["tile"], part)
            density.add(part)
        with ZarrZip(path, "blosc") as store:
            origin = {f"metrics_density_{axis}_origin": float(density.origin[k]) for k, axis in enumerate("xy")}
            spacing = {f"metrics_density_{axis}_spacing": METRICS_UM for axis in "xy"}
            size = dict(
                zip(("metrics_density_y_count", "metrics_density_x_count"), density.metrics.shape, strict=False)
            )
            store.group("", {**_attributes(slide, ordered, summary.n_written), **origin, **spacing, **size})
            summary.n_levels = _write_grids(store, rows, found)
            density.write(store, ordered)
            store.array("gene_category", category)
            store.array("codeword_category", category)
    finally:
        rows.close()
        density.close()
    return summary


def tile_place(code: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """x and y of tiles by their places on the curve in Z, which has the bits of x and y in turn."""
    return _gather(code), _gather(code >> np.uint32(1))


def _gather(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    out = np.asarray(values) & np.uint32(0x55555555)
    for shift, mask in ((1, 0x33333333), (2, 0x0F0F0F0F), (4, 0x00FF00FF), (8, 0x0000FFFF)):
        out = (out | out >> np.uint32(shift)) & np.uint32(mask)
    return out


def depth(ids: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """(n,) uint8 the last level that shows each transcript: at least k for 4^-k of them, by a hash of the number."""
    key = np.asarray(ids, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    key ^= key >> np.uint64(31)
    out = np.zeros(key.size, np.uint8)
    left = np.arange(key.size)
    for level in range(1, _MOST_LEVELS):
        left = left[key[left] & np.uint64(4**level - 1) == 0]
        out[left] = level
    return out


def categories(names: list[str], is_control: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(genes, 9) bool, of which kind each is: a gene, or one of the machine's kinds of controls."""
    out = np.zeros((len(names), CATEGORIES), bool)
    out[~is_control, 0] = True
    for k in np.flatnonzero(is_control).tolist():
        out[k, next((kind for kind, pattern in _CATEGORY if re.search(pattern, names[k].lower())), 1)] = True
    return out


# --- reading


def gene_column(slide: ViewedSlide) -> str:
    """Name of the transcripts' column of genes.

    Raises
    ------
    CellquiltError
        ``points-column-missing``.
    """
    from cellquilt.core import zarr_json

    assert slide.points is not None
    columns = points_columns(slide.points)
    named = zarr_json.read_attributes(slide.points).get("spatialdata_attrs", {}).get("feature_key")
    name = named if named in columns else "gene"
    if name not in columns:
        raise CellquiltError(
            "points-column-missing", f"{slide.points} has no column of genes; columns: {', '.join(columns)}",
            "name it as feature_key of the points",
        )  # fmt: skip
    return str(name)


def _ordered(names: list[str], nameless: bool) -> tuple[list[str], NDArray[np.int64]]:
    """The names sorted, and the place among them of each gene by its number as it came (number 0 has no name)."""
    column = np.full(len(names) + 1, -1, np.int64)
    column[np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64) + 1] = np.arange(len(names))
    column[0] = len(names) if nameless else -1
    return sorted(names) + ([_NAMELESS] if nameless else []), column


def _batches(slide: ViewedSlide, matrix: Affine, genes: GeneNames, memory_mb: int) -> Iterator[_Batch]:
    """The transcripts as rows of `_ROW`, some at a time: which are controls, and how many were left out.

    Genes are numbered as they come, from 1 on; 0 has none.
    """
    assert slide.points is not None
    there = points_columns(slide.points)
    gene = gene_column(slide)
    own = ("z", "qv", "passes_qv", "transcript_id", "is_control")
    columns = ["x", "y", gene, *(name for name in own if name in there)]
    size = batch_rows(memory_mb)
    batches = iter_points(slide.points, columns, size)
    first = 0
    for batch in progress(batches, "transcripts for the viewer", -(-count_points(slide.points) // size)):
        n = batch.num_rows
        rows = np.zeros(n, _ROW)
        n_inside, highest = _fill(floats(batch, "x"), floats(batch, "y"), matrix, rows["location"], rows["tile"])
        if highest > FARTHEST_UM:
            raise CellquiltError(
                "explorer-coordinates",
                f"{slide.points}: a transcript lies {highest:.4g} µm from the image's corner",
                "is pixel_size_um right, and are the transcripts' coordinates in µm?",
            )
        if "z" in columns:
            rows["location"][:, 2] = np.nan_to_num(floats(batch, "z"))
        rows["gene"] = genes.encode(batch.column(gene), np.ones(n, bool)) + 1
        if "qv" in columns:
            qv = floats(batch, "qv")
            rows["qv"] = np.where(np.isfinite(qv), qv, _QV)
        else:
            rows["qv"] = _QV
        rows["valid"] = bools(batch, "passes_qv") if "passes_qv" in columns else rows["qv"] >= MIN_QV
        ids = batch.column("transcript_id").to_numpy() if "transcript_id" in columns else np.zeros(0)
        rows["id"] = ids if ids.dtype.kind in "iu" else np.arange(first, first + n, dtype=np.uint64)
        first += n
        control = bools(batch, "is_control") if "is_control" in columns else np.zeros(n, bool)
        if n_inside < n:
            inside = rows["tile"] != _OUTSIDE
            rows, control = rows[inside], control[inside]
        yield rows, control, n - n_inside


@numba.njit(cache=True, nogil=True)
def _fill(x, y, matrix, location, tile):
    """Places in the viewer and their tiles, `_OUTSIDE` for those left of or above it; how many are inside, how far."""
    n_inside, highest = 0, 0.0
    for i in range(x.size):
        px = np.float32(matrix[0, 0] * x[i] + matrix[0, 1] * y[i] + matrix[0, 2])
        py = np.float32(matrix[1, 0] * x[i] + matrix[1, 1] * y[i] + matrix[1, 2])
        location[i, 0], location[i, 1] = px, py
        if not (px >= 0 and py >= 0 and px < np.inf and py < np.inf):
            tile[i] = _OUTSIDE
            continue
        n_inside += 1
        highest = max(highest, float(px), float(py))
        if highest > FARTHEST_UM:
            break
        a, b = np.uint32(px / TILE_UM), np.uint32(py / TILE_UM)
        code = np.uint32(0)
        for bit in range(10):  # of `FARTHEST_UM`
            code |= ((a >> bit) & np.uint32(1)) << np.uint32(2 * bit)
            code |= ((b >> bit) & np.uint32(1)) << np.uint32(2 * bit + 1)
        tile[i] = code
    return n_inside, highest


# --- writing


def _attributes(slide: ViewedSlide, genes: list[str], n: int) -> dict[str, Any]:
    import uuid

    places = list(range(len(genes)))
    return {
        "codeword_count": len(genes),
        "codeword_gene_mapping": places,
        "codeword_gene_names": genes,
        "gene_names": genes,
        "gene_index_map": dict(zip(genes, places, strict=True)),
        "number_genes": len(genes),
        "number_rnas": n,
        "spatial_units": "micron",
        "coordinate_space": "refined-final_global_micron",
        "major_version": 4,
        "minor_version": 1,
        "name": "RnaDataset",
        "dataset_uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, f"cellquilt-explorer/{slide.store.name}/transcripts")),
        "data_format": 0,
    }


def _write_grids(store: ZarrZip, rows: Buckets, found: _Survey) -> int:
    """The tiles of all levels; returns how many levels there are."""
    widest = max(int(place.max()) for place in tile_place(found.tiles))
    n_levels = min(widest.bit_length() + 1, _MOST_LEVELS)
    keys: list[list[NDArray[np.uint32]]] = [[] for _ in range(n_levels)]
    counts: list[list[NDArray[np.int64]]] = [[] for _ in range(n_levels)]
    waiting = [np.zeros(0, _ROW) for _ in range(n_levels)]
    for part in range(len(rows)):
        here = rows.take(part)
        following = int(rows.bounds[part + 1]) if part + 1 < len(rows) else None
        here = here[np.argsort(_ranks(here["tile"], found.tiles), kind="stable")]
        last = depth(here["id"])
        for level in range(n_levels):
            if level:
                shown = last >= level
                here, last = here[shown], last[shown]
            ready = np.concatenate([waiting[level], here]) if len(waiting[level]) else here
            tile = ready["tile"] >> np.uint32(2 * level)
            # Only the last tile of a level may go on in the next part.
            whole = len(ready) if following is None else int(np.searchsorted(tile, following >> 2 * level))
            waiting[level] = ready[whole:].copy()
            key, n = _write_tiles(store, level, tile[:whole], ready[:whole])
            keys[level].append(key)
            counts[level].append(n)
    grids: dict[str, Any] = {
        "grid_key_names": ["grid_x_loc", "grid_y_loc"],
        "grid_zip": False,
        "grid_size": [TILE_UM],
        "grid_array_shapes": [],
        "grid_number_objects": [],
        "grid_keys": [],
    }
    for level in range(n_levels):
        n = np.concatenate(counts[level])
        if not n.size:
            n_levels = level
            break
        x, y = tile_place(np.concatenate(keys[level]))
        order = np.lexsort((y, x))
        store.group(f"grids/{level}")
        grids["grid_keys"].append([f"{i},{j}" for i, j in zip(x[order].tolist(), y[order].tolist(), strict=True)])
        grids["grid_number_objects"].append(n[order].tolist())
        grids["grid_array_shapes"].append([{} for _ in order])
    store.group("grids", {**grids, "number_levels": n_levels})
    return n_levels


def _ranks(tile: NDArray[np.uint32], known: NDArray[np.uint32]) -> NDArray[np.unsignedinteger]:
    """(n,) places of tiles in the list of all, from the part's first on; of 16 bits, which sort fast, if they fit."""
    if known.size and int(known[-1]) < 1 << 24:  # a table of all places is faster than a search
        table = np.zeros(int(known[-1]) + 1, np.uint32)
        table[known] = np.arange(known.size, dtype=np.uint32)
        rank = table[tile]
    else:
        rank = np.searchsorted(known, tile).astype(np.uint32)
    first, past = (int(rank.min()), int(rank.max()) + 1) if rank.size else (0, 0)
    return (rank - first).astype(np.uint16 if past - first <= 1 << 16 else np.uint32)


def _write_tiles(
    store: ZarrZip, level: int, tile: NDArray[np.uint32], rows: NDArray
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Write the tiles of sorted rows; their places and numbers of rows."""
    starts = np.flatnonzero(np.diff(tile, prepend=tile[:1] ^ np.uint32(1)))
    keys, counts = tile[starts], np.diff(np.append(starts, len(tile)))
    x, y = tile_place(keys)
    for i, j, start, n in zip(x.tolist(), y.tolist(), starts.tolist(), counts.tolist(), strict=True):
        here, base = rows[start : start + n], f"grids/{level}/{i},{j}"
        ones = np.ones((n, 1), np.uint8)
        number = np.full((n, 2), _NONE, np.uint32)
        number[:, 0] = here["id"]
        codeword = np.full((n, 2), _NONE, np.uint16)
        codeword[:, 0] = here["gene"]
        store.group(base)
        store.array(f"{base}/valid", here["valid"][:, None])
        store.array(f"{base}/status", ones)
        store.array(f"{base}/location", here["location"])
        store.array(f"{base}/gene_identity", codeword[:, :1])
        store.array(f"{base}/quality_score", here["qv"][:, None])
        store.array(f"{base}/codeword_identity", codeword)
        store.array(f"{base}/uuid", number)
        store.array(f"{base}/id", number)
    return keys, counts


# --- densities


class _Density:
    """Transcripts by gene in squares of 10 µm, and of all kinds in squares of 20 µm."""

    def __init__(
        self, found: _Survey, by_gene: NDArray[np.int64], category: NDArray[np.bool_], path: Path, budget: int
    ) -> None:
        self.origin = np.floor(found.low / DENSITY_UM) * DENSITY_UM
        # Coordinates are single in the file: one more square than double precision needs.
        columns, rows = ((found.high - self.origin) // DENSITY_UM).astype(np.int64) + 2
        self.columns, self.rows, self.n_genes = int(columns), int(rows), len(by_gene)
        columns, rows = ((found.high - self.origin) // METRICS_UM).astype(np.int64) + 2
        self.metrics = np.zeros((int(rows), int(columns), 4), np.float32)
        # Channels of the metrics: all, decoded (again all), and two kinds of controls.
        self._kind = np.where(category[:, 1], 2, np.where(category[:, 2], 3, 0))
        bounds = bounds_of(np.arange(len(by_gene)), by_gene, budget // (_COPIES * 8))
        self._keys = Buckets(path.parent, f"{path.name}.density", bounds * self.rows * self.columns, np.dtype("<i8"))

    def add(self, rows: NDArray) -> None:
        """Count a batch."""
        keys = np.empty(len(rows), np.int64)
        _count(rows["gene"], rows["location"], self.origin, self.rows, self.columns, self._kind, keys, self.metrics)
        self._keys.add(keys, keys)

    def write(self, store: ZarrZip, genes: list[str]) -> None:
        """Write both, gene by gene."""
        attributes = {
            "grid_size": [DENSITY_UM, DENSITY_UM],
            "rows": self.rows,
            "cols": self.columns,
            "origin": {"x": float(self.origin[0]), "y": float(self.origin[1])},
            "gene_names": genes,
        }
        store.group("density")
        store.group("density/gene", attributes)
        columns = {
            name: Column(store, f"density/gene/{name}", kind)
            for name, kind in (("data", "<u2"), ("indices", "<u2"), ("indptr", "<u4"))
        }
        columns["indptr"].write(np.zeros(1))
        last, n = 0, 0
        for part in range(len(self._keys)):
            following = int(self._keys.bounds[part + 1]) if part + 1 < len(self._keys) else None
            keys = np.sort(self._keys.take(part))
            starts = np.flatnonzero(np.diff(keys, prepend=-1))
            squares, counts = keys[starts], np.diff(np.append(starts, len(keys)))
            columns["data"].write(np.minimum(counts, _NONE))
            columns["indices"].write(squares % self.columns)
            row = squares // self.columns
            past = self.n_genes * self.rows if following is None else following // self.columns
            columns["indptr"].write(n + np.searchsorted(row, np.arange(last, past), side="right"))
            last, n = past, n + len(squares)
        for column in columns.values():
            column.close()
        store.array("metrics_density", self.metrics)

    def close(self) -> None:
        """Remove what lies on disk."""
        self._keys.close()


@numba.njit(cache=True, nogil=True)
def _count(gene, location, origin, rows, columns, kind, keys, metrics):
    """The square and gene of each transcript as one number, and its square's counts of the metrics."""
    for i in range(gene.size):
        x, y = location[i, 0] - origin[0], location[i, 1] - origin[1]
        keys[i] = (np.int64(gene[i]) * rows + np.int64(y / DENSITY_UM)) * columns + np.int64(x / DENSITY_UM)
        p, q = np.int64(y / METRICS_UM), np.int64(x / METRICS_UM)
        metrics[p, q, 0] += 1
        metrics[p, q, 1] += 1
        if kind[gene[i]]:
            metrics[p, q, kind[gene[i]]] += 1
