"""Baysor's contract, through every door: the executable of 0.6 and 0.7, and Julia in this process.

The doors lead to stand-ins (tests/fakes) unless CELLQUILT_REAL_BAYSOR is set, as `make check-baysor` does.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import shapely
from cellquilt.cli import main as cli
from cellquilt.core import zarr_json
from cellquilt.core.errors import CellquiltError, SeveralErrors
from cellquilt.core.points import PointsWriter
from cellquilt.core.settings import Settings
from cellquilt.core.store import new_store
from cellquilt.segment.baysor import plan, segment_bundle
from cellquilt.segment.baysor.call import arguments, cause
from cellquilt.segment.baysor.config import KEYS, checked_config
from cellquilt.segment.baysor.prior import main_prior
from cellquilt.segment.baysor.read import read_output
from cellquilt.segment.molecules import CONFIDENCE, TRANSCRIPT_SCHEMA, read_results
from cellquilt.segment.stages import patchify_transcripts
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transcript_bundles import write_transcript_bundle

pytest_plugins = ["baysor_doors"]
REAL = bool(os.environ.get("CELLQUILT_REAL_BAYSOR"))

GENES = ["ACTB", "CD3E", 'D"1,2', "EPCAM", "RARE"]
#: Few rounds: the cells of these tests are far apart, and there are many tests.
QUICK = {"baysor_iterations": 60} if REAL else {}


# --- slides with known cells


def molecules(n_side=4, per_cell=60, spacing=20.0, spread=2.0, planes=1, with_prior=0.7, n_free=0, rare=0, seed=0):
    """A grid of round cells, far apart. Columns of a patch, and each transcript's true cell."""
    rng = np.random.default_rng(seed)
    centres = np.stack(np.meshgrid(*[np.arange(n_side) * spacing + spacing / 2] * 2), axis=-1).reshape(-1, 2)
    truth = np.repeat(np.arange(1, len(centres) + 1), per_cell)
    xy = centres[truth - 1] + rng.normal(0, spread, (len(truth), 2))
    gene = np.where(rng.random(len(truth)) < 0.9, truth % 2 + 1, 3 * (truth % 2)).astype(np.int32)
    if n_free:
        xy = np.concatenate([xy, rng.uniform(0, n_side * spacing, (n_free, 2))])
        truth = np.concatenate([truth, np.zeros(n_free, int)])
        gene = np.concatenate([gene, rng.integers(0, 4, n_free).astype(np.int32)])
    gene[:rare] = 4
    order = rng.permutation(len(truth))
    xy, truth, gene = xy[order], truth[order], gene[order]
    known = (rng.random(len(truth)) < with_prior) & (truth > 0)
    z = rng.integers(0, planes, len(truth)) * 1.5
    columns = {
        "transcript_id": np.arange(len(truth), dtype=np.uint64) * 3 + 1000,
        "x_um": xy[:, 0],
        "y_um": xy[:, 1],
        "z_um": z,
        "gene": gene,
        "prior_cell": np.where(known, truth, 0).astype(np.int32),
        "in_nucleus": known,
    }
    return columns, truth


def write_bundle(folder, patches, width=80.0, engine=None, prior=None, genes=GENES):
    return write_transcript_bundle(
        folder, patches, width=width, genes=genes, engine=engine or {"method": "baysor"}, prior=prior
    )


def segment(door, tmp_path, patches, name="bundle", **settings):
    """Segment patches through a door; returns the record and the result."""
    own = {key: settings.pop(key) for key in ("engine", "prior", "genes", "width") if key in settings}
    bundle = tmp_path / f"{name}.zarr"
    if not bundle.exists():
        write_bundle(bundle, patches, **own)
    output = tmp_path / f"{name}.result"
    record = segment_bundle(bundle, output, settings={**QUICK, **door.settings, **settings})
    return record, read_results([output])


def all_transcripts(result):
    """The transcripts of all patches in one table."""
    empty = pa.schema([*TRANSCRIPT_SCHEMA, CONFIDENCE]).empty_table()
    return pa.concat_tables([empty, *result.transcripts])


def assignment(result, patch=0):
    """transcript_id → label of a patch."""
    table = all_transcripts(result)
    rows = table.column("patch").to_numpy() == patch
    return table.column("transcript_id").to_numpy()[rows], table.column("label").to_numpy()[rows]


def agreement(truth, labels):
    """Share of the molecules of true cells that lie in the one label that most of their cell's molecules have."""
    right = sum(np.bincount(labels[truth == cell])[1:].max(initial=0) for cell in np.unique(truth[truth > 0]))
    return right / (truth > 0).sum()


def contents(folder):
    """All that a result says, but for the time it took."""
    result = read_results([folder])
    return [
        shapely.to_wkb(result.geometry).tolist(),
        {name: values.tolist() for name, values in result.cells.items()},
        all_transcripts(result).to_pydict(),
    ]


def same(a, b):
    return json.dumps(a, default=str) == json.dumps(b, default=str)


# --- what comes out


def test_cells_are_found_and_every_transcript_is_accounted_for(door, tmp_path):
    columns, truth = molecules(n_free=40)
    record, result = segment(door, tmp_path, [columns])
    ids, labels = assignment(result)
    assert ids.tolist() == columns["transcript_id"].tolist()
    assert agreement(truth, labels) > 0.95
    counts = np.bincount(labels, minlength=len(result.geometry) + 1)[1:]
    assert result.cells["n_transcripts"].tolist() == counts.tolist()
    assert counts.min() >= 1
    assert record["facts"]["n_objects"] == len(result.geometry)
    assert [patch["error"] for patch in result.patches] == [None]
    # The large cells are the true ones, with their prior cell.
    large = result.cells["n_transcripts"] >= 30
    assert large.sum() == 16
    true_of = [np.bincount(truth[labels == label]).argmax() for label in result.cells["label"][large]]
    assert result.cells["prior_cell"][large].tolist() == true_of


