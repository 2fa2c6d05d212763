"""A slide split into regions: sums, cells and transcripts are those of the whole slide; mistakes are named."""

import json

import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
from cellquilt.aggregation.columns import read_columns
from cellquilt.aggregation.split import split_slide
from cellquilt.core.errors import CellquiltError
from cellquilt.core.regions import read_features, region_sample
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import read_shapes
from cellquilt.core.store import Store
from cellquilt.readers.regions import read_regions
from cellquilt.report.stage import assemble_slide, report_slide
from synthetic_slide import CENTRES_PX, N_CELLS, PIXEL_UM, TRANSFORMS, make_parts, pixels

#: Left, middle (two parts) and a circle at the right: outlines in px, and none over columns 400-420.
SHAPES = {
    "A 1": shapely.box(0, 0, 205, 400),
    "B/2": shapely.MultiPolygon([shapely.box(205.5, 0.5, 400, 150), shapely.box(205.5, 200, 300, 380.25)]),
    "core C": shapely.Point(500, 150).buffer(90),
}
SLUGS = ["A_1", "B_2", "core_C"]


def geojson(shapes, **more):
    features = [
        {"type": "Feature", "properties": {"name": name, **more}, "geometry": json.loads(shapely.to_geojson(shape))}
        for name, shape in shapes.items()
    ]
    return {"type": "FeatureCollection", "features": features}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("regions") / "regions.geojson"
    path.write_text(json.dumps(geojson(SHAPES)))
    return path


@pytest.fixture(scope="module")
def split(parts, file, tmp_path_factory):
    """Assembled stores of the whole slide and of its regions: (whole, {slug: store}, folder)."""
    folder = tmp_path_factory.mktemp("split")
    stores = split_slide(parts, folder / "out", settings=Settings(), regions=file, columns=folder / "c.parquet")
    assert [path.name for path in stores] == [f"s1_{slug}.slide.zarr" for slug in SLUGS]
    whole = assemble_slide(parts, folder / "s1.zarr", settings=Settings(), columns=[folder / "c.parquet"])
    made = {}
    for slug, store in zip(SLUGS, stores, strict=True):
        qc = folder / f"{slug}.json"
        made[slug] = assemble_slide([store], folder / f"s1_{slug}.zarr", settings=Settings(), qc=qc)
    return spatialdata.read_zarr(whole), {slug: spatialdata.read_zarr(path) for slug, path in made.items()}, folder


def owner():
    """(105,) region of each cell by brute force, -1 for none."""
    inside = np.array([shapely.contains_xy(shape, *CENTRES_PX.T) for shape in SHAPES.values()])
    return np.where(inside.any(axis=0), inside.argmax(axis=0), -1)


def test_each_region_has_the_cells_of_the_whole_slide(split):
    whole, regions, _ = split
    table = whole.tables["table"]
    for number, sdata in enumerate(regions.values()):
        own, expected = sdata.tables["table"], table[owner() == number]
        assert own.obs_names.tolist() == expected.obs_names.tolist()
        assert (own.X != expected.X).nnz == 0
        np.testing.assert_array_equal(own.obsm["spatial"], expected.obsm["spatial"])
        pd.testing.assert_frame_equal(own.obsm["intensities"], expected.obsm["intensities"].loc[own.obs_names])
        same = [name for name in table.obs if name not in ("sample",)]
        pd.testing.assert_frame_equal(
            own.obs[same].astype(str), expected.obs[same].astype(str), check_categorical=False
        )
        assert set(own.obs["sample"]) == {f"s1_{SLUGS[number]}"}
        assert set(own.obs["region_name"]) == {list(SHAPES)[number]}
    assert table.obs["region_name"].isna().sum() == (owner() < 0).sum() > 0


