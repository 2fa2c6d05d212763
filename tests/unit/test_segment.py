"""Segmentation: the array checks, `generic`, the dynamics, and what a bundle's result looks like."""

import json
import subprocess
import sys
from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
from cellquilt.core.errors import CellquiltError
from cellquilt.core.shapes import read_geoparquet
from cellquilt.geometry.polygonize import labels_to_polygons
from cellquilt.patches.grid import Lattice, make_grid
from cellquilt.segment import cellpose, engine
from cellquilt.segment.arrays import ArrayImage, in_raster_order
from cellquilt.segment.cpnet import read_metadata
from cellquilt.segment.diameter import estimate_diameter, radii_of, typical_diameter
from cellquilt.segment.dynamics import masks_from_flows
from cellquilt.segment.generic import as_labels, import_function, rainfall
from cellquilt.segment.resample import resample, taps
from cellquilt.segment.run import make_image_patches, patch_objects, segment_bundle
from cellquilt.segment.tissue import tissue_polygons
from hypothesis import given, settings
from hypothesis import strategies as st
from test_normalize import nuclei

SETTINGS = {"generic_diameter_um": 6.0, "patch_width_px": 150, "patches_per_task": 3}


def slide(side=400):
    image, inside = nuclei(side, spacing=24)
    return ArrayImage(np.stack([np.zeros_like(image), image]), ["PolyT", "DAPI"], 0.5), inside


# --- functions that tests use as segmenters, importable by name


def bright(image, threshold=0.5):
    from scipy import ndimage

    return ndimage.label(image[0] > threshold)[0]


def of_floats(image):
    return image[0] * 1.0


def too_small(image):
    return np.zeros((3, 3), int)


def broken(image):
    raise RuntimeError("no kernel")


def broken_in_the_middle(image):
    if image.shape[2] > 170:  # patches at a side have one halo, those in the middle two
        raise RuntimeError("no kernel")
    return bright(image)


def run(folder, function=None, method="generic", image=None, on_patch_error="fail", **more):
    image = slide()[0] if image is None else image
    values = {**SETTINGS, **more}
    if function:
        values["generic_function"] = f"{__name__}:{function}"
    grid, plan, bundles = make_image_patches(
        image, folder, method=method, settings=values, sample="s1", tissue=tissue_polygons(image)
    )
    records = [
        segment_bundle(path, folder / f"{path.stem}.cells.parquet", settings={"on_patch_error": on_patch_error})
        for path in bundles
    ]
    return grid, plan, records, [read_geoparquet(folder / f"{path.stem}.cells.parquet") for path in bundles]


def test_the_patch_result_is_what_the_interface_says(tmp_path):
    grid, plan, records, results = run(tmp_path, "bright")
    assert plan.channels == ("DAPI",)  # the nuclear stain, not the first channel
    assert [patch["index"] for record in records for patch in record["patches"]] == list(range(len(grid.patches)))
    for (geometry, table, metadata), record in zip(results, records, strict=True):
        assert table.schema.names == ["patch", "label", "cut", "depth_px"]
        assert [str(kind) for kind in table.schema.types] == ["int32", "int32", "bool", "float"]
        assert metadata == json.loads(json.dumps(record))
        assert (metadata["stage"], metadata["method"], metadata["sample"]) == ("segment", "generic", "s1")
        order = list(zip(table["patch"].to_pylist(), table["label"].to_pylist(), strict=True))
        assert order == sorted(order)
        counts = {patch["index"]: patch["n_cells"] for patch in metadata["patches"]}
        assert sum(counts.values()) == len(geometry)
        assert all(patch["seconds"] >= 0 and patch["error"] is None for patch in metadata["patches"])


def test_objects_lie_where_the_slide_has_them(tmp_path):
    image, _ = slide()
    _, _, _, results = run(tmp_path, "bright", image=image, normalize="global")
    from cellquilt.patches.normalize import estimate_normalization

    regions = tissue_polygons(image).polygons
    whole = bright(
        estimate_normalization(image, ["DAPI"], mode="global", regions=regions).apply(image.pixels[1:], 0, 0)
    )
    truth = {shapely.normalize(cell).wkb for cell in labels_to_polygons(whole)[1]}
    for geometry, table, _ in results:
        kept = ~table["cut"].to_numpy(zero_copy_only=False)
        assert {shapely.normalize(cell).wkb for cell in geometry[kept] if not cell.interiors} <= truth


