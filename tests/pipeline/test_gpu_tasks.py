"""GPUs in the pipeline on a machine that has none: what a sample says that wants one, and what containers are given."""

import csv
import os

import pytest
from cellquilt.core.shapes import read_geoparquet
from cellquilt.simulate import simulate
from runner import ROOT, Nextflow


@pytest.mark.slow
def test_a_gpu_that_is_not_there_fails_the_sample_by_name_or_falls_back(tmp_path):
    simulate(tmp_path / "sim", width_px=256, seed=1)
    nextflow = Nextflow(tmp_path)
    asked = ("--input", "sim/sheet.csv", "--cellpose_gpu", "--gpus", "2")
    run = nextflow.pipeline(*asked, CUDA_VISIBLE_DEVICES="")
    assert run.code != 0
    with (tmp_path / "results" / "samples.tsv").open(newline="") as file:
        (row,) = csv.DictReader(file, delimiter="\t")
    assert (row["status"], row["stage"], row["error"]) == ("failed", "SEGMENT_CELLPOSE", "gpu-missing")
    assert row["cause"].startswith("a GPU is asked for by --cellpose_gpu (gpu=True), and torch")
    assert "--gpu_fallback" in row["hint"]

    run = nextflow.pipeline(*asked, "--gpu_fallback", "-resume", CUDA_VISIBLE_DEVICES="")
    assert run.code == 0, run.out + run.err
    assert run.status("PATCHIFY") == ["CACHED"]
    assert "hours of GPUs" not in run.out
    made = [path for path in tmp_path.glob("work/*/*/*.cells.parquet") if not path.is_symlink()]
    assert {read_geoparquet(path)[2]["facts"].get("device") for path in made if "bundle" in path.name} == {"cpu"}


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_tasks_in_containers_see_the_folder_of_locks(tmp_path, engine):
    (tmp_path / "programs").mkdir()
    program = tmp_path / "programs" / engine
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@" >>"$CALLS.$$"\n')
    program.chmod(0o755)
    Nextflow(tmp_path)(
        "-C", ROOT / "nextflow.config", "run", ROOT / "tests/pipeline/check_scripts", "-profile", f"local,{engine}",
        "--container_registry", "localhost/", "--container_version", "1", "--max_retries", "0",
        "--on_sample_error", "skip",
        PATH=f"{program.parent}:{os.environ['PATH']}", CALLS=str(tmp_path / "call"),
    )  # fmt: skip
    calls = [path.read_text().splitlines() for path in tmp_path.glob("call.*")]
    folder = f"/tmp/cellquilt-gpus-{os.getuid()}"
    locked = [call for call in calls if f"{folder}:{folder}" in call]
    assert len(locked) == 1, calls
    assert locked[0][locked[0].index("-v") :].count(f"CELLQUILT_GPU_LOCKS={folder}") == 1
    assert any("cellpose" in part for part in locked[0])