def test_labels_are_numbered_by_the_first_transcript(door, tmp_path):
    _, result = segment(door, tmp_path, [molecules(n_free=40)[0]])
    ids, labels = assignment(result)
    first = [ids[labels == label].min() for label in result.cells["label"]]
    assert result.cells["label"].tolist() == list(range(1, len(first) + 1))
    assert first == sorted(first)


def test_same_input_same_result_though_baysor_names_cells_at_random(door, tmp_path):
    columns, _ = molecules(n_free=40)
    segment(door, tmp_path, [columns], name="a")
    segment(door, tmp_path, [columns], name="b")
    a, b = (contents(tmp_path / f"{name}.result") for name in "ab")
    # Where an outline starts is Baysor's.
    assert same(a[1:] if REAL else a, b[1:] if REAL else b)


def test_outlines_are_valid_in_microns_and_hold_their_molecules(door, tmp_path):
    columns, _ = molecules(n_free=60)
    record, result = segment(door, tmp_path, [columns], baysor_scale_um=4)
    assert shapely.is_valid(result.geometry).all()
    assert (shapely.get_type_id(result.geometry) == shapely.GeometryType.POLYGON).all()
    assert (shapely.area(result.geometry) > 0).all()
    _, labels = assignment(result)
    inside = labels > 0
    points = shapely.points(columns["x_um"][inside], columns["y_um"][inside])
    covered = shapely.intersects(shapely.buffer(result.geometry[labels[inside] - 1], 0.01), points)
    assert covered.mean() > 0.85
    if not REAL:  # some of the stand-in's cells are small or have no outline
        small = (result.cells["n_transcripts"] <= 2).sum()
        assert record["facts"]["n_outlines_from_molecules"] >= small > 0


def test_patches_know_their_borders(door, tmp_path):
    """The right side of the left patch cuts a cell; the left side of the slide cuts none."""
    left, right = molecules(seed=1)[0], molecules(seed=2)[0]
    right["x_um"] = right["x_um"] + 80
    right["transcript_id"] = right["transcript_id"] + np.uint64(10_000)
    inside = left["x_um"] < 85
    rng = np.random.default_rng(0)
    n = 60
    x, y = rng.uniform(82, 85, n), rng.uniform(36, 44, n)  # half of a cell, as evenly as molecules lie
    left["x_um"], left["y_um"] = np.append(left["x_um"], x), np.append(left["y_um"], y)
    left["transcript_id"] = np.append(left["transcript_id"], np.arange(n, dtype=np.uint64) + np.uint64(8000))
    left["gene"] = np.append(left["gene"], np.arange(n, dtype=np.int32) % 3)
    left["prior_cell"] = np.append(left["prior_cell"], np.full(n, 99, np.int32))
    left["z_um"], left["in_nucleus"] = (
        np.append(left["z_um"], np.zeros(n)),
        np.append(left["in_nucleus"], np.ones(n, bool)),
    )
    _, result = segment(door, tmp_path, [left, right])
    assert inside.all()
    cut = result.cells["cut"]
    assert cut.dtype == bool
    (half,) = np.flatnonzero(result.cells["prior_cell"] == 99)
    assert cut[half]
    assert result.cells["depth_um"][half] > 0  # its outermost molecule is not on the border
    whole = (result.cells["n_transcripts"] >= 30) & (np.arange(len(cut)) != half)
    assert not cut[whole].any()
    assert whole.sum() == 32


def test_measures_of_baysor_are_kept(door, tmp_path):
    _, result = segment(door, tmp_path, [molecules()[0]])
    assert {"baysor_avg_confidence", "baysor_elongation", "baysor_lifespan"} <= set(result.cells)
    assert np.nanmin(result.cells["baysor_avg_confidence"]) >= 0
    table = all_transcripts(result)
    assert np.nanmax(table.column("confidence").to_numpy()) <= 1


def test_transcripts_of_rare_genes_are_in_no_cell(door, tmp_path):
    columns, _ = molecules(rare=4)
    rare = columns["gene"] == 4
    _, result = segment(door, tmp_path, [columns], baysor_config={"data": {"min_molecules_per_gene": 10}})
    ids, labels = assignment(result)
    assert ids.tolist() == columns["transcript_id"].tolist()
    assert rare.sum() == 4
    assert (labels[rare] == 0).all()
    assert (labels[~rare] > 0).mean() > 0.9
    confidence = all_transcripts(result).column("confidence").to_numpy()
    assert np.isnan(confidence).tolist() == rare.tolist()


@pytest.mark.parametrize("numbers", ["float", "string"])
def test_row_numbers_may_come_back_as_floats_or_text(door, tmp_path, misbehave, numbers):
    columns, _ = molecules()
    columns["transcript_id"] = columns["transcript_id"] + np.uint64(2**63)  # beyond what a float holds
    _, plain = segment(door, tmp_path, [columns], name="plain")
    misbehave(numbers=numbers)
    _, odd = segment(door, tmp_path, [columns], name="odd")
    assert assignment(plain)[0].tolist() == assignment(odd)[0].tolist() == columns["transcript_id"].tolist()
    assert assignment(plain)[1].tolist() == assignment(odd)[1].tolist()


def test_small_objects_are_no_cells_where_asked(door, tmp_path):
    columns, _ = molecules(n_free=60)
    _, everything = segment(door, tmp_path, [columns], name="all")
    areas = shapely.area(everything.geometry)
    least = float(np.median(areas))
    _, large = segment(door, tmp_path, [columns], name="large", min_area_um2=least)
    _, labels = assignment(large)
    assert len(large.geometry) == (areas >= least).sum()
    assert shapely.area(large.geometry).min() >= least
    assert np.bincount(labels, minlength=len(large.geometry) + 1)[1:].tolist() == large.cells["n_transcripts"].tolist()


def test_a_bundle_without_patches_is_an_empty_result(door, tmp_path):
    record, result = segment(door, tmp_path, [])
    assert len(result.geometry) == 0
    assert record["facts"]["n_objects"] == 0
    assert door.calls == []


# --- what goes in


