"""The pipeline as a whole: results, resuming after every kind of stop, failures by name, nothing touched."""

import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import anndata
import cellquilt
import numpy as np
import pyarrow.parquet as pq
import pytest
import spatialdata
import tifffile
import yaml
from cellquilt import explorer
from cellquilt.core.points import iter_points
from cellquilt.core.shapes import read_geoparquet, read_shapes
from cellquilt.core.sizes import size_of
from cellquilt.costs.table import memory_mb
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.rasterize import polygons_to_labels
from cellquilt.patches.bundle import Bundle
from runner import ROOT, Nextflow
from traces import megabytes, process, took

pytestmark = pytest.mark.slow

GENERIC = (
    "--segmentation", "generic", "--generic_function", "cellquilt.segment.generic:rainfall",
    "--patch_width_px", "256", "--patches_per_task", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """A sheet of two small simulated slides, with truth."""
    from cellquilt.simulate import simulate

    folder = tmp_path_factory.mktemp("slides")
    simulate(folder / "sim", width_px=512, slides=2, seed=3)
    write_sheet(folder / "sheet.csv", {"s1": {}, "s2": {}}, folder)
    return folder


def write_sheet(path: Path, samples: dict[str, dict[str, str]], folder: Path) -> None:
    columns = ["sample", "technology", "path", "transcripts", "truth"]
    columns += sorted({name for more in samples.values() for name in more})
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        for number, (sample, more) in enumerate(samples.items()):
            slide = folder / "sim" / f"slide_{number % 2}"
            table.writerow(
                {
                    "sample": sample,
                    "technology": "ome_tif",
                    "path": slide / "image.ome.tif",
                    "transcripts": slide / "transcripts.parquet",
                    "truth": slide / "truth",
                    **more,
                }
            )


def fingerprint(store: Path) -> dict[str, str]:
    """Checksums of what a slide is: the table's parts, outlines, and the transcripts' cells."""
    table = anndata.read_zarr(store / "tables" / "table")
    assigned = hashlib.sha256()
    for batch in iter_points(store / "points" / "transcripts", columns=["transcript_id", "cell_id", "in_nucleus"]):
        assigned.update(json.dumps(batch.column("cell_id").to_pylist()).encode())
        assigned.update(batch.column("in_nucleus").to_pandas().to_numpy().tobytes())
    parts = {
        "X": table.X.tocsr().toarray().tobytes(),
        "obs": table.obs.to_csv().encode(),
        "var": table.var.to_csv().encode(),
        "spatial": np.asarray(table.obsm["spatial"]).tobytes(),
        "intensities": table.obsm["intensities"].to_numpy().tobytes(),
        **{
            name: b"".join(shape.wkb for shape in read_shapes(store / "shapes" / name).geometry)
            for name in ("cell_boundaries", "nucleus_boundaries")
        },
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()} | {
        "transcripts": assigned.hexdigest()
    }


def tree_checksum(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def samples(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results" / "samples.tsv").open(newline="") as file:
        return {row["sample"]: row for row in csv.DictReader(file, delimiter="\t")}


@pytest.fixture(scope="module")
def finished(slides, tmp_path_factory):
    """One plain run that several tests look at: (folder, run, fingerprints)."""
    folder = tmp_path_factory.mktemp("plain")
    run = Nextflow(folder).pipeline("--input", slides / "sheet.csv", *GENERIC, "--export", "vpt,qupath")
    assert run.code == 0, run.out + run.err
    return folder, run, {name: fingerprint(folder / "results" / name / f"{name}.zarr") for name in ("s1", "s2")}


def test_a_run_publishes_what_the_contract_says(finished, slides):
    folder, run, _ = finished
    results = folder / "results"
    assert {row["status"] for row in samples(folder).values()} == {"done"}
    assert list(samples(folder)) == ["s1", "s2"]
    asked = json.loads((results / "pipeline_info" / "params.json").read_text())
    assert (asked["segmentation"], asked["seed"]) == ("generic", 0)
    used = yaml.safe_load((results / "pipeline_info" / "versions.yml").read_text())
    stages = {"convert", "tissue", "patchify_image", "segment_generic", "resolve", "aggregate", "assemble", "report"}
    assert stages <= set(used)
    assert used["segment_generic"]["numpy"] == np.__version__
    sums = (results / "pipeline_info" / "checksums.tsv").read_text().splitlines()
    image = hashlib.sha256((slides / "sim/slide_0/image.ome.tif").read_bytes()).hexdigest()
    assert f"s1\timage.ome.tif\t{image}" in sums
    assert len((results / "multiqc" / "cellquilt_samples_mqc.tsv").read_text().split("\nSample\t")[1].splitlines()) == 3
    assert run.trace
    for sample in ("s1", "s2"):
        qc = json.loads((results / sample / "qc.json").read_text())
        assert qc["verdict"] in ("PASS", "WARN", "FAIL")
        assert (results / sample / "report.html").stat().st_size > 10_000
        sdata = spatialdata.read_zarr(results / sample / f"{sample}.zarr")
        table = sdata.tables["table"]
        assert table.obs_names.tolist() == [f"{sample}-{n}" for n in range(1, table.n_obs + 1)]
        assert table.n_obs == qc["n_cells"] > 10
        transcripts = sdata.points["transcripts"].compute()
        assert len(transcripts) == qc["n_transcripts"]
        assert sorted(transcripts["transcript_id"]) == list(range(len(transcripts)))
        counted = transcripts[~transcripts["is_control"] & transcripts["passes_qv"]]
        sums = counted["cell_id"].value_counts()
        per_cell = np.asarray(table.X.sum(axis=1)).ravel()
        assert per_cell.tolist() == [sums.get(cell, 0) for cell in table.obs_names]
        assert {"global", "microns"} <= set(sdata.coordinate_systems)
        viewer = explorer.validate(results / sample / "explorer")
        assert (viewer["cells"], viewer["transcripts"]) == (table.n_obs, len(transcripts))
        exports = results / sample / "exports"
        assert sorted(entry.name for entry in exports.iterdir()) == ["qupath", "vpt"]
        cells = pq.read_table(exports / "vpt" / "cell_boundaries.parquet", columns=["Name"]).column("Name").to_pylist()
        assert list(dict.fromkeys(cells)) == table.obs_names.tolist()
        features = json.loads((exports / "qupath" / "cells.geojson").read_text())["features"]
        assert [feature["properties"]["name"] for feature in features] == table.obs_names.tolist()
    text = (results / "samples.tsv").read_text() + (results / "s1" / "report.html").read_text()
    assert str(folder) not in text
    assert str(slides) not in text


def test_what_it_took_is_what_was_asked_for_and_estimated(finished, slides):
    _, run, _ = finished
    slide = slides / "sim" / "slide_0"
    given = size_of([slide / "image.ome.tif", slide / "transcripts.parquet"])
    convert = next(task for task in run.trace if process(task) == "CONVERT" and task["tag"] == "s1")
    assert megabytes(convert["memory"]) == memory_mb("CONVERT", given)
    for task in run.trace:
        assert megabytes(task["peak_rss"]) < megabytes(task["memory"]) <= 3 << 10, task
    found = cellquilt.estimate(
        slides / "sheet.csv", segmentation="generic", patch_width_px=256, patches_per_task=2, export="vpt,qupath"
    )
    tasks, cpu_s, peak_mb = took(run.trace)
    assert found.total.tasks == tasks
    assert cpu_s / 2 < 3600 * found.total.cpu_h < 2 * cpu_s
    assert peak_mb / 2 < found.total.peak_mb < 2 * peak_mb


def test_cleanup_leaves_the_results_and_what_resume_needs(nextflow, finished, slides):
    run = nextflow.pipeline("--input", slides / "sheet.csv", *GENERIC, "--cleanup")
    assert run.code == 0, run.out + run.err
    work, results = nextflow.folder / "work", nextflow.folder / "results"
    for sample, expected in finished[2].items():
        store = results / sample / f"{sample}.zarr"
        assert fingerprint(store) == expected
        assert all(path.stat().st_nlink > 1 for path in (store / "images").rglob("*") if path.is_file())
    bundles = list(work.glob("*/*/bundles/bundle_*.zarr"))
    assert len(bundles) == 4
    left = [path for bundle in bundles for path in bundle.rglob("*") if path.is_file()]
    assert {path.name for path in left} == {"zarr.json"}
    raw = [path for path in work.glob("*/*/s?.raw.zarr") if not path.is_symlink()]
    assert len(raw) == 2
    assert not [path for store in raw for path in store.rglob("*.parquet") if path.is_file()]
    assert all(any((store / "images").rglob("c/*/*/*")) for store in raw)
    again = nextflow.pipeline("--input", slides / "sheet.csv", *GENERIC, "--cleanup", "-resume")
    assert {task["status"] for task in again.trace} == {"CACHED"}, again.out


def test_a_second_run_is_all_cached_and_an_edit_of_the_results_stays_there(finished, slides):
    folder, _, prints = finished
    store = folder / "results" / "s1" / "s1.zarr"
    work = {path: tree_checksum(path) for path in (folder / "work").glob("*/*/s1.zarr")}
    assert work
    shutil.rmtree(store / "tables")
    for part in (store / "shapes").rglob("*.parquet"):
        part.write_bytes(b"edited")
    assert work == {path: tree_checksum(path) for path in work}
    shutil.rmtree(store.parent)  # a resumed run publishes what is missing, and never overwrites what a user edited
    run = Nextflow(folder).pipeline("--input", slides / "sheet.csv", *GENERIC, "-resume")
    assert run.code == 0, run.out + run.err
    assert {task["status"] for task in run.trace} == {"CACHED"}
    assert fingerprint(store) == prints["s1"]


def test_one_changed_row_runs_only_that_sample_again(finished, slides):
    folder, _, prints = finished
    write_sheet(slides / "changed.csv", {"s1": {"expand_um": ""}, "s2": {"expand_um": "2"}}, slides)
    run = Nextflow(folder).pipeline("--input", slides / "changed.csv", *GENERIC, "-resume")
    assert run.code == 0, run.out + run.err
    again = {(task["process"].split(":")[-1], task["tag"]) for task in run.trace if task["status"] == "COMPLETED"}
    assert again == {
        *(("RESOLVE", "s2:generic"), ("AGGREGATE", "s2:generic")),
        *(("ASSEMBLE", "s2"), ("REPORT", "s2"), ("EXPLORER", "s2"), ("SAMPLES", "-")),
    }
    assert fingerprint(folder / "results" / "s1" / "s1.zarr") == prints["s1"]
    assert fingerprint(folder / "results" / "s2" / "s2.zarr") != prints["s2"]


def test_copied_inputs_give_the_same_cells(nextflow, finished, slides):
    """What an object store does: every task has copies of its inputs, and nothing written into one comes back."""
    write_sheet(slides / "one.csv", {"s1": {}}, slides)
    run = nextflow.pipeline("--input", slides / "one.csv", *GENERIC, "-profile", "local,copy", "-process.cpus", "2")
    assert run.code == 0, run.out + run.err
    assert fingerprint(nextflow.folder / "results" / "s1" / "s1.zarr") == finished[2]["s1"]
    # A patch task has a copy of its bundle and of nothing else: the slide is not among it.
    for script in nextflow.folder.glob("work/*/*/.command.run"):
        if "SEGMENT_GENERIC" not in script.read_text():
            continue
        (path,) = staged(script)
        bundle = Bundle(path)
        own = sum((y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in (patch.core for patch in bundle.patches))
        pixels = bundle.read(bundle.patches[0])
        n_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        assert 0 < n_bytes <= 2 * own * len(pixels) * pixels.itemsize


def staged(script: Path) -> list[Path]:
    """What a task copies from elsewhere before it starts."""
    (stage,) = re.findall(r"^nxf_stage\(\) \{(.*?)^\}", script.read_text(), flags=re.S | re.M)
    return [Path(shlex.split(line)[-2]) for line in stage.splitlines() if line.split()[:1] == ["cp"]]


@pytest.mark.parametrize("wanted", [1, 2], ids=["after the first patch", "after the second"])
def test_a_killed_run_goes_on_with_the_same_cells(nextflow, finished, slides, wanted):
    """SIGKILL to Nextflow and its tasks, as a lost machine does; -resume does only what is left."""
    write_sheet(slides / "one.csv", {"s1": {}}, slides)
    arguments = ("--input", slides / "one.csv", *GENERIC[:-1], "1")  # one patch a task: four of them
    command = nextflow.command("run", ROOT / "main.nf", "--outdir", "results", *arguments, "-process.maxForks", "1")
    log = nextflow.folder / "stdout.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=nextflow.folder, env=nextflow.environment(), stdout=out, stderr=out, start_new_session=True
        )
        deadline = time.monotonic() + 300
        try:
            # Nextflow writes a task's line into the trace when it has seen the task's end.
            info = nextflow.folder / "results" / "pipeline_info"
            while sum(trace.read_text().count("SEGMENT_GENERIC (") for trace in info.glob("trace.*txt")) < wanted:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            time.sleep(0.5)  # the cache's own entry is written after the trace's
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    run = nextflow.pipeline(*arguments, "-resume")
    assert run.code == 0, run.out + run.err
    patches = run.status("SEGMENT_GENERIC")
    assert len(patches) == 4
    assert 1 <= patches.count("CACHED") < 4  # the next patch may have ended before the signal came
    assert patches.count("COMPLETED") == 4 - patches.count("CACHED")
    assert fingerprint(nextflow.folder / "results" / "s1" / "s1.zarr") == finished[2]["s1"]


def test_a_failing_patch_names_its_slide_and_the_others_finish(nextflow, slides):
    write_sheet(
        slides / "failing.csv",
        {"good": {"generic_function": ""}, "bad": {"generic_function": "cellquilt.segment.generic:nothing_here"}},
        slides,
    )
    run = nextflow.pipeline("--input", slides / "failing.csv", *GENERIC)
    assert run.code != 0
    rows = samples(nextflow.folder)
    assert (rows["good"]["status"], rows["bad"]["status"]) == ("done", "failed")
    assert rows["bad"]["stage"] in ("PATCHIFY", "SEGMENT_GENERIC")
    assert "nothing_here" in rows["bad"]["cause"]
    assert "failed: bad" in run.out
    assert (nextflow.folder / "results" / "good" / "good.zarr").is_dir()
    assert not (nextflow.folder / "results" / "bad").exists()


def test_the_strict_parser_gives_the_same_cells(nextflow, finished, slides):
    run = nextflow.pipeline("--input", slides / "sheet.csv", *GENERIC, NXF_SYNTAX_PARSER="v2")
    assert run.code == 0, run.out + run.err
    assert {
        name: fingerprint(nextflow.folder / "results" / name / f"{name}.zarr") for name in ("s1", "s2")
    } == finished[2]


def test_the_first_failure_stops_the_run_and_a_mail_says_so(nextflow, slides):
    bad = {"generic_function": "cellquilt.segment.generic:nothing_here"}
    write_sheet(nextflow.folder / "sheet.csv", {"s1": {"generic_function": ""}, "s2": bad}, slides)
    mailer = nextflow.folder / "programs" / "sendmail"
    mailer.parent.mkdir()
    mailer.write_text(f"#!/bin/sh\ncat > '{nextflow.folder}/mail.txt'\n")
    mailer.chmod(0o755)
    run = nextflow.pipeline(
        "--input", "sheet.csv", *GENERIC, "--on_sample_error", "stop", "--email_on_fail", "core@example.org",
        PATH=f"{mailer.parent}:{os.environ['PATH']}",
    )  # fmt: skip
    assert run.code != 0
    rows = samples(nextflow.folder)
    assert {name: row["status"] for name, row in rows.items()} == {"s1": "failed", "s2": "failed"}
    assert "nothing_here" in rows["s2"]["cause"]
    assert rows["s1"]["error"] == "run-ended"
    mail = (nextflow.folder / "mail.txt").read_text()
    assert "To: core@example.org" in mail
    assert "0 of 2 samples done" in mail
    assert rows["s2"]["cause"][:30] in mail


def test_stubs_draw_the_whole_graph(nextflow, slides):
    run = nextflow.pipeline("--input", slides / "sheet.csv", "-stub-run")
    assert run.code == 0, run.out + run.err
    done = {task["process"].split(":")[-1] for task in run.trace}
    assert done == {
        "CONVERT", "TISSUE", "PATCHIFY", "SEGMENT_CELLPOSE", "RESOLVE", "AGGREGATE", "ASSEMBLE", "REPORT", "SAMPLES",
        "EXPLORER",
    }  # fmt: skip


def test_the_real_merscope_region(nextflow, shared_data):
    """With the vendor's cells and with our own nuclei; every transcript is accounted for."""
    region = shared_data / "merscope_liver"
    (nextflow.folder / "region").mkdir()
    for name in ("images", "detected_transcripts.csv"):
        os.symlink(region / name, nextflow.folder / "region" / name)
    (nextflow.folder / "sheet.csv").write_text("sample,technology,path,z\nliver,merscope,region,3\n")
    run = nextflow.pipeline("--input", "sheet.csv")
    assert run.code == 0, run.out + run.err
    qc = json.loads((nextflow.folder / "results" / "liver" / "qc.json").read_text())
    assert (qc["n_transcripts"], qc["n_inside_image"], qc["n_control"]) == (5936, 3334, 22)
    sdata = spatialdata.read_zarr(nextflow.folder / "results" / "liver" / "liver.zarr")
    transcripts = sdata.points["transcripts"].compute()
    assert sorted(transcripts["transcript_id"]) == list(range(5936))
    assert int(transcripts["cell_id"].notna().sum()) == qc["n_assigned"]
    assert int(sdata.tables["table"].X.sum()) == qc["n_counted"] <= qc["n_assigned"] <= 3334
    assert qc["n_cells"] >= 3


FAKES = ROOT / "tests" / "fakes"


def test_chains_of_methods_count_every_transcript_once(tmp_path, nextflow):
    """Image or machine first, then transcripts: with the stand-in for Baysor that the contract tests use.

    Prior cells also from a label image and from a file, there without an image; a configuration file of Baysor's. All
    are staged: what tasks see has other paths.
    """
    from cellquilt.simulate import simulate

    simulate(tmp_path / "sim", format="xenium", width_px=768, seed=3)
    truth, _, _ = read_geoparquet(tmp_path / "sim" / "slide_0" / "truth" / "nuclei.parquet")
    labels = polygons_to_labels(Rings.from_shapely(truth), np.arange(1, len(truth) + 1), (0, 768, 0, 768))
    tifffile.imwrite(tmp_path / "nuclei.tif", labels.astype(np.uint16))
    (tmp_path / "own.toml").write_text("[data]\nmin_molecules_per_gene = 2\n")
    rows = {
        "by_image": 'xenium,sim/slide_0,,,"generic,baysor",,',
        "by_machine": 'xenium,sim/slide_0,,,"vendor,baysor",,own.toml',
        "alone": "xenium,sim/slide_0,,,baysor,,",
        "by_labels": "xenium,sim/slide_0,,,baysor,nuclei.tif,",
        "by_file": 'transcripts,,sim/slide_0/transcripts.parquet,sim/slide_0/truth/nuclei.parquet,"vendor,baysor",,',
    }
    header = (
        "sample,technology,path,transcripts,prior_cells,segmentation,prior,baysor_config,prior_cells_unit,pixel_size_um"
    )
    pixel_um = json.loads((tmp_path / "sim" / "slide_0" / "experiment.xenium").read_text())["pixel_size"]
    lines = [header, *(f"{name},{row},px,{pixel_um}" for name, row in rows.items())]
    (tmp_path / "sheet.csv").write_text("\n".join(lines) + "\n")
    run = nextflow.pipeline(
        "--input", "sheet.csv", *GENERIC[2:], "--generic_diameter_um", "8", "--transcripts_per_patch", "20000",
        "--transcripts_patch_overlap_um", "30", PATH=f"{FAKES}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    assert run.code == 0, run.out + run.err
    assert len(run.status("SEGMENT_BAYSOR")) > len(rows)  # patches are segmented each by itself
    chains = {"by_image": "generic,baysor", "alone": "baysor", "by_labels": "baysor"}
    priors = {"by_image": "cell_boundaries", "by_labels": "labels/nuclei.tif", "alone": "vendor_cell_id"}
    for name in rows:
        sdata = spatialdata.read_zarr(tmp_path / "results" / name / f"{name}.zarr")
        chain = chains.get(name, "vendor,baysor")
        table = sdata.tables["table"]
        points = sdata.points["transcripts"].compute()
        counted = points[points["passes_qv"] & ~points["is_control"]]
        sums = counted.groupby("cell_id", observed=True).size().reindex(table.obs_names).fillna(0).to_numpy()
        assert np.array_equal(np.asarray(table.X.sum(axis=1)).ravel(), sums), chain
        assert sums.sum() > 0.8 * len(counted)
        assert list(table.obs_names) == [f"{name}-{number}" for number in range(1, table.n_obs + 1)]
        records = sdata.attrs["cellquilt"]["records"]
        assert ",".join(record["facts"]["method"] for record in records if record["stage"] == "resolve") == chain
        (cut,) = (record for record in records if record["stage"] == "patchify_transcripts")
        assert cut["facts"]["prior"]["name"] == priors.get(name, "cell_boundaries")
        assert cut["facts"]["n_with_prior"] > 0.2 * cut["facts"]["n_to_segment"]
        assert bool(sdata.images) == (name != "by_file")
        tasks = next(record for record in records[::-1] if record["stage"] == "resolve")["facts"]["tasks"]
        assert [task["facts"]["prior"]["n_cells"] > 10 for task in tasks] == [True] * len(tasks)
        if name == "by_image":
            # Each nucleus has the id of the one cell that started from it.
            nuclei = sdata.shapes["nucleus_boundaries"]
            assert 0.8 * len(sdata.shapes["generic_boundaries"]) < len(nuclei) <= table.n_obs
            assert nuclei.index.is_unique
            cells = sdata.shapes["cell_boundaries"].loc[nuclei.index]
            assert (cells.intersection(nuclei, align=False).area > 0.5 * nuclei.area.to_numpy()).mean() > 0.9