def test_cut_and_depth_count_from_inner_sides_only():
    grid = make_grid((100, 100), width_px=50, overlap_px=20)
    patch = grid.patches[0]  # the window is 0-60 in x and y, inner sides right and bottom
    labels = np.zeros((60, 60), np.int32)
    labels[0:5, 0:5] = 1
    labels[20:30, 40:60] = 2
    labels[50:55, 10:15] = 3
    found = patch_objects(patch, labels, (100, 100))
    assert found["cut"].tolist() == [False, True, False]
    assert found["depth_px"].tolist() == [55, 0, 5]
    only = make_grid((60, 60)).patches[0]
    assert patch_objects(only, labels, (60, 60))["depth_px"].tolist() == [np.inf] * 3


def test_small_objects_holes_and_parts():
    labels = np.zeros((40, 40), np.int32)
    labels[5:15, 5:15] = 7
    labels[8:10, 8:10] = 0
    labels[30, 30] = 7  # a crumb of the same label
    labels[20:22, 20:22] = 9
    found = patch_objects(make_grid((40, 40)).patches[0], labels, (40, 40), least_area_px=5)
    assert found["label"].tolist() == [7]
    assert shapely.equals(found["geometry"][0], shapely.box(5, 5, 15, 15))


def test_no_tissue_is_an_empty_result(tmp_path):
    empty = ArrayImage(np.full((1, 300, 300), 100, np.uint16), ["DAPI"], 0.5)
    grid, _, records, results = run(tmp_path, "bright", image=empty)
    assert grid.patches == ()
    assert len(results) == 1
    assert len(results[0][0]) == 0
    assert records[0]["patches"] == []


@pytest.mark.parametrize(
    ("function", "part"),
    [("of_floats", "integers"), ("too_small", r"shape \(3, 3\)"), ("broken", "no kernel")],
)
def test_what_a_function_does_wrong_is_named(tmp_path, function, part):
    with pytest.raises(CellquiltError, match=part) as caught:
        run(tmp_path, function)
    assert caught.value.code == "patch-failed"
    assert f"{__name__}:{function}" in caught.value.message
    assert "sample s1, patch 0 (y 0-" in caught.value.message
    assert not list(tmp_path.glob("*.parquet"))


def test_a_failed_patch_can_be_skipped_and_is_recorded(tmp_path):
    grid, _, records, _ = run(tmp_path, "broken_in_the_middle", on_patch_error="skip")
    failed = [patch for record in records for patch in record["patches"] if patch["error"]]
    assert 0 < len(failed) < len(grid.patches)
    assert failed[0]["error"]["code"] == "segmenter-failed"
    assert sum(record["facts"]["n_failed"] for record in records) == len(failed)


def test_labels_are_checked():
    assert as_labels(np.array([[0, 5]], np.uint8), (1, 2), "f").dtype == np.int32
    assert as_labels(np.array([[0, 2**40]], np.int64), (1, 2), "f").tolist() == [[0, 1]]
    for wrong in (np.array([[True]]), np.array([[-1]]), np.array([1]), "x"):
        with pytest.raises(CellquiltError) as caught:
            as_labels(wrong, (1, 1), "f")
        assert caught.value.code == "segmenter-output"


def test_functions_that_are_not_there_are_named():
    for name in ("nowhere:f", "json:nothing", "json", "json:decoder"):
        with pytest.raises(CellquiltError) as caught:
            import_function(name)
        assert caught.value.code == "generic-function"
    with pytest.raises(CellquiltError, match="JSON"):
        engine.plan("generic", slide()[0], {"generic_kwargs": "{threshold: 3}"})


def test_methods_and_channels_are_looked_up():
    image = slide(100)[0]
    with pytest.raises(CellquiltError, match="celpose"):
        engine.plan("celpose", image)
    assert engine.pick_channels(image, ["dapi", "0"]) == ("DAPI", "PolyT")
    with pytest.raises(CellquiltError, match="it has PolyT, DAPI") as caught:
        engine.pick_channels(image, ["DAPY"])
    assert "DAPI" in caught.value.hint
    with pytest.raises(CellquiltError, match="both"):
        engine.length_px({"patch_width_px": 5, "patch_width_um": 2.0}, "patch_width", 0.5)


def test_an_overlap_below_two_diameters_is_refused(tmp_path):
    with pytest.raises(CellquiltError, match="two expected diameters"):
        run(tmp_path, "bright", patch_overlap_px=20)


@settings(max_examples=20, deadline=None)
@given(y=st.integers(0, 60), x=st.integers(0, 60))
def test_rainfall_does_not_depend_on_where_the_image_is_cut(y, x):
    image, _ = nuclei(220, spacing=17)
    values = (image[None].astype(np.float32) - 100) / 800
    whole = labels_to_polygons(rainfall(values, 12.0))[1]
    part = labels_to_polygons(rainfall(values[:, y : y + 150, x : x + 150], 12.0), (x, y))[1]
    inner = shapely.box(x + 24, y + 24, x + 126, y + 126)
    expected, found = ({cell.wkb for cell in cells[shapely.within(cells, inner)]} for cells in (whole, part))
    assert len(expected) > 5
    assert expected == found


