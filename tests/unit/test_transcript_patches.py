"""Transcript patches: every transcript in its place, whatever the order; priors as brute force finds them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cellquilt.patches.transcripts as module
import numpy as np
import pyarrow as pa
import pytest
import shapely
from cellquilt.cli import main
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import ImageWriter
from cellquilt.core.points import PointsWriter
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import ShapesTable, read_shapes, write_shapes
from cellquilt.core.store import Store, new_store
from cellquilt.patches.balance import CountGrid, balanced, of_width
from cellquilt.patches.priors import ColumnPrior, PriorCentres, find_nucleus, find_prior
from cellquilt.patches.transcripts import (
    MIN_PRIOR_TRANSCRIPTS,
    SCHEMA,
    Cutting,
    TranscriptBundle,
    TranscriptPatches,
    inner_sides,
    write_transcript_bundles,
)
from cellquilt.segment.stages import patchify_transcripts
from hypothesis import given, settings
from hypothesis import strategies as st

TO_PX = np.array([[2.0, 0.0, 30.0], [0.0, 2.0, -10.0], [0.0, 0.0, 1.0]])
POINT_TRANSFORMS = {"global": TO_PX, "microns": np.eye(3)}
SHAPE_TRANSFORMS = {"global": np.eye(3), "microns": np.linalg.inv(TO_PX)}
GENES = ["Actb", "Blank-1", "NANOG", "NEGR1"]


def transcripts(n: int = 5000, size: float = 900.0, seed: int = 0, **columns: Any) -> pa.Table:
    """Clustered, with controls, low quality and rows without coordinates."""
    rng = np.random.default_rng(seed)
    dense = rng.random(n) < 0.5
    x = np.where(dense, rng.normal(size * 0.3, size * 0.06, n), rng.uniform(-50, size, n))
    gene = rng.choice(GENES, n)
    x[rng.random(n) < 0.01] = np.nan
    table = {
        "x": x,
        "y": np.where(dense, rng.normal(size * 0.6, size * 0.05, n), rng.uniform(-20, size * 0.7, n)),
        "z": rng.uniform(0, 10, n),
        "gene": pa.array(gene).dictionary_encode(),
        "transcript_id": np.arange(n, dtype=np.uint64),
        "is_control": gene == "Blank-1",
        "passes_qv": rng.random(n) < 0.9,
        **columns,
    }
    return pa.table({name: values for name, values in table.items() if values is not None})


def write_points(element: Path, table: pa.Table, rows: int = 10_000) -> Path:
    with PointsWriter(element, POINT_TRANSFORMS) as writer:
        for start in range(0, max(table.num_rows, 1), rows):
            writer.write(table.slice(start, rows))
    return element


def make_store(folder: Path, table: pa.Table | None, shapes: dict[str, ShapesTable] | None = None, **more: Any) -> Path:
    path = folder / "slide.zarr"
    with new_store(path, sample="slide") as store:
        if table is not None:
            write_points(store.new_element("points", "transcripts"), table, **more)
        for name, cells in (shapes or {}).items():
            write_shapes(store.new_element("shapes", name), cells)
    return path


def cut(folder: Path, table: pa.Table, rows: int = 10_000, **cutting: Any) -> TranscriptPatches:
    points = write_points(folder / "points", table, rows)
    return write_transcript_bundles(
        points, folder / "bundles", sample="slide", engine={"method": None}, cutting=Cutting(**cutting), memory_mb=200
    )


def patches_of(made: TranscriptPatches) -> dict[int, pa.Table]:
    return {patch.index: patch.table for path in made.bundles for patch in TranscriptBundle(path)}


def to_segment(table: pa.Table) -> dict[str, np.ndarray]:
    """Brute force: the transcripts that count."""
    columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in ("x", "y", "z", "transcript_id")}
    keep = np.isfinite(columns["x"]) & np.isfinite(columns["y"])
    keep &= ~table.column("is_control").to_numpy() & table.column("passes_qv").to_numpy()
    return {name: values[keep] for name, values in columns.items()} | {
        "gene": np.array(table.column("gene").to_pylist())[keep]
    }


def check(made: TranscriptPatches, table: pa.Table) -> None:
    """Every window holds what brute force finds in it, and every transcript is in one core."""
    want, found = to_segment(table), patches_of(made)
    x, y, ids = want["x"], want["y"], want["transcript_id"]
    cores = np.zeros(len(ids), dtype=int)
    assert sorted(found) == list(range(len(found))) == [record["index"] for record in made.records]
    genes = TranscriptBundle(made.bundles[0]).genes
    for record in made.records:
        x0, y0, x1, y1 = record["core"]
        cores += (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        inside = (x >= record["x0"]) & (x < record["x1"]) & (y >= record["y0"]) & (y < record["y1"])
        order = np.flatnonzero(inside)[np.argsort(ids[inside])]
        got = found[record["index"]]
        assert got.schema == SCHEMA
        assert record["n_transcripts"] == got.num_rows == len(order)
        np.testing.assert_array_equal(got["transcript_id"].to_numpy(), ids[order])
        for name in ("x", "y", "z"):
            np.testing.assert_array_equal(got[f"{name}_um"].to_numpy(), want[name][order])
        np.testing.assert_array_equal(np.array(genes, dtype=object)[got["gene"].to_numpy()], want["gene"][order])
    assert (cores == 1).all()
    assert made.facts["n_to_segment"] == len(ids)
    left_out = sum(made.facts[name] for name in ("n_control", "n_low_quality", "n_without_coordinates"))
    assert made.facts["n_transcripts"] == table.num_rows == len(ids) + left_out


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(
        [{"transcripts_per_patch": 400}, {"transcripts_per_patch": 60}, {"width_um": 130.0}, {"width_um": 0}]
    ),
    st.sampled_from([16.0, 50.0, 37.3]),
)
@settings(max_examples=8, deadline=None)
def test_windows_hold_what_brute_force_finds_and_cores_share_out_the_slide(tmp_path_factory, seed, how, overlap):
    table = transcripts(1500, seed=seed)
    check(cut(tmp_path_factory.mktemp("cut"), table, **how, overlap_um=overlap, min_transcripts=5), table)


def test_neighbours_share_the_overlap_and_only_the_slide_s_own_sides_have_none(tmp_path):
    made = cut(tmp_path, transcripts(), width_um=200, overlap_um=40, min_transcripts=0)
    extent = np.array([record["core"] for record in made.records])
    ends = (*extent[:, :2].min(axis=0), *extent[:, 2:].max(axis=0))
    for record in made.records:
        window = (record["x0"], record["y0"], record["x1"], record["y1"])
        want = tuple(core != end for core, end in zip(record["core"], ends, strict=True))
        assert inner_sides(record) == want
        grown = [side - core for side, core in zip(window, record["core"], strict=True)]
        assert grown == [sign * 20 * inner for sign, inner in zip((-1, -1, 1, 1), want, strict=True)]


def test_patches_hold_about_the_same_number_and_never_more_than_the_limit(tmp_path):
    table = transcripts(60_000, size=3000)
    made = cut(tmp_path, table, transcripts_per_patch=5000, overlap_um=30)
    held = [record["n_transcripts"] for record in made.records]
    assert max(held) <= 5000
    assert min(held) >= 0.7 * max(held)
    assert len(held) <= 1.6 * made.facts["n_to_segment"] / 5000
    assert made.facts["n_full_patches"] == 0
    check(made, table)


def test_a_hot_spot_is_cut_no_finer_than_the_overlap_and_named(tmp_path):
    rng = np.random.default_rng(1)
    grid = CountGrid()
    grid.add(rng.uniform(0, 50, 5000), rng.uniform(0, 50, 5000))
    grid.add(rng.uniform(0, 2000, 500), rng.uniform(0, 2000, 500))
    found = balanced(grid, 1000, 48.0)
    sizes = found.core_um[:, 2:] - found.core_um[:, :2]
    assert sizes.min() >= 48
    assert found.n_core.sum() == 5500
    assert found.n_core.max() > 1000
    made = cut(tmp_path, transcripts(3000, size=100), transcripts_per_patch=100, overlap_um=60)
    assert made.facts["n_full_patches"] == sum(record["n_transcripts"] > 100 for record in made.records) > 0
    assert made.facts["largest_patch"] == max(record["n_transcripts"] for record in made.records)


@given(st.lists(st.tuples(st.floats(-3000, 3000), st.floats(-3000, 3000)), min_size=1, max_size=60), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_count_grid_does_not_depend_on_the_order(points, random):
    """Also where squares get wider on the way: the limit on their number is set low."""
    import cellquilt.patches.balance as balance

    limit, balance._MAX_SQUARES = balance._MAX_SQUARES, 1000
    try:
        grids = []
        for _ in range(2):
            grid = CountGrid()
            for point in points:
                grid.add(*np.array(point).reshape(2, 1))
            grids.append(grid)
            random.shuffle(points)
        one, other = grids
        assert (one.step_um, one.first) == (other.step_um, other.first)
        np.testing.assert_array_equal(one.counts, other.counts)
        assert one.n == len(points)
        assert one.counts.size <= 1000
        column = np.floor(np.array(points)[:, 0] / one.step_um).astype(int) - one.first[0]
        np.testing.assert_array_equal(one.counts.sum(axis=0), np.bincount(column, minlength=one.counts.shape[1]))
    finally:
        balance._MAX_SQUARES = limit


@pytest.mark.parametrize(("files", "budget"), [(400, None), (3, 200)])
def test_row_groups_order_and_batches_of_the_input_do_not_matter(tmp_path, monkeypatch, files, budget):
    """Also where few files may be open, and where a patch is sorted piece by piece."""
    monkeypatch.setattr(module, "_FILES_AT_A_TIME", files)
    table = transcripts(3000)
    reference = cut(tmp_path / "a", table, transcripts_per_patch=500)
    shuffled = table.take(np.random.default_rng(3).permutation(table.num_rows))
    if budget:  # as if memory were short
        initial = module._PatchWriter.__init__
        monkeypatch.setattr(
            module._PatchWriter, "__init__", lambda self, path, *_: initial(self, path, 64, budget * 4 * 41)
        )
    for k, (rows, other) in enumerate([(777, table), (100_000, shuffled), (50, shuffled)]):
        made = cut(tmp_path / f"b{k}", other, rows, transcripts_per_patch=500)
        assert made.records == reference.records
        assert made.facts == reference.facts
        for index, got in patches_of(made).items():
            assert got.equals(patches_of(reference)[index])


def test_one_patch_is_the_whole_slide_and_two_runs_are_the_same_bytes(tmp_path):
    table = transcripts()
    one, again = (cut(tmp_path / name, table, width_um=0) for name in "ab")
    (patch,) = one.records
    assert patch["core"] == [patch[side] for side in ("x0", "y0", "x1", "y1")]
    assert inner_sides(patch) == (False,) * 4
    assert patch["n_transcripts"] == one.facts["n_to_segment"]
    files = [sorted(path for path in made.bundles[0].rglob("*") if path.is_file()) for made in (one, again)]
    for left, right in zip(*files, strict=True):
        assert left.read_bytes() == right.read_bytes()


def test_sparse_patches_are_joined_or_named_and_nothing_is_lost(tmp_path):
    """A dense block, a thin strip beside it, and a lonely few far away."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(0, 190, 3000), rng.uniform(200, 390, 20), rng.uniform(1210, 1390, 7)])
    n = len(x)
    table = transcripts(n, x=x, y=rng.uniform(1, 150, n), is_control=np.zeros(n, bool), passes_qv=np.ones(n, bool))
    made = cut(tmp_path, table, width_um=200, overlap_um=20, min_transcripts=100)
    assert [record["n_transcripts"] for record in made.records] == [3020, 7]
    assert [record["sparse"] for record in made.records] == [False, True]
    assert (made.facts["n_sparse_patches"], made.facts["n_transcripts_in_sparse_patches"]) == (1, 7)
    check(made, table)


