"""The notebook's door: the talk's snippet and commands with only the package's name changed, and the same results."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import spatialdata
from cellquilt.cli import main

RAINFALL = "cellquilt.segment.generic:rainfall"


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    import cellquilt as cq

    folder = tmp_path_factory.mktemp("api")
    cq.simulate(folder / "sim", width_px=400, seed=5)
    return folder / "sim" / "slide_0"


def command(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 0


@pytest.mark.slow
def test_the_three_doors_agree(slide, tmp_path):
    """The same cells from objects, from commands on one store, and from commands with deltas as the pipeline runs."""
    import cellquilt as cq

    sdata = cq.io.ome_tif(
        slide / "image.ome.tif", transcripts=slide / "transcripts.parquet", output=tmp_path / "api.zarr"
    )
    cq.segmentation.tissue(sdata)
    cq.make_image_patches(sdata, patch_width=256)
    cq.segmentation.generic(sdata, RAINFALL, diameter_um=8)
    cq.aggregate(sdata, min_transcripts=10)
    ours = sdata.tables["table"]
    assert ours.n_obs > 10
    assert ours.obs["cell_id"].tolist() == sdata.shapes["cell_boundaries"].index.tolist()
    assert sdata.shapes["generic_boundaries"].geometry.equals(sdata.shapes["nucleus_boundaries"].geometry)
    assert sorted(spatialdata.read_zarr(tmp_path / "api.zarr").tables) == ["table"]

    store = tmp_path / "api_cli.zarr"
    method = ("--generic-function", RAINFALL, "--generic-diameter-um", "8")
    command(
        "convert", slide / "image.ome.tif", "--technology", "ome_tif", "--sdata-path", store,
        "--transcripts", slide / "transcripts.parquet", "--sample", "api",
    )  # fmt: skip
    command("tissue", store)
    command("patchify", "image", store, "--patch-width-pixel", "256", "--segmentation", "generic", *method)
    command("segmentation", "generic", store, "--patch-width-px", "256", *method)
    command("resolve", "generic", store)
    command("aggregate", store, "--average-intensities", "--min-transcripts", "10")
    theirs = spatialdata.read_zarr(store).tables["table"]
    assert np.array_equal(ours.X.toarray(), theirs.X.toarray())
    assert np.array_equal(ours.obsm["spatial"], theirs.obsm["spatial"])
    assert np.array_equal(ours.obsm["intensities"], theirs.obsm["intensities"], equal_nan=True)
    assert ours.obs["passes_qc"].tolist() == theirs.obs["passes_qc"].tolist()

    raw, tissue, patches, cells, table = (
        tmp_path / f"api.{name}.zarr" for name in ["raw", "tissue", "patches", "cells", "table"]
    )
    command(
        "convert", slide / "image.ome.tif", "--technology", "ome_tif", "-o", raw,
        "--transcripts", slide / "transcripts.parquet", "--sample", "api",
    )  # fmt: skip
    command("tissue", raw, "-o", tissue)
    command(
        "patchify", "image", raw, "--tissue", tissue, "--bundles", tmp_path / "bundles", "-o", patches,
        "--segmentation", "generic", "--patch-width-px", "256", "--patches-per-task", "2", *method,
    )  # fmt: skip
    results = []
    for bundle in sorted((tmp_path / "bundles").iterdir(), reverse=True):
        results.append(tmp_path / f"{bundle.stem}.cells.parquet")
        command("segment", "generic", bundle, "-o", results[-1])
    assert len(results) > 1
    command("resolve", raw, *results, "-o", cells, "--segmentation", "generic")
    command("aggregate", raw, "--cells", cells, "-o", table, "--min-transcripts", "10")
    command(
        "assemble", raw, tissue, patches, cells, table, "-o", tmp_path / "published.zarr", "--qc", tmp_path / "qc.json"
    )
    published = spatialdata.read_zarr(tmp_path / "published.zarr").tables["table"]
    assert np.array_equal(ours.X.toarray(), published.X.toarray())
    assert np.array_equal(ours.obsm["spatial"], published.obsm["spatial"])
    assert published.obs_names.tolist() == [f"api-{number}" for number in range(1, published.n_obs + 1)]


def test_an_object_in_memory_works_too(slide):
    import cellquilt as cq

    backed = cq.io.ome_tif(slide / "image.ome.tif")
    sdata = spatialdata.SpatialData(images={"image": backed.images["image"]})
    assert sdata.path is None
    cq.segmentation.generic(sdata, RAINFALL, diameter_um=8, expand_um=0)
    cq.aggregate(sdata)
    assert sdata.path is None
    assert sdata.tables["table"].shape[0] == len(sdata.shapes["cell_boundaries"]) > 10
    assert sdata.tables["table"].shape[1] == 0


def test_dropped_cells_are_gone_from_table_shapes_and_transcripts(slide, tmp_path):
    import cellquilt as cq

    sdata = cq.io.ome_tif(
        slide / "image.ome.tif", transcripts=slide / "transcripts.parquet", output=tmp_path / "s.zarr"
    )
    cq.segmentation.generic(sdata, RAINFALL, diameter_um=8)
    cq.aggregate(sdata)
    before = sdata.tables["table"]
    limit = int(np.median(np.asarray(before.X.sum(axis=1))))
    cq.aggregate(sdata, min_transcripts=limit, drop_failed=True)
    after = sdata.tables["table"]
    assert 0 < after.n_obs < before.n_obs
    assert np.asarray(after.X.sum(axis=1)).min() >= limit
    assert sdata.shapes["cell_boundaries"].index.tolist() == after.obs_names.tolist()
    assert sdata.shapes["nucleus_boundaries"].index.tolist() == after.obs_names.tolist()
    named = set(sdata.points["transcripts"]["cell_id"].compute().dropna())
    assert named <= set(after.obs_names)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, cellquilt; print([m for m in ('numpy', 'pandas', 'spatialdata', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