def test_baysor_is_asked_what_its_version_understands(door, tmp_path):
    segment(door, tmp_path, [molecules()[0]], threads=1)
    if REAL:
        return
    (call,) = door.calls
    assert call["prior"] == ":prior_cell"
    assert call["config"]["data"]["min_molecules_per_cell"] == 10
    assert call["config"]["segmentation"]["prior_segmentation_confidence"] == 0.8
    format_flag = "--save-polygons=GeoJSON" if door.contract == "0.6" else "--polygon-format=GeometryCollection"
    assert format_flag in call["arguments"]
    assert ("--no-ncv-estimation" in call["arguments"]) == (door.contract == "0.6")


def test_scale_is_taken_from_the_prior_cells_of_all_patches(door, tmp_path):
    patches = [molecules(seed=1)[0], molecules(n_side=1, per_cell=200, seed=2)[0]]
    patches[1]["x_um"] = patches[1]["x_um"] + 80
    record, result = segment(door, tmp_path, patches)
    assert [patch["error"] for patch in result.patches] == [None, None]
    assert record["facts"]["scale_um"] == pytest.approx(10, abs=0.5)  # cells are 20 µm apart
    if not REAL:
        scales = {call["config"]["segmentation"]["scale"] for call in door.calls}
        assert scales == {record["facts"]["scale_um"]}


def test_without_prior_a_scale_is_enough(door, tmp_path):
    columns, truth = molecules(with_prior=0)
    _, result = segment(door, tmp_path, [columns], baysor_scale_um=5)
    assert agreement(truth, assignment(result)[1]) > 0.8
    assert not result.cells["prior_cell"].any()
    if not REAL:
        assert [call["prior"] for call in door.calls] == [""]


def test_few_prior_cells_in_a_patch_are_used_where_the_version_can(door, tmp_path):
    columns, _ = molecules()
    columns["prior_cell"][columns["prior_cell"] > 2] = 0
    _, result = segment(door, tmp_path, [columns], baysor_scale_um=5)
    assert [patch["error"] for patch in result.patches] == [None]
    if not REAL:  # 0.6 wants three prior cells even where it is given a scale
        assert [call["prior"] for call in door.calls] == ["" if door.contract == "0.6" else ":prior_cell"]
        assert result.patches[0]["with_prior"] == (door.contract != "0.6")


@pytest.mark.parametrize(("planes", "flat", "in_3d"), [(1, None, False), (4, None, True), (4, True, False)])
def test_z_counts_where_it_varies(door, tmp_path, planes, flat, in_3d):
    columns, truth = molecules(planes=planes)
    _, result = segment(door, tmp_path, [columns], baysor_force_2d=flat)
    assert agreement(truth, assignment(result)[1]) > 0.9
    if not REAL:
        assert door.calls[0]["config"]["data"]["force_2d"] == (not in_3d)


def test_threads_are_set(door, tmp_path, monkeypatch):
    record, _ = segment(door, tmp_path, [molecules()[0]], threads=3)
    if REAL:
        assert record["facts"]["baysor"]["threads"] >= 1
    elif door.via == "executable":
        assert door.calls[0]["threads"] == "3"
    else:
        assert os.environ["PYTHON_JULIACALL_THREADS"] == "3"
        assert os.environ["PYTHON_JULIACALL_HANDLE_SIGNALS"] == "yes"


def test_file_dict_json_and_parameters_say_the_same(door, tmp_path):
    columns, _ = molecules()
    tree = {"data": {"min_molecules_per_cell": 12}, "segmentation": {"scale": 6.5, "n_clusters": 3, "iters": 70}}
    file = tmp_path / "own settings.toml"
    file.write_text(
        "[data]\nx = 'x_location'\nmin_molecules_per_cell = 12\n"
        "[segmentation]\nscale = 6.5\nn_clusters = 3\niters = 70\n"
    )
    parameters = {"min_molecules_per_cell": 12, "scale_um": 6.5, "n_clusters": 3, "iterations": 70}
    results = []
    for number, settings in enumerate(
        [
            {"baysor_config": str(file)},
            {"baysor_config": tree},
            {"baysor_config": json.dumps(tree)},
            {f"baysor_{name}": value for name, value in parameters.items()},
            {"baysor_config": {**tree, "segmentation": {**tree["segmentation"], "scale": 9}}, "baysor_scale_um": 6.5},
        ]
    ):
        quick = {"baysor_iterations": 70} if REAL else {}
        record, _ = segment(door, tmp_path, [columns], name=f"way{number}", **{**settings, **quick})
        results.append({key: record["parameters"][key] for key in ("data", "segmentation", "plotting")})
    assert all(result == results[0] for result in results)
    assert results[0]["segmentation"]["scale"] == 6.5
    if not REAL:
        assert all(call["config"] == door.calls[0]["config"] for call in door.calls)
        assert door.calls[0]["config"]["data"]["x"] == "x"


def test_settings_travel_in_the_bundle(door, tmp_path):
    file = tmp_path / "gone.toml"
    file.write_text("[segmentation]\nn_clusters = 6\n")
    engine = plan(Settings(baysor_config=str(file), baysor_scale_um=7))
    file.unlink()
    json.dumps(engine)
    given = Settings({**QUICK, **door.settings, "baysor_config": str(file)})  # as a task of the pipeline is told
    bundle = write_bundle(tmp_path / "bundle.zarr", [molecules()[0]], engine=engine)
    record = segment_bundle(bundle, tmp_path / "a.result", settings=given)
    assert record["parameters"]["segmentation"]["n_clusters"] == 6
    assert record["parameters"]["segmentation"]["scale"] == 7
    later = segment_bundle(bundle, tmp_path / "b.result", settings={**given.given, "baysor_scale_um": 5})
    assert later["parameters"]["segmentation"]["scale"] == 5
    with pytest.raises(CellquiltError) as caught:
        plan({"baysor_config": str(file)})
    assert caught.value.code == "baysor-config-missing"


