"""Bins to cells: the sums against brute force, each bin in one cell at most, nothing lost, whatever the grid's turn."""

import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import shapely
import spatialdata
from cellquilt.aggregation.bins import assign_grid, count_bins, grid_to_cells, sum_bins
from cellquilt.cli import main
from cellquilt.core.bins import BINS_CELLS, read_bins, write_bins
from cellquilt.core.errors import CellquiltError
from cellquilt.core.labels import Labels
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import ShapesTable, write_shapes
from cellquilt.core.store import Store, add_delta, assemble, consolidate, new_store
from cellquilt.core.transforms import apply
from cellquilt.geometry.coverage import covered_shares, largest_shares
from cellquilt.geometry.outlines import Outlines
from cellquilt.geometry.polygons import Rings
from hypothesis import given, settings
from hypothesis import strategies as st
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine as AffineMap

GENES = ["A", "B", "C", "D"]


def turned(angle_deg: float, width: float, shift: tuple[float, float]) -> np.ndarray:
    """A grid of bins of a width, turned and shifted."""
    c, s = width * np.cos(np.deg2rad(angle_deg)), width * np.sin(np.deg2rad(angle_deg))
    return np.array([[c, -s, shift[0]], [s, c, shift[1]], [0, 0, 1]])


def stars(rng: np.random.Generator, n: int, size: float, radius: float) -> np.ndarray:
    """(n,) star-shaped polygons that overlap here and there."""
    centres, corners = rng.uniform(0, size, (n, 2)), 9
    angle = np.sort(rng.uniform(0, 2 * np.pi, (n, corners)), axis=1)
    r = rng.uniform(0.4, 1, (n, corners)) * radius
    xy = centres[:, None] + np.stack([r * np.cos(angle), r * np.sin(angle)], axis=2)
    polygons = np.asarray(shapely.polygons(xy), dtype=object)
    return polygons[shapely.is_valid(polygons)]


def centre_owner(shape: tuple[int, int], to_cells: np.ndarray, polygons: np.ndarray) -> np.ndarray:
    """(rows, columns) number of the cell from 1 on, by shapely and one look at each pair."""
    row, column = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
    points = apply(to_cells, np.column_stack([column, row]) + 0.5)
    inside = shapely.contains_xy(polygons[:, None], points[None, :, 0], points[None, :, 1])
    centroids = shapely.get_coordinates(shapely.centroid(polygons))
    distance = np.where(inside, ((centroids[:, None] - points[None]) ** 2).sum(axis=2), np.inf)
    return np.where(inside.any(axis=0), distance.argmin(axis=0) + 1, 0).reshape(shape)


def a_slide(path: Path, polygons: np.ndarray, to_um: np.ndarray, shape: tuple[int, int], counts: sp.csr_matrix, place):
    """A store with cells (in pixels of 0.5 µm) and bins."""
    with new_store(path, sample="s1") as store:
        ids = np.array([f"s1-{k + 1}" for k in range(len(polygons))])
        transforms = {"global": np.eye(3), "microns": np.diag([0.5, 0.5, 1.0])}
        write_shapes(store.new_element("shapes", "cell_boundaries"), ShapesTable(ids, polygons, {}, transforms))
        row, column = np.divmod(place, shape[1])
        blocks = (counts[k : k + 100] for k in range(0, counts.shape[0], 100))
        bins = {"microns": to_um, "global": np.diag([2.0, 2.0, 1.0]) @ to_um}
        write_bins(store, row, column, GENES, blocks, bins, shape)
        consolidate(store.path)
    return Store(path)