def test_bundles_share_out_the_patches(tmp_path):
    made = cut(tmp_path, transcripts(), transcripts_per_patch=300, patches_per_task=4)
    bundles = [TranscriptBundle(path) for path in made.bundles]
    assert [bundle.attributes["bundle"] for bundle in bundles] == list(range(len(bundles)))
    assert [record for bundle in bundles for record in bundle.patches] == made.records
    assert max(len(bundle) for bundle in bundles) <= 4 < len(made.records)
    for bundle in bundles:
        assert bundle.attributes["n_bundles"] == len(bundles)
        assert bundle.attributes["n_patches"] == len(made.records)
        assert bundle.genes == ["Actb", "NANOG", "NEGR1"]
        np.testing.assert_array_equal(bundle.transforms["global"], TO_PX)


@pytest.mark.parametrize("table", [transcripts(0), transcripts(50, is_control=np.ones(50, bool))])
def test_a_slide_without_transcripts_to_segment_makes_one_bundle_of_no_patch(tmp_path, table):
    made = cut(tmp_path, table)
    (bundle,) = [TranscriptBundle(path) for path in made.bundles]
    assert len(bundle) == 0 == made.facts["n_to_segment"]
    assert made.facts["n_transcripts"] == table.num_rows


def test_a_slide_without_z_is_flat(tmp_path):
    made = cut(tmp_path, transcripts(500, z=None, passes_qv=None))
    assert made.facts["n_low_quality"] == 0
    assert set(patches_of(made)[0]["z_um"].to_pylist()) == {0.0}


