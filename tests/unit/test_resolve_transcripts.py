"""Transcript methods resolved: every transcript in one cell at most, the same whatever the order, and counted so."""

import shutil
import sys
import types
from pathlib import Path
from typing import Any

import cellquilt.resolve.transcripts as module
import cellquilt.segment.molecules as molecules
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from cellquilt.aggregation.stage import aggregate_slide
from cellquilt.cli import main
from cellquilt.core.assignment import Assignment, expected_counts
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import ImageWriter
from cellquilt.core.points import PointsWriter
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import read_shapes
from cellquilt.core.store import Store, assemble, new_store
from cellquilt.patches.priors import find_prior
from cellquilt.patches.transcripts import Cutting, TranscriptBundle, write_transcript_bundles
from cellquilt.resolve.stage import resolve_slide
from cellquilt.segment.molecules import MoleculeResult, read_results, write_result
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

TO_PX = np.array([[2.0, 0.0, 30.0], [0.0, 2.0, -10.0], [0.0, 0.0, 1.0]])
GENES = ["Actb", "NANOG", "NEGR1"]
N_CONTROL = 300
N_LOW = 200


def make_slide(folder: Path, *, n_cells: int = 150, per_cell: int = 40, width: float = 600.0, seed: int = 0) -> Path:
    """Round cells of about 8 µm radius with a prior for some of their transcripts, and controls and low quality."""
    rng = np.random.default_rng(seed)
    centres = np.empty((0, 2))
    while len(centres) < n_cells:
        point = rng.uniform(0, (width, width / 2), 2)
        if not len(centres) or np.hypot(*(centres - point).T).min() > 14:
            centres = np.vstack([centres, point])
    cell = np.repeat(np.arange(n_cells), per_cell)
    offset = rng.normal(0, 2.6, (cell.size, 2))
    xy = centres[cell] + offset
    stray = rng.uniform(0, (width, width / 2), (N_CONTROL + N_LOW, 2))
    prior = np.where(np.hypot(*offset.T) < 5, cell + 1, 0)
    order = rng.permutation(cell.size + len(stray))
    x, y = np.vstack([xy, stray])[order].T
    n = order.size
    gene = rng.choice(GENES, n)
    control = (np.arange(n) >= cell.size)[order] & (np.arange(n) < cell.size + N_CONTROL)[order]
    table = pa.table(
        {
            "x": x,
            "y": y,
            "gene": pa.array(np.where(control, "Blank-1", gene)).dictionary_encode(),
            "transcript_id": np.arange(n, dtype=np.uint64) * 3,
            "is_control": control,
            "passes_qv": (np.arange(n) < cell.size + N_CONTROL)[order],
            "vendor_cell_id": np.concatenate([prior, np.zeros(len(stray), int)])[order],
        }
    )
    path = folder / "s1.zarr"
    with new_store(path, sample="s1") as store:
        with PointsWriter(
            store.new_element("points", "transcripts"), {"global": TO_PX, "microns": np.eye(3)}
        ) as writer:
            for start in range(0, n, 1000):
                writer.write(table.slice(start, 1000))
        transforms = {"global": np.eye(3), "microns": np.linalg.inv(TO_PX)}
        shape = (1, int(width) + 40, 2 * int(width) + 80)
        with ImageWriter(store.new_element("images", "morphology"), shape, "uint8", ["DAPI"], transforms):
            pass
    return path


def cut(slide: Path, folder: Path, **cutting: Any) -> list[Path]:
    points = Store(slide).element("points", "transcripts")
    return write_transcript_bundles(
        points,
        folder,
        sample="s1",
        engine={"method": "toy"},
        prior=find_prior(Store(slide), points),
        cutting=Cutting(**cutting),
        pixel_size_um=0.5,
    ).bundles


