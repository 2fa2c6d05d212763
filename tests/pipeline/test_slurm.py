"""A real Slurm, of one node: the same cells as on this machine alone, whatever becomes of the node's daemon."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runner import ROOT, Nextflow
from slurm import QUICK, Slurm
from test_pipeline import GENERIC, fingerprint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """A sheet of two small slides, and what a local run makes of them in ``local``."""
    from cellquilt.simulate import simulate

    folder = tmp_path_factory.mktemp("cohort")
    simulate(folder / "sim", width_px=320, slides=2, seed=3)
    rows = ["sample,technology,path,transcripts"]
    rows += [f"s{n + 1},ome_tif,sim/slide_{n}/image.ome.tif,sim/slide_{n}/transcripts.parquet" for n in range(2)]
    (folder / "sheet.csv").write_text("\n".join(rows) + "\n")
    (folder / "quick.config").write_text(QUICK)
    (folder / "local").mkdir()
    run = Nextflow(folder / "local").pipeline("--input", folder / "sheet.csv", *GENERIC)
    assert run.code == 0, run.out + run.err
    return folder


def prints(folder: Path) -> dict[str, dict[str, str]]:
    return {name: fingerprint(folder / "results" / name / f"{name}.zarr") for name in ("s1", "s2")}


def test_a_real_slurm_makes_the_same_cells_though_its_daemon_is_killed(cohort, tmp_path):
    """One job a task, and no more: tasks outlive slurmd, and the new one finds them."""
    slurm = Slurm(tmp_path / "slurm")
    nextflow = Nextflow(tmp_path)
    command = nextflow.command(
        "-c", cohort / "quick.config", "run", ROOT / "main.nf", "-profile", "slurm", "--outdir", "results",
        "--input", cohort / "sheet.csv", *GENERIC,
    )  # fmt: skip
    log = tmp_path / "stdout.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=nextflow.environment(**slurm.environment), stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 900
        while "SEGMENT_GENERIC" not in log.read_text() or not slurm.jobs():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        slurm.kill("slurmd")
        time.sleep(5)
        slurm.start("slurmd")
        assert process.wait(900) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        slurm.down()
    trace = (tmp_path / "results" / "pipeline_info" / "trace.txt").read_text().splitlines()[1:]
    submitted = slurm.submitted()
    assert len(submitted) == len(set(submitted)) == len(trace) > 18
    assert prints(tmp_path) == prints(cohort / "local")
