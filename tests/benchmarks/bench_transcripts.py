"""Transcript patches, prior cells, and results of a transcript method put together: ours and Sopa's on the same data.

A slide has near-circular cells of 12 µm pitch, 100 transcripts a cell, most of them in cells, in no order; 1 % are
controls and 2 % of low quality, which neither tool segments. Each tool reads it from a store that it wrote itself.

``patches-*``
    Overlapping patches for a transcript method, on disk: ours a Parquet file a patch (sorted by transcript), Sopa's
    `make_transcript_patches` a CSV file a patch. Patches of the same width and overlap and as many of them, but not the
    same windows: ours meet on lines of the grid that transcripts are counted on. So each tool's files are checked
    against its own windows, by number and sum of ids.
``prior-*``
    The same with a prior cell for every transcript, from 10k / 100k outlines. Both number cells by their rows, so every
    transcript's prior must be the same, those on an outline apart. ``-500mb`` and ``-2000mb`` are ours alone, to show
    that memory follows `memory_mb` and not the slide.
``molecules-*``
    From the results of a transcript method in overlapping patches to one set of cells and their counts. In each patch,
    cells are the true outlines, shifted and scaled a little, cut at the window, with the transcripts in them, 3 % of
    these left out. Both get the same windows, outlines and molecules: Sopa outlines as JSON and counts as H5AD, ours
    outlines and labels as Parquet. Sopa (`resolve` of its transcript methods) merges copies, counts the transcripts in
    merged outlines anew and keeps the counts of all others. Ours (`resolve_slide`, then counting) chooses one copy,
    gives every transcript one cell, writes both down, and counts all by that. So cells that one patch saw must be the
    same, with the same counts; in overlaps they differ by design.
``molecules-points-*``
    The same, and the store has the cells, the table and every transcript with its cell: ours `resolve_slide` and
    `aggregate_slide`, Sopa `resolve`, `assign_transcript_to_cell` and the points written.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from harness import OURS, PEER, Case, Comparison

N_GENES = 300
PITCH_UM = 12.0
OVERLAP_UM = 50.0
GENES = [f"gene{number:03d}" for number in range(N_GENES)]
CONTROLS = [f"NegControlProbe_{number:02d}" for number in range(10)]
ROWS = 1_000_000
#: What a process holds besides data: interpreter, libraries and compiled code.
BASE_MB = 350.0

_QUICK = {"cells": 2500, "width": 250.0}
#: So many that outlines overlap: what then is to be done is compiled, too.
_WARM = _QUICK
_SMALL = {"cells": 10_000, "width": 450.0}
_LARGE = {"cells": 100_000, "width": 1000.0}


def _case(name: str, kind: str, sizes: dict[str, Any], memory_mb: int = 1500, **more: Any) -> Case:
    sizes = {"kind": kind, "memory_mb": memory_mb, "points": False, **sizes}
    return Case(name, sizes, _QUICK, _WARM, max_peak_mb=memory_mb + BASE_MB, **more)


CASES = (
    _case("patches-1m", "patches", _SMALL, target=5.0),
    _case("patches-10m", "patches", _LARGE, target=5.0),
    _case("prior-1m", "prior", _SMALL, target=5.0),
    _case("prior-10m", "prior", _LARGE, target=5.0),
    _case("prior-10m-500mb", "prior", _LARGE, 500, peer=False),
    _case("prior-10m-2000mb", "prior", _LARGE, 2000, peer=False),
    _case("molecules-1m", "molecules", _SMALL, target=5.0),
    _case("molecules-10m", "molecules", _LARGE, target=5.0),
    _case("molecules-10m-300mb", "molecules", _LARGE, 300, peer=False),
    _case("molecules-10m-500mb", "molecules", _LARGE, 500, peer=False),
    _case("molecules-points-1m", "molecules", _SMALL | {"points": True}),
    _case("molecules-points-10m", "molecules", _LARGE | {"points": True}, target=5.0),
)


# --- input


def _side_um(n_cells: int) -> float:
    return int(np.ceil(np.sqrt(n_cells))) * PITCH_UM


def make_cells(n: int, seed: int = 0) -> np.ndarray:
    """(n, 25, 2) closed outlines in µm that do not overlap."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(n)))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 1, 2)[:n]
    angle = np.append(np.linspace(0, 2 * np.pi, 24, endpoint=False), 0.0)
    radius = PITCH_UM * rng.uniform(0.35, 0.44, (n, 1)) * (1 + 0.06 * np.sin(3 * angle + rng.uniform(0, 6, (n, 1))))
    centre = (grid + 0.5 + rng.uniform(-0.03, 0.03, (n, 1, 2))) * PITCH_UM
    return centre + radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def make_transcripts(path: Path, cells: np.ndarray, seed: int = 1) -> None:
    """Parquet with x, y, z, gene, transcript_id, is_control, passes_qv; 100 rows a cell, row groups of a million."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    centres, side, n = cells[:, :-1].mean(axis=1), _side_um(len(cells)), 100 * len(cells)
    names = pa.array(GENES + CONTROLS)
    writer: pq.ParquetWriter | None = None
    for start in range(0, n, ROWS):
        m = min(ROWS, n - start)
        xy = rng.uniform(0, side, (m, 2))
        inside = rng.random(m) < 0.7
        angle, radius = rng.uniform(0, 2 * np.pi, m), 0.42 * PITCH_UM * np.sqrt(rng.random(m))
        around = centres[rng.integers(0, len(cells), m)] + radius[:, None] * np.column_stack(
            [np.cos(angle), np.sin(angle)]
        )
        xy[inside] = around[inside]
        control = rng.random(m) < 0.01
        gene = (N_GENES * rng.random(m) ** 2).astype(np.int32)
        gene[control] = N_GENES + rng.integers(0, len(CONTROLS), int(control.sum()))
        table = pa.table(
            {
                "x": xy[:, 0],
                "y": xy[:, 1],
                "z": rng.uniform(0, 10, m),
                "gene": pa.DictionaryArray.from_arrays(gene, names),
                "transcript_id": np.arange(start, start + m, dtype=np.uint64),
                "is_control": control,
                "passes_qv": rng.random(m) >= 0.02,
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=ROWS)
    assert writer is not None
    writer.close()


def make_input(sizes: dict[str, Any], folder: Path) -> None:
    """Cells and transcripts; for ``molecules`` also each patch's results, in both tools' forms."""
    cells = make_cells(sizes["cells"])
    np.save(folder / "cells.npy", cells)
    make_transcripts(folder / "transcripts.parquet", cells)
    if sizes["kind"] == "molecules":
        _make_results(folder, cells, sizes["width"])


def _windows(side: float, width: float) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) cores that tile the slide and windows that reach beyond them on inner sides."""
    n = int(np.ceil(side / width))
    edges = np.linspace(0, side, n + 1)
    j, i = (index.ravel() for index in np.mgrid[:n, :n])
    cores = np.column_stack([edges[i], edges[j], edges[i + 1], edges[j + 1]])
    inner = np.column_stack([i > 0, j > 0, i < n - 1, j < n - 1])
    return cores, cores + np.where(inner, np.array([-1, -1, 1, 1]) * OVERLAP_UM / 2, 0.0)