def test_rainfall_splits_what_touches():
    y, x = np.mgrid[:40, :60]
    image = np.maximum(np.exp(-((y - 20) ** 2 + (x - 20) ** 2) / 60), np.exp(-((y - 20) ** 2 + (x - 36) ** 2) / 60))
    labels = rainfall(image[None].astype(np.float32), 16.0)
    assert labels.max() == 2
    assert labels[20, 20] != labels[20, 36]


# --- resampling and tiles


@pytest.mark.parametrize("factor", [0.37, 1.0, 1.9])
def test_a_part_is_resampled_as_the_whole(factor):
    image = np.random.default_rng(0).random((1, 200, 180), dtype=np.float32)
    rows, columns = (Lattice(tile=224, rescale=factor).axis(n) for n in image.shape[1:])
    reach = max(1.0, rows.step)

    def resized(part, y, x, y0, y1, x0, x1):
        return resample(
            part,
            taps(rows.position(np.arange(y0, y1)), reach, y, y + part.shape[1]),
            taps(columns.position(np.arange(x0, x1)), reach, x, x + part.shape[2]),
        )

    whole = resized(image, 0, 0, 0, rows.resized, 0, columns.resized)
    a, b = int(80 * factor), int(110 * factor)
    part = resized(image[:, 60:140, 50:150], 60, 50, a, b, a, b)
    np.testing.assert_array_equal(part, whole[:, a:b, a:b])
    np.testing.assert_allclose(resized(np.ones_like(image), 0, 0, 0, rows.resized, 0, columns.resized), 1, rtol=1e-6)


@pytest.mark.parametrize("rescale", [0.6, 1.0, 1.5])
def test_tiles_of_a_patch_blend_to_the_same_flows_as_those_of_the_slide(rescale):
    """With a stand-in for the network that depends on the tile it sees."""
    image = np.random.default_rng(1).random((1, 700, 900), dtype=np.float32)
    lattice = Lattice(tile=224, rescale=rescale)
    axes = lattice.axis(700), lattice.axis(900)

    def flows(patch):
        y0, y1, x0, x1 = patch.context
        tiles = cellpose.cut_tiles(axes, cellpose._tiles(axes, patch), image[:, y0:y1, x0:x1], (y0, x0), 2)
        outputs = {
            key: np.stack([tile[0] - tile.mean(), tile[0] * 2, tile[0] + tile[1]]) for key, tile in tiles.items()
        }
        return cellpose.blend_tiles(axes, patch, outputs)

    whole = flows(make_grid((700, 900), lattice=lattice).patches[0])
    assert whole.shape == (3, 700, 900)
    grid = make_grid((700, 900), width_px=256, overlap_px=40, lattice=lattice)
    assert len(grid.patches) > 1
    for patch in grid.patches:
        y0, y1, x0, x1 = patch.window
        np.testing.assert_array_equal(flows(patch), whole[:, y0:y1, x0:x1])


# --- from flows to masks


def ideal_flows(labels):
    """Unit flow towards each label's centre."""
    flows = np.zeros((3, *labels.shape), np.float32)
    flows[2] = -5
    for number in range(1, labels.max() + 1):
        y, x = np.nonzero(labels == number)
        dy, dx = y.mean() - y, x.mean() - x
        length = np.maximum(np.hypot(dy, dx), 1e-6)
        flows[0, y, x], flows[1, y, x], flows[2, y, x] = 5 * dy / length, 5 * dx / length, 5
    return flows


def disks():
    labels = np.zeros((80, 120), np.int32)
    y, x = np.mgrid[:80, :120]
    for number, (cy, cx, radius) in enumerate([(20, 20, 9), (20, 37, 8), (55, 60, 14), (60, 100, 6)], 1):
        labels[((y - cy) ** 2 + (x - cx) ** 2 < radius**2) & (labels == 0)] = number
    return labels


def test_masks_from_ideal_flows_are_the_labels():
    labels = disks()
    masks = masks_from_flows(ideal_flows(labels))
    np.testing.assert_array_equal(masks, in_raster_order(labels))
    np.testing.assert_array_equal(masks_from_flows(ideal_flows(labels), threads=3), masks)


