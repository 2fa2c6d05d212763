"""The benchmarks' driver: what it makes of numbers, and how it stops a run."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def driver():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("compare")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("compare", "child", "harness", *(path.stem for path in FOLDER.glob("bench_*.py"))):
            sys.modules.pop(name, None)


def runs(*seconds: float, **more) -> list[dict]:
    return [{"cpu_s": value, "wall_s": 2 * value, "peak_mb": 100.0, **more} for value in seconds]


def test_ratio_is_of_medians_and_by_basis(driver):
    ours, peers = runs(1.0, 2.0, 9.0), [{"cpu_s": 30.0, "wall_s": 8.0}]
    assert driver.ratio_of(ours, peers, "cpu_s") == driver.Ratio(15.0)
    assert driver.ratio_of(ours, peers, "wall_s") == driver.Ratio(2.0)
    assert driver.ratio_of(ours, [], "cpu_s") is None
    assert driver.ratio_of([{"failed": "x"}], peers, "cpu_s") is None


def test_stopped_peer_gives_a_lower_bound(driver):
    case = driver.Case("resolve", {}, target=100.0)
    stopped = [{"stopped_s": 600.0, "cpu_s": 590.0, "wall_s": 600.0, "share_done": 0.79}]
    assert str(driver.ratio_of(runs(2.0), stopped, "cpu_s")) == "> 295.0"
    assert driver.verdict(case, runs(2.0), stopped)[0] == "met"
    # Slower than that, and nothing is shown either way.
    assert driver.verdict(case, runs(20.0), stopped)[0] == "open"
    assert "sopa stopped at 600 s, 79% done" in driver.notes(case, {driver.OURS: runs(2.0), driver.PEER: stopped}, [])


@pytest.mark.parametrize(
    ("more", "ours", "peers", "word"),
    [
        ({"target": 5.0}, {}, runs(5.0), "met"),
        ({"target": 5.0}, {}, runs(4.9), "NOT MET"),
        ({"target": 5.0}, {}, [], "open"),
        ({}, {}, runs(0.1), ""),
        ({"max_peak_mb": 100.0}, {}, [], "met"),
        ({"max_peak_mb": 99.0}, {}, [], "NOT MET"),
        ({"target": 5.0, "no_larger": True}, {"bytes": 10}, runs(9.0, bytes=10), "met"),
        ({"target": 5.0, "no_larger": True}, {"bytes": 11}, runs(9.0, bytes=10), "NOT MET"),
        ({}, {"engine_mb": 500.0, "stages": [{"peak_mb": 1012.0}]}, [], "met"),
        ({}, {"engine_mb": 500.0, "stages": [{"peak_mb": 1013.0}]}, [], "NOT MET"),
    ],
)
def test_verdict(driver, more, ours, peers, word):
    assert driver.verdict(driver.Case("case", {}, **more), runs(1.0, **ours), peers)[0] == word


def test_a_failure_of_ours_is_never_met(driver):
    assert driver.verdict(driver.Case("case", {}), [{"failed": "boom"}], runs(1.0))[0] == "NOT MET"


def test_memory_and_fixed_cost(driver):
    assert driver.memory_is_flat([800.0, 790.0, 1000.0])
    assert not driver.memory_is_flat([800.0, 1001.0])
    stages = [{"stage": "convert", "tasks": 1, "cpu_s": 10.0}, {"stage": "segment", "tasks": 4, "cpu_s": 7.0}]
    fixed = [{"stage": "convert", "tasks": 1, "cpu_s": 1.0}, {"stage": "segment", "tasks": 1, "cpu_s": 1.0}]
    assert driver.mostly_fixed(stages, fixed) == ["segment"]


@pytest.mark.parametrize(
    ("log", "share"),
    [("", None), ("no bar", None), ("Resolving conflicts:  3%|# | 1/9\rResolving conflicts:  79%|### | 7/9", 0.79)],
)
def test_share_done(driver, log, share):
    assert driver.share_done(log) == share


def test_wait_stops_a_step_but_not_its_preparation(driver, tmp_path):
    started = tmp_path / driver.STARTED
    code = f"""