def toy(bundle_path: Path, output: Path, *, fail: tuple[int, ...] = (), jitter: float = 0.0, **_: Any) -> None:
    """A segmenter whose result in the middle of a patch does not depend on the patch.

    Each transcript goes to the prior cell of the patch whose centroid is nearest, if within 9 µm; a cell's outline is
    the hull of its transcripts. `jitter` moves centroids by patch, so that patches disagree.
    """
    bundle = TranscriptBundle(bundle_path)
    parts: list[dict[str, Any]] = []
    tables, patches, expected = [], [], []
    for patch in bundle:
        record = {**patch.record, "seconds": 0.1, "error": None}
        patches.append(record)
        if patch.index in fail:
            record["error"] = {"code": "toy", "message": "failed on purpose", "hint": ""}
            continue
        xy = np.column_stack([patch.table["x_um"].to_numpy(), patch.table["y_um"].to_numpy()])
        prior = patch.table["prior_cell"].to_numpy()
        ids, index, counts = np.unique(prior, return_inverse=True, return_counts=True)
        centres = np.column_stack([np.bincount(index, column) / counts for column in xy.T])[ids > 0]
        label = np.zeros(len(xy), dtype=np.int32)
        if len(centres):
            centres = centres + np.random.default_rng(patch.index).normal(0, jitter + 1e-12, centres.shape)
            distance, nearest = cKDTree(centres).query(xy)
            label = np.where(distance < 9, nearest + 1, 0).astype(np.int32)
        few = np.bincount(label, minlength=len(centres) + 1) < 4
        label[few[label]] = 0
        labels = np.unique(label[label > 0])
        hulls = [shapely.convex_hull(shapely.multipoints(xy[label == k])).buffer(0.3, 2) for k in labels]
        values = np.bincount(label, minlength=len(centres) + 1)[labels]
        parts.append(
            {
                "geometry": np.array(hulls, dtype=object),
                "patch": np.full(len(labels), patch.index),
                "label": labels,
                "prior_cell": ids[ids > 0][labels - 1] if len(labels) else labels,
                "n_transcripts": values,
                "score": values / 2.0,
            }
        )
        columns = [patch.table["transcript_id"], pa.array(np.full(len(xy), patch.index, np.int32)), pa.array(label)]
        tables.append(pa.table(dict(zip(("transcript_id", "patch", "label"), columns, strict=True))))
        gene = patch.table["gene"].to_numpy()
        key, value = np.unique(np.column_stack([label, gene])[label > 0], axis=0, return_counts=True)
        name = pa.DictionaryArray.from_arrays(pa.array(key[:, 1].astype(np.int32)), pa.array(bundle.genes))
        number = pa.array(np.full(len(key), patch.index, np.int32))
        columns = [number, pa.array(key[:, 0].astype(np.int32)), name, pa.array(value.astype(np.float32) * 1.5)]
        expected.append(pa.table(dict(zip(("patch", "label", "gene", "value"), columns, strict=True))))
    names = ("geometry", "patch", "label", "prior_cell", "n_transcripts", "score")
    cells = {name: np.concatenate([np.zeros(0, int), *(part[name] for part in parts)]) for name in names}
    geometry = cells.pop("geometry").astype(object)
    counts = pa.concat_tables(expected) if expected else None
    write_result(output, MoleculeResult("toy", patches, geometry, cells, tables, counts, {"seconds": 1.0}))


def segment(bundles: list[Path], folder: Path, **how: Any) -> list[Path]:
    results = []
    for bundle in bundles:
        results.append(folder / f"{bundle.stem}.result")
        toy(bundle, results[-1], **how)
    return results


def resolve(slide: Path, results: list[Path], output: Path, **values: Any) -> Store:
    resolve_slide(slide, results, settings=Settings(**values), output=output)
    return Store(output)


def points_of(slide: Path) -> dict[str, np.ndarray]:
    table = pa.concat_tables(pq.read_table(part) for part in sorted(slide.glob("points/*/points.parquet/*.parquet")))
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def assigned(store: Store, ids: np.ndarray) -> np.ndarray:
    """Row of the cell of every transcript, in the order of the points."""
    return Assignment(store.element("shapes", "cell_boundaries")).next(ids)


def priors_of(store: Store, ids: np.ndarray) -> np.ndarray:
    """The prior cell that each transcript's cell was grown from: a name that does not depend on the run."""
    cells = read_shapes(store.element("shapes", "cell_boundaries"))
    return np.append(cells.columns["prior_cell"], [0, 0])[assigned(store, ids)]


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    return make_slide(tmp_path_factory.mktemp("slide"))


TILED = {"transcripts_per_patch": 1500, "overlap_um": 50.0}


