"""Domains of a cohort by the pipeline: those of the model in memory, and never at the cost of a slide."""

import csv
import json
import shutil
import subprocess
from pathlib import Path

import anndata
import cellquilt as cq
import numpy as np
import pandas as pd
import pytest
import spatialdata
import tifffile
from cellquilt.core.shapes import read_geoparquet
from runner import ROOT, Nextflow
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

PYTHON = ROOT / ".venv/domains/bin/python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment for domains: make setup STAGES=domains"),
]
#: Those with domains, in the order of their names.
SAMPLES = ("s1", "s2", "table")
ARGUMENTS = ("--domains", "train", "--domains_n", "4", "--segmentation", "vendor")

#: What a notebook does with the tables: `python -c ... OUTPUT TABLE...`
IN_MEMORY = """
import sys, anndata, cellquilt as cq, pandas as pd
tables = [anndata.read_h5ad(path) for path in sys.argv[2:]]
cq.spatial_neighbors(tables)
model = cq.domains.Model.train(tables, n_domains=4)
model.compute_representations(tables)
model.assign_domains(tables, n_domains=4)
model.domain_confidence(tables)
columns = ["domain", "domain_leaf", "domain_confidence", "domain_stability"]
pd.concat([table.obs[columns].astype({"domain": str, "domain_leaf": str}) for table in tables]).to_csv(sys.argv[1])
"""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Two slides of different panels, one without cells, and a table of cells: a sheet, not in the order of names."""
    folder = tmp_path_factory.mktemp("cohort")
    simulated = {"format": "xenium", "image": False, "panels": 2, "seed": 3, "domain_contrast": 2.0}
    cq.simulate(folder / "sim", width_px=1024, slides=2, **simulated)
    cq.simulate(folder / "tiny", width_px=32, **simulated)
    (table,) = cq.simulate.cell_tables(
        1, 400, n_domains=4, thin_layers=0, rare_niches=0, seed=3, domain_contrast=2.0, domain_um=150.0
    )
    table.write_h5ad(folder / "made elsewhere.h5ad")
    table.X[0, 0] = -1
    table.write_h5ad(folder / "broken.h5ad")
    rows = {
        "s2": ("xenium", "sim/slide_1", "none", "case"),
        "tiny": ("xenium", "tiny/slide_0", "none", "case"),
        "table": ("anndata", "made elsewhere.h5ad", "", "control"),
        "s1": ("xenium", "sim/slide_0", "none", "control"),
        "broken": ("anndata", "broken.h5ad", "", "control"),
    }
    for name, samples in {"sheet.csv": ("s2", "tiny", "table", "s1"), "failing.csv": ("broken", "s1")}.items():
        with (folder / name).open("w", newline="") as file:
            sheet = csv.writer(file)
            sheet.writerow(["sample", "technology", "path", "xenium_image", "condition"])
            sheet.writerows([sample, *rows[sample]] for sample in samples)
    return folder


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = Nextflow(folder).pipeline("--input", cohort / "sheet.csv", *ARGUMENTS)
    assert run.code == 0, run.out + run.err
    return folder, run


def published(folder: Path) -> dict[str, anndata.AnnData]:
    """The tables of the slides with domains."""
    results = folder / "results"
    found = {name: spatialdata.read_zarr(results / name / f"{name}.zarr").tables["table"] for name in ("s1", "s2")}
    return {**found, "table": anndata.read_h5ad(results / "table" / "table.h5ad")}


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results" / "samples.tsv").open(newline="") as file:
        return {row["sample"]: row for row in csv.DictReader(file, delimiter="\t")}


def texts(column: pd.Series) -> list[str]:
    return column.astype(object).fillna("nan").tolist()


def test_domains_are_those_of_the_model_in_memory(finished, tmp_path):
    folder, _ = finished
    tables = published(folder)
    paths = []
    for name, table in tables.items():
        obs, var = pd.DataFrame(index=table.obs_names), pd.DataFrame(index=table.var_names)
        plain = anndata.AnnData(table.X, obs=obs, var=var)
        plain.obsm["spatial"] = table.obsm["spatial"]
        paths.append(tmp_path / f"{name}.h5ad")
        plain.write_h5ad(paths[-1])
    subprocess.run([PYTHON, "-c", IN_MEMORY, tmp_path / "expected.csv", *paths], check=True, timeout=300)
    expected = pd.read_csv(tmp_path / "expected.csv", index_col=0, keep_default_na=False)
    about = json.loads((folder / "results" / "cohort" / "domains" / "domains.json").read_text())
    for name, table in tables.items():
        files = pd.read_parquet(folder / "results" / "cohort" / "domains" / f"{name}.domains.parquet")
        assert files["cell_id"].tolist() == table.obs_names.tolist()
        for column in ("domain", "domain_leaf"):
            assert texts(table.obs[column]) == texts(files[column]) == expected.loc[table.obs_names, column].tolist()
        for column in ("domain_confidence", "domain_stability"):
            found = table.obs[column].to_numpy()
            assert np.array_equal(found, files[column], equal_nan=True)
            known = pd.to_numeric(expected.loc[table.obs_names, column]).to_numpy()
            np.testing.assert_allclose(found, known, rtol=1e-6)
        probable = table.obsm["domain_probabilities"]
        assert list(probable.columns) == about["domains"]
        assert np.array_equal(probable, np.stack(files["domain_probabilities"].to_list()), equal_nan=True)
        latents = np.nan_to_num(np.stack(files["niche_latent"].to_list()))
        assert np.array_equal(table.obsm["niche_latent"], latents)
        assert {"spatial_distances", "spatial_connectivities"} <= set(table.obsp)


def true_domains(table: anndata.AnnData, truth: Path) -> np.ndarray:
    _, columns, _ = read_geoparquet(truth / "cells.parquet")
    place = cKDTree(np.column_stack([columns["x_um"], columns["y_um"]])).query(table.obsm["spatial"])[1]
    return np.asarray(columns["domain"])[place]


def test_domains_are_nearer_to_the_truth_than_clusters_of_cells(finished, cohort):
    tables = published(finished[0])
    truth = [true_domains(tables[name], cohort / "sim" / f"slide_{k}" / "truth") for k, name in enumerate(("s1", "s2"))]
    truth.append(tables["table"].obs["domain_true"].astype(str).to_numpy())
    shared = sorted(set.intersection(*(set(table.var_names) for table in tables.values())))
    logs = []
    for table in tables.values():
        counts = np.asarray(table[:, shared].X.todense(), dtype=float)
        logs.append(np.log1p(100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)))
        logs[-1] = (logs[-1] - logs[-1].mean(axis=0)) / (logs[-1].std(axis=0) + 1e-9)
    clusters = KMeans(4, n_init=3, random_state=0).fit_predict(np.concatenate(logs))
    found = np.concatenate([texts(table.obs["domain"]) for table in tables.values()])
    ours = adjusted_rand_score(np.concatenate(truth), found)
    assert ours > 0.4
    assert ours > adjusted_rand_score(np.concatenate(truth), clusters) + 0.2


def test_what_is_published_of_the_cohort(finished, cohort):
    folder, _ = finished
    domains = folder / "results" / "cohort" / "domains"
    about = json.loads((domains / "domains.json").read_text())
    assert (about["mode"], about["level_asked"], len(about["domains"])) == ("train", 7, 4)
    tables = published(folder)
    assert list(about["n_cells"]) == list(SAMPLES)
    for name, table in tables.items():
        assert about["n_cells"][name] == table.obs["domain"].value_counts()[lambda n: n > 0].to_dict()
    assert sorted(entry.name for entry in (domains / "model").iterdir()) == ["config.json", "model.safetensors"]
    page = (folder / "results" / "cohort" / "report.html").read_text()
    assert all(f">{name}<" in page for name in SAMPLES)
    assert "control against case" in page or "case against control" in page
    shares = pd.read_csv(folder / "results" / "cohort" / "stats" / "proportions.csv")
    assert set(shares["slide"]) == set(SAMPLES)
    attributes = spatialdata.read_zarr(folder / "results" / "s1" / "s1.zarr").attrs["cellquilt"]
    assert attributes["checksums"]["domains_model"] == about["model_sha256"]
    assert attributes["parameters"]["domains_n"] == 4
    for text in (page, (domains / "domains.json").read_text()):
        assert str(folder) not in text
        assert str(cohort) not in text
    original = anndata.read_h5ad(cohort / "made elsewhere.h5ad")
    assert "domain" not in original.obs
    assert (tables["table"].X != original.X).nnz == 0
    assert tables["table"].obs["domain_true"].tolist() == original.obs["domain_true"].tolist()
    assert (tables["table"].obs["sample"] == "table").all()


def test_a_slide_without_cells_has_no_domains_and_the_run_says_so(finished):
    folder, run = finished
    found = rows(folder)
    assert {row["status"] for row in found.values()} == {"done"}
    assert {name: found[name]["n_domains"] for name in SAMPLES} == dict.fromkeys(SAMPLES, "4")
    assert found["tiny"]["cause"].startswith("domains missing: tiny has ")
    assert "done: tiny in DOMAINS_PREPARE: domains missing: tiny has" in run.out
    table = spatialdata.read_zarr(folder / "results" / "tiny" / "tiny.zarr").tables["table"]
    assert "domain" not in table.obs
    assert (
        json.loads((folder / "results" / "tiny" / "qc.json").read_text())["domains_missing"]["code"] == "too-few-cells"
    )


def test_a_second_run_is_all_cached(finished, cohort):
    folder, _ = finished
    before = {name: texts(table.obs["domain"]) for name, table in published(folder).items()}
    shutil.rmtree(folder / "results")
    run = Nextflow(folder).pipeline("--input", cohort / "sheet.csv", *ARGUMENTS, "-resume")
    assert run.code == 0, run.out + run.err
    assert {task["status"] for task in run.trace} == {"CACHED"}
    assert {name: texts(table.obs["domain"]) for name, table in published(folder).items()} == before


def test_slides_are_published_where_domains_fail(finished, cohort):
    """One table cannot be read, and no level has so many domains: named, and the slide's store stands."""
    folder, _ = finished
    run = Nextflow(folder).pipeline("--input", cohort / "failing.csv", *ARGUMENTS, "--domains_n", "1000", "-resume")
    assert run.code != 0
    found = rows(folder)
    assert (found["broken"]["status"], found["broken"]["stage"]) == ("failed", "DOMAINS_PREPARE")
    assert "scaled values" in found["broken"]["cause"]
    assert (found["s1"]["status"], found["s1"]["stage"]) == ("done", "DOMAINS_ASSIGN")
    assert found["s1"]["cause"].startswith("domains missing: no level has 1000 domains")
    assert "failed: broken in DOMAINS_PREPARE" in run.out
    table = spatialdata.read_zarr(folder / "results" / "s1" / "s1.zarr").tables["table"]
    assert "domain" not in table.obs
    assert table.n_obs > 100