def test_outlines_are_the_same_to_the_last_bit_in_pixels_of_the_region(split):
    whole, regions, _ = split
    for name in ("cell_boundaries", "nucleus_boundaries"):
        for sdata, shape in zip(regions.values(), SHAPES.values(), strict=True):
            x0, y0 = np.floor(shapely.bounds(shape)[:2])
            own = sdata.shapes[name]
            expected = whole.shapes[name].loc[own.index]
            back = shapely.transform(own.geometry.to_numpy(), lambda xy, corner=(x0, y0): xy + corner)
            assert shapely.equals_exact(back, expected.geometry.to_numpy(), tolerance=0).all()
            um = spatialdata.transform(own, to_coordinate_system="microns").geometry.to_numpy()
            there = spatialdata.transform(expected, to_coordinate_system="microns").geometry.to_numpy()
            np.testing.assert_allclose(shapely.get_coordinates(um), shapely.get_coordinates(there), atol=1e-9)


def test_every_transcript_is_of_its_cells_region_or_where_it_lies_and_none_is_lost(split):
    whole, regions, folder = split
    points = whole.points["transcripts"].compute()
    xy = points[["x", "y"]].to_numpy() / PIXEL_UM
    inside = np.array([shapely.contains_xy(shape, *xy.T) for shape in SHAPES.values()])
    expected = np.where(inside.any(axis=0), inside.argmax(axis=0), -1)
    of_cell = pd.Series(owner(), index=whole.tables["table"].obs_names)
    known = points["cell_id"].notna().to_numpy()
    expected[known] = of_cell.loc[points["cell_id"].astype(str)[known]].to_numpy()
    for number, sdata in enumerate(regions.values()):
        own = sdata.points["transcripts"].compute()
        there = points[expected == number]
        assert own["transcript_id"].tolist() == there["transcript_id"].tolist()
        for column in points:
            np.testing.assert_array_equal(*(part[column].astype(object).fillna("") for part in (own, there)))
    facts = read_columns(folder / "c.parquet").facts
    assert facts["n_transcripts_outside"] == (expected < 0).sum() > 0
    assert facts["n_cells_outside"] == (owner() < 0).sum()
    assert sum(one["n_transcripts"] for one in facts["regions"]) + facts["n_transcripts_outside"] == len(points)
    record = Store(folder / "s1.zarr").records[-1]
    assert record["stage"] == "split"
    assert [one["sample"] for one in record["facts"]["regions"]] == [f"s1_{slug}" for slug in SLUGS]


def test_sums_of_the_regions_are_those_of_the_slide(split):
    whole, regions, folder = split
    table = whole.tables["table"]
    together = sum(np.asarray(sdata.tables["table"].X.sum(axis=0)).ravel() for sdata in regions.values())
    np.testing.assert_array_equal(together, np.asarray(table.X[owner() >= 0].sum(axis=0)).ravel())
    for slug in SLUGS:
        qc = json.loads((folder / f"{slug}.json").read_text())
        own = regions[slug]
        assert qc["sample"] == f"s1_{slug}"
        assert qc["n_cells"] == own.tables["table"].n_obs
        assert qc["n_counts_differing"] == 0
        assert qc["n_transcripts"] == len(own.points["transcripts"])
        tissue = shapely.intersection(SHAPES[list(SHAPES)[SLUGS.index(slug)]], shapely.box(0, 0, 600, 300))
        assert qc["tissue_area_um2"] == pytest.approx(tissue.area * PIXEL_UM**2)
        assert qc["seconds"]["resolve"] == 0


def test_images_are_cut_to_the_regions_bounds(split):
    _, regions, _ = split
    for sdata, shape in zip(regions.values(), SHAPES.values(), strict=True):
        low, high = np.floor(shapely.bounds(shape)[:2]).astype(int), np.ceil(shapely.bounds(shape)[2:]).astype(int)
        image = sdata.images["image"]
        np.testing.assert_array_equal(np.asarray(image), pixels()[:, low[1] : high[1], low[0] : high[0]])
        to_um = spatialdata.transformations.get_transformation(image, "microns").to_affine_matrix(
            ("x", "y"), ("x", "y")
        )
        np.testing.assert_allclose(to_um @ [0, 0, 1], [low[0] * PIXEL_UM, low[1] * PIXEL_UM, 1])
        assert sdata.shapes["regions"].geometry.iloc[0].area == pytest.approx(shape.area)