@pytest.fixture(scope="module")
def tiled(slide, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tiled")
    return segment(cut(slide, folder / "b", **TILED, patches_per_task=2), folder)


@pytest.fixture(scope="module")
def disagreeing(slide, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("disagreeing")
    return segment(cut(slide, folder / "b", **TILED, patches_per_task=2), folder, jitter=2.5)


def test_tiled_is_what_the_whole_slide_gives(slide, tiled, tmp_path):
    whole = resolve(slide, segment(cut(slide, tmp_path / "b", width_um=0), tmp_path), tmp_path / "whole.zarr")
    parts = resolve(slide, tiled, tmp_path / "tiled.zarr")
    points = points_of(slide)
    a, b = (priors_of(store, points["transcript_id"]) for store in (whole, parts))
    records = read_results(tiled).patches
    assert len(records) >= 5
    distance = np.full(len(a), np.inf)
    for record in records:
        for axis, low, high in (("x", 0, 2), ("y", 1, 3)):
            for side in (record["core"][low], record["core"][high]):
                distance = np.minimum(distance, np.abs(points[axis] - side))
    near = distance < 25
    assert 0.1 < near.mean() < 0.9
    assert (a[~near] == b[~near]).all()
    assert (a[near] == b[near]).mean() >= 0.98
    assert 0.9 < (a > 0).sum() / 6000 < 1
    ids = [read_shapes(store.element("shapes", "cell_boundaries")).ids for store in (whole, parts)]
    assert ids[0].tolist() == ids[1].tolist() == [f"s1-{k + 1}" for k in range(len(ids[0]))]


def test_transcripts_are_in_one_cell_at_most_and_cells_in_raster_order(slide, disagreeing, tmp_path):
    store = resolve(slide, disagreeing, tmp_path / "cells.zarr")
    points = points_of(slide)
    cell = assigned(store, points["transcript_id"])
    counted = ~points["is_control"].astype(bool) & points["passes_qv"].astype(bool)
    assert (cell[~counted] == -2).all()
    assert (cell[counted] >= -1).all()
    shapes = read_shapes(store.element("shapes", "cell_boundaries"))
    np.testing.assert_array_equal(np.bincount(cell[cell >= 0], minlength=len(shapes)), shapes.columns["n_transcripts"])
    centre = shapely.get_coordinates(shapely.centroid(shapes.geometry))
    assert (np.diff(centre[:, 1]) >= 0).all()
    np.testing.assert_array_equal(shapes.transforms["microns"], np.linalg.inv(TO_PX))
    facts = store.records[-1]["facts"]
    assert facts["n_contested"] > 0
    assert facts["n_taken_over"] > 0
    assert facts["n_assigned_molecules"] == (cell >= 0).sum()
    # By brute force: what a cell has are its own transcripts, or those of copies that it won against.
    result = read_results(disagreeing)
    rows = pa.concat_tables(result.transcripts)
    claims: dict[int, set[tuple[int, int]]] = {}
    for key, patch, label in zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True):
        claims.setdefault(key, set()).add((patch, label))
    copies = {
        (int(p), int(k)): i for i, (p, k) in enumerate(zip(*map(result.cells.get, ("patch", "label")), strict=True))
    }
    xy = shapely.points(points["x"], points["y"])
    own = other = between = 0
    in_um = np.linalg.inv(TO_PX)
    outlines = shapely.transform(shapes.geometry, lambda v: v @ in_um[:2, :2].T + in_um[:2, 2])
    for i in np.flatnonzero(cell >= 0).tolist():
        names = claims[int(points["transcript_id"][i])]
        patch, prior = (shapes.columns[name][cell[i]] for name in ("patch", "prior_cell"))
        mine = [name for name in names if name in copies and name[0] == patch]
        if any(result.cells["prior_cell"][copies[name]] == prior for name in mine):
            own += 1
            continue
        other += 1
        away = shapely.distance(outlines[cell[i]], xy[i])
        assert away <= 5
        if away >= 0.6:
            between += 1
            assert not shapely.contains(shapely.buffer(outlines, -0.6), xy[i]).any()
    assert own > 20 * other > 0
    assert other > between > 0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=5, deadline=None)