def _read(folder: Path, *columns: str) -> list[np.ndarray]:
    """Columns of the transcripts that are to be segmented."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "transcripts.parquet", columns=[*columns, "is_control", "passes_qv"])
    keep = table["passes_qv"].to_numpy() & ~table["is_control"].to_numpy()
    parts = (table[name].combine_chunks() for name in columns)
    return [
        np.asarray(part.indices if name == "gene" else part)[keep] for name, part in zip(columns, parts, strict=True)
    ]


def _make_results(folder: Path, cells: np.ndarray, width: float) -> None:
    import pyarrow as pa
    from anndata import AnnData
    from cellquilt.geometry.locate import PolygonIndex
    from cellquilt.geometry.polygons import Rings
    from cellquilt.segment.molecules import MoleculeResult, write_result
    from scipy.sparse import coo_matrix

    rng = np.random.default_rng(2)
    x, y, gene, ids = _read(folder, "x", "y", "gene", "transcript_id")
    centres, side = cells[:, :-1].mean(axis=1), _side_um(len(cells))
    cores, windows = _windows(side, width)
    (folder / "windows.json").write_text(json.dumps(windows.tolist()))
    for index, (core, window) in enumerate(zip(cores.tolist(), windows.tolist(), strict=True)):
        inside = np.flatnonzero((x >= window[0]) & (x < window[2]) & (y >= window[1]) & (y < window[3]))
        near = ((centres > np.array(window[:2]) - PITCH_UM) & (centres < np.array(window[2:]) + PITCH_UM)).all(axis=1)
        centre = centres[near, None]
        moved = centre + (cells[near] - centre) * rng.uniform(0.95, 1.05, (near.sum(), 1, 1))
        seen = shapely.intersection(shapely.polygons(moved + rng.normal(0, 0.3, centre.shape)), shapely.box(*window))
        seen = seen[(shapely.get_type_id(seen) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(seen)]
        cell = PolygonIndex(Rings.from_shapely(seen)).locate(np.column_stack([x[inside], y[inside]]))
        cell[rng.random(cell.size) < 0.03] = -1
        enough = np.bincount(cell[cell >= 0], minlength=len(seen)) >= 5
        cell = np.where(enough, np.cumsum(enough), 0)[cell] * (cell >= 0)
        seen, n_in = seen[enough], np.bincount(cell, minlength=int(enough.sum()) + 1)[1:]
        label = np.arange(1, len(seen) + 1)
        record = {"index": index, "core": core, "n_transcripts": int(inside.size), "seconds": 1.0, "error": None}
        record |= dict(zip(("x0", "y0", "x1", "y1"), window, strict=True))
        columns = {"patch": np.full(len(seen), index), "label": label, "prior_cell": 0 * label, "n_transcripts": n_in}
        patch = np.full(inside.size, index, dtype=np.int32)
        molecules = pa.table({"transcript_id": ids[inside], "patch": patch, "label": cell.astype(np.int32)})
        result = MoleculeResult("baysor", [record], seen, columns, molecules)
        write_result(folder / f"bundle_{index:03d}.result", result)

        peer = folder / "peer" / str(index)
        peer.mkdir(parents=True)
        outlines = [
            {"type": "Polygon", "coordinates": [xy], "cell": number}
            for number, xy in zip(
                label.tolist(), (shapely.get_coordinates(shape).tolist() for shape in seen), strict=True
            )
        ]
        (peer / "segmentation_polygons.json").write_text(
            json.dumps({"type": "GeometryCollection", "geometries": outlines})
        )
        at = (cell[cell > 0] - 1, gene[inside][cell > 0])
        counts = coo_matrix((np.ones(at[0].size), at), shape=(len(seen), N_GENES)).tocsr()
        table = AnnData(counts)
        table.obs_names, table.var_names = [f"C{index}-{number}" for number in label.tolist()], GENES
        table.obs["CellID"], table.obs["area"] = label, shapely.area(seen)
        table.write_h5ad(peer / "segmentation_counts.h5ad")


def prepare(sizes: dict[str, Any], folder: Path, tool: str) -> None:
    """The slide as a store of the tool."""
    if tool == OURS:
        _prepare_ours(folder)
    else:
        _prepare_peer(sizes, folder)


def _prepare_ours(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from cellquilt.core.points import PointsWriter
    from cellquilt.core.shapes import ShapesTable, write_shapes
    from cellquilt.core.store import new_store

    transforms = {"global": np.eye(3), "microns": np.eye(3)}
    cells = shapely.polygons(np.load(folder / "cells.npy"))
    with new_store(folder / f"{OURS}.zarr", sample="slide") as store:
        with (
            PointsWriter(store.new_element("points", "transcripts"), transforms) as writer,
            pq.ParquetFile(folder / "transcripts.parquet", read_dictionary=["gene"]) as file,
        ):
            for batch in file.iter_batches(batch_size=ROWS):
                writer.write(pa.Table.from_batches([batch]))
        ids = np.arange(len(cells)).astype(str)
        write_shapes(store.new_element("shapes", "cells"), ShapesTable(ids, cells, {}, transforms))


def _prepare_peer(sizes: dict[str, Any], folder: Path) -> None:
    import dask.dataframe as dd
    import geopandas as gpd
    import spatialdata
    from spatialdata.models import PointsModel, ShapesModel

    frame = dd.read_parquet(folder / "transcripts.parquet", split_row_groups=True)
    # Pandas categories known in advance, as sopa's own readers have them; and its name for low quality.
    frame["gene"] = frame["gene"].astype("category").cat.set_categories(GENES + CONTROLS)
    frame["low_quality_transcript"] = ~frame["passes_qv"]
    frame = frame.drop(columns=["is_control", "passes_qv"])
    points = PointsModel.parse(frame, coordinates={"x": "x", "y": "y", "z": "z"}, feature_key="gene")
    outlines = gpd.GeoDataFrame(geometry=shapely.polygons(np.load(folder / "cells.npy")))
    shapes = {"cells": ShapesModel.parse(outlines)}
    if sizes["kind"] == "molecules":
        windows = np.array(json.loads((folder / "windows.json").read_text()))
        patches = gpd.GeoDataFrame({"points_key": "transcripts"}, range(len(windows)), geometry=shapely.box(*windows.T))
        shapes["transcripts_patches"] = ShapesModel.parse(patches)
    spatialdata.SpatialData(points={"transcripts": points}, shapes=shapes).write(folder / f"{PEER}.zarr")


# --- the steps


def load(sizes: dict[str, Any], folder: Path, tool: str) -> Callable[[], Any]:
    """The step, with all input on disk."""
    if sizes["kind"] == "molecules":
        return (_molecules_ours if tool == OURS else _molecules_peer)(sizes, folder)
    return (_patches_ours if tool == OURS else _patches_peer)(sizes, folder)


def _fresh(path: Path) -> Path:
    """A path without what an earlier run left there, so that no run spends time on removing it."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def _store_peer(folder: Path, *made: str) -> Any:
    """The peer's store without what an earlier run made."""
    import spatialdata

    sdata = spatialdata.read_zarr(folder / f"{PEER}.zarr")
    there = [name for name in made if name in sdata]
    for name in there:
        del sdata[name]
    sdata.delete_element_from_disk(there)
    return sdata