def test_how_a_region_was_made_is_told(split):
    from cellquilt.report.remake import read_origin

    _, _, folder = split
    assert read_origin(folder / "s1_core_C.zarr").sample == "s1"
    lines = Store(folder / "s1_core_C.zarr").attributes["command"]
    assert lines[-1] == "cellquilt split s1.zarr --output split"
    assert "cellquilt split" not in " ".join(Store(folder / "s1.zarr").attributes["command"])


def test_a_region_reports_as_a_slide(split, tmp_path):
    _, _, folder = split
    page = report_slide(folder / "s1_A_1.zarr", tmp_path / "r.html", settings=Settings()).read_text()
    assert "<title>s1_A_1" in page
    assert 'id="slide"' in page


def test_the_same_bytes_twice_and_with_little_memory(parts, file, tmp_path, monkeypatch):
    import cellquilt.aggregation.split as module

    for name in ("one", "two"):
        split_slide(parts, tmp_path / name, settings=Settings(), regions=file, columns=tmp_path / f"{name}.parquet")
    first, second = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in sorted((tmp_path / name).rglob("*.parquet"))
            if path.is_file()
        }
        for name in ("one", "two")
    )
    assert first == second
    monkeypatch.setattr(module, "batch_rows", lambda _: 17)
    stores = split_slide(parts, tmp_path / "small", settings=Settings(), regions=file)
    for store in stores:
        own, other = (
            spatialdata.SpatialData.read(path, selection=("points",)).points["transcripts"].compute()
            for path in (store, tmp_path / "one" / store.name)
        )
        pd.testing.assert_frame_equal(own, other, check_categorical=False)


def test_a_region_without_cells_or_transcripts_is_a_slide_all_the_same(parts, tmp_path):
    path = tmp_path / "r.geojson"
    path.write_text(
        json.dumps(geojson({"empty": shapely.box(0.5, 390.5, 4, 399), "rest": shapely.box(0, 0, 600, 390)}))
    )
    empty, rest = split_slide(parts, tmp_path / "out", settings=Settings(), regions=path)
    made = assemble_slide([empty], tmp_path / "e.zarr", settings=Settings(), qc=tmp_path / "qc.json")
    assert json.loads((tmp_path / "qc.json").read_text())["n_cells"] == 0
    assert spatialdata.read_zarr(made).images["image"].shape == (2, 9, 4)
    assert len(read_shapes(Store(rest).element("shapes", "cell_boundaries"))) == N_CELLS


def test_slides_without_transcripts(tmp_path, file):
    parts = make_parts(tmp_path, points=False)
    stores = split_slide(parts, tmp_path / "out", settings=Settings(), regions=file)
    assert all(Store(store).names("points") == [] for store in stores)


def test_microns_and_names_of_classes(tmp_path):
    small = {"T": shapely.box(10, 10, 50, 50)}
    found = geojson(small)
    found["features"][0]["properties"] = {"classification": {"name": "T"}}
    (tmp_path / "um.geojson").write_text(json.dumps(found))
    frame = {"global": np.linalg.inv(TRANSFORMS["microns"]), "microns": np.eye(3)}
    shapes = read_regions(tmp_path / "um.geojson", frame, (400, 600))
    assert shapes.ids.tolist() == ["T"]
    assert shapely.bounds(shapes.geometry[0]).tolist() == [20, 20, 100, 100]
    np.testing.assert_allclose(shapes.transforms["microns"], TRANSFORMS["microns"])


def feature(name, shape):
    return geojson({name: shape})["features"][0]