def test_order_of_files_patches_and_rows_does_not_matter(slide, disagreeing, tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("order")
    rng = np.random.default_rng(seed)
    reference = resolve(slide, disagreeing, folder / "a.zarr")
    merged = read_results(disagreeing)
    number = rng.permutation(len(merged.patches))  # new numbers for the patches, and new labels for the cells
    shift = rng.integers(1, 1000)
    patches = [{**patch, "index": int(number[patch["index"]])} for patch in merged.patches]
    cells = {**merged.cells, "patch": number[merged.cells["patch"]], "label": merged.cells["label"] + shift}
    rows = pa.concat_tables(merged.transcripts)
    rows = rows.take(rng.permutation(rows.num_rows))
    label = rows["label"].to_numpy()
    label = np.where(label > 0, label + shift, 0).astype(np.int32)
    patch = number[rows["patch"].to_numpy()].astype(np.int32)
    expected = merged.expected.take(rng.permutation(merged.expected.num_rows))
    results = []
    for part in range(3):
        folders = folder / f"r{part}.result"
        here = [entry for entry in patches if entry["index"] % 3 == part]
        mine, told = cells["patch"] % 3 == part, patch % 3 == part
        by_patch = number[expected["patch"].to_numpy()].astype(np.int32)
        counts = expected.set_column(0, "patch", pa.array(by_patch)).set_column(
            1, "label", pa.array((expected["label"].to_numpy() + shift).astype(np.int32))
        )
        table = pa.table({"transcript_id": rows["transcript_id"], "patch": patch, "label": label}).filter(
            pa.array(told)
        )
        write_result(
            folders,
            MoleculeResult(
                "toy",
                here,
                merged.geometry[mine],
                {name: values[mine] for name, values in cells.items()},
                [table],
                counts.filter(pa.array(by_patch % 3 == part)),
            ),
        )
        results.append(folders)
    rng.shuffle(results)
    other = resolve(slide, results, folder / "b.zarr")
    ids = points_of(slide)["transcript_id"]
    np.testing.assert_array_equal(assigned(reference, ids), assigned(other, ids))
    left, right = (read_shapes(store.element("shapes", "cell_boundaries")) for store in (reference, other))
    assert shapely.to_wkb(left.geometry).tolist() == shapely.to_wkb(right.geometry).tolist()
    for name in ("cut", "merged", "prior_cell", "n_transcripts", "score"):
        assert left.columns[name].tolist() == right.columns[name].tolist()
    one, two = (
        expected_counts(store.element("shapes", "cell_boundaries"), GENES, len(left)) for store in (reference, other)
    )
    assert (one != two).nnz == 0


def test_short_memory_gives_the_same(slide, disagreeing, tmp_path, monkeypatch):
    ids = points_of(slide)["transcript_id"]
    reference = assigned(resolve(slide, disagreeing, tmp_path / "a.zarr"), ids)
    import cellquilt.core.points as points

    monkeypatch.setattr(module, "iter_points", lambda element, columns, _: points.iter_points(element, columns, 333))
    np.testing.assert_array_equal(assigned(resolve(slide, disagreeing, tmp_path / "b.zarr"), ids), reference)


# --- the rules, by hand: two patches side by side that overlap in x from 40 to 60


def small(folder: Path, xy: list[tuple[float, float]]) -> Path:
    path = folder / "small.zarr"
    n = len(xy)
    x, y = np.array(xy).T
    with (
        new_store(path, sample="s1") as store,
        PointsWriter(store.new_element("points", "transcripts"), {"global": np.eye(3), "microns": np.eye(3)}) as writer,
    ):
        writer.write(
            pa.table(
                {
                    "x": x,
                    "y": y,
                    "gene": pa.array(["Actb"] * n).dictionary_encode(),
                    "transcript_id": np.arange(n, dtype=np.uint64),
                    "is_control": np.zeros(n, bool),
                }
            )
        )
    return path


PATCHES = [
    {"index": 0, "x0": 0.0, "y0": 0.0, "x1": 60.0, "y1": 50.0, "core": [0.0, 0.0, 50.0, 50.0]},
    {"index": 1, "x0": 40.0, "y0": 0.0, "x1": 100.0, "y1": 50.0, "core": [50.0, 0.0, 100.0, 50.0]},
]


def by_hand(
    folder: Path,
    xy: list[tuple[float, float]],
    cells: list[tuple[int, int, tuple[float, float, float, float]]],
    claims: list[tuple[int, int, int]],
    expected: list[tuple[int, int, float]] | None = None,
) -> tuple[list[int], Store]:
    """Cells as (patch, label, box), claims as (transcript, patch, label); returns the cell of each transcript."""
    slide = small(folder, xy)
    labels = np.array([label for _, label, _ in cells])
    patch = np.array([number for number, _, _ in cells])
    n = [sum(claim[1:] == (p, k) for claim in claims) for p, k in zip(patch, labels, strict=True)]
    ids, where, label = (np.array(column) for column in zip(*claims, strict=True))
    rows = pa.table(
        {"transcript_id": ids.astype(np.uint64), "patch": where.astype(np.int32), "label": label.astype(np.int32)}
    )
    counts = None
    if expected:
        p, k, value = zip(*expected, strict=True)
        gene = pa.array(["Actb"] * len(p)).dictionary_encode()
        counts = pa.table(
            {"patch": pa.array(p, pa.int32()), "label": pa.array(k, pa.int32()), "gene": gene, "value": value}
        )
    columns = {"patch": patch, "label": labels, "prior_cell": np.zeros(len(cells)), "n_transcripts": np.array(n)}
    records = [{**record, "n_transcripts": 0, "seconds": 0.0, "error": None} for record in PATCHES]
    geometry = np.array([shapely.box(*box) for _, _, box in cells], dtype=object)
    write_result(folder / "r.result", MoleculeResult("toy", records, geometry, columns, [rows], counts))
    store = resolve(slide, [folder / "r.result"], folder / "cells.zarr")
    return assigned(store, np.arange(len(xy), dtype=np.uint64)).tolist(), store


def test_of_two_kept_cells_the_one_whose_patch_sees_deeper_has_the_transcript(tmp_path):
    """Neighbours that overlap a little: at x = 48.5 patch 0 sees 11.5 µm deep, patch 1 8.5; at 52, 8 and 12."""
    cells = [(0, 1, (30.0, 10, 54, 20)), (1, 1, (47.0, 10, 75, 20))]
    claims = [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 1, 0), (3, 1, 1), (4, 0, 0)]
    found, store = by_hand(tmp_path, [(48.5, 15), (52, 15), (45, 15), (70, 15), (5, 5), (9, 9)], cells, claims)
    assert found == [0, 1, 0, 1, -1, -1]
    facts = store.records[-1]["facts"]
    assert (facts["n_contested"], facts["n_not_segmented"], facts["n_taken_over"]) == (2, 1, 0)


