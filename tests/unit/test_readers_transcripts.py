"""A table of transcripts without an image, and cells that a user brings along."""

import json

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import spatialdata
from cellquilt.aggregation.stage import aggregate_slide
from cellquilt.core.errors import CellquiltError
from cellquilt.core.points import points_transforms
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import ShapesTable, read_shapes, write_shapes
from cellquilt.core.store import Store, result_of
from cellquilt.patches.priors import find_prior
from cellquilt.readers import convert_slide
from cellquilt.readers.prior_cells import read_prior_cells
from cellquilt.report.stage import assemble_slide, report_slide
from cellquilt.resolve.stage import resolve_slide
from cellquilt.segment.stages import patchify_transcripts

N = 600


@pytest.fixture
def table(tmp_path):
    """Six squares of 10 µm in a row, 100 transcripts in each, of which the last square has no cell."""
    rng = np.random.default_rng(0)
    square = np.arange(N) // 100
    xy = rng.uniform(0.5, 9.5, (N, 2)) + np.column_stack([20 * square, np.zeros(N)])
    path = tmp_path / "t.parquet"
    genes = rng.choice(["Actb", "Gapdh", "NANOG"], N)
    pq.write_table(pa.table({"x": xy[:, 0], "y": xy[:, 1], "gene": genes}), path)
    return path


def squares(n=5):
    return np.asarray(shapely.box(20.0 * np.arange(n), 0, 20.0 * np.arange(n) + 10, 10), dtype=object)


def convert(tmp_path, table=None, name="s1", path=None, **given) -> Store:
    prior = given.pop("prior_cells", None)
    return Store(
        convert_slide(
            path, technology="transcripts", transcripts=table, prior_cells=prior, output=tmp_path / f"{name}.zarr",
            settings=Settings(**given),
        )
    )  # fmt: skip


def test_a_table_alone_is_a_slide(tmp_path, table):
    store = convert(tmp_path, table)
    assert store.names("images") == []
    np.testing.assert_array_equal(points_transforms(store.element("points", "transcripts"))["global"], np.eye(3))
    sdata = spatialdata.read_zarr(store.path)
    want = pq.read_table(table)
    points = sdata.points["transcripts"].compute()
    assert points["x"].tolist() == want["x"].to_pylist()
    assert points["gene"].astype(str).tolist() == want["gene"].to_pylist()
    assert [entry["name"] for entry in store.attributes["inputs"]] == ["t.parquet"]


def test_the_table_may_be_the_path(tmp_path, table):
    a, b = convert(tmp_path, table, "a"), convert(tmp_path, None, "b", path=table)
    names = ["x", "y", "gene", "transcript_id"]
    left, right = (spatialdata.read_zarr(store.path).points["transcripts"].compute()[names] for store in (a, b))
    assert left.equals(right)


def test_pixels_become_microns(tmp_path, table):
    store = convert(tmp_path, table, transcripts_unit="px", pixel_size_um=0.5)
    points = spatialdata.read_zarr(store.path).points["transcripts"].compute()
    np.testing.assert_allclose(points["x"], np.asarray(pq.read_table(table)["x"]) / 2)
    to_global = points_transforms(store.element("points", "transcripts"))["global"]
    np.testing.assert_allclose(to_global, np.diag([2, 2, 1.0]))


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"table": None}, "slide-missing"),
        ({"table": "none.csv"}, "slide-not-found"),
        ({"transcripts_unit": "px"}, "pixel-size-unknown"),
        ({"path": "t.parquet"}, "transcripts-twice"),
        ({"table": None, "path": "."}, "transcripts-unreadable"),
        ({"prior_cells": "none.parquet"}, "prior-cells-not-found"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, table, given, code):
    given = {"table": table, **given}
    for key in ("path", "table", "prior_cells"):
        given |= {key: tmp_path / given[key]} if isinstance(given.get(key), str) else {}
    with pytest.raises(CellquiltError) as caught:
        convert(tmp_path, **given)
    assert caught.value.code == code
    assert caught.value.hint
    assert not (tmp_path / "s1.zarr").exists()


# --- prior cells

FRAME = {"microns": np.eye(3), "global": np.eye(3)}


