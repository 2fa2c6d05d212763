"""Xenium Explorer: what the folder holds is what the store holds, whoever reads it; and the way back."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import cellquilt as cq
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapely
import spatialdata
import tifffile
import zarr
from cellquilt.cli import main
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import Image, ImageWriter
from cellquilt.core.points import PointsWriter, iter_points
from cellquilt.core.shapes import ShapesTable, read_shapes, write_shapes
from cellquilt.core.store import Store, new_store
from cellquilt.core.tables import one_category, write_table
from cellquilt.core.tiff_pyramid import write_pyramid
from cellquilt.core.transforms import apply
from cellquilt.core.xenium import xenium_ids, xenium_numbers
from cellquilt.core.zarr_zip import ZarrZip, ZarrZipFile
from cellquilt.explorer.folder import letters_of
from cellquilt.explorer.image import to_8_bits, whites
from cellquilt.explorer.simplify import simplified
from cellquilt.explorer.slide import ViewedSlide
from cellquilt.explorer.transcripts import depth
from cellquilt.geometry.polygons import Rings
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

write = cq.io.explorer.write
DATA = Path(__file__).parents[1] / "data"
ZIPS = ("analysis.zarr.zip", "cell_feature_matrix.zarr.zip", "cells.zarr.zip", "transcripts.zarr.zip")


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 0, arguments


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A simulated Xenium slide, 2600 × 256 pixels, with the machine's cells counted: that of the recorded layout."""
    folder = tmp_path_factory.mktemp("explorer")
    cq.simulate(folder / "sim", width_px=2600, height_px=256, seed=4, format="xenium")
    path = folder / "s.zarr"
    run("convert", folder / "sim" / "slide_0", "--technology", "xenium", "-o", path)
    run("resolve", "vendor", path)
    run("aggregate", path)
    return path


@pytest.fixture(scope="module")
def folder(store) -> Path:
    """The store's Explorer folder, with the tables of a bundle."""
    path = store.parent / "s.explorer"
    write(store, path, tables=True)
    return path


def opened(folder: Path, name: str) -> Any:
    return zarr.open_group(zarr.storage.ZipStore(folder / name, mode="r", read_only=True), mode="r")


def points_of(store: Path) -> pd.DataFrame:
    return pa.concat_tables(iter_points(store / "points" / "transcripts")).to_pandas()


def code(error: pytest.ExceptionInfo[CellquiltError]) -> str:
    return error.value.code


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# --- the same as the store


def test_transcripts_are_all_there_once(store, folder):
    root, table = opened(folder, "transcripts.zarr.zip"), points_of(store)
    grids = root["grids"].attrs
    parts: dict[str, list[np.ndarray]] = {
        "location": [],
        "gene_identity": [],
        "quality_score": [],
        "id": [],
        "valid": [],
    }
    for key in grids["grid_keys"][0]:
        tile = root[f"grids/0/{key}"]
        for name, values in parts.items():
            values.append(tile[name][:])
    found = {name: np.concatenate(values) for name, values in parts.items()}
    order = np.argsort(found["id"][:, 0])
    assert found["id"][order, 0].tolist() == table["transcript_id"].tolist()
    np.testing.assert_array_equal(found["location"][order], table[["x", "y", "z"]].to_numpy(np.float32))
    names = np.array(root.attrs["gene_names"])
    assert names[found["gene_identity"][order, 0]].tolist() == table["gene"].tolist()
    np.testing.assert_array_equal(found["quality_score"][order, 0], table["qv"].to_numpy(np.float32))
    assert (found["valid"][order, 0] == 1).tolist() == table["passes_qv"].tolist()
    category = root["gene_category"][:]
    control = dict(zip(table["gene"], table["is_control"], strict=True))
    assert (~category[:, 0]).tolist() == [control[name] for name in names]
    assert (category.sum(axis=1) == 1).all()
    assert category[[name.startswith("NegControlCodeword") for name in names], 2].all()


def test_a_level_shows_a_quarter_of_the_one_below(folder):
    root = opened(folder, "transcripts.zarr.zip")
    grids = root["grids"].attrs
    n = [sum(counts) for counts in grids["grid_number_objects"]]
    assert grids["number_levels"] == len(n) == 3
    assert len(grids["grid_keys"][-1]) == 1
    for below, above in itertools.pairwise(n):
        assert above / below == pytest.approx(0.25, rel=0.05)
    ids = [
        {int(number) for key in keys for number in root[f"grids/{level}/{key}/id"][:, 0]}
        for level, keys in enumerate(grids["grid_keys"])
    ]
    assert ids[2] < ids[1] < ids[0]
    for level, keys in enumerate(grids["grid_keys"]):
        assert keys == sorted(keys, key=lambda key: tuple(map(int, key.split(","))))
        for key in keys:
            place = root[f"grids/{level}/{key}/location"][:, :2] // (250 * 2**level)
            assert (place == [int(part) for part in key.split(",")]).all()