HALF = shapely.box(0, 0, 300, 400)
BAD = {
    "text": ("no json", "regions-unreadable", "is no GeoJSON"),
    "list": ([1, 2], "regions-unreadable", "is no GeoJSON"),
    "empty": ({"type": "FeatureCollection", "features": []}, "regions-empty", "has no regions"),
    "nameless": ([{"type": "Feature", "properties": {}, "geometry": None}], "regions-name", "region 1 has no name"),
    "signs": (geojson({"//": HALF}), "regions-name", "region 1 has no name"),
    "twice": (
        [feature("core 1", shapely.box(0, 0, 9, 9)), feature("Core_1", shapely.box(20, 0, 29, 9))],
        "regions-twice", '"core 1" and "Core_1"',
    ),
    "point": (geojson({"a": shapely.Point(3, 4)}), "regions-geometry", 'region "a" is a Point'),
    "none": ([{"properties": {"name": "a"}, "geometry": None}], "regions-geometry", 'region "a" has no'),
    "flat": (
        [{"properties": {"name": "a"}, "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [5, 5], [0, 0]]]}}],
        "regions-geometry", 'region "a"',
    ),
    "nan": (
        json.dumps(geojson({"a": HALF})).replace("300.0, 0.0", "1e999, 0.0").replace("300, 0", "1e999, 0"),
        "regions-geometry", "no numbers",
    ),
    "outside": (geojson({"far": shapely.box(900, 0, 950, 40)}), "regions-outside", 'region "far" (x 900 to 950'),
    "overlap": (
        geojson({"left": HALF, "right": shapely.box(200, 0, 600, 400)}), "regions-overlap",
        'regions "left" and "right" overlap by 40000 px², 33% of the smaller one',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_regions_are_named(case, tmp_path):
    content, code, text = BAD[case]
    path = tmp_path / "r.geojson"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CellquiltError) as caught:
        read_regions(path, TRANSFORMS, (400, 600))
    assert caught.value.code == code
    assert "r.geojson" in str(caught.value)
    assert text in str(caught.value)


def test_neighbours_may_touch_and_what_crosses_itself_is_mended(tmp_path):
    path = tmp_path / "r.geojson"
    bow = shapely.Polygon([(400, 0), (500, 100), (500, 0), (400, 100)])
    path.write_text(json.dumps(geojson({"left": HALF, "right": shapely.box(299.9, 0, 390, 401), "bow": bow})))
    found = read_regions(path, TRANSFORMS, (400, 600))
    assert shapely.is_valid(found.geometry).all()
    assert shapely.area(found.geometry[2]) == pytest.approx(5000)
    assert shapely.bounds(found.geometry[1])[3] == 400


def test_names_that_get_too_long(tmp_path):
    path = tmp_path / "r.geojson"
    path.write_text(json.dumps(geojson({"b" * 40: HALF})))
    (found,) = read_features(path)
    with pytest.raises(CellquiltError, match="has 71 letters"):
        region_sample("a" * 30, found.slug)
    assert region_sample("s", found.slug) == f"s_{'b' * 40}"


def test_a_file_that_is_not_there_is_told_before_the_slide_is_read(tmp_path):
    from cellquilt.readers import convert_slide

    (tmp_path / "x.tif").touch()
    with pytest.raises(CellquiltError, match=r"no\.geojson does not exist") as caught:
        convert_slide(tmp_path / "x.tif", technology="ome_tif", regions=tmp_path / "no.geojson")
    assert caught.value.code == "regions-not-found"


def test_in_python_each_region_is_an_object(split, file, tmp_path):
    import cellquilt as cq

    whole, regions, _ = split
    found = cq.split_regions(whole, file, tmp_path / "out")
    assert list(found) == [f"s1_{slug}" for slug in SLUGS]
    for sdata, same in zip(found.values(), regions.values(), strict=True):
        assert sdata.tables["table"].obs_names.tolist() == same.tables["table"].obs_names.tolist()


def test_a_slide_without_cells_counted_is_refused(parts, file, tmp_path):
    with pytest.raises(CellquiltError, match="has no tables"):
        split_slide(parts[:4], tmp_path / "out", settings=Settings(), regions=file)
    with pytest.raises(CellquiltError, match="regions"):
        split_slide(parts, tmp_path / "out", settings=Settings())
    assert not (tmp_path / "out").exists()