def test_versions_are_recorded(door, tmp_path):
    record, _ = segment(door, tmp_path, [molecules()[0]])
    # 0.6 does not tell its version: its help tells what it is.
    expected = {"0.6.2": "0.6", "0.7.1": "0.7.1"}.get(door.version)
    assert record["versions"]["baysor"] == expected or REAL
    assert record["facts"]["baysor"]["door"] == door.via


# --- what goes wrong with Baysor


def two_patches():
    """One whole patch, and one with few molecules."""
    whole, few = molecules(seed=1)[0], molecules(n_side=1, per_cell=40, seed=2)[0]
    few["x_um"] = few["x_um"] + 80
    few["transcript_id"] = few["transcript_id"] + np.uint64(10_000)
    return [whole, few]


def test_a_failed_sparse_patch_becomes_a_record_and_the_rest_goes_on(door, tmp_path, misbehave):
    misbehave(fail_below=100)
    record, result = segment(door, tmp_path, two_patches(), on_patch_error="skip")
    good, bad = result.patches
    assert good["error"] is None
    assert bad["error"]["code"] == "baysor-failed"
    assert "arrays could not be broadcast" in bad["error"]["message"]
    assert set(result.cells["patch"].tolist()) == {0}
    assert set(all_transcripts(result).column("patch").to_pylist()) == {0}
    assert record["facts"]["n_failed"] == 1


def test_a_failed_patch_fails_with_baysors_own_words(door, tmp_path, misbehave):
    misbehave(fail="DomainError with -1.0: log was called")
    with pytest.raises(CellquiltError) as caught:
        segment(door, tmp_path, two_patches())
    assert caught.value.code == "patch-failed"
    assert "sample liver, patch 0" in caught.value.message
    assert "DomainError with -1.0: log was called" in caught.value.message
    assert "on_patch_error" in caught.value.hint
    assert not (tmp_path / "bundle.result").exists()
    log = (tmp_path / "bundle.result.log").read_text()
    assert "Loading data..." in log
    assert "Stacktrace:" in log


def test_the_log_is_kept(door, tmp_path):
    segment(door, tmp_path, two_patches())
    log = (tmp_path / "bundle.result.log").read_text()
    assert log.index("=== patch 0 ===") < log.index("=== patch 1 ===")
    assert log.count("All done!") == 2


@pytest.mark.parametrize("on_patch_error", ["fail", "skip"])
def test_out_of_memory_is_never_skipped(door, tmp_path, misbehave, on_patch_error):
    how = {"kill": 1} if door.via == "executable" else {"fail": "OutOfMemoryError()"}
    misbehave(**how)
    with pytest.raises(MemoryError, match="patch 0"):
        segment(door, tmp_path, two_patches(), on_patch_error=on_patch_error)
    assert not (tmp_path / "bundle.result").exists()


def test_out_of_memory_makes_the_pipeline_try_again(door, tmp_path, misbehave, capsys):
    misbehave(**({"kill": 1} if door.via == "executable" else {"fail": "OutOfMemoryError()"}))
    bundle = write_bundle(tmp_path / "bundle.zarr", [molecules()[0]])
    told = [f"--{name.replace('_', '-')}={value}" for name, value in door.settings.items()]
    with pytest.raises(SystemExit) as stop:
        cli(["segment", "baysor", str(bundle), "-o", str(tmp_path / "x.result"), *told])
    assert stop.value.code == 137
    assert "[out-of-memory]" in capsys.readouterr().err


def test_a_baysor_that_hangs_is_stopped(door, tmp_path, misbehave):
    if door.via == "julia":
        pytest.skip("a call in this process cannot be stopped")
    misbehave(hang=1)
    started = time.monotonic()
    _, result = segment(door, tmp_path, two_patches(), on_patch_error="skip", baysor_timeout_min=0.01)
    assert time.monotonic() - started < 20
    assert [patch["error"]["code"] for patch in result.patches] == ["baysor-timeout"] * 2
    assert len(result.geometry) == 0


def test_half_an_output_is_noticed(door, tmp_path, misbehave):
    misbehave(half=1)
    with pytest.raises(CellquiltError, match=r"segmentation_cell_stats.csv") as caught:
        segment(door, tmp_path, [molecules()[0]])
    assert caught.value.code == "patch-failed"


def test_interrupting_takes_baysor_along(door, tmp_path, misbehave):
    if door.via == "julia":
        pytest.skip("Baysor is in this process")
    misbehave(hang=1)
    bundle = write_bundle(tmp_path / "bundle.zarr", [molecules()[0]])
    told = [f"--baysor-executable={door.executable}", "-o", str(tmp_path / "x.result")]
    # Where these tests run in the background of a script, the shell has told them to ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        task = subprocess.Popen(
            [sys.executable, "-m", "cellquilt", "segment", "baysor", bundle, *told], stderr=subprocess.DEVNULL
        )
    finally:
        signal.signal(signal.SIGINT, before)
    while not door.calls:
        assert task.poll() is None
        time.sleep(0.05)
    child = children(task.pid)
    task.send_signal(signal.SIGINT)
    assert task.wait(20) == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in child)