def test_densities_are_histograms(store, folder):
    root, table = opened(folder, "transcripts.zarr.zip"), points_of(store)
    group = root["density/gene"]
    about = group.attrs
    dense = csr_matrix(
        (group["data"][:], group["indices"][:], group["indptr"][:]),
        shape=(len(about["gene_names"]) * about["rows"], about["cols"]),
    ).toarray()
    dense = dense.reshape(len(about["gene_names"]), about["rows"], about["cols"])
    gene = table["gene"].map({name: k for k, name in enumerate(about["gene_names"])}).to_numpy()
    edges = [
        np.arange(size + 1) * 10.0 + about["origin"][axis]
        for size, axis in ((about["rows"], "y"), (about["cols"], "x"))
    ]
    wanted, _ = np.histogramdd(
        np.column_stack([gene, table["y"].to_numpy(np.float32), table["x"].to_numpy(np.float32)]),
        bins=[np.arange(len(about["gene_names"]) + 1), *edges],
    )
    np.testing.assert_array_equal(dense, wanted)
    metrics = root["metrics_density"][:]
    assert metrics[:, :, 0].sum() == len(table)
    of_probes = table["gene"].isin(
        [n for n, c in zip(about["gene_names"], root["gene_category"][:], strict=True) if c[1]]
    )
    assert metrics[:, :, 2].sum() == of_probes.sum() > 0


def test_memory_and_order_change_nothing(store, folder, tmp_path):
    write(store, tmp_path / "x", mode="+tc", memory_mb=2)  # many parts, on disk
    again = files(tmp_path / "x")
    assert again["cell_feature_matrix.zarr.zip"] == (folder / "cell_feature_matrix.zarr.zip").read_bytes()
    ours, whole = opened(tmp_path / "x", "transcripts.zarr.zip"), opened(folder, "transcripts.zarr.zip")
    assert dict(ours["grids"].attrs) == dict(whole["grids"].attrs)
    for path, array in whole.members(max_depth=None):
        if isinstance(array, zarr.Array):
            np.testing.assert_array_equal(ours[path][:], array[:], err_msg=path)
    assert not [name for name in os.listdir(tmp_path / "x") if name.startswith(".")]


def test_same_slide_same_bytes(store, folder, tmp_path):
    write(store, tmp_path / "x", tables=True)
    left, right = files(tmp_path / "x"), files(folder)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] in ([], ["cell_feature_matrix.h5"])  # HDF5 notes times


def test_cells_and_nuclei(store, folder):
    root = opened(folder, "cells.zarr.zip")
    cells, nuclei = (read_shapes(store / "shapes" / f"{kind}_boundaries") for kind in ("cell", "nucleus"))
    summary = pd.DataFrame(root["cell_summary"][:], columns=root["cell_summary"].attrs["column_names"])
    matrix = Image(store / "images" / "morphology").transforms["microns"]
    to_um = cells.transforms["microns"]
    area = shapely.area(cells.geometry) * np.linalg.det(to_um[:2, :2])
    np.testing.assert_allclose(summary["cell_area"], area)
    centres = apply(to_um, shapely.get_coordinates(shapely.centroid(cells.geometry)))
    np.testing.assert_allclose(summary[["cell_centroid_x", "cell_centroid_y"]], centres)
    assert np.allclose(matrix, np.diag([0.2125, 0.2125, 1]))
    row = {name: k for k, name in enumerate(cells.ids)}
    owner = np.array([row[name] for name in nuclei.ids])
    assert root["polygon_sets/0/cell_index"][:].tolist() == owner.tolist()
    assert root["polygon_sets/1/cell_index"][:].tolist() == list(range(len(cells)))
    np.testing.assert_allclose(summary["nucleus_area"].to_numpy()[owner], shapely.area(nuclei.geometry) * 0.2125**2)
    assert summary["nucleus_count"].sum() == len(nuclei)
    assert summary["nucleus_area"].isna().sum() == len(cells) - len(set(owner)) > 0
    for key, shapes in (("0", nuclei), ("1", cells)):
        vertices = root[f"polygon_sets/{key}/vertices"][:].reshape(-1, 25, 2)
        shown = shapely.polygons(vertices.astype(np.float64))
        true = shapely.transform(shapes.geometry, lambda xy: apply(to_um, xy))
        assert shapely.is_valid(shown).all()
        largest = np.array([max(shapely.get_parts(polygon), key=lambda part: part.area) for polygon in true])
        filled = shapely.polygons(shapely.get_exterior_ring(largest))
        np.testing.assert_allclose(shapely.area(shown), shapely.area(filled), rtol=1e-4)  # single precision
        iou = shapely.area(shapely.intersection(shown, filled)) / shapely.area(shapely.union(shown, filled))
        assert np.median(iou) > 0.96
        assert iou.min() > 0.9
    names = pd.read_csv(folder / "cell_ids.csv")
    assert names["store_cell_id"].tolist() == cells.ids.tolist()
    assert names["cell_id"].tolist() == xenium_ids(root["cell_id"][:, 0]).tolist()


def test_counts(store, folder):
    group = opened(folder, "cell_feature_matrix.zarr.zip")["cell_features"]
    table = spatialdata.read_zarr(store).tables["table"]
    names = group.attrs["feature_keys"]
    assert names == [*table.var_names, "Total transcripts"]
    found = csr_matrix((group["data"][:], group["indices"][:], group["indptr"][:]), shape=(len(names), table.n_obs))
    np.testing.assert_array_equal(found[:-1].T.toarray(), table.X.toarray())
    np.testing.assert_array_equal(found[-1].toarray()[0], np.asarray(table.X.sum(axis=1)).ravel())