@pytest.fixture
def slide(tmp_path):
    """A slide whose grid is turned by 17 degrees; a fifth of its bins is empty and not in the table."""
    rng = np.random.default_rng(3)
    shape, to_um = (40, 50), turned(17.0, 2.0, (25.0, -4.0))
    place = np.sort(rng.choice(shape[0] * shape[1], 1600, replace=False))
    counts = sp.csr_matrix(rng.poisson(0.7, (place.size, 4)).astype(np.int32))
    polygons = stars(rng, 60, 220.0, 18.0)
    store = a_slide(tmp_path / "slide.zarr", polygons, to_um, shape, counts, place)
    return store, polygons, to_um, shape, counts, place


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    angle=st.floats(-180, 180),
    mirrored=st.booleans(),
    rule=st.sampled_from(["centre", "overlap"]),
)
def test_cells_of_a_grid_equal_brute_force_and_do_not_depend_on_the_order_of_cells(seed, angle, mirrored, rule):
    rng = np.random.default_rng(seed)
    shape, matrix = (14, 17), turned(angle, 2.0, (20.0, 15.0)) @ np.diag([1.0, -1.0 if mirrored else 1.0, 1.0])
    polygons = stars(rng, 12, 45.0, 7.0)
    found = assign_grid(shape, Rings.from_shapely(polygons), matrix, rule=rule)
    if rule == "centre":
        assert np.array_equal(found, centre_owner(shape, matrix, polygons))
    else:
        in_grid = shapely.transform(polygons, lambda xy: apply(np.linalg.inv(matrix), xy))
        y, x = np.mgrid[: shape[0], : shape[1]]
        parts = shapely.area(shapely.intersection(in_grid[:, None, None], shapely.box(x, y, x + 1, y + 1)[None]))
        best = parts.max(axis=0)
        clear = (np.sort(parts, axis=0)[-2] < best - 1e-6) | (best == 0)  # not two that cover the same
        outside = np.maximum(1 - parts.sum(axis=0), 0)
        sure = np.abs(best - outside) > 1e-5
        expected = np.where((best > 1e-9) & (best >= outside), parts.argmax(axis=0) + 1, 0)
        assert np.array_equal(found[sure & clear], expected[sure & clear])
        assert (sure & clear).mean() > 0.5
    order = rng.permutation(len(polygons))
    other = assign_grid(shape, Rings.from_shapely(polygons[order]), matrix, rule=rule)
    assert np.array_equal(np.where(other > 0, order[other - 1] + 1, 0), found)


def test_a_polygon_covers_of_each_square_what_shapely_says():
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:15, :16]
    squares = shapely.box(x, y, x + 1, y + 1)
    for polygon in stars(rng, 40, 16.0, 7.0):
        shape = polygon.difference(polygon.representative_point().buffer(0.6)).union(shapely.box(1, 1, 3.5, 2.25))
        got = covered_shares(Rings.from_shapely([shape]), (15, 16))
        assert np.allclose(got, shapely.area(shapely.intersection(shape, squares)), atol=1e-9)