def test_what_a_dropped_copy_had_goes_to_its_winner_inside_its_outline_only(tmp_path):
    """Patch 0 has the cell whole; patch 1 has it cut, with further transcripts, and a neighbour beside."""
    cells = [(0, 1, (36.0, 10, 48, 20)), (1, 7, (40.0, 10, 50, 22)), (1, 8, (50.0, 10, 58, 22))]
    claims = [(k, 1, 7) for k in range(4)] + [(0, 0, 1), (1, 0, 0), (2, 0, 0), (4, 1, 8), (5, 0, 1)]
    #      own of both, inside and free, outside, in the neighbour, the neighbour's own, own of the winner
    found, store = by_hand(tmp_path, [(42, 15), (44, 15), (44, 21), (53, 15), (54, 15), (38, 15)], cells, claims)
    assert found == [0, 0, -1, -1, 1, 0]
    assert store.records[-1]["facts"]["n_taken_over"] == 1


def test_between_two_cells_the_patch_that_sees_deepest_tells_whose_a_transcript_is(tmp_path):
    """Patch 0 keeps the left cell, patch 1 the right one; each has what lies between in the copy that is dropped."""
    cells = [
        (0, 1, (30.0, 10, 48, 20)),
        (0, 2, (49.0, 10, 59, 20)),
        (1, 1, (42.0, 10, 51, 20)),
        (1, 2, (52.0, 10, 70, 20)),
    ]
    xy = [(49.5, 15), (51.5, 15), (51.5, 28), (50.5, 15)]
    # In patch 0 all four are the right cell's. In patch 1 they are the left one's, but for the last, which is in none.
    claims = [(0, 0, 2), (1, 0, 2), (2, 0, 2), (3, 0, 2), (0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 0)]
    found, store = by_hand(tmp_path, xy, cells, claims)
    assert len(read_shapes(store.element("shapes", "cell_boundaries"))) == 2
    # Patch 0 sees the first deeper, patch 1 the others; the third is too far from any outline.
    assert found == [1, 0, -1, -1]
    assert store.records[-1]["facts"]["n_taken_over"] == 2


def test_a_cell_cut_in_every_copy_has_the_transcripts_of_all(tmp_path):
    """Its expected counts are scaled: the part that both saw counts once."""
    cells = [(0, 3, (25.0, 10, 60, 20)), (1, 4, (40.0, 10, 80, 20))]
    xy = [(30, 15), (35, 15), (45, 15), (55, 15), (70, 15)]
    claims = [(0, 0, 3), (1, 0, 3), (2, 0, 3), (3, 0, 3), (2, 1, 4), (3, 1, 4), (4, 1, 4)]
    found, store = by_hand(tmp_path, xy, cells, claims, [(0, 3, 4.5), (1, 4, 2.5)])
    assert found == [0] * 5
    shapes = read_shapes(store.element("shapes", "cell_boundaries"))
    assert shapes.columns["merged"].tolist() == [True]
    assert shapes.columns["n_transcripts"].tolist() == [5]
    assert shapely.bounds(shapes.geometry).tolist() == [[25, 10, 80, 20]]
    expected = expected_counts(store.element("shapes", "cell_boundaries"), ["Actb"], 1)
    assert expected.toarray() == pytest.approx(np.array([[7.0 * 5 / 7]]))


# --- the chain: resolve, aggregate, assemble


def published(slide: Path, parts: list[Path], folder: Path):
    import spatialdata

    assemble([slide, *parts], folder / "out.zarr", sample="s1", attributes={})
    return spatialdata.read_zarr(folder / "out.zarr")


