"""Joins, landmarks, regions, labels and GeoJSON across elements, against brute force; and what users get wrong."""

import json
import math

import anndata
import cellquilt as cq
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
from cellquilt import CellquiltError
from spatialdata.models import Image2DModel, PointsModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, get_transformation

PIXEL_UM = 0.5


def maps(matrix=None):
    """Of an element that is drawn in pixels, or by another matrix to pixels."""
    matrix = np.eye(3) if matrix is None else matrix
    um = np.diag([PIXEL_UM, PIXEL_UM, 1]) @ matrix
    axes = {"input_axes": ("x", "y"), "output_axes": ("x", "y")}
    return {"global": Affine(matrix, **axes), "microns": Affine(um, **axes)}


def slide():
    """100 cells of 8 × 8 px on a grid, points, regions drawn in another scale, bins, an image beside."""
    x, y = (10.0 * index.ravel() + 5 for index in np.meshgrid(np.arange(10), np.arange(10)))
    ids = np.array([f"c{k}" for k in range(100)])
    cells = gpd.GeoDataFrame(geometry=shapely.box(x - 4, y - 4, x + 4, y + 4), index=ids)
    other = cells.copy()
    regions = gpd.GeoDataFrame(
        {"classification": ["tumour", None]},
        geometry=[shapely.box(0, 0, 25, 50), shapely.box(20, 0, 50, 50)],
        index=["left", "right"],
    )
    bins = shapely.box(*np.array([[i, j, i + 2, j + 2] for i in range(0, 100, 2) for j in range(0, 100, 2)], float).T)
    kinds = np.where(shapely.get_x(shapely.centroid(bins)) < 50, "A", "B")
    bins = gpd.GeoDataFrame({"kind": kinds, "value": shapely.get_x(shapely.centroid(bins))}, geometry=bins)
    rng = np.random.default_rng(0)
    points = pd.DataFrame({"x": rng.random(300) * 100, "y": rng.random(300) * 100, "gene": "g"})
    obs = pd.DataFrame(
        {
            "region": pd.Categorical(["cells"] * 100),
            "cell_id": ids,
            "cell_type": pd.Categorical(np.where(x < 30, "T", "B")),
            "area_um2": 64 * PIXEL_UM**2,
        },
        index=ids,
    )
    table = anndata.AnnData(obs=obs, obsm={"intensities": pd.DataFrame({"DAPI": x}, index=ids)})
    twice = np.diag([2.0, 2.0, 1.0])
    image, um = np.zeros((3, 20, 20), np.uint8), Scale([PIXEL_UM] * 2, axes=("x", "y"))
    return spatialdata.SpatialData(
        images={"he": Image2DModel.parse(image, dims=("c", "y", "x"), transformations={"he": Identity()})},
        shapes={
            "cells": ShapesModel.parse(cells, transformations=maps()),
            "regions": ShapesModel.parse(regions, transformations=maps(twice)),
            "bins": ShapesModel.parse(bins, transformations={"global": Identity()}),
            "far": ShapesModel.parse(other, transformations={"elsewhere": Identity()}),
        },
        points={"dots": PointsModel.parse(points, transformations={"global": Identity(), "microns": um})},
        tables={"table": TableModel.parse(table, region="cells", region_key="region", instance_key="cell_id")},
    )  # fmt: skip


@pytest.fixture
def sdata():
    return slide()


@pytest.fixture(scope="module")
def kept():
    """One that no test changes."""
    return slide()


# --- joins


def test_a_join_brings_elements_to_one_system(kept):
    """The regions are drawn in pixels of twice the size: left is x below 50 px."""
    found = cq.spatial.sjoin(kept, "cells", "regions", how="inner", predicate="within")
    assert set(found["index_right"]) == {"left", "right"}
    left = found.index[found["index_right"] == "left"]
    assert sorted(left) == sorted(f"c{k}" for k in range(100) if k % 10 < 5)
    assert found.geometry.area.iloc[0] == pytest.approx(64 * PIXEL_UM**2)  # in µm
    in_px = cq.spatial.sjoin(kept, "cells", "regions", how="inner", predicate="within", coordinate_system="global")
    assert in_px.geometry.area.iloc[0] == pytest.approx(64)
    assert len(in_px) == len(found)