def children(pid):
    """Processes that a process started, and those that they did."""
    own = [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [each for number in own for each in children(number)]


# --- mistakes that are found before Baysor is called


@functools.cache
def faults():
    """Name → (settings, patches' columns, code, what the message says)."""
    columns, _ = molecules()
    plain = {}
    no_prior = {**columns, "prior_cell": np.zeros_like(columns["prior_cell"])}
    few_prior = {**columns, "prior_cell": np.where(columns["prior_cell"] < 3, columns["prior_cell"], 0)}
    nan = {**columns, "x_um": np.where(np.arange(len(columns["x_um"])) == 7, np.nan, columns["x_um"])}
    nan_z = {**columns, "z_um": np.where(np.arange(len(columns["z_um"])) == 7, np.nan, columns["z_um"])}
    one_gene = {**columns, "gene": np.zeros_like(columns["gene"])}
    sparse = {name: values[:15] for name, values in columns.items()}

    def config(section, key, value):
        return {"baysor_config": {section: {key: value}}}

    return {
        "no prior cell and no scale": (plain, no_prior, "baysor-scale-missing", "neither prior cells nor a scale"),
        "two prior cells and no scale": (plain, few_prior, "patch-failed", "fewer than 3 prior cells"),
        "NaN": (plain, nan, "patch-failed", "transcript_id 1021"),
        "NaN in z": (plain, nan_z, "patch-failed", "no finite position"),
        "one gene": (plain, one_gene, "patch-failed", "all transcripts are of one gene"),
        "too sparse": ({"baysor_scale_um": 5}, sparse, "patch-failed", "15 transcripts; Baysor needs 20"),
        "scale 0": ({"baysor_scale_um": 0}, columns, "parameters-invalid", "baysor_scale_um is 0"),
        "scale negative": ({"baysor_scale_um": -2}, columns, "parameters-invalid", "at least 0.01"),
        "scale no number": ({"baysor_scale_um": "big"}, columns, "parameters-invalid", '"big"; expected a number'),
        "no molecules per cell": (
            {"baysor_min_molecules_per_cell": 0},
            columns,
            "parameters-invalid",
            "baysor_min_molecules_per_cell is 0",
        ),
        "half a molecule": ({"baysor_min_molecules_per_cell": 1.5}, columns, "parameters-invalid", "a whole number"),
        "confidence above 1": ({"baysor_prior_confidence": 1.2}, columns, "parameters-invalid", "at most 1"),
        "unknown key": (config("segmentation", "scael", 5), columns, "baysor-config", 'did you mean "scale"?'),
        "unknown section": (config("segment", "scale", 5), columns, "baysor-config", 'did you mean "segmentation"?'),
        "key outside a section": ({"baysor_config": {"scale": 5}}, columns, "baysor-config", "under [segmentation]"),
        "text for a number": (config("data", "confidence_nn_id", "10"), columns, "baysor-config", "a whole number"),
        "number for a bool": (config("data", "force_2d", 1), columns, "baysor-config", "expected true or false"),
        "bool for a number": (config("segmentation", "iters", True), columns, "baysor-config", "a whole number"),
        "list for text": (config("data", "exclude_genes", ["A"]), columns, "baysor-config", "expected text"),
        "infinite": (config("segmentation", "scale", float("inf")), columns, "baysor-config", "expected a number"),
        "spread": (config("segmentation", "scale_std", "wide"), columns, "baysor-config", '"25%"'),
        "method": (config("plotting", "ncv_method", "pca"), columns, "baysor-config", "ri, dense or sparse"),
        "negative count": (config("data", "min_molecules_per_cell", -1), columns, "baysor-config", "at least 0"),
        "one compartment": (config("segmentation", "nuclei_genes", "A"), columns, "baysor-config", "give both or none"),
        "no such file": ({"baysor_config": "/nowhere/b.toml"}, columns, "baysor-config-missing", "/nowhere/b.toml"),
        "not JSON": ({"baysor_config": '{"data": '}, columns, "baysor-config", "not JSON"),
    }


@pytest.mark.parametrize("name", faults())
def test_mistakes_are_named_before_baysor_is_called(door, tmp_path, name):
    settings, columns, code, says = faults()[name]
    with pytest.raises(CellquiltError) as caught:
        segment(door, tmp_path, [columns], **settings)
    assert caught.value.code == code
    assert says in str(caught.value)
    assert door.calls == []
    assert not (tmp_path / "bundle.result").exists()


def test_all_mistakes_of_a_file_come_at_once(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("[data]\nmin_molecules = 5\n[segmentation]\niters = 'many'\n[plots]\n")
    with pytest.raises(SeveralErrors) as caught:
        checked_config({"baysor_config": str(file)})
    assert len(caught.value.errors) == 3
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_toml_is_named(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("scale = five")
    with pytest.raises(CellquiltError, match=r"bad\.toml is not TOML"):
        checked_config({"baysor_config": str(file)})


def test_keys_of_the_other_version_are_named(door, tmp_path):
    if REAL:
        pytest.skip("depends on the version")
    foreign = {"0.6": {"plotting": {"ncv_method": "ri"}}, "0.7": {"segmentation": {"new_component_weight": 0.2}}}
    other = "0.7" if door.contract == "0.6" else "0.6"
    with pytest.raises(CellquiltError) as caught:
        segment(door, tmp_path, [molecules()[0]], baysor_config=foreign[door.contract])
    assert caught.value.code == "baysor-config"
    assert f"Baysor {door.contract} has no" in str(caught.value)
    assert f"use Baysor {other}" in str(caught.value)
    assert door.calls == []


@pytest.mark.parametrize("n", [0, 5])
def test_a_patch_with_fewer_transcripts_than_a_cell_has_no_cell(door, tmp_path, n):
    columns = {name: values[:n] for name, values in molecules()[0].items()}
    _, result = segment(door, tmp_path, [columns], prior={"from": "shapes", "name": "cells", "n_cells": 3})
    assert [patch["error"] for patch in result.patches] == [None]
    assert len(result.geometry) == 0
    assert assignment(result)[0].tolist() == columns["transcript_id"].tolist()
    assert not assignment(result)[1].any()
    assert door.calls == []


def test_faults_of_a_patch_can_be_skipped(door, tmp_path):
    whole, few = two_patches()
    few = {**few, "gene": np.zeros_like(few["gene"])}
    _, result = segment(door, tmp_path, [whole, few], on_patch_error="skip")
    assert [patch["error"] and patch["error"]["code"] for patch in result.patches] == [None, "baysor-one-gene"]


def test_no_baysor_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "juliacall", None)
    bundle = write_bundle(tmp_path / "bundle.zarr", [molecules()[0]])
    for via, says in (("auto", "no executable baysor"), ("executable", "no executable baysor"), ("julia", "juliacall")):
        with pytest.raises(CellquiltError, match=says) as caught:
            segment_bundle(bundle, tmp_path / "x.result", settings={"baysor_via": via})
        assert caught.value.code == "engine-missing"
    with pytest.raises(CellquiltError, match="/opt/none/baysor") as caught:
        segment_bundle(bundle, tmp_path / "x.result", settings={"baysor_executable": "/opt/none/baysor"})
    assert caught.value.code == "engine-missing"


def test_julia_package_manager_puts_it_in_a_folder_of_its_own(door, tmp_path, monkeypatch):
    if REAL or door.via == "julia":
        pytest.skip("about finding the executable")
    (tmp_path / ".julia").mkdir()
    (tmp_path / ".julia" / "bin").symlink_to(door.executable.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    bundle = write_bundle(tmp_path / "bundle.zarr", [molecules()[0]])
    record = segment_bundle(bundle, tmp_path / "x.result", settings={})
    assert record["facts"]["baysor"]["door"] == "executable"


@pytest.mark.parametrize("version", ["0.5.2", "0.8.0", "1.0.0"])
def test_other_versions_are_refused(door, tmp_path, misbehave, monkeypatch, version):
    misbehave(version=version)
    if door.via == "julia":
        monkeypatch.setitem(sys.modules["juliacall"].ANSWERS, "string(pkgversion(Baysor))", version)
    with pytest.raises(CellquiltError, match=version.replace(".", r"\.")) as caught:
        segment(door, tmp_path, [molecules()[0]])
    assert caught.value.code == "baysor-version"
    assert door.calls == []


def test_something_else_called_baysor_is_refused(tmp_path):
    other = tmp_path / "baysor"
    other.write_text("#!/bin/sh\necho hello\n")
    other.chmod(0o755)
    bundle = write_bundle(tmp_path / "bundle.zarr", [molecules()[0]])
    with pytest.raises(CellquiltError, match="hello") as caught:
        segment_bundle(bundle, tmp_path / "x.result", settings={"baysor_executable": str(other)})
    assert caught.value.code == "baysor-version"


def test_an_existing_result_is_refused_before_any_work(door, tmp_path):
    segment(door, tmp_path, [molecules()[0]])
    calls = len(door.calls)
    with pytest.raises(CellquiltError) as caught:
        segment(door, tmp_path, [molecules()[0]])
    assert caught.value.code == "output-exists"
    assert len(door.calls) == calls


def test_an_image_bundle_is_refused(tmp_path):
    zarr_json.write_group(tmp_path / "b.zarr", {"cellquilt": {"bundle": 0, "patches": []}})
    with pytest.raises(CellquiltError) as caught:
        segment_bundle(tmp_path / "b.zarr", tmp_path / "x.result")
    assert caught.value.code == "bundle-unreadable"


# --- the command line, and Julia


def test_command_line(door, tmp_path):
    columns, truth = molecules()
    bundle = write_bundle(tmp_path / "bundle.zarr", [columns])
    told = [f"--{name.replace('_', '-')}={value}" for name, value in {**door.settings, **QUICK}.items()]
    with pytest.raises(SystemExit) as stop:
        cli(["segment", "baysor", str(bundle), "-o", str(tmp_path / "out.result"), "--scale-um", "5", *told])
    assert stop.value.code == 0
    assert agreement(truth, assignment(read_results([tmp_path / "out.result"]))[1]) > 0.9


def test_the_bridge_starts_one_julia_and_calls_baysor_once_a_patch(door, tmp_path):
    if REAL or door.via != "julia":
        pytest.skip("about the bridge")
    segment(door, tmp_path, two_patches())
    calls = sys.modules["juliacall"].CALLS
    assert [kind for kind, _ in calls].count("newmodule") == 1
    assert calls[1] == ("seval", "import Baysor")
    run = [what for kind, what in calls if kind == "command_main"]
    assert len(run) == 2
    assert all(what[0] == "run" for what in run)


def test_a_julia_without_baysor_is_named(door, tmp_path, monkeypatch):
    if REAL or door.via != "julia":
        pytest.skip("about the bridge")
    julia = sys.modules["juliacall"]
    missing = julia.JuliaError("ArgumentError: Package Baysor not found in current path.\nStacktrace:\n [1] ...")
    monkeypatch.setitem(julia.ANSWERS, "import Baysor", missing)
    with pytest.raises(CellquiltError, match="Package Baysor not found") as caught:
        segment(door, tmp_path, [molecules()[0]])
    assert caught.value.code == "engine-missing"


def test_a_task_of_the_pipeline_downloads_no_julia(door, tmp_path, monkeypatch):
    if REAL or door.via != "julia":
        pytest.skip("about the bridge")
    monkeypatch.setenv("CELLQUILT_TASK", "1")
    segment(door, tmp_path, [molecules()[0]])
    assert os.environ["PYTHON_JULIAPKG_OFFLINE"] == "yes"


def test_julia_and_baysor_are_pinned_where_juliapkg_looks():
    import cellquilt

    pins = json.loads((Path(cellquilt.__file__).parent / "juliapkg.json").read_text())
    assert pins["julia"] == "~1.10.3"
    assert pins["packages"]["Baysor"]["rev"] == "v0.7.1"


# --- the parts


def test_the_configuration_is_toml_that_both_versions_read():
    text = {"segmentation": {"nuclei_genes": 'A"\\,β', "cyto_genes": "C\n", "scale": 3}}
    config = checked_config({"baysor_config": text, "baysor_force_2d": True})
    for contract in ("0.6", "0.7"):
        tree = tomllib.loads(config.to_toml(contract))
        assert tree["segmentation"]["nuclei_genes"] == 'A"\\,β'
        assert tree["segmentation"]["scale"] == 3.0
        assert tree["data"]["force_2d"] is True
        assert ("unassigned_prior_label" in tree["segmentation"]) == (contract == "0.7")


def test_what_an_example_file_leaves_open_stays_open():
    text = {"data": {"min_molecules_per_cell": 0, "confidence_nn_id": 0}, "segmentation": {"scale": -1.0}}
    config = checked_config({"baysor_config": text})
    assert config.scale_um is None
    assert config.min_molecules_per_cell == 10
    assert (config.min_molecules_per_segment, config.confidence_nn_id) == (2, 6)


def test_causes_are_found_in_logs():
    comonicon = "[1] Info: x\nCommandError: Either `scale` must be provided. exit with 1\n\n  run <args>\nOptions\n"
    assert cause(comonicon) == "Either `scale` must be provided. exit with 1"
    julia = "Progress: 10%\rProgress: 100%\n\x1b[91mERROR: \x1b[39mLoadError: k > n\nin expression\nStacktrace:\n [1] f"
    assert cause(julia) == "LoadError: k > n / in expression"
    assert cause("a\nb\nc\nd\ne\nf\n") == "b / c / d / e / f"
    assert cause("") == "it said nothing"


@examples(max_examples=50)
@given(st.integers(2, 40), st.integers(0, 6), st.randoms(use_true_random=False))
def test_labels_do_not_depend_on_names_or_the_order_of_rows(n, n_cells, random):
    """Against a loop: rows in any order, cells by any name."""
    import tempfile

    cells = [random.randint(0, n_cells) for _ in range(n)]
    kept = sorted(random.sample(range(n), random.randint(1, n)))
    names = {cell: f"CRx-{number}" for cell, number in enumerate(random.sample(range(1, 99), n_cells), 1)}
    xy = np.array([[random.random(), random.random()] for _ in range(n)])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [f"{i}.0,{names.get(cells[i], '')}" for i in random.sample(kept, len(kept))]
        (folder / "segmentation.csv").write_text("row,cell\n" + "\n".join(rows) + "\n")
        there = sorted({cells[i] for i in kept} - {0})
        stats = [f"{names[cell]},{sum(cells[i] == cell for i in kept)}" for cell in there]
        (folder / "segmentation_cell_stats.csv").write_text("cell,n_transcripts\n" + "\n".join(stats) + "\n")
        (folder / "segmentation_polygons_2d.json").write_text('{"geometries": []}')
        found = read_output(folder, "0.7", xy)
    expected, numbers = [0] * n, {}
    for i in kept:
        if cells[i]:
            expected[i] = numbers.setdefault(cells[i], len(numbers) + 1)
    assert found.labels.tolist() == expected
    assert found.n_from_molecules == len(there) == len(found.geometry)
    assert all(found.geometry[expected[i] - 1].covers(shapely.Point(xy[i])) for i in kept if expected[i])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("row,cell\n0,a\n0,a\n", "a number twice"),
        ("row,cell\n0,a\n9,a\n", "expected 0 to 2"),
        ("row,cell\n0.5,a\n", "expected 0 to 2"),
        ("row,cell\n,a\n", "nan"),
        ("row,cell\nx,a\n", "cannot be read"),
        ("row,cell\n0,a,b\n", "cannot be read"),
        ("molecule,cell\n0,a\n", "has no column row"),
        ("row,cell\n0,a\n1,b\n", "lists 1 cells"),
        ("row,cell\n0,a\n", "counts 2 molecules in a"),
    ],
)
def test_outputs_that_contradict_themselves_are_refused(tmp_path, rows, says):
    (tmp_path / "segmentation.csv").write_text(rows)
    (tmp_path / "segmentation_cell_stats.csv").write_text("cell,n_transcripts\na,2\n")
    (tmp_path / "segmentation_polygons_2d.json").write_text('{"geometries": []}')
    with pytest.raises(CellquiltError) as caught:
        read_output(tmp_path, "0.7", np.zeros((3, 2)))
    assert caught.value.code == "baysor-output"
    assert says in caught.value.message


@pytest.mark.parametrize(
    "ring",
    [
        [],
        [[0, 0]],
        [[0, 0], [1, 1], [0, 0]],
        [[0, 0], [1, 1], [2, 2]],
        [[0, 0], [0, 0], [0, 0], [0, 0]],
        [[0, 0], [float("nan"), 1], [1, 1]],
        [[0, 0], [2, 2], [2, 0], [0, 2]],
        [[0, 0], [2, 0], [2, 2], [0, 2]],
        [[0, 0], [2, 0], [2, 2], [0, 2], [0, 0]],
    ],
)
@pytest.mark.parametrize("name", ["CR1-7", 7])
def test_any_ring_becomes_a_valid_outline(tmp_path, ring, name):
    (tmp_path / "segmentation.csv").write_text("row,cell\n0,CR1-7\n1,CR1-7\n2,CR1-7\n")
    (tmp_path / "segmentation_cell_stats.csv").write_text("cell,n_transcripts\nCR1-7,3\n")
    geometries = [{"type": "Polygon", "coordinates": [ring], "cell": name}]
    (tmp_path / "segmentation_polygons_2d.json").write_text(json.dumps({"geometries": geometries}))
    found = read_output(tmp_path, "0.7", np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]]))
    assert found.geometry[0].is_valid
    assert found.geometry[0].geom_type == "Polygon"
    assert found.geometry[0].area > 0.5
    distinct = len({tuple(point) for point in ring}) >= 4
    assert found.n_from_molecules == (0 if distinct else 1)