def files_of(folder, geometry, ids):
    """The same cells as GeoParquet and as GeoJSON."""
    frame = gpd.GeoDataFrame({"cell_id": ids}, geometry=list(geometry))
    frame.to_parquet(folder / "cells.parquet")
    (folder / "cells.geojson").write_text(frame.to_json())
    return folder / "cells.parquet", folder / "cells.geojson"


def test_both_formats_give_the_same_cells(tmp_path):
    found = [read_prior_cells(path, FRAME) for path in files_of(tmp_path, squares(), list("abcde"))]
    for cells in found:
        assert cells.ids.tolist() == list("abcde")
        assert shapely.equals(cells.geometry, squares()).all()


def test_without_names_cells_are_numbered(tmp_path):
    features = [
        {"type": "Feature", "properties": {}, "geometry": shapely.geometry.mapping(shape)} for shape in squares()
    ]
    (tmp_path / "c.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    assert read_prior_cells(tmp_path / "c.geojson", FRAME).ids.tolist() == ["1", "2", "3", "4", "5"]


def test_outlines_in_planes(tmp_path):
    pq.write_table(
        pa.table(
            {
                "EntityID": pa.array([7, 7, 9]),
                "ZIndex": [0, 1, 0],
                "geometry": shapely.to_wkb(squares(3)).tolist(),
            },
        ),
        tmp_path / "c.parquet",
    )
    cells = read_prior_cells(tmp_path / "c.parquet", FRAME)
    assert cells.ids.tolist() == ["7_z0", "7_z1", "9_z0"]
    assert cells.columns["entity_id"].tolist() == ["7", "7", "9"]
    assert cells.columns["z_plane"].tolist() == [0, 1, 0]


def test_crossed_outlines_are_mended_and_empty_ones_left_out(tmp_path, caplog):
    bow = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    line = shapely.Polygon([(0, 0), (5, 5), (0, 0)])
    shapes = [bow, line, shapely.Polygon(), *squares(2)]
    path, _ = files_of(tmp_path, shapes, ["bow", "line", "none", "a", "b"])
    cells = read_prior_cells(path, FRAME)
    assert cells.ids.tolist() == ["bow", "a", "b"]
    assert shapely.is_valid(cells.geometry).all()
    assert shapely.area(cells.geometry).tolist() == [50, 100, 100]
    assert "cross themselves" in caplog.text
    assert "2 of 5 cells have no area" in caplog.text


@pytest.mark.parametrize(
    ("geometry", "ids", "code"),
    [
        ([], [], "prior-cells-empty"),
        ([shapely.Polygon()], ["a"], "prior-cells-empty"),
        ([shapely.Point(1, 2)], ["a"], "prior-cells-invalid"),
        ([shapely.from_wkt("POLYGON ((0 0, nan 1, 1 1, 0 0))")], ["a"], "prior-cells-invalid"),
        (list(squares(2)), ["a", "a"], "prior-cells-ids"),
        (list(squares(2)), ["a", None], "prior-cells-ids"),
    ],
)
def test_bad_cells_are_refused(tmp_path, geometry, ids, code):
    gpd.GeoDataFrame({"cell_id": ids}, geometry=geometry).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(CellquiltError) as caught:
        read_prior_cells(tmp_path / "c.parquet", FRAME)
    assert caught.value.code == code
    assert "c.parquet" in caught.value.message


@pytest.mark.parametrize("name", ["c.parquet", "c.geojson", "c.txt"])
def test_files_that_are_something_else(tmp_path, name):
    (tmp_path / name).write_text("x,y\n1,2\n")
    with pytest.raises(CellquiltError) as caught:
        read_prior_cells(tmp_path / name, FRAME)
    assert caught.value.code == "prior-cells-unreadable"


def test_prior_cells_in_pixels_lie_where_those_in_microns_lie(tmp_path, table):
    um, _ = files_of(tmp_path, squares(), list("abcde"))
    px = tmp_path / "px.geojson"
    px.write_text(
        gpd.GeoDataFrame(
            {"cell_id": list("abcde")}, geometry=list(shapely.transform(squares(), lambda v: v * 4))
        ).to_json()
    )
    stores = [
        convert(tmp_path, table, "um", prior_cells=um, pixel_size_um=0.25),
        convert(tmp_path, table, "px", prior_cells=px, pixel_size_um=0.25, prior_cells_unit="px"),
    ]
    for name in ("global", "microns"):
        found = []
        for store in stores:
            cells = read_shapes(store.element("shapes", "prior_cells"))
            m = cells.transforms[name]
            found.append(shapely.transform(cells.geometry, lambda xy, m=m: xy @ m[:2, :2].T + m[:2, 2]))
        assert shapely.equals_exact(found[0], found[1], 1e-9).all()
    for store in stores:
        prior = find_prior(store, store.element("points", "transcripts"))
        assert (prior.name, prior.n_cells) == ("prior_cells", 5)


def test_prior_cells_become_cells_without_an_image(tmp_path, table):
    """`vendor` takes them where the machine has none: counts, report and all, without an image."""
    path, _ = files_of(tmp_path, squares(), list("abcde"))
    store = convert(tmp_path, table, prior_cells=path)
    resolve_slide(store.path, settings=Settings(segmentation="vendor"))
    aggregate_slide(store.path, settings=Settings())
    sdata = spatialdata.read_zarr(store.path)
    assert np.asarray(sdata.tables["table"].X.sum(axis=1)).ravel().tolist() == [100] * 5
    assert sdata.tables["table"].obs["area_um2"].tolist() == [100.0] * 5
    assert sdata.shapes["cell_boundaries"]["vendor_id"].tolist() == list("abcde")
    points = sdata.points["transcripts"].compute()
    assert points["cell_id"].isna().sum() == 100
    assemble_slide([store.path], output=tmp_path / "out.zarr", qc=tmp_path / "qc.json", settings=Settings())
    report_slide(tmp_path / "out.zarr", qc=tmp_path / "qc.json", output=tmp_path / "report.html", settings=Settings())
    qc = json.loads((tmp_path / "qc.json").read_text())
    assert (qc["n_cells"], qc["n_assigned"], qc["n_transcripts"]) == (5, 500, 600)
    assert "500" in (tmp_path / "report.html").read_text()


def test_a_prior_in_the_wrong_unit_is_pointed_out(tmp_path, table, caplog):
    path, _ = files_of(tmp_path, shapely.transform(squares(), lambda xy: xy * 5), list("abcde"))
    store = convert(tmp_path, table, prior_cells=path)
    patchify_transcripts(store.path, settings=Settings(), method="proseg", output=tmp_path / "p.zarr")
    assert "only 2 of 5 prior cells of prior_cells hold a transcript" in caplog.text


# --- the machine's nuclei


def test_the_machines_nuclei_are_those_of_its_cells(tmp_path, table):
    """A nucleus has its cell's id; two of one cell are one outline, one of no cell is left out."""
    store = convert(tmp_path, table)
    cells = squares(4)
    nuclei = [shapely.box(2, 2, 5, 5), shapely.box(63, 2, 66, 5), shapely.box(67, 6, 69, 9), shapely.box(90, 2, 95, 5)]
    with result_of(store, None) as delta:
        names = np.array(list("abcd"))
        write_shapes(
            delta.new_element("shapes", "vendor_cells"), ShapesTable(names, cells, {"entity_id": names}, FRAME)
        )
        write_shapes(
            delta.new_element("shapes", "vendor_nuclei"),
            ShapesTable(
                np.array(["a", "d", "d_2", "x"]),
                np.asarray(nuclei, dtype=object),
                {"entity_id": np.array(["a", "d", "d", "x"])},
                FRAME,
            ),
        )
    resolve_slide(store.path, settings=Settings(segmentation="vendor"))
    aggregate_slide(store.path, settings=Settings())
    found = read_shapes(store.element("shapes", "nucleus_boundaries"))
    of = read_shapes(store.element("shapes", "cell_boundaries"))
    assert dict(zip(of.columns["vendor_id"], of.ids, strict=True))["d"] == found.ids[1]
    assert found.columns["vendor_id"].tolist() == ["a", "d"]
    assert shapely.area(found.geometry).tolist() == [9, 15]
    points = spatialdata.read_zarr(store.path).points["transcripts"].compute()
    inside = shapely.contains_xy(shapely.union_all(found.geometry), points["x"], points["y"])
    assert inside.sum() > 5
    np.testing.assert_array_equal(points["in_nucleus"].to_numpy(dtype=bool), inside)