# --- prior cells


def circles(n: int = 60, seed: int = 0, radius: float = 60.0) -> ShapesTable:
    """Overlapping circles in pixels."""
    rng = np.random.default_rng(seed)
    centres = np.column_stack([rng.uniform(0, 1800, n), rng.uniform(-50, 1250, n)])
    geometry = np.asarray(shapely.buffer(shapely.points(centres), radius * rng.uniform(0.4, 1, n)), dtype=object)
    return ShapesTable(np.array([f"c{k}" for k in range(n)]), geometry, {}, SHAPE_TRANSFORMS)


def prior_of(path: Path, name: str = "auto", **more: Any) -> tuple[dict[int, int], dict[str, Any], dict[int, bool]]:
    """Prior cell of every transcript, by id, from patches that must agree about it; and whether in a nucleus."""
    slide = Store(path)
    points = slide.element("points", "transcripts")
    prior = find_prior(slide, points, name=name, **more)
    made = write_transcript_bundles(
        points,
        path.parent / f"bundles-{len(list(path.parent.iterdir()))}",
        sample="slide",
        engine={"method": None},
        prior=prior,
        nucleus=find_nucleus(slide, points, prior),
        cutting=Cutting(transcripts_per_patch=500),
    )
    assert len(made.records) > 1
    cells: dict[int, int] = {}
    nuclei: dict[int, bool] = {}
    for table in patches_of(made).values():
        ids, found = table["transcript_id"].to_pylist(), table["prior_cell"].to_pylist()
        for key, cell in zip(ids, found, strict=True):
            assert cells.setdefault(key, cell) == cell
        nuclei |= dict(zip(ids, table["in_nucleus"].to_pylist(), strict=True))
    assert made.facts["n_with_prior"] == sum(cell > 0 for cell in cells.values())
    spacing = ("spacing_um", "min_transcripts")
    return cells, {name: value for name, value in made.facts["prior"].items() if name not in spacing}, nuclei