@pytest.mark.parametrize("drop", [False, True])
def test_the_table_counts_what_the_method_assigned(slide, disagreeing, tmp_path, drop):
    cells = resolve(slide, disagreeing, tmp_path / "cells.zarr")
    chosen = Settings(min_transcripts=30, drop_failed=drop)
    aggregate_slide(slide, settings=chosen, cells=cells.path, output=tmp_path / "table.zarr")
    sdata = published(slide, [cells.path, tmp_path / "table.zarr"], tmp_path)
    table, points = sdata["table"], sdata["transcripts"].compute()
    assert list(table.obs_names) == list(sdata["cell_boundaries"].index)
    counted = points[~points.is_control & points.passes_qv]
    sums = counted[counted.cell_id.notna()].groupby("cell_id", observed=True).size()
    np.testing.assert_array_equal(
        np.asarray(table.X.sum(axis=1)).ravel(), sums.reindex(table.obs_names, fill_value=0).to_numpy()
    )
    per_gene = counted.groupby("gene", observed=True).apply(lambda rows: rows.cell_id.notna().sum())
    np.testing.assert_array_equal(np.asarray(table.X.sum(axis=0)).ravel(), per_gene.reindex(table.var_names).to_numpy())
    # What the points say is what the method said, save for cells that were dropped.
    cell = assigned(cells, points.transcript_id.to_numpy())
    names = np.append(read_shapes(cells.element("shapes", "cell_boundaries")).ids.astype(object), [None, None])[cell]
    names = np.where(np.isin(names.astype(str), table.obs_names), names, None)
    given = cell >= -1
    assert points.cell_id[given].fillna("").tolist() == [name or "" for name in names[given]]
    # Controls were not segmented: outlines tell.
    outlines = np.asarray(sdata["cell_boundaries"].geometry)
    xy = points[["x", "y"]].to_numpy() @ TO_PX[:2, :2].T + TO_PX[:2, 2]
    inside = shapely.contains_xy(outlines[:, None], xy[None, ~given, 0], xy[None, ~given, 1]).any(axis=0)
    np.testing.assert_array_equal(points.cell_id[~given].notna(), inside)
    assert table.obs.n_control.sum() == (points.is_control & points.passes_qv & points.cell_id.notna()).sum() > 0
    # Expected counts: the toy's are one and a half times the copy's own.
    expected = table.layers["expected"]
    assert expected.dtype == np.float32
    assert expected.shape == table.shape
    shapes = sdata["cell_boundaries"]
    copy = shapes.loc[~shapes.merged, "score"] * 2
    sums = np.asarray(expected.sum(axis=1)).ravel()
    np.testing.assert_allclose(sums[~shapes.merged.to_numpy()], 1.5 * copy.to_numpy(), rtol=1e-6)
    n_failing = int((~table.obs.passes_qc).sum())
    assert (n_failing == 0) == drop
    assert not table.obs_names.duplicated().any()
    assert table.obsm["intensities"].shape == (table.n_obs, 1)
    if drop:
        # The cells that are left know their transcripts: counting again gives the same.
        aggregate_slide(slide, settings=Settings(), cells=tmp_path / "table.zarr", output=tmp_path / "again.zarr")
        import anndata

        again = anndata.read_zarr(tmp_path / "again.zarr" / "tables" / "table")
        assert (again.X != table.X).nnz == 0
        assert (again.layers["expected"] != expected).nnz == 0


def test_in_place_on_the_command_line(slide, tmp_path, capsys, monkeypatch):
    """`segment`, `resolve`, `aggregate` on one store; a second run needs --overwrite."""
    path = tmp_path / "s1.zarr"
    shutil.copytree(slide, path)
    engine = types.ModuleType("cellquilt.segment.proseg")
    engine.plan = lambda settings: {"method": "proseg"}  # type: ignore[attr-defined]
    engine.segment_bundle = toy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cellquilt.segment.proseg", engine)

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        errors = capsys.readouterr().err
        assert stop.value.code == 0, errors
        return errors

    run("segment", "proseg", path, "--transcripts-per-patch", 1500)
    run("resolve", "proseg", path)
    run("aggregate", path)
    store = Store(path)
    assert store.has("shapes", "transcripts_patches")
    assert "assignment.parquet" in [file.name for file in store.element("shapes", "cell_boundaries").iterdir()]
    import spatialdata

    sdata = spatialdata.read_zarr(path)
    points = sdata["transcripts"].compute()
    cell = assigned(store, points.transcript_id.to_numpy())
    assert points.cell_id.notna()[cell >= -1].sum() == (cell >= 0).sum() == sdata["table"].X.sum()
    run("resolve", "proseg", path, "--overwrite")
    run("aggregate", path, "--overwrite")
    assert "expected" in spatialdata.read_zarr(path)["table"].layers
    # What was made from these transcripts is no prior for them.
    assert find_prior(store, store.element("points", "transcripts")).kind == "column"


def test_a_patch_that_failed_is_said_so_and_its_transcripts_are_in_no_cell(slide, tmp_path):
    bundles = cut(slide, tmp_path / "b", **TILED)
    store = resolve(slide, segment(bundles, tmp_path, fail=(1,)), tmp_path / "cells.zarr")
    facts = store.records[-1]["facts"]
    assert [patch["index"] for patch in facts["patches"] if patch["error"]] == [1]
    points = points_of(slide)
    cell = assigned(store, points["transcript_id"])
    record = TranscriptBundle(bundles[1]).patches[0]
    lost = np.ones(len(cell), dtype=bool)
    for other in (TranscriptBundle(bundle).patches[0] for k, bundle in enumerate(bundles) if k != 1):
        x, y = points["x"], points["y"]
        lost &= ~((x >= other["x0"]) & (x < other["x1"]) & (y >= other["y0"]) & (y < other["y1"]))
    given = cell > -2
    assert facts["n_not_segmented"] == (lost & given).sum() > 0
    assert (cell[lost & given] == -1).all()
    failed = facts["patches"][1]
    assert failed["x0"] == record["x0"] * 2 + 30
    table = aggregate_slide(slide, settings=Settings(), cells=store.path, output=tmp_path / "table.zarr")
    assert Store(table).records[-1]["facts"]["n_counted"] == (cell >= 0).sum()