def test_bins_on_borders_belong_to_one_of_two_cells():
    """Two cells share the line through the centres of a column of bins; bins half covered by one cell only are its."""
    left, right = shapely.box(0, 0, 2.5, 4), shapely.box(2.5, 0, 5, 4)
    cells = Rings.from_shapely([left, right])
    by_centre = assign_grid((4, 5), cells, np.eye(3))
    assert by_centre.tolist() == [[1, 1, 2, 2, 2]] * 4 or by_centre.tolist() == [[1, 1, 1, 2, 2]] * 4
    by_share = largest_shares(cells, (4, 5))
    assert by_share[:, [0, 1]].tolist() == [[1, 1]] * 4
    assert by_share[:, [3, 4]].tolist() == [[2, 2]] * 4
    assert set(np.unique(by_share[:, 2])) <= {1, 2}
    assert largest_shares(Rings.from_shapely([shapely.box(0, 0, 1.5, 1)]), (1, 2)).tolist() == [[1, 1]]
    assert largest_shares(Rings.from_shapely([shapely.box(0, 0, 1.4, 1)]), (1, 2)).tolist() == [[1, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("entries", [1, 7, 500, 10**6])
def test_sums_equal_brute_force_for_any_blocks(slide, entries):
    store, polygons, to_um, shape, counts, place = slide
    bins, cells = read_bins(store), Outlines(store.element("shapes", "cell_boundaries"))
    owner = centre_owner(shape, np.diag([2.0, 2.0, 1.0]) @ to_um, polygons).ravel()[place]
    expected = np.zeros((len(polygons), 4), dtype=np.int64)
    np.add.at(expected, owner[owner > 0] - 1, counts.toarray()[owner > 0])
    got = sum_bins(bins.counts(entries), owner.astype(np.int64) - 1, len(polygons), 4)
    assert np.array_equal(got.toarray(), expected)
    assert got.has_sorted_indices
    assert got.dtype == np.int32
    result, owners = count_bins(bins, cells)
    assert np.array_equal(result.matrix.toarray(), expected)
    assert np.array_equal(owners.ravel()[place], owner)
    assert result.columns["n_bins"].tolist() == np.bincount(owner, minlength=len(polygons) + 1)[1:].tolist()
    assert np.allclose(result.columns["bins_area_um2"], 4.0 * result.columns["n_bins"])
    # Nothing is lost: what is in no cell, and in the cells, is all there is.
    outside = counts.toarray()[owner == 0].sum()
    assert expected.sum() + outside == result.qc["n_transcripts"] == counts.sum()
    assert result.qc["n_assigned"] == expected.sum()
    assert result.qc["bin_size_um"] == pytest.approx(2.0)


def test_growing_takes_bins_of_no_cell_only_and_the_nearest_cell_has_them(slide):
    store, *_ = slide
    bins, cells = read_bins(store), Outlines(store.element("shapes", "cell_boundaries"))
    _, before = count_bins(bins, cells)
    result, after = count_bins(bins, cells, expand_um=6.0)
    assert np.array_equal(after[before > 0], before[before > 0])
    grown = np.argwhere((before == 0) & (after > 0))
    seeds = np.argwhere(before > 0)
    distance = np.linalg.norm(seeds[None] - grown[:, None], axis=2)
    assert distance.min(axis=1).max() <= 3.0  # bins of 2 µm
    nearest = distance == distance.min(axis=1, keepdims=True)
    owners = before[before > 0]
    assert all(after[tuple(g)] in owners[near] for g, near in zip(grown, nearest, strict=True))
    left = np.argwhere(after == 0)
    assert np.linalg.norm(seeds[None] - left[:, None], axis=2).min() > 3.0
    assert result.qc["n_assigned"] <= result.qc["n_transcripts"]
    assert len(grown) > 100


def test_squares_and_circles_of_spatialdata_io_are_the_same_grid(slide, tmp_path):
    """A table that annotates shapes, in another order than the shapes, on a grid that only its columns tell."""
    store, _, to_um, shape, counts, place = slide
    row, column = np.divmod(place, shape[1])
    to_pixels = np.diag([2.0, 2.0, 1.0]) @ to_um
    corners = np.stack([column, row], axis=1)[:, None] + np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    squares = shapely.polygons(apply(to_pixels, corners.reshape(-1, 2)).reshape(-1, 4, 2))
    shuffled = np.random.default_rng(0).permutation(place.size)
    import geopandas

    names = np.array([f"s_002um_{r:05d}_{c:05d}-1" for r, c in zip(row, column, strict=True)])
    for number, geometry in enumerate((squares, shapely.centroid(squares))):
        frame = geopandas.GeoDataFrame(geometry=geometry[shuffled], index=names[shuffled])
        if number:
            frame["radius"] = 1.0
        obs = pd.DataFrame({"region": pd.Categorical(["squares"] * place.size), "name": names}, index=names)
        obs["array_row"], obs["array_col"] = row, column
        table = TableModel.parse(
            anndata.AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=GENES)),
            region="squares",
            region_key="region",
            instance_key="name",
        )
        sdata = spatialdata.SpatialData(shapes={"squares": ShapesModel.parse(frame)}, tables={"square_002um": table})
        path = tmp_path / f"io_{number}.zarr"
        sdata.write(path)
        shutil.copytree(store.element("shapes", "cell_boundaries"), path / "shapes" / "cell_boundaries")
        bins, cells = read_bins(Store(path), "square_002um"), Outlines(path / "shapes" / "cell_boundaries")
        assert np.allclose(bins.transforms["global"], to_pixels, atol=1e-6)
        ours, _ = count_bins(read_bins(store), cells)
        theirs, _ = count_bins(bins, cells)
        assert np.array_equal(ours.matrix.toarray(), theirs.matrix.toarray())
        assert theirs.genes == GENES


