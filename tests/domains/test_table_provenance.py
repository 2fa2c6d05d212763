"""A cell table with domains says how it got them, by the same bytes each time."""

import csv
import json
from pathlib import Path

import anndata
import cellquilt as cq
import cellquilt.simulate
import pytest
import spatialdata
from cellquilt.cli import main
from cellquilt.core.settings import Settings
from cellquilt.domains import stages
from cellquilt.domains.checkpoint import checksum
from cellquilt.readers.base import describe_file
from cellquilt.report import remake
from cellquilt.report.stage import annotate_sample
from leaks import leaks

KINDS = {"a": "a.h5ad", "b": "b.zarr", "c": "c.zarr"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """An .h5ad file, a .zarr folder and a SpatialData store, with the domains found in them."""
    folder = tmp_path_factory.mktemp("planted_folder")
    a, b, c = cq.simulate.cell_tables(3, 300, n_domains=4, thin_layers=0, rare_niches=0, seed=4)
    a.write_h5ad(folder / KINDS["a"])
    b.write_zarr(folder / KINDS["b"])
    spatialdata.SpatialData(tables={"cells": c}).write(folder / KINDS["c"])
    settings = Settings(domains="train", domains_n=4, domains_seed=5, domains_radius=70.0)
    graphs = [
        stages.prepare_slide(folder / file, folder / f"{name}.graph.zarr", settings=settings, sample=name)
        for name, file in KINDS.items()
    ]
    model = stages.train_model(graphs, folder / "model", settings=settings)
    latents = [
        stages.embed_slide(graph, graph.with_suffix(".parquet"), settings=settings, weights=model) for graph in graphs
    ]
    stages.assign_domains(latents, folder / "domains", settings=settings, weights=model)
    return folder


def annotated(cohort: Path, name: str, output: Path) -> Path:
    return annotate_sample(
        cohort / KINDS[name],
        output,
        domains=cohort / "domains" / f"{name}.domains.parquet",
        graph=cohort / f"{name}.graph.zarr",
        sample=name,
        metadata={"condition": "x"},
        qc=output.with_suffix(".json"),
    )


@pytest.mark.parametrize("name", KINDS)
def test_it_says_what_it_was_made_of_and_how(cohort, tmp_path, name):
    copy = annotated(cohort, name, tmp_path / KINDS[name])
    origin = remake.read_origin(copy)
    assert origin.sample == name
    assert origin.technology == ("spatialdata" if name == "c" else "anndata")
    assert origin.given == {"domains": "train", "domains_n": 4, "domains_radius": 70.0, "domains_seed": 5}
    assert origin.seeds == {"domains_seed": 5}
    assert origin.checksums["domains_model"] == checksum(cohort / "domains" / "model")
    assert [record["stage"] for record in origin.records] == ["domains_prepare", "domains", "domains_annotate"]
    assert origin.inputs == [{"column": "path", **describe_file(cohort / KINDS[name])}]
    assert remake.check_inputs(origin, {"path": cohort / KINDS[name]}) == [KINDS[name]]
    assert "planted" not in json.dumps(remake.as_dict(origin, {}, full=True))
    if name == "c":
        assert "domain" in spatialdata.read_zarr(copy).tables["cells"].obs
    else:
        found = anndata.read_h5ad(copy) if name == "a" else anndata.read_zarr(copy)
        assert "domain" in found.obs


def test_no_folder_of_this_machine_is_in_what_is_published(cohort, tmp_path):
    for name, file in KINDS.items():
        annotated(cohort, name, tmp_path / "out" / file)
    for folder in (tmp_path / "out", cohort / "domains"):
        assert leaks(folder, "/home/", "pytest-of") == []


@pytest.mark.parametrize("name", KINDS)
def test_the_same_table_has_the_same_bytes_wherever_and_whenever(cohort, tmp_path, name):
    one = annotated(cohort, name, tmp_path / "one" / KINDS[name])
    two = annotated(cohort, name, tmp_path / "two" / "renamed")
    assert describe_file(one)["sha256"] == describe_file(two)["sha256"]


def test_on_the_command_line(cohort, tmp_path, capsys):
    copy = annotated(cohort, "a", tmp_path / "a.h5ad")
    with pytest.raises(SystemExit) as stop:
        main(["provenance", str(copy), "--path", str(cohort / "a.h5ad"), "--sheet", str(tmp_path / "sheet.csv")])
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "take the sheet of the whole cohort" in said
    assert 'domains: domains = "train", domains_n = 4, domains_seed = 5' in said
    with open(tmp_path / "sheet.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"sample": "a", "technology": "anndata", "path": str(cohort / "a.h5ad"), "condition": "x"}