@pytest.mark.parametrize("what", ["no cells", "no patch"])
def test_a_slide_without_cells(slide, tmp_path, what):
    if what == "no cells":
        bundles = cut(slide, tmp_path / "b", **TILED)
        results = segment(bundles, tmp_path, fail=tuple(range(len(bundles))))
    else:
        write_result(tmp_path / "r.result", MoleculeResult("toy", [], np.zeros(0, object), dict(_no_cells()), []))
        results = [tmp_path / "r.result"]
    store = resolve(slide, results, tmp_path / "cells.zarr")
    aggregate_slide(slide, settings=Settings(), cells=store.path, output=tmp_path / "table.zarr")
    facts = Store(tmp_path / "table.zarr").records[-1]["facts"]
    assert (facts["n_cells"], facts["n_assigned"], facts["n_counted"]) == (0, 0, 0)
    assert published(slide, [store.path, tmp_path / "table.zarr"], tmp_path)["table"].shape[0] == 0


def _no_cells() -> list[tuple[str, np.ndarray]]:
    return [(name, np.zeros(0, np.int32)) for name in ("patch", "label", "prior_cell", "n_transcripts")]


# --- results that cannot be


def _rewrite(file: Path, change) -> None:
    table = pq.read_table(file)
    metadata = table.schema.metadata
    pq.write_table(change(table).replace_schema_metadata(metadata), file)


def _other_transcripts(table: pa.Table) -> pa.Table:
    return table.set_column(0, "transcript_id", pa.array(np.arange(table.num_rows, dtype=np.uint64) * 3 + 1))


BAD = {
    "not a result": (lambda r: (r[0] / "cells.parquet").unlink(), "is no result"),
    "damaged cells": (lambda r: (r[0] / "cells.parquet").write_bytes(b"PAR1no"), "cells.parquet"),
    "damaged transcripts": (lambda r: (r[0] / "transcripts.parquet").write_bytes(b"no"), "transcripts.parquet"),
    "damaged counts": (lambda r: (r[0] / "expected.parquet").write_bytes(b"no"), "expected.parquet"),
    "a column missing": (
        lambda r: _rewrite(r[0] / "cells.parquet", lambda t: t.drop_columns(["label"])),
        "cells.parquet lacks label",
    ),
    "a transcript column missing": (
        lambda r: _rewrite(r[0] / "transcripts.parquet", lambda t: t.drop_columns(["label"])),
        "transcripts.parquet cannot be read",
    ),
    "a patch twice": (lambda r: r.append(shutil.copytree(r[0], r[0].with_name("copy.result"))), "patch 0 is in more"),
    "of another slide": (
        lambda r: _rewrite(r[0] / "transcripts.parquet", _other_transcripts),
        "the results are about transcripts that",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_result_is_named_and_leaves_nothing(slide, tiled, tmp_path, case):
    spoil, says = BAD[case]
    results = [Path(shutil.copytree(result, tmp_path / result.name)) for result in tiled]
    spoil(results)
    with pytest.raises(CellquiltError) as caught:
        resolve(slide, results, tmp_path / "cells.zarr")
    assert says in str(caught.value)
    assert caught.value.code in ("molecule-result-invalid", "geoparquet-unreadable")
    assert not (tmp_path / "cells.zarr").exists()


def test_results_of_two_methods_are_refused(slide, tiled, tmp_path):
    other = MoleculeResult("baysor", [], np.zeros(0, object), dict(_no_cells()), [])
    write_result(tmp_path / "other.result", other)
    with pytest.raises(CellquiltError, match="results of baysor and toy in one slide"):
        resolve(slide, [*tiled, tmp_path / "other.result"], tmp_path / "cells.zarr")


def test_a_store_without_results_says_what_to_run(slide, tmp_path):
    with pytest.raises(CellquiltError, match="run `cellquilt segment baysor"):
        resolve_slide(slide, settings=Settings(), method="baysor", output=tmp_path / "x.zarr")


def test_cells_of_other_transcripts_are_refused(slide, tiled, tmp_path):
    cells = resolve(slide, tiled, tmp_path / "cells.zarr")
    other = make_slide(tmp_path / "other", n_cells=3)
    with pytest.raises(CellquiltError) as caught:
        aggregate_slide(other, settings=Settings(), cells=cells.path, output=tmp_path / "table.zarr")
    assert caught.value.code == "assignment-mismatch"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": np.array([0])}, "labels of cells start at 1"),
        ({"label": None}, "lack the columns label"),
        ({"label": np.array([1, 2])}, "other lengths"),
        ({"patch": np.array([5])}, "no record"),
    ],
)
def test_methods_are_held_to_the_format(tmp_path, change, says):
    one = {"patch": np.array([0]), "label": np.array([1]), "prior_cell": np.array([0]), "n_transcripts": np.array([1])}
    columns = {name: values for name, values in {**one, **change}.items() if values is not None}
    result = MoleculeResult("toy", [{**PATCHES[0]}], np.array([shapely.box(0, 0, 1, 1)], dtype=object), columns, [])
    with pytest.raises(ValueError, match=says):
        write_result(tmp_path / "r.result", result)
    assert not (tmp_path / "r.result").exists()