def test_prior_cells_of_labels_against_a_loop():
    rng = np.random.default_rng(0)
    labels, prior = rng.integers(0, 8, 200).astype(np.int32), rng.integers(0, 5, 200).astype(np.int32)
    for k in range(1, 8):
        own = prior[(labels == k) & (prior > 0)]
        assert main_prior(labels, prior, 7)[k - 1] == np.bincount(own, minlength=5).argmax()
    assert main_prior(np.zeros(3, np.int32), np.ones(3, np.int32), 2).tolist() == [0, 0]


@pytest.mark.parametrize("rows", [100_000, 977])
def test_all_bundles_of_a_slide_have_one_scale(door, tmp_path, rows):
    """Cells are 20 µm apart on the left and 30 on the right; each task sees but one side."""
    (left, _), (right, _) = molecules(n_side=6, seed=1), molecules(n_side=6, spacing=30.0, seed=2)
    slide = tmp_path / "slide.zarr"
    x, y = np.concatenate([left["x_um"], right["x_um"] + 150]), np.concatenate([left["y_um"], right["y_um"]])
    prior = np.concatenate([left["prior_cell"], right["prior_cell"] + 36 * (right["prior_cell"] > 0)])
    prior[np.flatnonzero(prior == 1)[7:]] = 0  # too few to count
    gene = pa.array(np.array(GENES)[np.concatenate([left["gene"], right["gene"]])]).dictionary_encode()
    ids, control = np.arange(len(x), dtype=np.uint64), np.zeros(len(x), dtype=bool)
    table = pa.table({"x": x, "y": y, "gene": gene, "transcript_id": ids, "is_control": control, "mine": prior})
    with new_store(slide, sample="slide") as store:
        frame = {"global": np.eye(3), "microns": np.eye(3)}
        with PointsWriter(store.new_element("points", "transcripts"), frame) as writer:
            for start in range(0, len(x), rows):
                writer.write(table.slice(start, rows))
    cut = Settings(prior="column:mine", transcripts_patch_width_um=160.0, min_transcripts_per_patch=0)
    bundles = patchify_transcripts(
        slide, settings=cut, method="baysor", bundles=tmp_path / "bundles", output=tmp_path / "patches.zarr"
    )
    scales = []
    for bundle in bundles:
        record = segment_bundle(bundle, tmp_path / f"{bundle.stem}.result", settings={**QUICK, **door.settings})
        scales.append(record["facts"]["scale_um"])
        assert record["facts"]["prior"]["min_transcripts"] == 10
    numbers, sizes = np.unique(prior[prior > 0], return_counts=True)
    centres = [(x[prior == number].mean(), y[prior == number].mean()) for number in numbers[sizes >= 10]]
    assert len(centres) == 71
    nearest = np.sort([[np.hypot(a - c, b - d) for c, d in centres] for a, b in centres])[:, 1]
    assert len(scales) > 1
    assert scales == [scales[0]] * len(scales)
    assert scales[0] == pytest.approx(np.median(nearest) / 2, abs=1e-3)