def test_prior_from_shapes_is_what_shapely_finds(tmp_path):
    table, shapes, nuclei = transcripts(2000), circles(), circles(30, seed=5, radius=30)
    path = make_store(tmp_path, table, {"cell_boundaries": shapes, "nucleus_boundaries": nuclei})
    cells, facts, in_nucleus = prior_of(path)
    assert facts == {
        "from": "shapes",
        "name": "cell_boundaries",
        "n_cells": 60,
        "in_nucleus_from": "nucleus_boundaries",
    }
    want = to_segment(table)
    xy = np.column_stack([want["x"], want["y"]]) @ TO_PX[:2, :2].T + TO_PX[:2, 2]
    inside = shapely.contains_xy(shapes.geometry[:, None], xy[None, :, 0], xy[None, :, 1])
    centre = shapely.get_coordinates(shapely.centroid(shapes.geometry))
    distance = np.where(inside, ((xy[None] - centre[:, None]) ** 2).sum(axis=-1), np.inf)
    best = np.where(inside.any(axis=0), distance.argmin(axis=0) + 1, 0)
    assert [cells[key] for key in want["transcript_id"].tolist()] == best.tolist()
    assert 0 < (best > 0).sum() < len(best)
    nucleus = shapely.contains_xy(nuclei.geometry[:, None], xy[None, :, 0], xy[None, :, 1]).any(axis=0)
    assert [in_nucleus[key] for key in want["transcript_id"].tolist()] == nucleus.tolist()


def test_outlines_of_one_cell_in_several_planes_are_one_prior_cell(tmp_path):
    n = 1500
    table = transcripts(n, z_plane=(np.arange(n) % 2).astype(np.int32))
    one = circles()
    both = ShapesTable(
        np.array([f"{name}-{z}" for z in (0, 1) for name in one.ids]),
        np.concatenate([one.geometry, shapely.buffer(one.geometry, -5)]),
        {"entity_id": np.tile(one.ids, 2), "z_plane": np.repeat([0, 1], len(one))},
        SHAPE_TRANSFORMS,
    )
    path = make_store(tmp_path, table, {"flat": one, "planes": both})
    flat, _, _ = prior_of(path, "flat")
    cells, facts, _ = prior_of(path, "shapes:planes")
    assert facts["n_cells"] == 60
    assert all(cells[key] == cell for key, cell in flat.items() if key % 2 == 0)
    assert any(cells[key] for key in flat if key % 2)