def test_groups(store, tmp_path):
    sdata = spatialdata.read_zarr(store)
    obs = sdata.tables["table"].obs  # in memory only: what a notebook has
    obs["cell_type"] = pd.Categorical.from_codes(np.arange(len(obs)) % 3, ["b", "a", "c"])
    obs["leiden"] = [f"L{k % 4}" for k in range(len(obs))]
    obs.loc[obs.index[:5], "cell_type"] = np.nan
    obs["score"] = np.linspace(0, 1, len(obs))
    obs["own_name"] = obs.index.to_numpy()
    write(sdata, tmp_path / "x", mode="+bo")
    group = opened(tmp_path / "x", "analysis.zarr.zip")["cell_groups"]
    names = dict(zip(group.attrs["grouping_names"], group.attrs["group_names"], strict=True))
    assert set(names) == {"passes_qc", "qc_reason", "cell_type", "leiden"}
    assert names["cell_type"] == ["b", "a", "c", "NA"]
    for k, (column, known) in enumerate(names.items()):
        starts = [*group[f"{k}/indptr"][:], len(obs)]
        for number, name in enumerate(known):
            cells = group[f"{k}/indices"][starts[number] : starts[number + 1]]
            if column in ("cell_type", "leiden"):
                wanted = obs[column].astype(object).fillna("NA") == name
                assert cells.tolist() == np.flatnonzero(wanted).tolist()


def test_floats_are_rounded_with_a_notice(store, tmp_path, caplog):
    sdata = spatialdata.read_zarr(store)
    table = sdata.tables["table"]
    table.layers["expected"] = (table.X * 1.3).tocsr()
    with caplog.at_level("WARNING", logger="cellquilt"):
        write(sdata, tmp_path / "x", mode="+c", layer="expected")
    assert "are rounded" in caplog.text
    group = opened(tmp_path / "x", "cell_feature_matrix.zarr.zip")["cell_features"]
    shape = (table.n_vars + 1, table.n_obs)
    found = csr_matrix((group["data"][:], group["indices"][:], group["indptr"][:]), shape=shape)[:-1].T.toarray()
    np.testing.assert_array_equal(found, np.rint(table.layers["expected"].toarray()))


# --- the image