@pytest.mark.slow
def test_the_three_doors_count_a_simulated_slide_as_its_transcripts_do(tmp_path):
    """True cells, bins of 0.5 µm from the true transcripts: nearly what the transcripts themselves give."""
    import cellquilt as cq
    from cellquilt.simulate.bins import bin_transcripts

    cq.simulate(tmp_path / "sim", width_px=500, seed=2)
    folder = tmp_path / "sim" / "slide_0"
    truth = pq.read_table(folder / "truth" / "transcripts_truth.parquet").to_pandas()
    cells = pq.read_table(folder / "truth" / "cells.parquet").to_pandas()
    genes = truth[~truth["gene"].str.startswith("Blank")]
    sdata = cq.io.ome_tif(folder / "image.ome.tif", output=tmp_path / "s.zarr")
    ids = np.array([f"slide_0-{n}" for n in range(1, len(cells) + 1)])
    outlines = np.asarray(shapely.from_wkb(cells["geometry"]), dtype=object)
    transforms = {"global": np.eye(3), "microns": np.diag([0.2125, 0.2125, 1.0])}
    with new_store(tmp_path / "cells.zarr", sample="slide_0") as delta:
        write_shapes(delta.new_element("shapes", "cell_boundaries"), ShapesTable(ids, outlines, {}, transforms))
    add_delta(tmp_path / "s.zarr", tmp_path / "cells.zarr")
    bin_transcripts(folder, tmp_path / "bins.zarr", bin_um=0.5, angle_deg=30)
    add_delta(tmp_path / "s.zarr", tmp_path / "bins.zarr")

    binned = read_bins(Store(tmp_path / "s.zarr"))
    assert sum(int(block.sum()) for _, block in binned.counts()) == len(genes)
    with pytest.raises(SystemExit) as stop:
        main(["aggregate", str(tmp_path / "s.zarr"), "-o", str(tmp_path / "cli.zarr"), "--no-average-intensities"])
    assert stop.value.code == 0
    sdata = spatialdata.read_zarr(tmp_path / "s.zarr")
    cq.aggregate(sdata, average_intensities=False, bins_key="bins")
    table = sdata.tables["table"]
    theirs = anndata.read_zarr(tmp_path / "cli.zarr" / "tables" / "table")
    assert np.array_equal(table.X.toarray(), theirs.X.toarray())
    assert table.obs["n_bins"].tolist() == theirs.obs["n_bins"].tolist()
    assert table.var_names.tolist() == binned.genes
    # A transcript lies in its bin's cell unless a border runs between: at 0.5 µm that is rare.
    known = genes.groupby("cell_id").size().reindex(cells["cell_id"], fill_value=0).to_numpy()
    counted = np.asarray(table.X.sum(axis=1)).ravel()
    assert np.corrcoef(known, counted)[0, 1] > 0.98
    # The labels say where each bin went, and lie on the image as the bins do.
    labels = np.asarray(sdata.labels[BINS_CELLS])
    at = labels[binned.row, binned.column]
    sums = sum_bins(binned.counts(), at.astype(np.int64) - 1, len(cells), len(binned.genes))
    assert np.array_equal(sums.toarray(), table.X.toarray())
    place = Labels(tmp_path / "s.zarr" / "labels" / BINS_CELLS).transforms["global"]
    assert np.array_equal(place, binned.transforms["global"])
    # Dropped cells' bins are free; the table, the labels and the shapes have the same cells.
    cq.aggregate(sdata, average_intensities=False, min_transcripts=int(np.median(counted)), drop_failed=True)
    kept = sdata.tables["table"]
    assert 0 < kept.n_obs < table.n_obs
    assert int(np.asarray(sdata.labels[BINS_CELLS]).max()) == kept.n_obs
    assert sdata.shapes["cell_boundaries"].index.tolist() == kept.obs_names.tolist()


