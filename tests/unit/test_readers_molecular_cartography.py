"""Molecular Cartography: a table without a header and images by stain, regions of a folder, and what can be wrong."""

import shutil

import cellquilt as cq
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.core.points import points_transforms
from cellquilt.readers import transcript_table
from cellquilt.simulate import simulate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_cases import (
    assert_true_intensities,
    channels,
    convert,
    facts,
    fails,
    pixels,
    points,
    table_of_given_cells,
)

TECHNOLOGY = "molecular_cartography"
PIXEL = 0.5  # a power of two: to µm and back changes nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two slides in one folder, as a run of two regions."""
    output = tmp_path_factory.mktemp("cartography") / "sim"
    simulate(
        output, width_px=400, height_px=300, pixel_size_um=PIXEL, seed=3, slides=2, format=TECHNOLOGY, tile_px=256,
        n_genes=40,
    )  # fmt: skip
    run = output / "run"
    run.mkdir()
    for number in (0, 1):
        for path in (output / f"slide_{number}").glob("32800*"):
            shutil.copyfile(path, run / path.name)
        shutil.copytree(output / f"slide_{number}" / "truth", output / f"truth_{number}")
    return run


def truth_of(folder, number=1):
    return folder.parent / f"truth_{number}"


# --- simulated


def test_a_region_is_that_of_its_slide(folder, tmp_path) -> None:
    store = convert(folder, TECHNOLOGY, tmp_path / "out.zarr", vendor_region="A2-1", pixel_size_um=PIXEL)
    expected = tifffile.imread(folder / "32800-1377_A2-1_DAPI.tiff")
    np.testing.assert_array_equal(pixels(store), expected[None])
    assert channels(store) == ["DAPI"]
    assert facts(store)["vendor_region"] == "A2-1"
    whole = convert(folder, TECHNOLOGY, tmp_path / "b.zarr", vendor_region="32800-1377_A2-1", pixel_size_um=PIXEL)
    np.testing.assert_array_equal(pixels(whole), pixels(store))


def test_transcripts_are_the_true_ones(folder, tmp_path) -> None:
    given = {"vendor_region": "A2-1", "pixel_size_um": PIXEL, "z_step_um": 1.5}
    store = convert(folder, TECHNOLOGY, tmp_path / "out.zarr", **given)
    ours, truth = points(store), pq.read_table(truth_of(folder) / "transcripts_truth.parquet").to_pandas()
    assert len(ours) == len(truth) > 10_000
    np.testing.assert_allclose(ours[["x", "y"]], truth[["x", "y"]], atol=1e-9)
    np.testing.assert_allclose(ours["z"], truth["z"], atol=1e-6)
    np.testing.assert_allclose(ours["z_plane"] * 1.5, ours["z"])
    assert (ours["gene"].astype(str) == truth["gene"].astype(str)).all()
    assert (ours["is_control"] == ours["gene"].astype(str).str.startswith("Blank-")).all()
    to_px = points_transforms(store.element("points", "transcripts"))["global"]
    np.testing.assert_allclose(to_px, np.diag([1 / PIXEL, 1 / PIXEL, 1]))
    # As the file has them, and as whoever reads it into a data frame.
    raw = pd.read_csv(folder / "32800-1377_A2-1_results.txt", sep="\t", header=None)
    np.testing.assert_allclose(raw[[0, 1]] * PIXEL, ours[["x", "y"]])
    assert (raw[3] == ours["gene"].astype(str)).all()


def test_given_cells_have_the_true_counts(folder, tmp_path) -> None:
    given = {"vendor_region": "A2-1", "pixel_size_um": PIXEL, "min_qv": 0}
    truth = truth_of(folder)
    found, _ = table_of_given_cells(folder, TECHNOLOGY, truth, tmp_path, **given)
    assert_true_intensities(found, truth)
    cells = pq.read_table(truth / "cells.parquet").to_pandas()
    transcripts = pq.read_table(truth / "transcripts_truth.parquet").to_pandas()
    # A cell is its pixels, each [i, i + 1): what lies on a border is in one of them.
    places = shapely.points(*(np.floor(transcripts[axis] / PIXEL) + 0.5 for axis in "xy"))
    row, cell = shapely.STRtree(shapely.from_wkb(cells["geometry"])).query(places, "intersects")
    inside = transcripts.iloc[row].assign(cell=cells["cell_id"].to_numpy()[cell])
    control = inside["gene"].astype(str).str.startswith("Blank-")
    genes = inside[~control]
    expected = pd.crosstab(genes["cell"].astype(str), genes["gene"].astype(str))
    counts = pd.DataFrame(found.X.toarray(), index=found.obs_names, columns=found.var_names)
    assert counts.to_numpy().sum() == len(genes) > 10_000
    pd.testing.assert_frame_equal(
        counts.loc[expected.index, expected.columns], expected, check_dtype=False, check_names=False
    )
    assert found.obs["n_control"].sum() == control.sum() > 10


def test_the_table_is_streamed(folder, tmp_path, monkeypatch) -> None:
    given = {"vendor_region": "A1-1", "pixel_size_um": PIXEL}
    whole = points(convert(folder, TECHNOLOGY, tmp_path / "a.zarr", **given))
    monkeypatch.setattr(transcript_table, "_BLOCK_BYTES", 1 << 14)
    pd.testing.assert_frame_equal(points(convert(folder, TECHNOLOGY, tmp_path / "b.zarr", **given)), whole)


def test_the_facade(folder) -> None:
    sdata = cq.io.molecular_cartography(folder, "A1-1", pixel_size_um=PIXEL)
    assert len(sdata["transcripts"]) == len(pq.read_table(truth_of(folder, 0) / "transcripts_truth.parquet"))