def test_the_image_is_the_stores_and_each_level_knows_its_pixels(store, folder):
    image = Image(store / "images" / "morphology")
    white = whites(image)
    with tifffile.TiffFile(folder / "morphology.ome.tif") as tiff:
        levels = tiff.series[0].levels
        assert [level.shape for level in levels] == [(4, 256 >> k, 2600 >> k) for k in range(5)]
        pixels = levels[0].asarray()
        for channel, name in enumerate(image.channels):
            shown = np.empty((256, 2600), np.uint8)
            to_8_bits(image.read(0, 256, 0, 2600, channels=[name])[0], white[name], shown)
            np.testing.assert_array_equal(pixels[channel], shown)
        for k, level in enumerate(levels):
            over, under = level.pages[0].tags["XResolution"].value
            assert 1e4 * under / over == pytest.approx(0.2125 * 2**k, rel=1e-4)
            assert level.pages[0].tags["ResolutionUnit"].value == 3
            assert level.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        half = pixels.astype(np.uint32).reshape(4, 128, 2, 1300, 2).sum(axis=(2, 4))
        np.testing.assert_array_equal(levels[1].asarray(), (half + 2) // 4)
        names = re.findall(r'<Channel[^>]* Name="([^"]*)"', tiff.ome_metadata)
    assert names == image.channels


def test_twelve_bits_are_not_black(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 3000, (1, 300, 310), dtype=np.uint16)
    pixels[0, 5, 7] = 65535  # a hot pixel
    with ImageWriter(tmp_path / "image", pixels.shape, np.uint16, ["DAPI"], {"global": np.eye(3)}) as writer:
        writer.write(pixels, 0, 0)
    white = whites(Image(tmp_path / "image"))
    assert 2900 < white["DAPI"] < 3100
    shown = np.empty((300, 310), np.uint8)
    to_8_bits(pixels[0], white["DAPI"], shown)
    assert np.median(shown) == pytest.approx(127, abs=4)
    assert (shown.min(), shown.max()) == (0, 255)


@pytest.mark.parametrize("shape", [(1, 1000, 1300), (2, 513, 257), (1, 2, 700), (1, 90, 80)])
def test_pyramids_of_odd_sizes(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    tiles = (
        plane[y : y + 128, x : x + 128]
        for plane in pixels
        for y in range(0, shape[1], 128)
        for x in range(0, shape[2], 128)
    )
    write_pyramid(tmp_path / "x.ome.tif", tiles, shape, np.uint8, tile_px=128, compression="deflate", pixel_size_um=1)
    with tifffile.TiffFile(tmp_path / "x.ome.tif") as tiff:
        for level in tiff.series[0].levels:
            np.testing.assert_array_equal(level.asarray().reshape(pixels.shape), pixels)
            _, high, wide = pixels.shape
            even = pixels[:, : high // 2 * 2, : wide // 2 * 2].astype(np.uint32)
            sums = even.reshape(shape[0], high // 2, 2, wide // 2, 2).sum(axis=(2, 4))
            pixels = ((sums + 2) // 4).astype(np.uint8)
    assert os.listdir(tmp_path) == ["x.ome.tif"]


# --- read by others


def test_our_reader_opens_the_folder_again(store, folder, tmp_path):
    run("convert", folder, "--technology", "xenium", "--xenium-image", "none", "-o", tmp_path / "again.zarr")
    names = dict(pd.read_csv(folder / "cell_ids.csv").to_numpy())
    was, found = points_of(store), points_of(tmp_path / "again.zarr")
    for column in ("x", "y", "z", "qv"):
        np.testing.assert_array_equal(found[column].to_numpy(np.float32), was[column].to_numpy(np.float32))
    assert found["gene"].tolist() == was["gene"].tolist()
    assert found["is_control"].tolist() == was["is_control"].tolist()
    cells = read_shapes(tmp_path / "again.zarr" / "shapes" / "vendor_cells")
    assert [names[name] for name in cells.ids] == read_shapes(store / "shapes" / "cell_boundaries").ids.tolist()
    vertices = opened(folder, "cells.zarr.zip")["polygon_sets/1/vertices"][:].reshape(-1, 25, 2)
    np.testing.assert_allclose(shapely.area(cells.geometry), shapely.area(shapely.polygons(vertices)))
    image = tmp_path / "image.zarr"
    run("convert", folder / "morphology.ome.tif", "--technology", "ome_tif", "-o", image)
    read = Image(next((image / "images").glob("*/zarr.json")).parent)
    assert read.channels == Image(store / "images" / "morphology").channels
    assert read.pixel_size_um == 0.2125


@pytest.mark.filterwarnings("ignore")
def test_spatialdata_io_opens_the_folder(store, folder):
    from spatialdata_io import xenium

    sdata = xenium(
        folder, cells_labels=False, nucleus_labels=False, morphology_focus=False, morphology_mip=False,
        aligned_images=False, cells_as_circles=False,
    )  # fmt: skip
    names = dict(pd.read_csv(folder / "cell_ids.csv").to_numpy())
    table, ours = sdata.tables["table"], spatialdata.read_zarr(store).tables["table"]
    np.testing.assert_array_equal(table.X.toarray(), ours.X.toarray())
    assert [names[name] for name in table.obs["cell_id"]] == ours.obs_names.tolist()
    np.testing.assert_allclose(table.obs["cell_area"], ours.obs["area_um2"])
    root = opened(folder, "cells.zarr.zip")
    for name, key in (("cell_boundaries", "1"), ("nucleus_boundaries", "0")):
        vertices = root[f"polygon_sets/{key}/vertices"][:].reshape(-1, 25, 2)
        np.testing.assert_allclose(sdata.shapes[name].area, shapely.area(shapely.polygons(vertices)))
    points, was = sdata.points["transcripts"].compute(), points_of(store)
    assert len(points) == len(was)
    np.testing.assert_array_equal(points["x"], was["x"].to_numpy(np.float32))
    assert [names.get(name) for name in points["cell_id"]] == [None if pd.isna(c) else c for c in was["cell_id"]]


def test_the_layout_is_sopas_where_it_is_not_better(folder):
    """Field by field against what sopa 2.2.11 wrote of the same slide; docs/explorer.md says why what differs does."""
    path = Path(__file__).parents[1] / "benchmarks" / "explorer_layout.py"
    spec = importlib.util.spec_from_file_location("explorer_layout", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours, theirs = module.describe(folder), json.loads((DATA / "explorer_sopa_2.2.11.json").read_text())["files"]
    assert set(theirs) <= set(ours)

    def kinds(found: dict[str, Any]) -> dict[str, Any]:
        return {
            name: (node.get("dtype"), len(node.get("shape", [])), sorted(node.get("attributes", {})))
            for name, node in found.items()
        }

    name = "transcripts.zarr.zip"
    same = {k: v for k, v in kinds(theirs[name]).items() if not k.startswith("grids/")}
    assert {k: kinds(ours[name])[k] for k in same} == same
    fixed = ("codeword_count", "number_genes", "number_rnas", "major_version", "minor_version", "spatial_units",
             "coordinate_space", "data_format", "metrics_density_x_count", "metrics_density_y_count")  # fmt: skip
    for field in fixed:
        assert ours[name][""]["attributes"][field] == theirs[name][""]["attributes"][field], field
    ours_grids, their_grids = (found[name]["grids"]["attributes"] for found in (ours, theirs))
    assert ours_grids["grid_keys"] == their_grids["grid_keys"]
    assert ours_grids["grid_number_objects"][0] == their_grids["grid_number_objects"][0]
    assert ours[name]["density/gene/data"]["shape"] == theirs[name]["density/gene/data"]["shape"]
    for key in ("valid", "status", "location", "gene_identity", "quality_score", "codeword_identity", "uuid", "id"):
        assert ours[name][f"grids/0/1,0/{key}"] == theirs[name][f"grids/0/1,0/{key}"]
    name = "cell_feature_matrix.zarr.zip"
    assert kinds(ours[name]) == kinds(theirs[name])
    for field in ("feature_keys", "feature_types", "major_version", "number_cells", "number_features"):
        left, right = (found[name]["cell_features"]["attributes"][field] for found in (ours, theirs))
        assert left == right
    name = "analysis.zarr.zip"
    assert kinds(ours[name])["cell_groups/0/indices"] == kinds(theirs[name])["cell_groups/0/indices"]
    assert kinds(ours[name])["cell_groups"] == kinds(theirs[name])["cell_groups"]
    name = "cells.zarr.zip"  # two sets of polygons of version 6, where sopa has one array of version 5
    assert set(theirs[name]) - set(ours[name]) == {"polygon_num_vertices", "polygon_vertices", "seg_mask_value"}
    assert ours[name]["cell_id"] == theirs[name]["cell_id"]
    assert (
        ours[name]["cell_summary"]["attributes"]["column_names"][:7]
        == theirs[name]["cell_summary"]["attributes"]["column_names"]
    )
    name = "morphology.ome.tif"
    assert ours[name]["levels"] == theirs[name]["levels"][: len(ours[name]["levels"])]
    assert (ours[name]["dtype"], ours[name]["tile"]) == (theirs[name]["dtype"], theirs[name]["tile"])
    assert ours[name]["um_a_pixel"] == pytest.approx([0.2125 * 2**k for k in range(5)], rel=1e-4)
    assert theirs[name]["um_a_pixel"][1] == pytest.approx(0.2125 / 2, rel=1e-4)  # the wrong way
    name = "experiment.xenium"
    assert set(theirs[name]) == set(ours[name])
    for field in ("major_version", "num_cells", "pixel_size", "images", "z_step_size"):
        assert ours[name][field] == theirs[name][field]


# --- parts


def test_modes():
    assert letters_of(None) == set("itcbom")
    assert letters_of(None, tables=True) == set("itcbomp")
    assert letters_of("-it") == set("cbom")
    assert letters_of("+o") == {"o"}
    for mode in ("o", "+", "-x", "", "+ox"):
        with pytest.raises(CellquiltError) as error:
            letters_of(mode)
        assert code(error) == "explorer-mode"


def test_a_mode_rewrites_only_what_it_names(store, tmp_path):
    write(store, tmp_path / "x")
    (tmp_path / "x" / "my selection.csv").write_text("mine")
    (tmp_path / "x" / "analysis.zarr.zip").write_bytes(b"old")
    before = {path.name: path.stat().st_ino for path in (tmp_path / "x").iterdir()}
    write(store, tmp_path / "x", mode="+o")
    after = {path.name: path.stat().st_ino for path in (tmp_path / "x").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"analysis.zarr.zip"}
    assert cq.io.explorer.validate(tmp_path / "x")["groupings"] == 2
    run("explorer", "write", store, "-o", tmp_path / "x", "--mode", "-itb")
    last = {path.name: path.stat().st_ino for path in (tmp_path / "x").iterdir()}
    assert {name for name in last if last[name] != after[name]} == {
        "analysis.zarr.zip", "cell_feature_matrix.zarr.zip", "experiment.xenium",
    }  # fmt: skip
    assert (tmp_path / "x" / "my selection.csv").read_text() == "mine"
    with pytest.raises(CellquiltError) as error:
        write(store, tmp_path / "x")
    assert code(error) == "output-exists"


def test_a_killed_write_leaves_the_earlier_folder(store, tmp_path):
    write(store, tmp_path / "x", mode="+bocm")
    before = files(tmp_path / "x")
    script = f"""
import os, signal
from cellquilt.explorer import folder, write
folder.write_groups = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
write({str(store)!r}, {str(tmp_path / "x")!r}, mode="+bco")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert files(tmp_path / "x") == before


def test_a_part_of_other_cells_is_refused(store, tmp_path):
    write(store, tmp_path / "x", mode="+bocm")
    before = files(tmp_path / "x")
    few = tmp_path / "few.zarr"
    shutil.copytree(store, few)
    cells = read_shapes(store / "shapes" / "cell_boundaries").take(np.arange(50))
    shutil.rmtree(few / "shapes" / "cell_boundaries")
    write_shapes(few / "shapes" / "cell_boundaries", cells)
    with pytest.raises(CellquiltError) as error:
        write(few, tmp_path / "x", mode="+o")
    assert code(error) == "explorer-invalid"
    assert str(tmp_path / "x") in error.value.message
    assert files(tmp_path / "x") == before


def test_either_order_and_an_object(tmp_path):
    sdata = spatialdata.read_zarr(small(tmp_path / "s.zarr"))
    assert write(tmp_path / "a", sdata, mode="+m") == write(sdata, tmp_path / "b", mode="+m") == {}


def test_update_obs(store, tmp_path):
    write(store, tmp_path / "x", mode="+bom")
    table = spatialdata.read_zarr(store).tables["table"][::-1].copy()  # rows in another order
    table.obs["mine"] = pd.Categorical([f"t{k % 2}" for k in range(table.n_obs)])
    table.write_h5ad(tmp_path / "t.h5ad")
    run("explorer", "update-obs", tmp_path / "t.h5ad", tmp_path / "x", "--column", "mine")
    group = opened(tmp_path / "x", "analysis.zarr.zip")["cell_groups"]
    assert group.attrs["grouping_names"] == ["mine"]
    wanted = np.flatnonzero((table.obs["mine"] == "t1").to_numpy()[::-1])
    assert group["0/indices"][int(group["0/indptr"][1]) :].tolist() == wanted.tolist()


# --- slides of other kinds


def small(path: Path, *, image: bool = True, table: bool = False, offset: float = 0.0) -> Path:
    """Three squares, twenty transcripts; µm begin `offset` away from the image's corner."""
    to_um = np.array([[0.5, 0, offset], [0, 0.5, offset], [0, 0, 1]])
    with new_store(path, sample="small") as made:
        if image:
            maps = {"global": np.eye(3), "microns": to_um}
            with ImageWriter(made.new_element("images", "main"), (1, 100, 120), np.uint8, ["c"], maps) as writer:
                writer.write(np.full((1, 100, 120), 7, np.uint8), 0, 0)
        squares = np.array([shapely.box(x, 10, x + 10, 20) for x in (10, 40, 70)], dtype=object)
        ids = np.array(["s-1", "s-2", "s-3"])
        maps = {"microns": to_um} | ({"global": np.eye(3)} if image else {})
        write_shapes(made.new_element("shapes", "cell_boundaries"), ShapesTable(ids, squares, {}, maps))
        maps = {"microns": np.eye(3)} | ({"global": np.linalg.inv(to_um)} if image else {})
        with PointsWriter(made.new_element("points", "transcripts"), maps) as points:
            x = np.linspace(1, 40, 20) + offset
            gene = pa.array([f"g{k % 3}" for k in range(20)]).dictionary_encode()
            points.write(pa.table({"x": x, "y": x, "gene": gene}))
        if table:
            obs = pd.DataFrame({"cell_id": ids, "kind": pd.Categorical(["a", "b", "a"])}, index=ids)
            obs["region"] = one_category("cell_boundaries", 3)
            annotation = {"region": "cell_boundaries", "region_key": "region", "instance_key": "cell_id"}
            counts = csr_matrix(np.array([[1, 0], [2, 5], [0, 0]], np.int32))
            write_table(made.new_element("tables", "table"), obs, ["g0", "g1"], [counts], annotation)
    return path


def test_the_viewer_begins_at_the_images_corner(tmp_path):
    write(small(tmp_path / "s.zarr", offset=500.0), tmp_path / "x")
    summary = opened(tmp_path / "x", "cells.zarr.zip")["cell_summary"][:]
    np.testing.assert_allclose(summary[:, :3], [[7.5, 7.5, 25], [22.5, 7.5, 25], [37.5, 7.5, 25]])
    assert np.isnan(summary[:, 3:6]).all()
    location = opened(tmp_path / "x", "transcripts.zarr.zip")["grids/0/0,0/location"][:]
    np.testing.assert_allclose(location[:, 0], np.linspace(1, 40, 20), rtol=1e-4)
    assert json.loads((tmp_path / "x" / "experiment.xenium").read_text())["pixel_size"] == 0.5


def test_transcripts_left_of_the_image_are_told(tmp_path, caplog):
    path = small(tmp_path / "s.zarr", offset=0.0)
    shutil.rmtree(path / "points" / "transcripts")
    maps = {"microns": np.eye(3), "global": np.diag([2.0, 2.0, 1.0])}
    with PointsWriter(path / "points" / "transcripts", maps) as points:
        gene = pa.array(["a", None, "a", "b"]).dictionary_encode()
        points.write(pa.table({"x": [-1.0, 5, 300, np.nan], "y": [3.0, 5, 260, 1], "gene": gene}))
    with caplog.at_level("WARNING", logger="cellquilt"):
        found = write(path, tmp_path / "x")
    assert "2 transcripts lie left of or above" in caplog.text
    assert found["transcripts"] == 2
    attrs = opened(tmp_path / "x", "transcripts.zarr.zip").attrs
    assert attrs["gene_names"] == ["a", "b", "unnamed"]


def test_a_slide_without_an_image_gets_a_blank_one(tmp_path):
    path = small(tmp_path / "s.zarr", image=False, offset=-20.0)
    found = write(path, tmp_path / "x")
    assert (found["cells"], found["transcripts"], found["channels"]) == (3, 20, 1)
    location = opened(tmp_path / "x", "transcripts.zarr.zip")["grids/0/0,0/location"][:]
    assert location.min() >= 0
    selection = tmp_path / "coordinates.csv"
    summary = opened(tmp_path / "x", "cells.zarr.zip")["cell_summary"][:]
    x, y = summary[1, :2]
    selection.write_text(f"X,Y\n{x - 3},{y - 3}\n{x + 3},{y - 3}\n{x + 3},{y + 3}\n{x - 3},{y + 3}\n")
    cq.io.explorer.add_lasso(path, selection)
    shapes = read_shapes(path / "shapes" / "selections")
    um = shapely.transform(shapes.geometry, lambda xy: apply(shapes.transforms["microns"], xy))
    cells = read_shapes(path / "shapes" / "cell_boundaries")
    there = shapely.transform(cells.geometry, lambda xy: apply(cells.transforms["microns"], xy))
    assert shapely.contains(um[0], there).tolist() == [False, True, False]


def test_names_of_cells():
    names = np.array(["aaaaaaab-1", "s-7", "aaaachba-1", "aaaaaaaz-1", "aaaachba", "x" * 40])
    assert xenium_numbers(names).tolist() == [1, -1, 10000, -1, 10000, -1]
    numbers = np.array([0, 1, 10000, 2**32 - 1])
    assert xenium_numbers(xenium_ids(numbers)).tolist() == numbers.tolist()


# --- the way back


def test_lasso_selections(store, tmp_path):
    path = tmp_path / "s.zarr"
    shutil.copytree(store, path)
    file = tmp_path / "coordinates.csv"
    file.write_text(
        "#Selection names: left, right\n#Areas (µm^2): 1, 2\nSelection,X,Y\n"
        "left,0,0\nleft,200,0\nleft,200,60\nleft,0,60\nright,300,0\nright,500,0\nright,500,60\nright,300,60\n"
    )
    sdata = spatialdata.read_zarr(path)
    found = cq.io.explorer.add_lasso(sdata, file)
    obs, spatial = sdata.tables["table"].obs, sdata.tables["table"].obsm["spatial"]
    wanted = np.where(spatial[:, 0] < 200, "left", np.where((spatial[:, 0] > 300) & (spatial[:, 0] < 500), "right", ""))
    assert obs["selections"].astype(object).fillna("").tolist() == wanted.tolist()
    assert found == {"left": int((wanted == "left").sum()), "right": int((wanted == "right").sum())}
    assert found["left"] > 10
    shapes = spatialdata.transform(sdata.shapes["selections"], to_coordinate_system="global")
    assert shapes.loc["left"].geometry.bounds == pytest.approx((0, 0, 200 / 0.2125, 60 / 0.2125))
    with pytest.raises(CellquiltError) as error:
        cq.io.explorer.add_lasso(path, file)
    assert code(error) == "output-exists"


def test_cell_categories(store, folder, tmp_path):
    path = tmp_path / "s.zarr"
    shutil.copytree(store, path)
    names = pd.read_csv(folder / "cell_ids.csv")
    chosen = names.iloc[::3]
    chosen[["cell_id"]].assign(group="tumour").to_csv(tmp_path / "groups.csv", index=False)
    run("explorer", "selections", path, tmp_path / "groups.csv", "--groups", "--name", "mine", "--folder", folder)
    obs = spatialdata.read_zarr(path).tables["table"].obs
    assert obs.index[obs["mine"] == "tumour"].tolist() == chosen["store_cell_id"].tolist()
    assert obs["mine"].isna().sum() == len(obs) - len(chosen)
    assert cq.io.explorer.add_categories(path, tmp_path / "groups.csv", name="again") == {"tumour": len(chosen)}


def test_aligned_images(store, tmp_path):
    path, viewer = tmp_path / "s.zarr", tmp_path / "x"
    shutil.copytree(store, path)
    write(path, viewer, mode="+m")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "he.ome.tif", pixels, photometric="rgb")
    matrix = np.array([[0.0, -2.0, 300.0], [2.0, 0.0, 10.0], [0, 0, 1]])
    np.savetxt(tmp_path / "m.csv", matrix, delimiter=",")
    run("explorer", "add-aligned", path, tmp_path / "he.ome.tif", tmp_path / "m.csv", "--folder", viewer)
    image = Image(path / "images" / "he")
    np.testing.assert_allclose(image.transforms["global"], matrix)
    np.testing.assert_allclose(image.transforms["microns"], np.diag([0.2125, 0.2125, 1]) @ matrix)
    np.testing.assert_array_equal(image.read(0, 64, 0, 80), pixels.transpose(2, 0, 1))
    np.testing.assert_allclose(np.loadtxt(viewer / "he_alignment.csv", delimiter=","), matrix)
    with tifffile.TiffFile(viewer / "he.ome.tif") as tiff:
        np.testing.assert_array_equal(tiff.series[0].levels[0].asarray(), pixels.transpose(2, 0, 1))
    # With two images, the one whose pixels are the slide's is still the viewer's.
    assert ViewedSlide(Store(path)).image.element.name == "morphology"
    spatialdata.read_zarr(path)


# --- polygons


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(5, 25))
def test_simplified_outlines_keep_their_area(seed, limit):
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 120)))
    radius = rng.uniform(3, 10, angle.size)
    outline = shapely.make_valid(
        shapely.Polygon(np.column_stack([radius * np.cos(angle), radius * np.sin(angle)]) + 50)
    )
    outline = max(shapely.get_parts(outline), key=lambda part: part.area)
    outline = shapely.Polygon(outline.exterior) if outline.geom_type == "Polygon" else shapely.Polygon()
    if outline.area < 1e-3:
        return
    vertices, n = simplified(Rings.from_shapely([outline, shapely.Polygon(), outline.reverse()]), limit)
    assert n[1] == 0
    assert 4 <= n[0] <= limit
    shown = shapely.polygons(vertices[[0, 2]])
    assert shapely.area(shown) == pytest.approx(outline.area, rel=1e-6)
    assert (vertices[0, n[0] - 1 :] == vertices[0, 0]).all()
    few = len(outline.exterior.coords)
    if few <= limit:
        assert shapely.equals(shown[0], outline)


def test_squares_stay_squares():
    steps = [(x, 0) for x in range(10)] + [(10, y) for y in range(10)]
    steps += [(x, 10) for x in range(10, 0, -1)] + [(0, y) for y in range(10, 0, -1)]
    vertices, n = simplified(Rings.from_shapely([shapely.Polygon(steps)]), 5)
    assert n.tolist() == [5]
    assert shapely.equals(shapely.Polygon(vertices[0]), shapely.box(0, 0, 10, 10))


def test_depth_is_a_quarter_each():
    found = depth(np.arange(400_000, dtype=np.uint64))
    shares = [(found >= level).mean() for level in range(4)]
    np.testing.assert_allclose(shares, [1, 1 / 4, 1 / 16, 1 / 64], rtol=0.03)


def test_zipped_arrays_are_read_as_zarr_reads_them(tmp_path):
    values = np.random.default_rng(0).integers(0, 9, (7, 5)).astype(np.uint16)
    with ZarrZip(tmp_path / "a.zip", "blosc") as made:
        made.group("", {"a": 1})
        made.header("x", (7, 5), (4, 3), values.dtype, {"b": 2})
        for i in range(2):
            for j in range(2):
                block = np.zeros((4, 3), np.uint16)
                part = values[4 * i : 4 * i + 4, 3 * j : 3 * j + 3]
                block[: part.shape[0], : part.shape[1]] = part
                made.chunk("x", (i, j), block)
    with ZarrZipFile(tmp_path / "a.zip") as found:
        np.testing.assert_array_equal(found.array("x"), values)
        assert (found.attributes(), found.attributes("x")) == ({"a": 1}, {"b": 2})
    np.testing.assert_array_equal(opened(tmp_path, "a.zip")["x"][:], values)


# --- what is wrong is said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no column X"),
        ("X,Y\n", "has no points"),
        ("X,Y\n1,2\n3,4\n", "has 2 points"),
        ("X,Y\n1,2\n3,x\n5,6\n", "point 2: X is '3', Y is 'x'"),
        ("X,Y\n0,0\n1,1\n2,2\n", "has no area"),
        ("a,b\n1,2\n", "columns: a, b"),
    ],
)
def test_bad_selections(store, tmp_path, text, said):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(CellquiltError, match=re.escape(said)) as error:
        cq.io.explorer.add_lasso(store, tmp_path / "c.csv")
    assert code(error) == "explorer-selection"
    assert error.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cell_id\nx\n", "has no column group"),
        ("cell_id,group\n", "has no rows"),
        ("cell_id,group\nx,a\nx,b\n", 'into "a" and into "b"'),
        ("cell_id,group\nnobody,a\n", "none of its cells"),
        ("cell_id,group\n,a\n", "row 1 names no cell"),
    ],
)
def test_bad_categories(store, tmp_path, text, said):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(CellquiltError, match=re.escape(said)) as error:
        cq.io.explorer.add_categories(store, tmp_path / "c.csv", name="x")
    assert code(error) == "explorer-categories"
    assert error.value.hint