def _patches_ours(sizes: dict[str, Any], folder: Path) -> Callable[[], Any]:
    from cellquilt.core.settings import Settings
    from cellquilt.segment.stages import patchify_transcripts

    settings = Settings(
        prior="shapes:cells" if sizes["kind"] == "prior" else "none",
        transcripts_patch_width_um=sizes["width"],
        transcripts_patch_overlap_um=OVERLAP_UM,
        memory_mb=sizes["memory_mb"],
    )
    bundles, output = _fresh(folder / "bundles"), _fresh(folder / "patches.zarr")
    return lambda: patchify_transcripts(folder / f"{OURS}.zarr", settings=settings, bundles=bundles, output=output)


def _patches_peer(sizes: dict[str, Any], folder: Path) -> Callable[[], Any]:
    import sopa

    _fresh(folder / f"{PEER}.zarr" / ".sopa_cache")
    sdata = _store_peer(folder, "transcripts_patches")
    prior = {"prior_shapes_key": "cells"} if sizes["kind"] == "prior" else {}

    def cut() -> Any:
        sopa.make_transcript_patches(sdata, patch_width=sizes["width"], patch_overlap=OVERLAP_UM, **prior)
        return sdata

    return cut


def _molecules_ours(sizes: dict[str, Any], folder: Path) -> Callable[[], Any]:
    from cellquilt.aggregation.counts import TranscriptCounter, count_transcripts
    from cellquilt.aggregation.stage import aggregate_slide
    from cellquilt.core.assignment import Assignment
    from cellquilt.core.points import batch_rows, iter_points
    from cellquilt.core.settings import Settings
    from cellquilt.core.store import Store
    from cellquilt.geometry.locate import PolygonIndex
    from cellquilt.geometry.outlines import Outlines
    from cellquilt.resolve.stage import resolve_slide

    settings = Settings(segmentation="baysor", memory_mb=sizes["memory_mb"])
    raw = folder / f"{OURS}.zarr"
    resolved, output = _fresh(folder / "resolved.zarr"), _fresh(folder / "aggregated.zarr")
    results = sorted(folder.glob("*.result"))

    def put_together() -> Any:
        resolve_slide(raw, results, settings=settings, method="baysor", output=resolved)
        if sizes["points"]:
            aggregate_slide(raw, cells=resolved, settings=settings, output=output)
            return None
        element = Store(resolved).element("shapes", "cell_boundaries")
        index = PolygonIndex(Outlines(element).rings())
        counter = TranscriptCounter(index, np.eye(3), assignment=Assignment(element).next, memory_mb=sizes["memory_mb"])
        columns = ["x", "y", "gene", "transcript_id", "is_control", "passes_qv"]
        points = iter_points(raw / "points" / "transcripts", columns, batch_rows(sizes["memory_mb"]))
        return count_transcripts(points, counter)

    return put_together


