"""Spatial statistics by the pipeline: those of the API, in the pages, and never at the cost of a slide."""

import csv
import json
from pathlib import Path

import cellquilt as cq
import pandas as pd
import pytest
from runner import ROOT, Nextflow

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".venv/domains/bin/python").exists(), reason="no environment for domains"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two slides and a table with domains; of one slide a column is asked for that it does not have."""
    folder = tmp_path_factory.mktemp("stats")
    simulated = {"format": "xenium", "image": False, "panels": 2, "seed": 3, "domain_contrast": 2.0}
    cq.simulate(folder / "sim", width_px=768, slides=2, **simulated)
    (table,) = cq.simulate.cell_tables(
        1, 400, n_domains=4, thin_layers=0, rare_niches=0, seed=3, domain_contrast=2.0, domain_um=150.0
    )
    table.write_h5ad(folder / "cells.h5ad")
    with (folder / "sheet.csv").open("w", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(["sample", "technology", "path", "xenium_image", "condition", "stats_cell_type"])
        sheet.writerow(["s1", "xenium", "sim/slide_0", "none", "case", ""])
        sheet.writerow(["s2", "xenium", "sim/slide_1", "none", "control", "kind"])
        sheet.writerow(["table", "anndata", "cells.h5ad", "", "control", "domain_true"])
    run = Nextflow(folder).pipeline(
        *("--input", folder / "sheet.csv", "--segmentation", "vendor", "--domains", "train", "--domains_n", "4"),
        *("--stats", "--stats_permutations", "19"),
    )
    return folder, run


def results(finished) -> Path:
    return finished[0] / "results"


def test_statistics_are_those_of_the_api(finished):
    folder = results(finished) / "table"
    assert {path.name for path in (folder / "stats").iterdir()} == {
        *("about.json", "niches.parquet"),
        *(f"{name}.csv" for name in ("co_occurrence", "composition", "distances", "enrichment", "network")),
        *("niches.csv", "niches_by_domain.csv"),
    }
    found = cq.spatial.SlideStatistics.read(folder / "stats")
    import anndata

    expected = cq.spatial.slide_statistics(anndata.read_h5ad(folder / "table.h5ad"), "domain_true", n_permutations=19)
    for name, own in expected.tables.items():
        pd.testing.assert_frame_equal(found.tables[name], own, check_dtype=False)


def test_reports_show_it(finished):
    page = (results(finished) / "s1/report.html").read_text()
    assert '<section id="space">' in page
    assert "Neighbours among domains" in page
    assert "No cell types: obs has none of" in page


def test_a_slide_that_cannot_be_measured_is_published(finished):
    folder, run = finished
    assert run.status("STATS", "s2") == ["FAILED"]
    with (folder / "results/samples.tsv").open(newline="") as file:
        rows = {row["sample"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(("s1", "s2", "table"), "done")
    assert rows["s2"]["cause"].startswith('not measured in space: obs has no column "kind"')
    assert not (folder / "results/s2/stats").exists()
    assert '<section id="space">' not in (folder / "results/s2/report.html").read_text()
    assert (folder / "results/s2/s2.zarr").is_dir()


def test_the_cohort_is_brought_together(finished):
    cohort = results(finished) / "cohort"
    values = pd.read_csv(cohort / "stats/spatial.csv")
    assert set(values["sample"]) == {"s1", "table"}
    compared = pd.read_csv(cohort / "stats/conditions_spatial.csv")
    assert compared["p"].isna().all()  # one sample each
    assert (cohort / "stats/proportions.csv").is_file()  # what the domains' report wrote stands beside it
    page = (cohort / "spatial.html").read_text()
    assert "Spatial statistics of 2 slides" in page
    assert str(finished[0]) not in page
    about = json.loads((results(finished) / "s1/stats/about.json").read_text())
    assert about["metadata"]["condition"] == "case"