def test_bad_calls(folder, tmp_path):
    path = small(tmp_path / "s.zarr", table=True)
    (tmp_path / "file").write_text("x")
    table = spatialdata.read_zarr(path).tables["table"]
    scaled, holes = table.copy(), table.copy()
    scaled.X = csr_matrix(table.X.toarray() - 0.5)
    holes.X = csr_matrix(np.where(np.arange(table.n_vars) == 1, np.nan, table.X.toarray()))
    other = table.copy()
    other.obs_names = [f"other-{k}" for k in range(other.n_obs)]
    other.obs["cell_id"] = other.obs_names
    other.write_h5ad(tmp_path / "other.h5ad")
    tifffile.imwrite(tmp_path / "i.tif", np.zeros((8, 8), np.uint8))

    def with_table(adata: anndata.AnnData):  # type: ignore[no-untyped-def]
        found = spatialdata.read_zarr(path)
        del found.tables["table"]
        found.tables["table"] = adata
        return found

    calls = [
        ("store-missing", lambda: write(tmp_path / "none.zarr", tmp_path / "x")),
        ("explorer-no-folder", lambda: write(path, tmp_path / "file", overwrite=True)),
        ("explorer-vertices", lambda: write(path, tmp_path / "x", max_vertices=3)),
        ("image-missing", lambda: write(path, tmp_path / "x", image="mian")),
        ("explorer-layer", lambda: write(path, tmp_path / "x", layer="raw")),
        ("explorer-column", lambda: write(path, tmp_path / "x", columns=["knid"])),
        ("explorer-counts", lambda: write(with_table(scaled), tmp_path / "x", mode="+c")),
        ("explorer-counts", lambda: write(with_table(holes), tmp_path / "x", mode="+c")),
        ("explorer-table-cells", lambda: cq.io.explorer.update_obs(tmp_path / "other.h5ad", folder)),
        ("table-unreadable", lambda: cq.io.explorer.update_obs(tmp_path / "file", folder)),
        ("explorer-names", lambda: cq.io.explorer.update_obs(path, tmp_path)),
        ("explorer-image-missing", lambda: cq.io.explorer.align(path, tmp_path / "none.tif")),
        ("explorer-image-name", lambda: cq.io.explorer.align(path, tmp_path / "i.tif", name="main")),
        ("he-matrix-invalid", lambda: cq.io.explorer.align(path, tmp_path / "i.tif", tmp_path / "file")),
        ("explorer-no-folder", lambda: cq.io.explorer.validate(tmp_path / "none")),
        ("explorer-invalid", lambda: cq.io.explorer.validate(tmp_path)),
    ]
    for wanted, call in calls:
        with pytest.raises(CellquiltError) as error:
            call()
        assert code(error) == wanted
        assert not (tmp_path / "x").exists()
    far = small(tmp_path / "far.zarr")
    shutil.rmtree(far / "points" / "transcripts")
    with PointsWriter(far / "points" / "transcripts", {"microns": np.eye(3)}) as points:
        points.write(pa.table({"x": [1.0, 9e8], "y": [1.0, 1.0], "gene": pa.array(["a", "b"]).dictionary_encode()}))
    with pytest.raises(CellquiltError) as error:
        write(far, tmp_path / "x")
    assert code(error) == "explorer-coordinates"


@pytest.mark.parametrize("name", [*ZIPS, "morphology.ome.tif", "experiment.xenium"])
def test_damaged_files_are_found(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "x")
    data = (folder / name).read_bytes()
    (tmp_path / "x" / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CellquiltError, match=re.escape(name)) as error:
        cq.io.explorer.validate(tmp_path / "x")
    assert code(error) == "explorer-invalid"


def test_rules_are_checked(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    document = json.loads((folder / "experiment.xenium").read_text())
    (tmp_path / "x" / "experiment.xenium").write_text(json.dumps({**document, "pixel_size": 0.5, "num_cells": 1}))
    os.remove(tmp_path / "x" / "transcripts.zarr.zip")
    with pytest.raises(CellquiltError) as error:
        cq.io.explorer.validate(tmp_path / "x")
    for said in ("pixel_size is 0.5", "num_cells is 1", "transcripts.zarr.zip, which is not there"):
        assert said in error.value.message