def _molecules_peer(sizes: dict[str, Any], folder: Path) -> Callable[[], Any]:
    from sopa.segmentation.methods.utils import resolve
    from sopa.spatial import assign_transcript_to_cell
    from spatialdata import SpatialData

    stored = _store_peer(folder, "baysor_boundaries", "table", "assigned")
    folders = sorted((folder / "peer").iterdir(), key=lambda path: int(path.name))
    # Without a store it writes nothing.
    sdata = stored if sizes["points"] else SpatialData(points=dict(stored.points), shapes=dict(stored.shapes))

    def put_together() -> Any:
        resolve(sdata, folders, gene_column="gene")
        if sizes["points"]:
            assign_transcript_to_cell(sdata, "transcripts", "baysor_boundaries")
            sdata.points["assigned"] = sdata.points.pop("transcripts")
            sdata.write_element("assigned")
        return sdata

    return put_together


# --- the results


def finish(result: Any, sizes: dict[str, Any], folder: Path, tool: str) -> dict[str, Any]:
    """Keep what is compared."""
    if sizes["kind"] == "molecules":
        return (_finish_molecules_ours if tool == OURS else _finish_molecules_peer)(result, folder)
    files = _files_ours(folder) if tool == OURS else _files_peer(result)
    prior = np.full(100 * sizes["cells"], -1, dtype=np.int32)
    patches, n_bytes, damaged = [], 0, 0
    for path, window in files:
        ids, cell, wrong = _contents(path)
        prior[ids] = cell
        patches.append([*window, ids.size, ids.sum()])
        n_bytes, damaged = n_bytes + path.stat().st_size, damaged + wrong
    np.savez(folder / f"{tool}.npz", patches=np.array(patches), prior=prior)
    return {"patches": len(patches), "bytes": n_bytes, **({"damaged_rows": damaged} if damaged else {})}