COLUMNS: dict[str, tuple[list[Any], Any, list[str] | None]] = {
    "text": (["b", "UNASSIGNED", "a", "", None, "c", "0", "-1"], pa.string(), None),
    "text, another word for none": (["b", "nobody", "a", "", None, "c", "nobody", "nobody"], pa.string(), ["nobody"]),
    "int": ([20, -1, 10, 0, None, 30, 0, -1], pa.int64(), None),
    "large": ([2**62 + 2, -1, 2**62 + 1, 0, None, 2**62 + 3, 0, 0], pa.int64(), None),
    "unsigned": ([20, 0, 10, 0, None, 30, 0, 0], pa.uint32(), None),
    "float": ([20.0, -1.0, 10.0, 0.0, float("nan"), 30.0, None, -1.0], pa.float64(), None),
    "int, 0 is a cell": ([1, -1, 0, -1, None, 2, -1, -1], pa.int32(), ["-1"]),
    "int, -7 is none": ([20, -7, 10, -7, None, 30, -7, -7], pa.int16(), ["-7"]),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_prior_from_a_column(tmp_path, case):
    values, kind, unassigned = COLUMNS[case]
    want = [2, 0, 1, 0, 0, 3, 0, 0]
    n = 1600
    column = pa.array(np.resize(np.array(values, dtype=object), n).tolist(), kind)
    if kind == pa.string():
        column = column.dictionary_encode()
    path = make_store(tmp_path, transcripts(n, seed=2, vendor_cell_id=column))
    for name in ("auto", "cell_id", "column:vendor_cell_id"):
        cells, facts, _ = prior_of(path, name, unassigned=unassigned)
        assert {key: cell for key, cell in cells.items() if cell != want[key % 8]} == {}
        assert facts == {"from": "column", "name": "vendor_cell_id", "n_cells": 3, "in_nucleus_from": ""}


def test_a_column_of_nothing_is_no_prior_cell(tmp_path):
    path = make_store(tmp_path, transcripts(1200, vendor_cell_id=pa.nulls(1200)))
    cells, facts, _ = prior_of(path)
    assert set(cells.values()) == {0}
    assert facts["n_cells"] == 0


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("overlaps_nucleus", pa.array(np.arange(1200) % 3 == 0).cast(pa.uint8())),
        ("vendor_in_nucleus", pa.array(np.arange(1200) % 3 == 0)),
        ("CellComp", pa.array(np.where(np.arange(1200) % 3 == 0, "Nuclear", "Membrane"))),
    ],
)
def test_in_nucleus_as_the_machine_says(tmp_path, name, column):
    path = make_store(tmp_path, transcripts(1200, **{name: column}))
    _, facts, nuclei = prior_of(path, "none")
    assert facts["in_nucleus_from"] == name
    assert all(inside == (key % 3 == 0) for key, inside in nuclei.items())


def labels(shape: tuple[int, int] = (1250, 1850)) -> np.ndarray:
    """Squares with large, uneven labels."""
    y, x = np.indices(shape)
    number = (y // 40) * 100 + x // 40
    return np.where((y % 40 < 25) & (x % 40 < 30), number * 7 + 3, 0).astype(np.uint32)


def add_image(path: Path, shape: tuple[int, int]) -> None:
    with ImageWriter(Store(path).new_element("images", "morphology"), (1, *shape), "uint8", ["DAPI"], SHAPE_TRANSFORMS):
        pass


@pytest.mark.parametrize(("kind", "tile"), [("tiff", 2048), ("tiff", 300), ("element", 300)])
def test_prior_from_a_label_image(tmp_path, monkeypatch, kind, tile):
    import cellquilt.patches.priors as priors

    monkeypatch.setattr(priors, "_TILE_PX", tile)
    table, image = transcripts(2000), labels()
    path = make_store(tmp_path, table)
    if kind == "tiff":
        import tifffile

        name = str(tmp_path / "labels.tif")
        tifffile.imwrite(name, image, tile=(256, 256), compression="zlib")
        add_image(path, image.shape)
    else:
        import spatialdata
        from spatialdata.models import Labels2DModel

        name = "masks"
        sdata = spatialdata.SpatialData(labels={"masks": Labels2DModel.parse(image, dims=("y", "x"))})
        sdata.write(tmp_path / "labels.zarr")
        (tmp_path / "labels.zarr" / "labels").rename(tmp_path / "slide.zarr" / "labels2")
        (tmp_path / "slide.zarr" / "labels").rename(tmp_path / "empty")
        (tmp_path / "slide.zarr" / "labels2").rename(tmp_path / "slide.zarr" / "labels")
    cells, facts, _ = prior_of(path, name, memory_mb=200)
    want = to_segment(table)
    xy = np.column_stack([want["x"], want["y"]]) @ TO_PX[:2, :2].T + TO_PX[:2, 2]
    column, row = np.floor(xy).astype(int).T
    inside = (column >= 0) & (row >= 0) & (column < image.shape[1]) & (row < image.shape[0])
    label = np.where(inside, image[np.clip(row, 0, image.shape[0] - 1), np.clip(column, 0, image.shape[1] - 1)], 0)
    ids = np.unique(image)[1:]
    number = np.where(label > 0, np.searchsorted(ids, label) + 1, 0)
    assert [cells[key] for key in want["transcript_id"].tolist()] == number.tolist()
    assert facts["n_cells"] == len(ids)
    assert facts["from"] == "labels"
    assert 0 < (number > 0).mean() < 1


def test_auto_takes_cells_then_nuclei_then_what_the_machine_says(tmp_path):
    column = pa.array(["a"] * 1200)
    names = ["cell_boundaries", "nucleus_boundaries", "prior_cells", "vendor_cells"]
    for k in range(5):
        folder = tmp_path / str(k)
        path = make_store(folder, transcripts(1200, vendor_cell_id=column), {name: circles() for name in names[k:]})
        slide = Store(path)
        prior = find_prior(slide, slide.element("points", "transcripts"))
        assert prior.name == [*names[:3], "vendor_cell_id", "vendor_cell_id"][k]
    path = make_store(tmp_path / "last", transcripts(1200), {"vendor_cells": circles()})
    assert find_prior(Store(path), Store(path).element("points", "transcripts")).name == "vendor_cells"
    path = make_store(tmp_path / "none", transcripts(1200))
    assert find_prior(Store(path), Store(path).element("points", "transcripts")).kind == "none"


def test_shapes_of_another_store_come_first(tmp_path):
    path = make_store(tmp_path, transcripts(1200), {"cell_boundaries": circles(10)})
    other = make_store(tmp_path / "other", None, {"cell_boundaries": circles(20)})
    points = Store(path).element("points", "transcripts")
    prior = find_prior(Store(path), points, name="cell_boundaries", cells=Store(other))
    assert prior.n_cells == 20


# --- the step


def test_the_step_writes_shapes_bundles_and_a_record(tmp_path):
    path = make_store(tmp_path, transcripts(), {"cell_boundaries": circles()})
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    chosen = Settings(transcripts_per_patch=1000, transcripts_patch_overlap_um=30)
    bundles = patchify_transcripts(path, settings=chosen, bundles=tmp_path / "b", output=tmp_path / "patches.zarr")
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    shapes = read_shapes(Store(tmp_path / "patches.zarr").element("shapes", "transcripts_patches"))
    records = [record for bundle in bundles for record in TranscriptBundle(bundle).patches]
    assert len(records) > 3
    windows = [[record[side] for side in ("x0", "y0", "x1", "y1")] for record in records]
    np.testing.assert_array_equal(shapely.bounds(shapes.geometry), windows)
    np.testing.assert_array_equal(shapes.transforms["global"], TO_PX)
    assert shapes.columns["n_transcripts"].tolist() == [record["n_transcripts"] for record in records]
    (record,) = Store(tmp_path / "patches.zarr").records
    assert record["facts"]["prior"]["name"] == "cell_boundaries"
    assert record["parameters"]["transcripts_per_patch"] == 1000
    assert TranscriptBundle(bundles[0]).attributes["engine"] == {"method": None}


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0), capsys.readouterr().err