@pytest.mark.parametrize("keep_bytes", [0, 2000, 10**9])
@pytest.mark.parametrize("in_order", [True, False])
def test_rows_come_in_step_with_the_transcripts_each_group_once_if_there_is_room(
    tmp_path, monkeypatch, keep_bytes, in_order
):
    monkeypatch.setattr(molecules, "_ROWS_PER_GROUP", 100)
    rng = np.random.default_rng(0)
    files, rows = [], []
    for patch in range(3):
        ids = np.sort(rng.choice(3000, 1200, replace=False)).astype(np.uint64)
        ids = ids if in_order else rng.permutation(ids)
        table = {"transcript_id": ids, "patch": np.full(1200, patch, np.int32), "label": rng.integers(0, 9, 1200)}
        molecules._write_transcripts(tmp_path / f"{patch}.parquet", pa.table(table))
        files.append(tmp_path / f"{patch}.parquet")
        rows += zip(*(values.tolist() for values in table.values()), strict=True)
    read: list[int] = []
    inner = molecules._read_groups

    def counting(path, groups):
        read.extend(groups)
        return inner(path, groups)

    monkeypatch.setattr(molecules, "_read_groups", counting)
    reader = molecules.TranscriptFiles(tuple(files)).in_step(keep_bytes)
    for low in range(0, 3000, 130):
        high = min(low + 129, 2999)
        parts = reader.between(low, high)
        found = [row for part in parts for row in zip(*(column.tolist() for column in part), strict=True)]
        asked_for = sorted(row for row in found if low <= row[0] <= high)
        assert asked_for == sorted(row for row in rows if low <= row[0] <= high)
        assert not in_order or all(low <= row[0] <= high for row in found)
        assert reader._kept_bytes == sum(group.n_bytes for group in reader._kept.values()) <= keep_bytes
    assert len(read) >= 36
    assert (len(read) == 36) == (keep_bytes == 10**9)
    assert not reader._kept


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("in_order", [True, False])
def test_claims_go_to_who_sees_a_transcript_deepest(step, in_order):
    rng = np.random.default_rng(step)
    n = 500
    ids = 7 + step * np.arange(n, dtype=np.uint64)
    order = np.empty(0, dtype=np.int64) if in_order else rng.permutation(n)
    place = rng.uniform(0, 100, (n, 2))
    patches = np.array([2, 5])
    windows = np.array([[-np.inf, -np.inf, 60, np.inf], [40, -np.inf, np.inf, np.inf]])
    labels = np.array([1, 2, 3, 1, 4, 9], dtype=np.int32)  # of patch 2, then of patch 5, with gaps
    cell_of_copy = np.array([0, 1, -1, 0, 2, -1])
    copies_of = (patches, windows, np.array([0, 3, 6]), labels, cell_of_copy, np.array([2, 0, 1]))
    cell, depth = np.full(n, -2), np.full((n, 2), -np.inf)
    contested = np.zeros(n, dtype=bool)
    expected, best, n_contested = np.full(n, -2), np.full(n, -np.inf), 0
    for patch, own in ((2, labels[:3]), (5, labels[3:])):
        row = np.flatnonzero(place[:, 0] < 60 if patch == 2 else place[:, 0] >= 40)
        label = rng.choice(np.append(own, 0), row.size)
        at = row if in_order else np.argsort(order)[row]
        given_ids = np.append(ids[at], np.array([3, 10**9], dtype=np.uint64))  # the last are of another batch
        of_patch, given_labels = np.full(row.size + 2, patch, np.int32), np.append(label, [1, 1]).astype(np.int32)
        found, rows, copies, depths = module._claim(
            given_ids, of_patch, given_labels, *copies_of, ids, order, *place.T, cell, depth, contested
        )
        deep = 60 - place[row, 0] if patch == 2 else place[row, 0] - 40
        copy = np.where(label > 0, 3 * (patch == 5) + np.searchsorted(own, label), -1)
        new = np.append(cell_of_copy, -1)[copy]
        dropped = (copy >= 0) & (new < 0)
        assert found == row.size
        assert (rows == row[dropped]).all()
        assert (copies == copy[dropped]).all()
        assert np.allclose(depths, deep[dropped])
        for i, owner, how in zip(row, new, deep, strict=True):
            n_contested += owner >= 0 and expected[i] >= 0 and expected[i] != owner
            if owner >= 0 and how > best[i]:
                expected[i], best[i] = owner, how
            expected[i] = max(expected[i], -1)
    assert (cell == expected).all()
    assert contested.sum() == n_contested > 0
    unknown = np.array([4], dtype=np.int32)
    answer = module._claim(ids[:1], unknown, unknown, *copies_of, ids, order, *place.T, cell, depth, contested)
    assert answer[0] == -1