@pytest.mark.slow
def test_a_store_with_bins_is_assembled_and_judged_whether_small_or_too_large_to_read(slide, tmp_path, monkeypatch):
    from cellquilt.aggregation.stage import aggregate_slide
    from cellquilt.core import store as stores
    from cellquilt.report.stage import assemble_slide, report_slide

    store, *_, counts, _ = slide
    aggregate_slide(store.path, settings=Settings(), output=tmp_path / "table.zarr")
    parts = [store.path, tmp_path / "table.zarr"]
    for limit in (1 << 40, 1):
        monkeypatch.setattr(stores, "_WHOLE_BYTES", limit)
        assemble_slide(parts, tmp_path / f"{limit}.zarr", settings=Settings(), qc=tmp_path / f"{limit}.json")
        read = spatialdata.read_zarr(tmp_path / f"{limit}.zarr")
        assert sorted(read.tables) == ["bins", "table"]
        assert sorted(read.labels) == ["bins_cells", "bins_grid"]
        assert np.array_equal(read.tables["bins"].X.toarray(), counts.toarray())
    import json

    numbers = json.loads((tmp_path / "1.json").read_text())
    assert numbers["n_transcripts"] == counts.sum()
    assert numbers["n_counts_differing"] == 0
    assert 0 < numbers["share_assigned"] < 1
    report_slide(tmp_path / "1.zarr", tmp_path / "r.html", settings=Settings(), qc=tmp_path / "1.json")
    assert f"{counts.sum():,}" in (tmp_path / "r.html").read_text().replace("\u2009", ",").replace("&thinsp;", ",")
    with pytest.raises(CellquiltError, match="annotates no labels"):
        read_bins(Store(tmp_path / "table.zarr"), "table")
    shutil.rmtree(store.path / "tables" / "bins" / "X" / "indptr")
    with pytest.raises(CellquiltError) as caught:
        assemble([store.path], tmp_path / "no.zarr", sample="s1", attributes={})
    assert caught.value.code in ("bins-unreadable", "assembly-invalid")


def test_mistakes_are_named(slide, tmp_path):
    import zarr

    store, _, to_um, shape, _, place = slide
    cells = Outlines(store.element("shapes", "cell_boundaries"))

    def code_of(action) -> str:
        with pytest.raises(CellquiltError) as caught:
            action()
        assert caught.value.hint
        return caught.value.code

    assert code_of(lambda: read_bins(store, "bns")) == "element-missing"
    assert code_of(lambda: grid_to_cells({"here": np.eye(3)}, cells.transforms)) == "bins-no-common-system"
    oblong = {"global": np.diag([2.0, 3.0, 1.0])}
    assert code_of(lambda: grid_to_cells(oblong, cells.transforms)) == "bins-not-squares"

    def changed(number: int, change) -> Store:
        path = tmp_path / f"changed_{number}.zarr"
        shutil.copytree(store.path, path)
        change(zarr.open_group(str(path / "tables" / "bins"), mode="a"), path)
        return Store(path)

    def float_counts(group, _):
        group["X/data"][3] = -1

    assert code_of(lambda: list(read_bins(changed(0, float_counts)).counts())) == "bins-not-counts"

    def other_labels(group, _):
        group["obs/bin_id"][0] = 99999

    assert code_of(lambda: read_bins(changed(1, other_labels))) == "bins-place"

    def by_genes(group, _):
        group["X"].attrs["encoding-type"] = "csc_matrix"

    assert code_of(lambda: read_bins(changed(2, by_genes))) == "bins-not-by-rows"

    def two_pixels(_, path):
        labels = zarr.open_array(str(path / "labels" / "bins_grid" / "s0"), mode="a")
        labels[0, :2] = 5

    assert code_of(lambda: read_bins(changed(3, two_pixels))) == "bins-place"

    def no_region(_, path):
        shutil.rmtree(path / "labels" / "bins_grid")

    assert code_of(lambda: read_bins(changed(4, no_region))) == "bins-no-grid"

    def as_shapes(path, columns: dict) -> Store:
        from cellquilt.core import zarr_json

        row, column = np.divmod(place, shape[1])
        x, y = apply(to_um, np.column_stack([column, row]) + 0.5).T
        ids = np.arange(1, place.size + 1).astype(str)
        outlines = np.asarray(shapely.box(x - 1, y - 1, x + 1, y + 1), dtype=object)
        shapes = ShapesTable(ids, outlines, {}, {"microns": np.eye(3)})
        write_shapes(path / "shapes" / "squares", shapes)
        zarr_json.update_attributes(path / "tables" / "bins", {"region": "squares"})
        group = zarr.open_group(str(path / "tables" / "bins"), mode="a")
        for name, values in columns.items():
            if values is None:
                del group[f"obs/{name}"]
            else:
                group[f"obs/{name}"][:] = values
        return Store(path)

    row, column = np.divmod(place, shape[1])
    for number, columns, code in (
        (5, {}, None),
        (6, {"array_row": None}, "bins-no-grid"),
        (7, {"array_row": row[::-1], "array_col": column[::-1]}, "bins-no-grid"),
        (8, {"array_row": np.where(row == row[5], row[5] - 1, row)}, "bins-place"),
        (9, {"array_row": row - 2}, "bins-place"),
    ):
        made = as_shapes(Path(shutil.copytree(store.path, tmp_path / f"shapes_{number}.zarr")), columns)
        if code is None:
            assert np.allclose(read_bins(made).transforms["microns"], to_um)
        else:
            assert code_of(lambda made=made: read_bins(made)) == code