def _files_ours(folder: Path) -> Iterator[tuple[Path, list[float]]]:
    from cellquilt.patches.transcripts import TranscriptBundle

    for path in sorted((folder / "bundles").iterdir()):
        bundle = TranscriptBundle(path)
        for record in bundle.patches:
            yield bundle.file(record), [record[side] for side in ("x0", "y0", "x1", "y1")]


def _files_peer(sdata: Any) -> Iterator[tuple[Path, list[float]]]:
    from sopa.utils import get_transcripts_patches_dirs

    windows = sdata["transcripts_patches"].geometry.bounds.to_numpy().tolist()
    for path, window in zip(get_transcripts_patches_dirs(sdata), windows, strict=True):
        yield path / "transcripts.csv", window


def _contents(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids and prior cells of a patch's transcripts, and rows that cannot be read."""
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    damaged = 0

    def skip(_: Any) -> str:
        nonlocal damaged
        damaged += 1
        return "skip"

    if path.suffix == ".parquet":
        table, name = pq.read_table(path, columns=["transcript_id", "prior_cell"]), "prior_cell"
    else:
        table, name = csv.read_csv(path, parse_options=csv.ParseOptions(invalid_row_handler=skip)), "sopa_prior"
    ids = table["transcript_id"].to_numpy().astype(np.int64)
    cell = table[name].to_numpy() if name in table.column_names else np.zeros(ids.size)
    return ids, cell.astype(np.int32), damaged


def _finish_molecules_ours(counts: Any, folder: Path) -> dict[str, Any]:
    import spatialdata
    from cellquilt.core.shapes import read_shapes
    from cellquilt.core.store import Store

    cells = read_shapes(Store(folder / "resolved.zarr").element("shapes", "cell_boundaries"))
    if counts is not None:
        matrix, genes = counts.matrix, counts.genes
    else:
        table = spatialdata.read_zarr(folder / "aggregated.zarr")["table"]
        assert (table.obs["cell_id"].to_numpy() == cells.ids).all()
        matrix, genes = table.X, table.var_names
    return _keep(folder, OURS, matrix, genes, cells.geometry, cells.columns["patch"])


def _finish_molecules_peer(sdata: Any, folder: Path) -> dict[str, Any]:
    cells, table = sdata["baysor_boundaries"], sdata["table"]
    merged = np.where(cells.index.str.startswith("merged"), -1, 0)
    return _keep(folder, PEER, table.X, table.var_names, np.asarray(cells.geometry), merged)


def _keep(folder: Path, tool: str, matrix: Any, genes: Any, shapes: np.ndarray, patch: np.ndarray) -> dict[str, Any]:
    import scipy.sparse

    column = {name: number for number, name in enumerate(genes)}
    matrix = scipy.sparse.csr_matrix(matrix)[:, [column[name] for name in GENES]]
    scipy.sparse.save_npz(folder / f"{tool}.counts.npz", matrix, compressed=False)
    np.savez(folder / f"{tool}.npz", centroids=shapely.get_coordinates(shapely.centroid(shapes)), patch=patch)
    return {"cells_out": matrix.shape[0], "counted": int(matrix.sum())}


# --- the comparison


def compare(sizes: dict[str, Any], folder: Path) -> Comparison:
    """Are the patches, the prior cells, the cells and their counts the same?"""
    return _compare_molecules(folder) if sizes["kind"] == "molecules" else _compare_patches(sizes, folder)


def check_patches(folder: Path, tool: str) -> tuple[np.ndarray, int, np.ndarray, int]:
    """A tool's patches against its own windows.

    Returns
    -------
    rows
        (n_patches,) rows of each patch.
    wrong
        Patches that do not hold just the transcripts of their window.
    prior
        (n,) prior cell of each transcript to be segmented.
    missing
        Transcripts that are in no patch.
    """
    x, y, ids = _read(folder, "x", "y", "transcript_id")
    ids = ids.astype(np.int64)
    with np.load(folder / f"{tool}.npz") as kept:
        patches, prior = kept["patches"], kept["prior"][ids]
    wrong = 0
    for x0, y0, x1, y1, n, total in patches:
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        wrong += (n, total) != (inside.sum(), ids[inside].sum())
    return patches[:, 4].astype(int), wrong, prior, int((prior < 0).sum())


def _compare_patches(sizes: dict[str, Any], folder: Path) -> Comparison:
    texts, priors, equal = [], [], True
    for tool in (OURS, PEER):
        rows, wrong, prior, missing = check_patches(folder, tool)
        texts.append(f"{tool} {rows.sum()} rows in {len(rows)} patches, {wrong} of them wrong")
        equal &= wrong == 0 and missing == 0
        priors.append(prior)
    if sizes["kind"] == "prior":
        different = int((priors[0] != priors[1]).sum())
        texts.append(f"{(priors[0] > 0).mean():.1%} in a prior cell, {different} differ")
        equal &= different <= 1e-6 * priors[0].size
    return Comparison(bool(equal), "; ".join(texts))


def _compare_molecules(folder: Path) -> Comparison:
    import scipy.sparse
    from scipy.spatial import cKDTree

    counts = [scipy.sparse.load_npz(folder / f"{tool}.counts.npz").astype(np.int64) for tool in (OURS, PEER)]
    with np.load(folder / f"{OURS}.npz") as ours, np.load(folder / f"{PEER}.npz") as peer:
        centroids, n_merged = (ours["centroids"], peer["centroids"]), int((peer["patch"] < 0).sum())
        single = peer["patch"] == 0
    windows = np.array(json.loads((folder / "windows.json").read_text()))
    n_seen = sum(((centroids[1] >= window[:2]) & (centroids[1] <= window[2:])).all(axis=1) for window in windows)
    # A cell next to an overlap may share transcripts with a copy in it: its neighbours can take some.
    reach = np.array([-1, -1, 1, 1]) * 2 * PITCH_UM
    n_near = sum(
        ((centroids[1] >= window[:2]) & (centroids[1] <= window[2:])).all(axis=1) for window in windows + reach
    )
    alone = single & (n_seen == 1) & (n_near == 1)
    distance, row = cKDTree(centroids[0]).query(centroids[1][alone])
    there = distance < 1.0
    trimmed = int((distance[there] > 1e-6).sum())
    differ = np.abs(counts[0][row[there]] - counts[1][np.flatnonzero(alone)[there]]).sum(axis=1) > 0
    text = f"{counts[0].shape[0]} cells against {counts[1].shape[0]}, {n_merged} of these merged; {alone.sum()} cells "
    text += f"that one patch saw: {int((~there).sum())} not in ours, {int(differ.sum())} with other counts, {trimmed} "
    text += f"trimmed where they overlapped; in all {counts[0].sum()} counts against {counts[1].sum()}"
    return Comparison(None if there.all() and not differ.any() else False, text)
