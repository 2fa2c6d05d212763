"""StarDist in the pipeline: alone on a real micrograph, as prior of methods for transcripts, by a model's path."""

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import shapely
import spatialdata
import tifffile
from cellquilt.geometry.polygonize import labels_to_polygons
from cellquilt.segment.stardist import SHIPPED_FOLDER, weights_of
from runner import ROOT

pytestmark = pytest.mark.slow

ENVIRONMENT = ROOT / ".venv" / "stardist"
FAKES = ROOT / "tests" / "fakes"


@pytest.fixture(scope="module")
def micrograph() -> Path:
    """The folder of the StarDist package with a micrograph of nuclei and their masks."""
    found = list(ENVIRONMENT.glob("lib/python3*/site-packages/stardist/data/images"))
    if not found:
        pytest.skip("no environment with StarDist: make setup STAGES=stardist")
    return found[0]


def average_precision(found: np.ndarray, truth: np.ndarray) -> float:
    """TP / (TP + FP + FN) at IoU 0.5, above which a partner is the only one."""
    a, b = shapely.STRtree(truth).query(found, predicate="intersects")
    shared = shapely.area(shapely.intersection(found[a], truth[b]))
    iou = shared / (shapely.area(found)[a] + shapely.area(truth)[b] - shared)
    hit = int((iou > 0.5).sum())
    return hit / (len(found) + len(truth) - hit)


def test_stardist_alone_and_as_prior(nextflow, micrograph):
    from cellquilt.simulate import simulate

    folder = nextflow.folder
    simulate(folder / "sim", format="xenium", width_px=512, seed=3)
    image = tifffile.imread(micrograph / "img2d.tif")
    tifffile.imwrite(folder / "nuclei.tif", image)
    shutil.copytree(SHIPPED_FOLDER, folder / "my model")
    slide = folder / "sim" / "slide_0"
    rows = [
        {"sample": "micrograph", "technology": "ome_tif", "path": "nuclei.tif", "segmentation": "stardist",
         "pixel_size_um": "0.4", "patch_width_px": "256"},
        {"sample": "prior", "technology": "xenium", "path": slide, "segmentation": "stardist,baysor",
         "stardist_model_type": "my model"},
    ]  # fmt: skip
    if (ROOT / ".venv/proseg/bin/proseg").exists():
        rows.append({**rows[1], "sample": "proseg", "segmentation": "stardist,proseg"})
    with (folder / "sheet.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0] | rows[1]))
        table.writeheader()
        table.writerows(rows)
    run = nextflow.pipeline(
        "--input", "sheet.csv", "--expand_um", "2", "--transcripts_per_patch", "20000",
        PATH=f"{FAKES}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    assert run.code == 0, run.out + run.err
    assert set(run.status("SEGMENT_STARDIST")) == {"COMPLETED"}
    assert len(run.status("SEGMENT_STARDIST")) >= len(rows)

    sdata = spatialdata.read_zarr(folder / "results" / "micrograph" / "micrograph.zarr")
    mask = np.unique(tifffile.imread(micrograph / "mask2d.tif"), return_inverse=True)[1].reshape(image.shape)
    truth = np.asarray(labels_to_polygons(mask.astype(np.int32))[1], dtype=object)
    found = np.asarray(sdata.shapes["nucleus_boundaries"].geometry)
    score = average_precision(found, truth)
    print(f"AP@0.5 {score:.3f} of {len(truth)} nuclei in {len(sdata.shapes['image_patches'])} patches")
    assert len(truth) == 125
    assert len(sdata.shapes["image_patches"]) == 4
    assert score >= 0.80
    assert sdata.tables["table"].n_obs == len(found)
    assert (sdata.shapes["cell_boundaries"].area > sdata.shapes["nucleus_boundaries"].area).mean() > 0.9

    weights = weights_of(SHIPPED_FOLDER)
    for row in rows:
        store = folder / "results" / row["sample"] / f"{row['sample']}.zarr"
        made = spatialdata.read_zarr(store).attrs["cellquilt"]
        model = "my model" if row["sample"] != "micrograph" else "stardist_nuclei"
        used = hashlib.sha256(weights.read_bytes()).hexdigest()
        assert made["checksums"][f"{model}/{weights.name}"] == used
        assert str(folder) not in json.dumps(made)
    for row in rows[1:]:
        sdata = spatialdata.read_zarr(folder / "results" / row["sample"] / f"{row['sample']}.zarr")
        table, points = sdata.tables["table"], sdata.points["transcripts"].compute()
        counted = points[points["passes_qv"] & ~points["is_control"]]
        sums = counted.groupby("cell_id", observed=True).size().reindex(table.obs_names).fillna(0).to_numpy()
        assert np.array_equal(np.asarray(table.X.sum(axis=1)).ravel(), sums)
        assert sums.sum() > 0.4 * len(counted)
        assert 0.5 * len(sdata.shapes["stardist_boundaries"]) < table.n_obs
        assert len(sdata.shapes["nucleus_boundaries"]) > 30