def test_command_line_and_notebook_make_the_same_patches(tmp_path, capsys):
    """Sopa's names are understood."""
    import cellquilt as cq
    import spatialdata

    path = make_store(tmp_path, transcripts(), {"cell_boundaries": circles(), "mine": circles(7)})
    options = ("--patch-width-microns", 300, "--patch-overlap-microns", 24, "--min-points-per-patch", 10)
    code, errors = run(capsys, "patchify", "transcripts", path, *options, "--prior-shapes-key", "mine")
    assert code == 0, errors
    left = read_shapes(Store(path).element("shapes", "transcripts_patches"))
    sdata = spatialdata.read_zarr(make_store(tmp_path / "n", transcripts(), {"cell_boundaries": circles()}))
    sdata.shapes["mine"] = spatialdata.read_zarr(path).shapes["mine"]  # in the object, but in no store
    cq.make_transcript_patches(sdata, 300, 24, prior_shapes_key="mine", min_points_per_patch=10)
    right = sdata.shapes["transcripts_patches"]
    assert list(right.geometry) == list(left.geometry)
    assert right.n_transcripts.tolist() == left.columns["n_transcripts"].tolist()
    record = Store(sdata.path).records[-1]
    assert record["facts"]["prior"] == {
        "from": "shapes",
        "name": "mine",
        "n_cells": 7,
        "spacing_um": None,  # too few transcripts in them
        "min_transcripts": MIN_PRIOR_TRANSCRIPTS,
        "in_nucleus_from": "",
    }


def _spacing(table: pa.Table, at_least: int) -> float:
    """Brute force: the median distance from a prior cell's centre to the nearest other."""
    want = to_segment(table)
    own = np.isin(table.column("transcript_id").to_numpy(), want["transcript_id"])
    cell = table.column("mine").to_numpy()[own]
    numbers, sizes = np.unique(cell[cell > 0], return_counts=True)
    centres = np.array(
        [[want[axis][cell == number].mean() for axis in ("x", "y")] for number in numbers[sizes >= at_least]]
    )
    distances = np.hypot(*(centres[:, None] - centres).T)
    np.fill_diagonal(distances, np.inf)
    return float(np.median(distances.min(axis=0)))


