"""The benchmark of domains: what it makes of labels, and that its recorded results are those of its cohorts."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("domains_quality")
    finally:
        sys.path.remove(str(FOLDER))
        for name in [name for name in sys.modules if name.startswith("domains_")]:
            sys.modules.pop(name)


@pytest.fixture(scope="module")
def cohorts(quality, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohorts")
    for cohort in quality.COHORTS.values():
        quality.write(cohort, folder)
    return folder


def truth_of(home: Path) -> list[list[str]]:
    import anndata

    slides = json.loads((home / "cohort.json").read_text())["slides"]
    return [anndata.read_h5ad(home / f"{name}.h5ad").obs["domain_true"].astype(str).tolist() for name in slides]


def test_cohorts_are_as_they_say(quality, cohorts) -> None:
    import anndata

    for name, cohort in quality.COHORTS.items():
        tables = [anndata.read_h5ad(file) for file in sorted((cohorts / name).glob("*.h5ad"))]
        assert {str(domain) for table in tables for domain in table.obs["domain_true"]} == {
            f"domain_{k}" for k in range(cohort.n_domains)
        }
        assert len({frozenset(table.var_names) for table in tables}) == (1 if name == "protein" else 3)
        assert all(table.n_obs <= 2000 for table in tables)
    assert {table.n_vars for table in tables} == {80, 79, 78}  # of the toy, the last one
    rings = [np.hypot(*(tables[0].obsm["spatial"].T))[(tables[0].obs["domain_true"] == f"domain_{k}").to_numpy()]
             for k in range(4)]  # fmt: skip
    assert all(ring.min() >= 125 * k - 1e-6 and ring.max() <= 125 * (k + 1) + 1e-6 for k, ring in enumerate(rings))


def test_recorded_results_are_of_these_cohorts(quality, cohorts) -> None:
    results = quality.read()
    for name in quality.COHORTS:
        assert json.loads((cohorts / name / "cohort.json").read_text())["digest"] == results["cohorts"][name]["digest"]
    for line in results["runs"]:
        assert set(line) >= {"method", "cohort", "seed", "command"}
        if "error" not in line:
            assert -0.5 <= line["ari"] <= 1
            assert 0 <= line["nmi"] <= 1
            assert len(line["slides"]) == (3 if line["cohort"].startswith("toy") else 6)


def test_scores(quality, cohorts) -> None:
    home = cohorts / "toy"
    truth = truth_of(home)
    renamed = [[{"domain_0": "d", "domain_1": "c"}.get(label, label) for label in part] for part in truth]
    perfect = quality.scores(home, renamed)
    assert (perfect["ari"], perfect["nmi"], perfect["n_found"], perfect["without"]) == (1, 1, 4, 0)
    # Names that differ between slides are right on each slide, and wrong for the cohort.
    apart = quality.scores(home, [[f"{k}-{label}" for label in part] for k, part in enumerate(truth)])
    assert [slide["ari"] for slide in apart["slides"].values()] == [1, 1, 1]
    assert apart["ari"] < 0.6
    assert apart["n_found"] == 12
    # Cells without a domain are a domain more.
    holes = quality.scores(home, [[None if label == "domain_0" else "rest" for label in part] for part in truth])
    two = quality.scores(home, [["a" if label == "domain_0" else "rest" for label in part] for part in truth])
    assert holes["ari"] == two["ari"]
    assert holes["n_found"] == 1
    assert holes["without"] == pytest.approx(1 / 16, abs=0.01)


def test_a_run_in_another_process(quality, cohorts) -> None:
    line = quality.run("kmeans_2hop", "toy", 0, cohorts, sys.executable, 10, 100)
    assert line["ari"] > 0.8
    assert line["versions"].keys() == {"scikit-learn"}
    again = quality.run("kmeans_2hop", "toy", 0, cohorts, "/no/python", 10, 100)
    assert again == line  # its labels are there
    recorded = next(run for run in quality.read()["runs"] if (run["method"], run["cohort"]) == ("kmeans_2hop", "toy"))
    assert line["ari"] == pytest.approx(recorded["ari"], abs=0.02)


def test_a_run_that_fails_says_why(quality, cohorts) -> None:
    line = quality.run("graphst", "toy", 7, cohorts, sys.executable, 10, 100)
    assert "GraphST" in line["error"]


def test_table(quality) -> None:
    line = {"cohort": "toy", "nmi": 0.5, "cpu_s": 3.0}
    results = {
        "cohorts": {"toy": {}, "hard": {}},
        "not_run": {"spaceflow": "not built"},
        "runs": [
            {**line, "method": "cellquilt", "ari": 0.6, "seed": 0},
            {**line, "method": "cellquilt", "ari": 0.8, "seed": 1},
            {"method": "novae", "cohort": "hard", "seed": 0, "error": "no level"},
        ],
    }
    assert quality.table(results).splitlines() == [
        "| ARI / NMI | hard | toy |",
        "| --- | --- | --- |",
        "| cellquilt |  | 0.70 / 0.50 (0.60–0.80, 3 s) |",
        "| novae, defaults | no level |  |",
        "| SpaceFlow | not built | |",
    ]