def test_no_cells_and_no_bins(tmp_path):
    from cellquilt.aggregation.stage import aggregate_slide

    nothing = np.zeros(0, dtype=object)
    empty = a_slide(tmp_path / "a.zarr", nothing, np.eye(3), (3, 4), sp.csr_matrix(np.eye(4, dtype=int)), np.arange(4))
    counts, owners = count_bins(read_bins(empty), Outlines(empty.element("shapes", "cell_boundaries")))
    assert counts.matrix.shape == (0, 4)
    assert not owners.any()
    one = np.array([shapely.box(0, 0, 4, 4)], dtype=object)
    bare = a_slide(tmp_path / "b.zarr", one, np.eye(3), (3, 4), sp.csr_matrix((0, 4), dtype=int), np.zeros(0, int))
    aggregate_slide(bare.path, settings=Settings(), output=tmp_path / "t.zarr")
    table = anndata.read_zarr(tmp_path / "t.zarr" / "tables" / "table")
    assert table.shape == (1, 4)
    assert table.obs["n_bins"].tolist() == [0]


def test_labels_and_maps_agree_with_spatialdata(tmp_path):
    """A map that spatialdata writes with its axes in another order is read as it is meant."""
    matrix = turned(30, 0.7, (4.0, 9.0))
    image = Image2DModel.parse(
        np.zeros((1, 4, 5)),
        dims=("c", "y", "x"),
        transformations={"microns": AffineMap(matrix, input_axes=("x", "y"), output_axes=("x", "y"))},
    )
    labels = spatialdata.models.Labels2DModel.parse(
        np.arange(20).reshape(4, 5),
        dims=("y", "x"),
        transformations={"microns": AffineMap(matrix, input_axes=("x", "y"), output_axes=("x", "y"))},
    )
    spatialdata.SpatialData(images={"i": image}, labels={"l": labels}).write(tmp_path / "s.zarr")
    read = Labels(tmp_path / "s.zarr" / "labels" / "l")
    assert np.allclose(read.transforms["microns"], matrix)
    assert np.array_equal(read.read_all(), np.arange(20).reshape(4, 5))
    from cellquilt.core.images import open_image

    assert np.allclose(open_image(tmp_path / "s.zarr").transforms["microns"], matrix)