def _prior_slide(n: int = 6000) -> pa.Table:
    rng = np.random.default_rng(3)
    cell = rng.integers(0, 300, n)
    centre = rng.uniform(0, 800, (300, 2))[cell] + rng.normal(0, 3, (n, 2))
    cell[rng.random(n) < 0.3] = 0
    return transcripts(n, x=centre[:, 0], y=centre[:, 1], mine=cell)


@pytest.mark.parametrize("at_least", [1, 10, 18])
def test_all_bundles_say_how_far_prior_cells_are_apart(tmp_path, at_least):
    table = _prior_slide()
    said = set()
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    for name, rows, slide, how in [
        ("one", 10_000, table, {"width_um": 0}),
        ("cut", 10_000, table, {"transcripts_per_patch": 700}),
        ("row groups", 101, table, {"transcripts_per_patch": 700, "patches_per_task": 2}),
        ("order", 1700, shuffled, {"width_um": 300}),
    ]:
        points = write_points(tmp_path / name / "points", slide, rows)
        made = write_transcript_bundles(
            points, tmp_path / name / "bundles", sample="slide", engine={"method": None}, prior=ColumnPrior("mine"),
            cutting=Cutting(**how), min_prior_transcripts=at_least, memory_mb=200,
        )  # fmt: skip
        priors = [TranscriptBundle(path).prior for path in made.bundles]
        assert len(priors) > 1 or name == "one"
        assert {prior["min_transcripts"] for prior in priors} == {at_least}
        said |= {prior["spacing_um"] for prior in priors}
    assert len(said) == 1
    assert said.pop() == pytest.approx(_spacing(table, at_least), abs=1e-3)


def test_prior_cells_that_tell_nothing_have_no_spacing(tmp_path):
    for name, prior in (("none", None), ("few", ColumnPrior("mine"))):
        table = transcripts(500, mine=np.arange(500) % 3)  # two cells
        points = write_points(tmp_path / name / "points", table)
        made = write_transcript_bundles(
            points, tmp_path / name / "bundles", sample="slide", engine={"method": None}, prior=prior, memory_mb=200
        )
        assert TranscriptBundle(made.bundles[0]).prior["spacing_um"] is None


def test_centres_of_prior_cells_take_memory_by_their_number_alone():
    import tracemalloc

    rng = np.random.default_rng(0)
    centres = PriorCentres(1000)
    centres.add(np.zeros(1, np.int32), np.zeros(1), np.zeros(1))  # compiled
    tracemalloc.start()
    for _ in range(20):
        batch = rng.integers(0, 1001, 50_000).astype(np.int32), *rng.uniform(0, 5e5, (2, 50_000))
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        centres.add(*batch)
        assert tracemalloc.get_traced_memory()[1] - before < 20_000
    tracemalloc.stop()
    assert centres.n_transcripts.sum() == pytest.approx(1_000_000, rel=0.01)


def _bad_labels(folder: Path, pixels: np.ndarray, image: tuple[int, int] | None = None) -> tuple[Path, str]:
    import tifffile

    path = make_store(folder, transcripts(300))
    tifffile.imwrite(folder / "labels.tif", pixels, photometric="minisblack")
    if image:
        add_image(path, image)
    return path, str(folder / "labels.tif")