def test_masks_do_not_depend_on_where_the_image_is_cut():
    flows = ideal_flows(disks())
    whole = masks_from_flows(flows)
    part = masks_from_flows(flows[:, 3:, 5:])
    np.testing.assert_array_equal(part, in_raster_order(whole[3:, 5:]))


def test_masks_that_disagree_with_the_flow_are_dropped():
    flows = ideal_flows(disks())
    y, x = np.nonzero(disks() == 3)
    turned = flows.copy()
    angle = np.random.default_rng(0).uniform(-2, 2, len(y))
    turned[0, y, x] = flows[0, y, x] * np.cos(angle) - flows[1, y, x] * np.sin(angle)
    turned[1, y, x] = flows[0, y, x] * np.sin(angle) + flows[1, y, x] * np.cos(angle)
    at = disks() == 3
    assert (masks_from_flows(turned, flow_threshold=0.2)[at] > 0).mean() < 0.2
    assert (masks_from_flows(turned, flow_threshold=0)[at] > 0).mean() > 0.5


def test_thresholds_and_nothing_at_all():
    flows = ideal_flows(disks())
    assert masks_from_flows(flows, cellprob_threshold=6).max() == 0
    assert masks_from_flows(flows, min_size_px=150).max() == 3
    assert masks_from_flows(np.zeros((3, 5, 5), np.float32)).shape == (5, 5)


# --- diameter, weights, planning


def test_the_diameter_is_measured():
    image, _ = slide(800)
    from cellquilt.patches.normalize import estimate_normalization

    found, count = estimate_diameter(image, "DAPI", estimate_normalization(image, ["DAPI"]))
    assert abs(found - 12) < 2
    assert count > 50
    assert typical_diameter(radii_of(np.zeros((100, 100), np.float32))) is None


def test_cellpose_plans_without_its_library(tmp_path):
    image, _ = slide(800)
    plan = engine.plan("cellpose", image, {"cellpose_diameter_um": 6.0})
    assert plan.diameter_px == 12
    assert plan.lattice.rescale == pytest.approx(read_metadata(cellpose.SHIPPED_FILE)["diam_mean_px"] / 12)
    assert plan.facts["diameter_from"] == "setting"
    assert engine.plan("cellpose", image).facts["diameter_from"] == "estimate"
    with pytest.raises(CellquiltError, match="at most 2"):
        engine.plan("cellpose", image, {"cellpose_channels": ["DAPI", "PolyT", "DAPI"]})
    four = engine.plan("cellpose", image, {"cellpose_generation": "4", "cellpose_model": "cpsam"})
    assert (four.lattice.tile, four.lattice.rescale) == (256, 1.0)


def test_weights_that_are_not_there_are_named_with_the_step_that_gets_them(monkeypatch, tmp_path):
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
    with pytest.raises(CellquiltError, match="cyto3") as caught:
        cellpose.find_weights("cyto3")
    assert caught.value.code == "weights-missing"
    assert "cellquilt download-weights cyto3" in caught.value.hint
    (tmp_path / "cyto3").write_bytes(b"weights")
    assert cellpose.find_weights("cyto3") == tmp_path / "cyto3"


def test_the_record_names_no_folder(tmp_path):
    _, _, records, _ = run(tmp_path / "planted-name", "bright")
    assert "planted-name" not in json.dumps(records)


def test_importing_a_method_does_not_import_its_engine():
    code = (
        "import sys, cellquilt.segment.run, cellquilt.segment.cellpose, cellquilt.segment.generic;"
        "heavy = {'torch', 'cellpose', 'skimage', 'pandas', 'spatialdata', 'zarr'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


def test_a_task_costs_little_beside_its_engine(tmp_path):
    """Pandas would be half a second of each of many thousand tasks; pyarrow imports it when given NumPy arrays."""
    path = tmp_path / "cells.parquet"
    code = (
        "import sys, resource, numpy, shapely, cellquilt.segment.run as run;"
        "from cellquilt.core.shapes import write_geoparquet;"
        "geometry = shapely.box(numpy.arange(3), 0, numpy.arange(3) + 1, 2);"
        "columns = {'label': numpy.arange(3, dtype='int32'), 'cut': numpy.array([True, False, True])};"
        f"write_geoparquet({str(path)!r}, geometry, columns);"
        "assert 'pandas' not in sys.modules;"
        "used = resource.getrusage(resource.RUSAGE_SELF); assert used.ru_utime + used.ru_stime < 4, used"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    frame = geopandas.read_parquet(path)
    assert (frame["label"].tolist(), frame["cut"].tolist()) == ([0, 1, 2], [True, False, True])
    assert frame.geometry.bounds["maxx"].tolist() == [1, 2, 3]