def test_points_are_joined_to_shapes(kept):
    found = cq.spatial.sjoin(kept, "dots", "cells")
    places = kept.points["dots"].compute()
    inside = ((places["x"] % 10 - 5).abs() < 4) & ((places["y"] % 10 - 5).abs() < 4)
    assert len(found) == 300
    assert found["index_right"].notna().to_numpy().tolist() == inside.tolist()
    k = int(np.flatnonzero(inside)[0])
    column, row = (int(places[axis].iloc[k] // 10) for axis in ("x", "y"))
    assert found["index_right"].iloc[k] == f"c{10 * row + column}"


# --- regions


def test_regions_are_counted_and_measured(kept):
    found = cq.spatial.region_statistics(kept, "regions", "cells", "cell_type")
    assert found.index.tolist() == ["left", "right"]
    # Left is x < 50 px, right 40 < x < 100: 20 columns of cells lie in both.
    assert found["n_cells"].tolist() == [50, 60]
    assert found["area"].tolist() == pytest.approx([50 * 100 / 4, 60 * 100 / 4])
    assert found["density"]["left"] == pytest.approx(50 / 1250 * 1e6)
    assert found["share_T"].tolist() == pytest.approx([0.6, 0.0])
    assert found["share_B"].tolist() == pytest.approx([0.4, 1.0])
    assert found["mean_area_um2"].tolist() == pytest.approx([16, 16])
    assert found["mean_intensity_DAPI"]["left"] == pytest.approx(25.0)


# --- labels


def test_bins_give_cells_the_label_that_covers_most(kept):
    found = cq.spatial.transfer_labels(kept, "bins", "cells", "kind")
    x = shapely.get_x(shapely.centroid(np.asarray(kept.shapes["cells"].geometry.array)))
    assert found["label"].tolist() == np.where(x < 50, "A", "B").tolist()
    assert found["share"].to_numpy() == pytest.approx(1.0)
    means = cq.spatial.transfer_labels(kept, "bins", "cells", "value")
    np.testing.assert_allclose(means["label"], x)


def test_a_border_is_shared_by_area(sdata):
    """A cell of which 3/4 lie in A and 1/4 in B."""
    shapes = gpd.GeoDataFrame({"kind": ["A", "B"]}, geometry=[shapely.box(0, 0, 3, 4), shapely.box(3, 0, 9, 4)])
    sdata["areas"] = ShapesModel.parse(shapes, transformations={"global": Identity()})
    target = gpd.GeoDataFrame(geometry=[shapely.box(0, 0, 4, 4), shapely.box(50, 50, 60, 60)])
    sdata["target"] = ShapesModel.parse(target, transformations={"global": Identity()})
    found = cq.spatial.transfer_labels(sdata, "areas", "target", "kind")
    assert found["label"].iloc[0] == "A"
    assert found["share"].iloc[0] == pytest.approx(0.75)
    assert pd.isna(found["label"].iloc[1])
    assert found["share"].iloc[1] == 0


def test_the_nearest_cell_gives_its_table_s_label(kept):
    found = cq.spatial.transfer_labels(kept, "cells", "dots", "cell_type", how="nearest", max_distance=2.5)
    places = kept.points["dots"].compute()
    middle = np.floor(places[["x", "y"]].to_numpy() / 10) * 10 + 5
    far = np.linalg.norm(places[["x", "y"]].to_numpy() - middle, axis=1) * PIXEL_UM
    np.testing.assert_allclose(found["distance"], far)
    near = far <= 2.5
    expected = np.where(middle[:, 0] < 30, "T", "B")
    assert (found["label"].to_numpy()[near] == expected[near]).all()
    assert found["label"].isna().to_numpy().tolist() == (~near).tolist()


def test_points_take_the_label_of_what_they_lie_in(kept):
    found = cq.spatial.transfer_labels(kept, "bins", "dots", "kind")
    x = kept.points["dots"].compute()["x"].to_numpy()
    assert found["label"].tolist() == np.where(x < 50, "A", "B").tolist()


# --- alignment


def turned(angle=0.3, scale=1.7, shift=(40.0, -12.0)):
    matrix = np.eye(3)
    matrix[:2, :2] = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix[:2, 2] = shift
    return matrix


PLACES = np.array([[0.0, 0], [90, 5], [80, 70], [10, 95], [45, 50]])


@pytest.mark.parametrize(("model", "matrix"), [
    ("similarity", turned()),
    ("affine", turned() @ np.array([[1, 0.2, 0], [0, -0.9, 0], [0, 0, 1]])),
])  # fmt: skip
def test_landmarks_give_the_map_back(model, matrix):
    fixed = PLACES @ matrix[:2, :2].T + matrix[:2, 2]
    found = cq.spatial.fit_landmarks(PLACES + 1e6, fixed + 1e6, model, um_per_unit=PIXEL_UM)
    moved = (PLACES + 1e6) @ found.matrix[:2, :2].T + found.matrix[:2, 2]
    np.testing.assert_allclose(moved, fixed + 1e6, atol=1e-5)
    assert found.rms_um < 1e-6
    assert np.nanmax(found.left_out_um) < 1e-5


def test_errors_are_in_um_and_a_wrong_landmark_stands_out():
    fixed = PLACES.copy()
    fixed[4] += (10.0, 0.0)
    found = cq.spatial.fit_landmarks(PLACES, fixed, "similarity", um_per_unit=PIXEL_UM)
    assert found.left_out_um.argmax() == 4
    assert found.left_out_um[4] == pytest.approx(10 * PIXEL_UM)
    assert 0 < found.error_um[4] < found.left_out_um[4]
    # As many as the map needs fit in any case: nothing is known of the error.
    assert math.isnan(cq.spatial.fit_landmarks(PLACES[:3], fixed[:3]).rms_um)


def test_an_image_gets_its_place_in_all_systems(sdata):
    matrix = turned()
    fixed = PLACES @ matrix[:2, :2].T + matrix[:2, 2]
    found = cq.spatial.align(sdata, "he", "cells", landmarks=(PLACES, fixed), model="similarity")
    assert found.rms_um < 1e-9
    placed = get_transformation(sdata["he"], get_all=True)
    assert set(placed) == {"global", "microns"}
    own = placed["microns"].to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(own, np.diag([PIXEL_UM, PIXEL_UM, 1]) @ matrix)


def test_landmarks_and_matrices_come_from_files(sdata, tmp_path):
    table = pd.DataFrame(np.hstack([PLACES, PLACES + 3]), columns=["moving_x", "moving_y", "fixed_x", "fixed_y"])
    table.to_csv(tmp_path / "l.csv", index=False)
    found = cq.spatial.align(sdata, "he", "cells", landmarks=tmp_path / "l.csv")
    np.testing.assert_allclose(found.matrix, [[1, 0, 3], [0, 1, 3], [0, 0, 1]], atol=1e-12)
    (tmp_path / "m.csv").write_text("1,0,3\n0,1,3\n0,0,1\n")
    same = cq.spatial.align(sdata, "he", "cells", matrix=tmp_path / "m.csv")
    np.testing.assert_array_equal(same.matrix, [[1, 0, 3], [0, 1, 3], [0, 0, 1]])


# --- GeoJSON


def test_regions_go_to_qupath_and_back(sdata, tmp_path):
    path = cq.spatial.write_geojson(sdata, "regions", tmp_path / "r.geojson")
    document = json.loads(path.read_text())
    assert document["type"] == "FeatureCollection"
    first, second = document["features"]
    assert first["properties"] == {
        "objectType": "annotation",
        "name": "left",
        "classification": {"name": "tumour"},
    }
    assert "classification" not in second["properties"]
    back = cq.spatial.read_geojson(path, sdata, like="cells", name="again")
    assert back["classification"].iloc[0] == "tumour"
    assert back["classification"].isna().tolist() == [False, True]
    assert back["name"].tolist() == ["left", "right"]
    # Written in pixels of the image: there they lie, and in µm where the regions lay.
    assert shapely.bounds(back.geometry.iloc[0]).tolist() == [0, 0, 50, 100]
    for system in ("global", "microns"):
        pair = (
            cq.spatial.sjoin(sdata, "cells", name, "inner", "within", coordinate_system=system)
            for name in ("regions", "again")
        )
        one, two = pair
        assert one.index.tolist() == two.index.tolist()


def test_the_same_shapes_give_the_same_bytes(sdata, tmp_path):
    a = cq.spatial.write_geojson(sdata, "cells", tmp_path / "a.geojson", kind="cell").read_bytes()
    assert a == cq.spatial.write_geojson(sdata, "cells", tmp_path / "b.geojson", kind="cell").read_bytes()
    with pytest.raises(CellquiltError, match="output-exists"):
        cq.spatial.write_geojson(sdata, "cells", tmp_path / "a.geojson")


# --- what users get wrong


@pytest.mark.parametrize(("call", "code", "said"), [
    (lambda s: cq.spatial.sjoin(s, "cels", "regions"), "element-unknown", 'did you mean "cells"'),
    (lambda s: cq.spatial.sjoin(s, "cells", "far"), "coordinate-systems-disjoint", "elsewhere"),
    (lambda s: cq.spatial.sjoin(s, "cells", "bins", coordinate_system="microns"), "coordinate-system-unknown", "bins"),
    (lambda s: cq.spatial.sjoin(s, "cells", "cells", how="outer"), "sjoin-how-unknown", "outer"),
    (lambda s: cq.spatial.sjoin(s, "cells", "cells", predicate="inside"), "sjoin-predicate-unknown", "inside"),
    (lambda s: cq.spatial.sjoin(s, "he", "far"), "coordinate-systems-disjoint", "he"),
    (lambda s: cq.spatial.sjoin(s, "he", "he"), "element-kind", "image"),
    (lambda s: cq.spatial.region_statistics(s,
     "regions", "cells", "cell_typ"), "column-unknown", 'did you mean "cell_type"'),
    (lambda s: cq.spatial.region_statistics(s, "regions", "bins", "kind"), "table-missing", "bins"),
    (lambda s: cq.spatial.transfer_labels(s,
     "cells", "bins", "celltype"), "column-unknown", 'did you mean "cell_type"'),
    (lambda s: cq.spatial.transfer_labels(s, "cells", "bins", "cell_type", how="vote"), "transfer-unknown", "vote"),
    (lambda s: cq.spatial.transfer_labels(s,
     "cells", "bins", "cell_type", table="tabel"), "table-missing", 'did you mean "table"'),
    (lambda s: cq.spatial.fit_landmarks(PLACES[:2], PLACES[:2]), "landmarks-too-few", "similarity"),
    (lambda s: cq.spatial.fit_landmarks(PLACES[:1], PLACES[:1], "similarity"), "landmarks-too-few", "1 landmarks"),
    (lambda s: cq.spatial.fit_landmarks([[0, 0], [1, 1], [5, 5], [9, 9]], PLACES[:4]), "landmarks-collinear", "moving"),
    (lambda s: cq.spatial.fit_landmarks(PLACES[:3], [[0, 0], [1, 2], [2, 4]]), "landmarks-collinear", "fixed"),
    (lambda s: cq.spatial.fit_landmarks([[1, 1]] * 3, PLACES[:3], "similarity"), "landmarks-collinear", "one place"),
    (lambda s: cq.spatial.fit_landmarks(PLACES, PLACES[:4]), "landmarks-invalid", "5 moving landmarks and 4"),
    (lambda s: cq.spatial.fit_landmarks(PLACES * np.nan, PLACES), "landmarks-invalid", "moving"),
    (lambda s: cq.spatial.fit_landmarks(PLACES, PLACES, "rigid"), "alignment-model-unknown", "rigid"),
    (lambda s: cq.spatial.align(s, "he", "cells"), "alignment-missing", "landmarks"),
    (lambda s: cq.spatial.align(s, "he", "cells", matrix=np.diag([1.0, 0, 1])), "he-matrix-invalid", "inverted"),
    (lambda s: cq.spatial.align(s, "he", "cells", matrix=[[1, 2], [3, 4]]), "he-matrix-invalid", "shape"),
    (lambda s: cq.spatial.align(s, "he", "cells", landmarks="none.csv"), "landmarks-unreadable", "none.csv"),
    (lambda s: cq.spatial.write_geojson(s, "dots", "x.geojson"), "element-kind", "dots"),
    (lambda s: cq.spatial.write_geojson(s, "cells", "x.geojson", kind="region"), "geojson-kind-unknown", "region"),
    (lambda s: cq.spatial.write_geojson(s, "cells", "x.geojson", class_key="kind"), "column-unknown", "kind"),
    (lambda s: cq.spatial.read_geojson("none.geojson"), "geojson-unreadable", "none.geojson"),
])  # fmt: skip
def test_mistakes_are_named(kept, call, code, said):
    with pytest.raises(CellquiltError) as caught:
        call(kept)
    assert caught.value.code == code
    assert said in str(caught.value)


def test_lines_are_no_regions(tmp_path):
    line = {"type": "Feature", "properties": {}, "geometry": {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}}
    (tmp_path / "l.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [line]}))
    with pytest.raises(CellquiltError, match="geojson-unreadable"):
        cq.spatial.read_geojson(tmp_path / "l.geojson")