#: A network of images, a module of the user's.
NETWORK = """
import torch

def moments(x):
    return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1)
"""


def test_what_aligned_images_show_goes_into_domains(cohort, tmp_path):
    """A slide without an image of its own and a table of cells, both with an H&E; by the strict parser."""
    rng = np.random.default_rng(0)
    for name in ("s1", "table"):
        pixels = rng.integers(0, 256, (500, 500, 3), dtype=np.uint8)
        tifffile.imwrite(tmp_path / f"{name} he.tif", pixels, photometric="rgb", tile=(128, 128), compression="zlib")
    (tmp_path / "matrix.csv").write_text("4,0,-50\n0,4,-50\n0,0,1\n")
    (tmp_path / "stains.py").write_text(NETWORK)
    with (tmp_path / "sheet.csv").open("w", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(["sample", "technology", "path", "xenium_image", "he_image", "he_matrix"])
        sheet.writerow(["s1", "xenium", cohort / "sim/slide_0", "none", "s1 he.tif", "matrix.csv"])
        sheet.writerow(["table", "anndata", cohort / "made elsewhere.h5ad", "", "table he.tif", "matrix.csv"])
    run = Nextflow(tmp_path).pipeline(
        "--input", "sheet.csv", *ARGUMENTS, "--domains_image_model", "stains:moments", "--domains_um_per_px", "4",
        "--domains_image_components", "3", PYTHONPATH=str(tmp_path), NXF_SYNTAX_PARSER="v2",
    )  # fmt: skip
    assert run.code == 0, run.out + run.err
    domains = tmp_path / "results" / "cohort" / "domains"
    about = json.loads((domains / "domains.json").read_text())
    assert about["image"]["model"] == "stains:moments"
    files = ["config.json", "image_pca.safetensors", "model.safetensors"]
    assert sorted(entry.name for entry in (domains / "model").iterdir()) == files
    table = anndata.read_h5ad(tmp_path / "results" / "table" / "table.h5ad")
    assert table.obs["domain"].notna().mean() > 0.95
    assert "domain" in spatialdata.read_zarr(tmp_path / "results" / "s1" / "s1.zarr").tables["table"].obs


def test_stubs_draw_the_whole_graph(cohort, tmp_path):
    run = Nextflow(tmp_path).pipeline("--input", cohort / "sheet.csv", *ARGUMENTS, "-stub-run", NXF_SYNTAX_PARSER="v2")
    assert run.code == 0, run.out + run.err
    done = {task["process"].split(":")[-1] for task in run.trace}
    assert done == {
        *("CONVERT", "RESOLVE", "AGGREGATE", "ASSEMBLE", "REPORT", "EXPLORER", "SAMPLES"),
        *(f"DOMAINS_{stage}" for stage in ("PREPARE", "TRAIN", "EMBED", "ASSIGN", "ANNOTATE", "REPORT")),
    }