# --- the stand-in is as strict as Baysor


@pytest.fixture
def fake(tmp_path, monkeypatch, capsys):
    """Run the stand-in on a small table; returns its exit code and what it said."""
    import fake_baysor

    columns, _ = molecules(n_side=2, per_cell=30, n_free=6)
    names = np.array(["A", "B", "C", "D"])[columns["gene"]]
    fields = (columns["x_um"], columns["y_um"], names, columns["prior_cell"])
    lines = [f"{x},{y},{gene},{i},{prior}" for i, (x, y, gene, prior) in enumerate(zip(*fields, strict=True))]
    (tmp_path / "m.csv").write_text("x,y,gene,row,prior_cell\n" + "\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)

    def run(version, *options, config="", table="m.csv", prior=""):
        monkeypatch.setenv("FAKE_BAYSOR_VERSION", version)
        (tmp_path / "c.toml").write_text(config)
        code = fake_baysor.main(["run", "-c", "c.toml", *options, table, *([prior] if prior else [])])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.mark.parametrize("version", ["0.6.2", "0.7.1"])
def test_stand_in_refuses_what_baysor_refuses(fake, version):
    old = version == "0.6.2"
    good = "[data]\nmin_molecules_per_cell = 5\n[segmentation]\nscale = 5.0\n"
    assert fake(version, config=good)[0] == 0
    assert fake(version, "-m", "5", "-s", "5")[0] == 0
    assert fake(version, "-m5", "--scale=5")[0] == 0
    assert fake(version, "-m", "5", "--count-matrix-format=tsv", prior=":prior_cell")[0] == 0
    for options, settings, says in [
        (["-s", "5"], "", "`min_molecules_per_cell` must be positive"),
        (["-m", "5"], "", "Either `prior_segmentation` or `scale` must be provided"),
        (["--overlap=3"], good, "cannot find --overlap"),
        (["--polygon-format=GeometryCollection" if old else "--save-polygons=GeoJSON"], good, "cannot find"),
        (["-m", "five"], good, "expect value of type"),
        (["--count-matrix-format=h5ad"], good, "count_matrix_format"),
        ([], good + "iterations = 5\n", "invalid key iterations"),
        ([], good + ("unassigned_prior_label = '0'\n" if old else "new_component_weight = 0.1\n"), "invalid key"),
        ([], "[plots]\n", "invalid key plots"),
        ([], good + "iters = 'many'\n", "FieldTypeConversionError"),
        ([], good.replace("5.0", "5.0\nnuclei_genes = 'A'"), "Only one of"),
        (["-x", "nope"], good, "x column 'nope' not found"),
    ]:
        code, said = fake(version, *options, config=settings)
        assert (code, says in said) == (1, True), said
    assert "ERROR" in fake(version, config=good, table="m.parquet")[1]
    code, said = fake(version, "-m", "50", prior=":prior_cell")
    assert code == 1
    assert "Not enough prior cells pass the min_mol" in said


def test_stand_in_has_the_slip_that_our_choice_of_format_avoids(fake):
    """As many cells as genes: Baysor's loom writer fails, its text writer does not."""
    options = ["-m", "5", "-s", "8", "--config.data.min_molecules_per_gene=1"]
    code, said = fake("0.7.1", *options, "--count-matrix-format=loom", prior=":prior_cell")
    assert (code, "wrong length" in said) == (1, True)
    assert fake("0.7.1", *options, "--count-matrix-format=tsv", prior=":prior_cell")[0] == 0
    assert "--count-matrix-format=tsv" in arguments("0.7", Path("x"), prior=True)


def test_stand_in_knows_the_keys_that_we_know():
    import fake_baysor

    for section, keys in KEYS.items():
        both = set(fake_baysor.BOTH[section])
        only = [set(fake_baysor.ONLY[version].get(section, {})) for version in ("0.6", "0.7")]
        assert both.union(*only) == set(keys)
