"""Proseg, killed for memory, is tried again with more; the real one, behind a script that is killed the first time."""

import os
from pathlib import Path

import numpy as np
import pytest
import spatialdata
from cellquilt.core.errors import CellquiltError
from cellquilt.segment.proseg import find_proseg
from cellquilt.simulate import simulate
from runner import ROOT

pytestmark = pytest.mark.slow

WRAPPER = """#!/bin/sh
case "$*" in *--version*) exec "{proseg}" "$@" ;; esac
if mkdir "{folder}/killed" 2>/dev/null; then kill -KILL $$; fi
exec "{proseg}" "$@"
"""
CONFIG = "process { withName: SEGMENT_PROSEG { memory = { 1.GB * task.attempt }; cpus = 2 } }\n"


@pytest.fixture
def proseg() -> Path:
    linked = ROOT / ".venv" / "proseg" / "bin" / "proseg"
    try:
        return linked if linked.exists() else find_proseg(None).path
    except CellquiltError as error:
        if os.environ.get("CELLQUILT_REQUIRE_PROSEG"):
            raise
        pytest.skip(f"NO PROSEG, NOT TESTED: {error.message} (make setup STAGES=proseg)")


def test_killed_for_memory_it_is_tried_again_with_more(nextflow, proseg):
    folder = nextflow.folder
    simulate(folder / "sim", format="xenium", width_px=512, seed=3)
    wrapper = folder / "proseg"
    wrapper.write_text(WRAPPER.format(proseg=proseg, folder=folder))
    wrapper.chmod(0o755)
    (folder / "more.config").write_text(CONFIG)
    (folder / "sheet.csv").write_text("sample,technology,path\ns1,xenium,sim/slide_0\n")
    run = nextflow.pipeline(
        "--input", "sheet.csv", "--segmentation", "vendor,proseg", "--proseg_executable", wrapper,
        "--proseg_args", "--hillclimb 10", "--proseg_samples", "20", "--proseg_burnin_samples", "20",
        "-c", "more.config",
    )  # fmt: skip
    assert run.code == 0, run.out + run.err
    tries = [task for task in run.trace if "SEGMENT_PROSEG" in task["process"]]
    tries.sort(key=lambda task: task["attempt"])
    assert [(task["status"], task["exit"], task["memory"]) for task in tries] == [
        ("FAILED", "137", "1 GB"),
        ("COMPLETED", "0", "2 GB"),
    ]
    assert (folder / "killed").is_dir()
    sdata = spatialdata.read_zarr(folder / "results" / "s1" / "s1.zarr")
    table, points = sdata.tables["table"], sdata.points["transcripts"].compute()
    counted = points[points["passes_qv"] & ~points["is_control"]]
    sums = counted.groupby("cell_id", observed=True).size().reindex(table.obs_names).fillna(0).to_numpy()
    assert np.array_equal(np.asarray(table.X.sum(axis=1)).ravel(), sums)
    assert 0.5 * len(sdata.shapes["vendor_boundaries"]) < table.n_obs
    records = sdata.attrs["cellquilt"]["records"]
    (tasks,) = (record["facts"]["tasks"] for record in records if record["facts"].get("method") == "proseg")
    assert tasks[0]["parameters"]["threads"] == 2
