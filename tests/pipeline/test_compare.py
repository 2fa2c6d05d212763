"""`--compare` through the pipeline: several methods of a slide in one run, and what becomes of it where one fails."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import spatialdata
from cellquilt.comparison.methods import MEASURES, read_comparison
from cellquilt.core.assignment import Assignment
from cellquilt.core.shapes import read_shapes
from cellquilt.core.store import Store
from runner import ROOT, Nextflow

pytestmark = pytest.mark.slow

FAKES = ROOT / "tests" / "fakes"
#: The samples' columns besides `sample, technology, path`.
SAMPLES = {
    "whole": {"truth": "sim/slide_0/truth", "compare_markers": "sim/exclusive (1).csv"},
    # One of the compared methods, the comparison, the chosen method: each fails by itself.
    "partly": {"baysor_config": '{"nonsense": {"x": 1}}'},
    "mistaken": {"compare": "vendor", "compare_markers": "foreign.csv"},
    "lost": {"segmentation": "generic,baysor", "compare": "vendor", "baysor_config": '{"nonsense": {"x": 1}}'},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two simulated Xenium bundles, files of pairs of genes, and the sheet."""
    from cellquilt.simulate import simulate

    folder = tmp_path_factory.mktemp("compare")
    simulate(folder / "sim", format="xenium", width_px=384, slides=2, seed=3)
    (folder / "foreign.csv").write_text("gene_a,gene_b\nNot,Here\n")
    rows = pq.read_table(folder / "sim/slide_0/transcripts.parquet", columns=["feature_name", "is_gene"])
    genes = sorted(set(rows.filter(rows["is_gene"])["feature_name"].to_pylist()))[:4]
    (folder / "sim/exclusive (1).csv").write_text("gene_a,gene_b\n{},{}\n{},{}\n".format(*genes))
    columns = sorted({name for more in SAMPLES.values() for name in more})
    with (folder / "sheet.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["sample", "technology", "path", *columns])
        table.writeheader()
        for sample, more in SAMPLES.items():
            slide = "sim/slide_0" if sample == "whole" else "sim/slide_1"
            table.writerow({"sample": sample, "technology": "xenium", "path": slide, **more})
    return folder


def launch(folder: Path, compared: str, *more: str):
    return Nextflow(folder).pipeline(
        *("--input", "sheet.csv", "--segmentation", "generic", "--compare", compared, *more),
        *("--generic_function", "cellquilt.segment.generic:rainfall", "--generic_diameter_um", "8"),
        PATH=f"{FAKES}{os.pathsep}{os.environ['PATH']}",
    )


def by_sample(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results/samples.tsv").open(newline="") as file:
        return {row["sample"]: row for row in csv.DictReader(file, delimiter="\t")}


def tasks(run, sample: str, status: str = "COMPLETED") -> list[str]:
    """Processes with the method that they were about, of a sample's tasks."""
    found = [task for task in run.trace if task["tag"].split(":")[0] == sample and task["status"] == status]
    return sorted(" ".join([task["process"].split(":")[-1], *task["tag"].split(":")[1:2]]) for task in found)


def check_table(store: Path, table, element: str) -> None:
    """The rows of a table add up to the counted transcripts that its cells say are in them."""
    said = Assignment(Store(store).element("shapes", element))
    points = spatialdata.read_zarr(store).points["transcripts"].compute()
    cell = said.next(points["transcript_id"].to_numpy())
    said.finish()
    counted = (points["passes_qv"] & ~points["is_control"]).to_numpy() & (cell >= 0)
    assert np.asarray(table.X.sum(axis=1)).ravel().tolist() == np.bincount(cell[counted], minlength=len(table)).tolist()
    assert table.obs_names.tolist() == read_shapes(store / "shapes" / element).ids.tolist()
    assert counted.sum() > 1000


def test_methods_are_compared_and_none_takes_the_others_down(folder):
    run = launch(folder, "vendor,generic+baysor")
    assert run.code != 0
    rows, results = by_sample(folder), folder / "results"

    # Common work is done once: one conversion, one tissue, one segmentation of nuclei for `generic` and its chain.
    assert tasks(run, "whole") == sorted([
        *("CONVERT", "TISSUE", "PATCHIFY generic", "SEGMENT_GENERIC generic", "RESOLVE generic", "RESOLVE vendor"),
        *("PATCHIFY_TRANSCRIPTS generic+baysor", "SEGMENT_BAYSOR generic+baysor", "RESOLVE_TRANSCRIPTS generic+baysor"),
        *("AGGREGATE generic", "AGGREGATE generic+baysor", "AGGREGATE vendor"),
        *("ASSEMBLE", "COMPARE", "REPORT", "EXPLORER"),
    ])  # fmt: skip
    assert (rows["whole"]["status"], rows["whole"]["cause"]) == ("done", "")
    store = results / "whole/whole.zarr"
    sdata = spatialdata.read_zarr(store)
    assert sorted(sdata.tables) == ["table", "table_generic_baysor", "table_vendor"]
    assert {"cell_boundaries", "generic_baysor_boundaries", "vendor_boundaries"} <= set(sdata.shapes)
    for method in ("vendor", "generic_baysor"):
        assert sdata.tables[f"table_{method}"].uns["spatialdata_attrs"]["region"] == f"{method}_boundaries"
        check_table(store, sdata.tables[f"table_{method}"], f"{method}_boundaries")
    points = sdata.points["transcripts"].compute()
    counted = points[points["passes_qv"] & ~points["is_control"]].groupby("cell_id", observed=True).size()
    sums = counted.reindex(sdata.tables["table"].obs_names).fillna(0).to_numpy()
    assert np.array_equal(np.asarray(sdata.tables["table"].X.sum(axis=1)).ravel(), sums)

    # The numbers of comparison.json are those of the tables, and the report shows them.
    found = read_comparison(results / "whole/comparison.json")
    assert found.methods == ("generic", "vendor", "generic+baysor")
    assert (found.marker_source, len(found.marker_pairs)) == ("file", 2)
    for k, name in enumerate(("table", "table_vendor", "table_generic_baysor")):
        table = sdata.tables[name]
        assert found.values["n_cells"][k] == table.n_obs
        assert found.values["median_transcripts_per_cell"][k] == np.median(np.asarray(table.X.sum(axis=1)))
    assert found.values["true_f1"][1] == 1  # the simulated machine's cells are the true ones
    assert float(rows["whole"]["share_assigned"]) == pytest.approx(found.values["share_assigned"][0], rel=1e-5)
    with (results / "whole/comparison.tsv").open(newline="") as file:
        table = {row["method"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert tuple(table) == found.methods
    assert list(table["vendor"])[1:] == [measure.name for measure in MEASURES if measure.name in found.values]
    html = (results / "whole/report.html").read_text()
    assert '<section id="methods">' in html
    data = json.loads(re.search(r'id="cellquilt-report">(.*?)</script>', html, re.DOTALL).group(1))
    assert data["comparison"] == json.loads((results / "whole/comparison.json").read_text())
    assert f"{100 * found.values['share_assigned'][1]:.1f}%" in html
    assert str(folder) not in html + json.dumps(sdata.attrs["cellquilt"])

    # A compared method that fails leaves the others; the row says which, where and why.
    assert rows["partly"]["status"] == "done"
    assert rows["partly"]["stage"] == "PATCHIFY_TRANSCRIPTS"
    assert rows["partly"]["cause"].startswith("generic+baysor not compared: baysor_config: ")
    assert "nonsense" in rows["partly"]["cause"]
    assert "done: partly in PATCHIFY_TRANSCRIPTS: generic+baysor not compared" in run.out
    left = read_comparison(results / "partly/comparison.json")
    assert left.methods == ("generic", "vendor")
    assert left.notes[0] == "no cells by generic+baysor: the run's log says why"
    assert "No cells by generic+baysor" in (results / "partly/report.html").read_text()
    assert sorted(spatialdata.read_zarr(results / "partly/partly.zarr").tables) == ["table", "table_vendor"]

    # So does a comparison.
    assert rows["mistaken"]["status"] == "done"
    assert rows["mistaken"]["stage"] == "COMPARE"
    assert rows["mistaken"]["cause"].startswith("methods not compared: no marker is on the panel")
    assert not (results / "mistaken/comparison.json").exists()
    assert '<section id="methods">' not in (results / "mistaken/report.html").read_text()
    assert "table_vendor" in spatialdata.read_zarr(results / "mistaken/mistaken.zarr").tables

    # The chosen method is the slide's result: without it there is none.
    assert (rows["lost"]["status"], rows["lost"]["stage"]) == ("failed", "PATCHIFY_TRANSCRIPTS")
    assert "nonsense" in rows["lost"]["cause"]
    assert not (results / "lost").exists()
    assert "Traceback" not in run.out + run.err


def test_one_more_method_runs_only_what_is_new(folder):
    run = launch(folder, "vendor,generic+baysor,baysor", "-resume")
    assert tasks(run, "whole") == [
        *("AGGREGATE baysor", "ASSEMBLE", "COMPARE", "EXPLORER", "PATCHIFY_TRANSCRIPTS baysor", "REPORT"),
        *("RESOLVE_TRANSCRIPTS baysor", "SEGMENT_BAYSOR baysor"),
    ]
    assert tasks(run, "mistaken") == []  # its own column says what it compares
    found = read_comparison(folder / "results/whole/comparison.json")
    assert found.methods == ("generic", "vendor", "generic+baysor", "baysor")
    store = folder / "results/whole/whole.zarr"
    check_table(store, spatialdata.read_zarr(store).tables["table_baysor"], "baysor_boundaries")
    # Each method's tables are the same as before: what comes and goes beside them has no say.
    again = launch(folder, "vendor", "-resume")
    assert tasks(again, "whole") == ["ASSEMBLE", "COMPARE", "EXPLORER", "REPORT"]
    assert tasks(again, "partly") == ["COMPARE", "REPORT"]  # nothing was asked for this time that is missing
    assert read_comparison(folder / "results/partly/comparison.json").notes == ()
