"""Clusters, types and regions by the pipeline: a region is a slide, and no failure costs one."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import spatialdata
from cellquilt.core.store import Store
from runner import ROOT, Nextflow

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / ".venv/domains/bin/python").exists(), reason="no environment for domains: make setup STAGES=domains"
    ),
]
GENERIC = (
    "--segmentation", "generic", "--generic_function", "cellquilt.segment.generic:rainfall",
    "--patch_width_px", "256", "--patches_per_task", "2", "--min_transcripts", "5",
)  # fmt: skip
REGIONS = {"left": (0, 0, 240, 512), "top right": (256, 0, 512, 250), "core/3": (250, 260, 500.5, 500)}
SLUGS = ("left", "top_right", "core_3")


def box(x0, y0, x1, y1):
    return {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]}


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """Two slides; the first has regions, the second a marker that is not there."""
    from cellquilt.simulate import simulate

    folder = tmp_path_factory.mktemp("slides")
    simulate(folder / "sim", width_px=512, slides=2, seed=3)
    features = [
        {"type": "Feature", "properties": {"name": name, "objectType": "annotation"}, "geometry": box(*corners)}
        for name, corners in REGIONS.items()
    ]
    (folder / "regions.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    table = pq.read_table(folder / "sim/slide_0/transcripts.parquet", columns=["gene"])
    genes = table.column("gene").value_counts().to_pylist()
    first, second = [one["values"] for one in sorted(genes, key=lambda one: -one["counts"])[:2]]
    (folder / "good.csv").write_text(f"cell_type,positive\nx,{first}\ny,{second}\n")
    (folder / "bad.csv").write_text(f"cell_type,positive\nx,{first}x\n")
    with (folder / "sheet.csv").open("w", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(["sample", "technology", "path", "transcripts", "regions", "annotate_markers"])
        for number, (regions, markers) in enumerate((("regions.geojson", "good.csv"), ("", "bad.csv"))):
            slide = f"sim/slide_{number}"
            paths = (f"{slide}/image.ome.tif", f"{slide}/transcripts.parquet")
            sheet.writerow([f"s{number + 1}", "ome_tif", *paths, regions, markers])
    return folder


def test_regions_are_slides_with_clusters_and_types(slides, tmp_path):
    run = Nextflow(tmp_path).pipeline("--input", slides / "sheet.csv", *GENERIC, "--cluster", "--explorer", "false")
    assert run.code == 1, run.out + run.err  # a task failed, and no slide
    assert "5 of 5 samples done" in run.out
    results = tmp_path / "results"
    with (results / "samples.tsv").open(newline="") as file:
        rows = {row["sample"]: row for row in csv.DictReader(file, delimiter="\t")}
    names = [f"s1_{slug}" for slug in SLUGS]
    assert list(rows) == ["s1", *names, "s2"]
    assert {row["status"] for row in rows.values()} == {"done"}
    assert rows["s2"]["stage"] == "ANNOTATE"
    assert rows["s2"]["error"] == "annotate-marker-unknown"
    assert rows["s2"]["cause"].startswith("cell types missing: s2 has no marker")
    whole = spatialdata.read_zarr(results / "s1/s1.zarr")
    table = whole.tables["table"]
    assert "cluster" not in table.obs
    facts = Store(results / "s1/s1.zarr").records[-1]["facts"]
    n_cells = n_transcripts = 0
    for name, slug in zip(REGIONS, SLUGS, strict=True):
        folder = results / f"s1_{slug}"
        assert {"qc.json", "report.html", f"s1_{slug}.zarr", "cluster_markers.tsv"} <= {
            p.name for p in folder.iterdir()
        }
        sdata = spatialdata.read_zarr(folder / f"s1_{slug}.zarr")
        own = sdata.tables["table"]
        same = table[(table.obs["region_name"] == name).to_numpy()]
        assert own.obs_names.tolist() == same.obs_names.tolist()
        assert (own.X != same.X).nnz == 0
        np.testing.assert_array_equal(own.obsm["spatial"], same.obsm["spatial"])
        assert own.obs["cluster"].notna().tolist() == own.obs["passes_qc"].tolist()
        assert set(own.obs["cell_type"].dropna()) <= {"x", "y", "unknown"}
        qc = json.loads((folder / "qc.json").read_text())
        assert qc["sample"] == f"s1_{slug}"
        assert qc["n_counts_differing"] == 0
        assert 'id="celltypes"' in (folder / "report.html").read_text()
        n_cells, n_transcripts = n_cells + own.n_obs, n_transcripts + qc["n_transcripts"]
    assert n_cells + facts["n_cells_outside"] == table.n_obs
    assert n_transcripts + facts["n_transcripts_outside"] == len(whole.points["transcripts"])
    assert n_cells > 0.6 * table.n_obs
    second = spatialdata.read_zarr(results / "s2/s2.zarr").tables["table"]
    assert second.obs["cluster"].notna().any()
    assert "cell_type" not in second.obs


def test_stubs_draw_the_whole_graph(slides, tmp_path):
    run = Nextflow(tmp_path).pipeline("--input", slides / "sheet.csv", "--cluster", "-stub-run")
    assert run.code == 0, run.out + run.err
    assert sorted(task["tag"] for task in run.trace if task["process"].endswith("CLUSTER")) == [
        "s1_core_3", "s1_left", "s1_top_right", "s2",
    ]  # fmt: skip
    assert run.status("SPLIT") == ["COMPLETED"]
    assert len(run.status("REPORT")) == 5