import time
time.sleep(0.4)
open({str(started)!r}, "w").write('{{"cpu_s": 0.0}}')
while True: pass
"""
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    stopped = driver.wait(process, started, 0.3)
    assert stopped is not None
    assert stopped["stopped_s"] == 0.3
    assert started.is_file()
    assert process.returncode == -9
    quick = subprocess.Popen([sys.executable, "-c", "pass"], start_new_session=True)
    assert driver.wait(quick, tmp_path / "never", 0.0) is None


def test_cases_have_unique_names_and_the_targets_of_the_issue(driver):
    cases = {case.name: case for _, case in driver.choose("*")}
    assert len(cases) == len(driver.choose("*"))
    wanted = {"resolve-100k": 20, "resolve-1m": 100, "count-1m": 8, "count-10m": 5, "channels-8k": 10, "kernel-8k": 30}
    wanted |= {"write-16k": 5, "cellpose-4k-stock": 2, "patches-10m": 5, "prior-10m": 5, "molecules-10m": 5}
    assert {name: cases[name].target for name in wanted} == wanted
    assert cases["path-32k"].max_peak_mb == 1500
    assert cases["resolve-1m"].sizes_of(quick=True)["cells"] < cases["resolve-1m"].sizes_of(quick=False)["cells"]


@pytest.fixture(scope="module")
def transcripts(driver):
    return importlib.import_module("bench_transcripts")


def run_ours(module, folder: Path, name: str) -> tuple[dict, dict]:
    """A case of transcripts with the sizes of its warm-up: its sizes and what it says in the end."""
    case = next(case for case in module.CASES if case.name == name)
    sizes = {**case.sizes, **case.warm}
    module.make_input(sizes, folder)
    module.prepare(sizes, folder, module.OURS)
    return sizes, module.finish(module.load(sizes, folder, module.OURS)(), sizes, folder, module.OURS)


def test_transcript_patches_hold_what_their_windows_hold(transcripts, tmp_path):
    sizes, line = run_ours(transcripts, tmp_path, "prior-1m")
    rows, wrong, prior, missing = transcripts.check_patches(tmp_path, transcripts.OURS)
    assert line["patches"] == len(rows) == 9
    assert (wrong, missing) == (0, 0)
    assert 0.96 * 100 * sizes["cells"] < prior.size < rows.sum()
    assert 0.7 < (prior > 0).mean() < 0.8
    assert prior.max() <= sizes["cells"]
    # A check that finds nothing wrong with wrong patches would be none.
    with np.load(tmp_path / "cellquilt.npz") as kept:
        patches, ids = kept["patches"], kept["prior"]
    patches[1, 5] += 1
    np.savez(tmp_path / "cellquilt.npz", patches=patches, prior=ids)
    assert transcripts.check_patches(tmp_path, transcripts.OURS)[1] == 1


@pytest.mark.slow
def test_molecules_are_counted_the_same_with_and_without_their_points(transcripts, tmp_path):
    lines, counts = [], []
    for name in ("molecules-1m", "molecules-points-1m"):
        folder = tmp_path / name
        folder.mkdir()
        sizes, line = run_ours(transcripts, folder, name)
        lines.append(line)
        counts.append(scipy.sparse.load_npz(folder / "cellquilt.counts.npz"))
    assert lines[0] == lines[1]
    assert lines[0]["cells_out"] == sizes["cells"]
    assert (counts[0] != counts[1]).nnz == 0
    # Against itself in the place of the peer: all cells are there, with the same counts.
    for path in folder.glob("cellquilt.*npz"):
        (folder / path.name.replace("cellquilt", "sopa")).write_bytes(path.read_bytes())
    with np.load(folder / "sopa.npz") as kept:
        np.savez(folder / "sopa.npz", centroids=kept["centroids"], patch=0 * kept["patch"])
    compared = transcripts.compare(sizes, folder)
    assert compared.equal is None
    assert "0 not in ours, 0 with other counts, 0 trimmed" in compared.text


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("PEER"), reason="needs the Python of an environment with sopa in PEER")
@pytest.mark.parametrize("name", ["patches-1m", "prior-1m", "molecules-1m", "molecules-points-1m"])
def test_transcript_cases_beside_the_peer(driver, tmp_path, name):
    pythons = {driver.OURS: sys.executable, driver.PEER: os.environ["PEER"]}
    module, case = driver.choose(name)[0]
    line = driver.Bench(pythons, 1, 600.0, True, tmp_path).run(module, case)
    assert all(map(driver.is_whole, line[driver.OURS] + line[driver.PEER]))
    assert line["compared"]["equal"] is (None if name.startswith("molecules") else True)