BAD: dict[str, tuple[Any, str, str]] = {
    "no transcripts": (lambda f: (make_store(f, None), "auto"), "element-missing", "points"),
    "no such prior": (
        lambda f: (make_store(f, transcripts(50), {"cell_boundaries": circles(3)}), "cell_boundries"),
        "prior-unknown",
        'did you mean "cell_boundaries"',
    ),
    "no such shapes": (lambda f: (make_store(f, transcripts(50)), "shapes:gene"), "prior-unknown", "columns: x, y"),
    "no such column": (lambda f: (make_store(f, transcripts(50)), "column:cellid"), "prior-unknown", "transcript_id"),
    "no such image": (lambda f: (make_store(f, transcripts(50)), str(f / "l.tif")), "prior-image-missing", "l.tif"),
    "negative ids": (
        lambda f: (make_store(f, transcripts(50, cells=np.resize([3, -5, 0], 50))), "cells"),
        "prior-id-negative",
        "-5",
    ),
    "ids that are no ids": (
        lambda f: (make_store(f, transcripts(50, cells=np.resize([3.5, 1.0], 50))), "cells"),
        "prior-column-type",
        "cells",
    ),
    "ids of a type that cannot be": (
        lambda f: (make_store(f, transcripts(50, cells=np.resize([True, False], 50))), "cells"),
        "prior-column-type",
        "bool",
    ),
    "labels of another size": (
        lambda f: _bad_labels(f, labels((100, 200)), (120, 200)),
        "labels-size",
        "100 × 200",
    ),
    "labels that are none": (lambda f: _bad_labels(f, np.full((40, 50), 0.5, np.float32)), "labels-invalid", "whole"),
    "labels of several channels": (
        lambda f: _bad_labels(f, np.zeros((3, 40, 50), np.uint16)),
        "labels-invalid",
        "labels.tif",
    ),
    "labels that are no image": (
        lambda f: (make_store(f, transcripts(50)), str((f / "x.txt").write_text("no") and f / "x.txt")),
        "not-a-tiff",
        "x.txt",
    ),
    "wrong unit": (
        lambda f: (make_store(f, transcripts(50, x=np.linspace(0, 9e6, 50))), "none"),
        "transcripts-far-away",
        "9e+06",
    ),
    "no gene": (
        lambda f: (make_store(f, transcripts(50, gene=pa.nulls(50, pa.string()))), "none"),
        "gene-missing",
        "no gene",
    ),
    "no column is_control": (
        lambda f: (make_store(f, transcripts(50, is_control=None)), "none"),
        "points-column-missing",
        "is_control",
    ),
    "planes that the transcripts do not have": (
        lambda f: (
            make_store(
                f,
                transcripts(50),
                {"p": ShapesTable(np.array(["a"]), circles(1).geometry, {"z_plane": np.array([0])}, SHAPE_TRANSFORMS)},
            ),
            "p",
        ),
        "z-plane-missing",
        "z_plane",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_input_is_named_and_leaves_nothing(tmp_path, capsys, case):
    make, error, says = BAD[case]
    path, prior = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = (
        "patchify",
        "transcripts",
        path,
        "--prior",
        prior,
        "--bundles",
        tmp_path / "b",
        "-o",
        tmp_path / "o.zarr",
    )
    code, errors = run(capsys, *command)
    assert code == 1
    assert f"[{error}]" in errors
    assert says in errors
    assert "Traceback" not in errors
    assert sorted(tmp_path.rglob("*")) == before


def test_narrow_patches_are_refused(tmp_path):
    with pytest.raises(CellquiltError, match="patches of 40 µm overlap by 50 µm"):
        cut(tmp_path, transcripts(100), width_um=40)


@pytest.mark.parametrize("spoil", ["no folder", "image bundle", "damaged"])
def test_what_is_no_bundle_is_refused(tmp_path, spoil):
    path = tmp_path / "bundle_000.zarr"
    if spoil == "image bundle":
        path.mkdir()
        attributes = {"cellquilt": {"bundle": 0, "patches": []}}
        (path / "zarr.json").write_text(json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}))
    if spoil == "damaged":
        path = cut(tmp_path, transcripts(200)).bundles[0]
        file = next(path.rglob("*.parquet"))
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CellquiltError) as caught:
        list(TranscriptBundle(path))
    assert caught.value.code == "bundle-unreadable"


_MEASURE = """
import resource, sys
from pathlib import Path
from cellquilt.patches.transcripts import Cutting, write_transcript_bundles
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
folder, points = Path(sys.argv[1]), Path(sys.argv[2])
for kind in ({}, {"width_um": 0.0}, {"transcripts_per_patch": 20_000}):
    write_transcript_bundles(folder / "small", folder / f"s{len(str(kind))}", sample="s", engine={"method": None},
                             cutting=Cutting(**kind), memory_mb=200)
before = peak()
for kind in ({}, {"width_um": 0.0}, {"transcripts_per_patch": 20_000}):
    write_transcript_bundles(points, folder / f"b{len(str(kind))}", sample="s", engine={"method": None},
                             cutting=Cutting(**kind), memory_mb=200)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_setting(tmp_path):
    """3 million transcripts in any order, in 200 MB beside what a small slide takes."""
    table = transcripts(3_000_000, size=6000)
    table = table.take(np.random.default_rng(0).permutation(table.num_rows))
    write_points(tmp_path / "small", table.slice(0, 1000))
    points = write_points(tmp_path / "points", table, 1_000_000)
    command = [sys.executable, "-c", _MEASURE, tmp_path, points]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    assert grown < 200


def test_width_is_the_largest_width():
    grid = CountGrid()
    rng = np.random.default_rng(0)
    grid.add(rng.uniform(0, 1000, 4000), rng.uniform(0, 500, 4000))
    found = of_width(grid, 300, 20)
    sizes = found.core_um[:, 2:] - found.core_um[:, :2]
    assert sizes.max() <= 300
    assert sizes.min() >= 0.8 * sizes.max(axis=0).min()
    assert len(found) == 8