def test_the_preset(folder, tmp_path) -> None:
    store = convert(folder, TECHNOLOGY, tmp_path / "a.zarr", vendor_region="A1-1", preset=TECHNOLOGY)
    assert open_image(store.path).pixel_size_um == pytest.approx(0.138)


# --- by hand

ROWS = "10\t20.5\t3\tNANOG\t\n1e1\t7\t0\tActα\t\n"


def noise(seed=0, size=(40, 50)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60_000, size).astype(np.uint16)


def write(folder, region="A1-1", rows=ROWS, stains=("DAPI",), size=(40, 50)) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"p_{region}_results.txt").write_text(rows, encoding="utf-8")
    for seed, stain in enumerate(stains):
        tifffile.imwrite(folder / f"p_{region}_{stain}.tiff", noise(seed, size))


def test_stains_are_in_order_and_belong_to_the_longest_id(tmp_path) -> None:
    write(tmp_path / "run", "A1", stains=("PolyA", "GFP", "DAPI"))
    write(tmp_path / "run", "A1_b", stains=("Cy5",))
    store = convert(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr", vendor_region="A1", pixel_size_um=0.5)
    assert channels(store) == ["DAPI", "GFP", "PolyA"]
    np.testing.assert_array_equal(pixels(store), [noise(2), noise(1), noise(0)])


@pytest.mark.parametrize("end", ["", "\t", "\t0.97"])
def test_lines_with_and_without_more_columns(tmp_path, end) -> None:
    write(tmp_path / "run", rows=f"10\t20.5\t3\tNANOG{end}\n12\t7\t0\tActα{end}\n")
    store = convert(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr", pixel_size_um=0.5)
    found = points(store)
    assert found[["x", "y"]].to_numpy().tolist() == [[5.0, 10.25], [6.0, 3.5]]
    assert found["gene"].astype(str).tolist() == ["NANOG", "Actα"]
    assert found["z_plane"].tolist() == [3, 0]
    assert ("vendor_column_5" in found) == bool(end)


def test_a_header_of_its_own_and_a_table_given_beside(tmp_path) -> None:
    write(tmp_path / "run", rows="x\ty\tgene\n10\t20\tNANOG\n")
    store = convert(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr", pixel_size_um=0.5)
    assert points(store)[["x", "y"]].to_numpy().tolist() == [[5.0, 10.0]]


# --- what can be wrong


def _rows(text):
    return lambda folder: write(folder, rows=text)


def _no_results(folder) -> None:
    write(folder)
    (folder / "p_A1-1_results.txt").unlink()


def _no_images(folder) -> None:
    write(folder, stains=())
    tifffile.imwrite(folder / "other_DAPI.tiff", noise())


def _regions(folder) -> None:
    write(folder, "A1-1")
    write(folder, "A2-1")


def _sizes(folder) -> None:
    write(folder, stains=("DAPI",))
    tifffile.imwrite(folder / "p_A1-1_GFP.tiff", noise(1, (41, 50)))


def _cut(folder) -> None:
    write(folder)
    path = folder / "p_A1-1_DAPI.tiff"
    path.write_bytes(path.read_bytes()[:900])


def _binary(folder) -> None:
    write(folder)
    (folder / "p_A1-1_results.txt").write_bytes(bytes(range(256)) * 4)


PX = {"pixel_size_um": 0.5}
BAD = {
    "no results": (_no_results, PX, "molecular-cartography-no-results", "p_A1-1_DAPI.tiff"),
    "no images": (_no_images, PX, "molecular-cartography-no-images", "other_DAPI.tiff"),
    "several regions": (_regions, PX, "machine-region-needed", "A1-1, A2-1"),
    "a region that is not there": (_regions, {**PX, "vendor_region": "A3-1"}, "machine-region-unknown", "A3-1"),
    "no pixel size": (write, {}, "pixel-size-unknown", "p_A1-1_DAPI.tiff"),
    "images that differ": (_sizes, PX, "machine-images-differ", "41 × 50"),
    "an image cut short": (_cut, PX, "tiff-truncated", "p_A1-1_DAPI.tiff"),
    "too few columns": (_rows("1\t2\tNANOG\n"), PX, "molecular-cartography-results", "3 columns"),
    "an empty table": (_rows(""), PX, "transcripts-empty-file", "p_A1-1_results.txt"),
    "no number": (_rows("1\t2\t3\tA\t\n1\tx\t3\tB\t\n"), PX, "transcripts-value", '"x"'),
    "a line cut short": (_rows("1\t2\t3\tA\t\n1\t2\n"), PX, "transcripts-bad-row", "p_A1-1_results.txt"),
    "no gene": (_rows("1\t2\t3\tA\t\n1\t2\t3\t\t\n"), PX, "transcripts-gene-missing", "row 2:"),
    "half a plane": (_rows("1\t2\t3.5\tA\t\n"), PX, "transcripts-z-plane", "3.5"),
    "no text": (_binary, PX, "transcripts-", "p_A1-1_results.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case) -> None:
    make, given, code, text = BAD[case]
    (tmp_path / "run").mkdir()
    make(tmp_path / "run")
    error = fails(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr", **given)
    assert error.code.startswith(code)
    assert text in error.message


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="0123456789.-eE\t\n\"'AB µ\r", max_size=60))
def test_any_text_is_an_error_or_a_table(tmp_path, text) -> None:
    write(tmp_path / "run", rows=text)
    try:
        store = convert(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr", **PX)
    except CellquiltError:
        return
    assert len(points(store)) <= text.count("\n") + text.count("\r") + 1
