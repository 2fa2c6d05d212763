"""Faults through the whole pipeline: each ends in the same tables, or in a named error after which -resume finishes.

One test a scenario; a scenario injects one or more faults of the table in `faults_table.py` into one run.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from runner import ROOT
from scene import STAGES, Scene, kill, programs, until
from slurm import QUICK, Slurm

pytestmark = pytest.mark.faults
in_ci = pytest.mark.slow
by_hand = pytest.mark.bench
VERSION = re.search(r"^ *version *= *'(.+)'", (ROOT / "nextflow.config").read_text(), flags=re.M)[1]  # type: ignore[index]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="FAULT NOT INJECTED: only root may mount")


def said_error(text: str) -> str:
    """The first error that a run names: ``error: [outdir-in-use] …``."""
    for line in text.splitlines():
        if line.startswith("error: ["):
            return line.split("[")[1].split("]")[0]
    return ""


def attempts(run, stage: str, sample: str = "s1") -> list[tuple[str, str]]:
    """Attempt and status of a stage's tasks of a sample."""
    return sorted(
        (task["attempt"], task["status"])
        for task in run.trace
        if task["process"].endswith(stage) and task["tag"].split(":")[0] in (sample, "-")
    )


# --------------------------------------------------------------------------------------------------------------- tasks


@in_ci
def test_a_killed_patch_is_tried_again(scene: Scene, outcome):
    scene.finished_until("SEGMENT_GENERIC")
    going = scene.start("one", "-resume")
    kill(going.program("segment.py")[:1])
    run = going.finish()
    assert attempts(run, "SEGMENT_GENERIC") == [("1", "COMPLETED"), ("1", "FAILED"), ("2", "COMPLETED")]
    outcome("patch-killed", finished=True, equal=scene.same(run))


@by_hand
def test_each_stage_killed_once(scene: Scene, outcome):
    scene.fresh()
    going = scene.start("one")
    for program in STAGES.values():
        kill(going.program(program)[:1])
    run = going.finish()
    for stage in STAGES:
        assert ("1", "FAILED") in attempts(run, stage), stage
        assert ("2", "COMPLETED") in attempts(run, stage), stage
    equal = scene.same(run)
    for program in STAGES.values():
        outcome(f"{program.removesuffix('.py')}-killed", finished=True, equal=equal)


@in_ci
def test_a_patch_killed_for_good_costs_its_slide_alone(scene: Scene, outcome):
    scene.finished_until("SEGMENT_GENERIC", ("s2",))
    going = scene.start("two", "-resume", "--max_retries", 1)
    bundle = "bundle_000.zarr"
    killed = 0
    while going.process.poll() is None:
        for pid in programs(scene.folder, "segment.py"):
            if f" {bundle} ".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" "):
                kill([pid])
                killed += 1
        time.sleep(0.02)
    run = going.finish()
    row = scene.failed(run, "s2", "two")
    assert (row["stage"], killed >= 2) == ("SEGMENT_GENERIC", True)
    again = scene.resume("two", "--max_retries", 1)
    outcome("patch-killed-for-good", finished=True, equal=scene.same(again, "two"), error=row["error"])


@in_ci
def test_a_task_that_is_refused_memory_is_tried_with_more(scene: Scene, outcome):
    """The same as what a container's limit does, without a container."""
    scene.finished_until("SEGMENT_GENERIC")
    limit = "ulimit -v ${task.attempt == 1 ? 200_000 : 'unlimited'}"
    before = f"export PATH='${{projectDir}}/.venv/core/bin':\"\\$PATH\"; {limit}"
    text = f'process {{ withName: SEGMENT_GENERIC {{ beforeScript = {{ """{before}""" }} }} }}\n'
    run = scene.resume("one", *scene.config(text))
    tries = attempts(run, "SEGMENT_GENERIC")
    assert tries == [("1", "FAILED"), ("1", "FAILED"), ("2", "COMPLETED"), ("2", "COMPLETED")], run.out
    outcome("memory-refused", finished=True, equal=scene.same(run))


@in_ci
def test_a_worker_that_hangs_is_ended_by_the_time_limit(scene: Scene, outcome):
    """A task that stands still, as one does that waits for a disk which is gone."""
    scene.finished_until("SEGMENT_GENERIC")
    text = "process { withName: SEGMENT_GENERIC { time = '25 s' } }\n"
    going = scene.start("one", "-resume", "--max_retries", 0, *scene.config(text))
    stopped = going.program("segment.py")[0]
    kill([stopped], signal.SIGSTOP)
    run = going.finish()
    kill([stopped], signal.SIGCONT)  # it has been told to end, and now hears it
    row = scene.failed(run, "s1")
    assert (row["stage"], "too little time" in row["cause"]) == ("SEGMENT_GENERIC", True), row
    outcome("worker-hangs", finished=True, equal=scene.same(scene.resume("one")), error=row["error"])


# ------------------------------------------------------------------------------------------------------------ Nextflow


@by_hand
def test_a_run_that_is_stopped_again_and_again(scene: Scene, outcome):
    scene.fresh()
    ends: list[tuple[str, str]] = []
    going = scene.start("one")
    going.program("convert.py")
    going.signal(signal.SIGKILL)
    ends.append(("nextflow-killed", "run-ended"))  # nobody is left to write it down
    going = scene.start("one", "-resume")
    going.program("patchify.py")
    going.stop(signal.SIGKILL)
    ends.append(("machine-lost", "run-ended"))
    going = scene.start("one", "-resume")
    going.program("segment.py")
    run = going.signal(signal.SIGTERM)
    ends.append(("nextflow-ended", scene.failed(run, "s1")["error"]))
    going = scene.start("one", "-resume")
    going.program("resolve.py")
    run = going.stop(signal.SIGINT)
    ends.append(("ctrl-c", scene.failed(run, "s1")["error"]))
    going = scene.start("one", "-resume")
    until("the store to be published", lambda: (scene.results / "s1" / "s1.zarr").exists() or going.process.poll())
    going.stop(signal.SIGKILL)
    ends.append(("killed-while-publishing", "run-ended"))
    notes = scene.results / "s1" / "notes.txt"  # somebody else's, and younger than the run
    notes.write_text("mine")
    run = scene.resume("one")
    assert run.status("CONVERT", "s1") == ["CACHED"]
    assert notes.read_text() == "mine"
    equal = scene.same(run)
    for name, error in ends:
        outcome(name, finished=True, equal=equal, error=error)


@by_hand
def test_nextflow_loses_its_cache(scene: Scene, outcome):
    scene.finished_until("AGGREGATE")
    for table in (scene.run / ".nextflow" / "cache").rglob("*"):
        if table.is_file() and table.stat().st_size:
            os.truncate(table, table.stat().st_size // 2)
    run = scene.resume("one")
    error = "" if run.code == 0 else "nextflow"
    assert run.code == 0 or "cache" in run.out.lower(), run.out
    if run.code:
        run = scene.start("one").finish()
    outcome("cache-damaged", finished=True, equal=scene.same(run), error=error)
    shutil.rmtree(scene.run / ".nextflow")
    run = scene.resume("one")
    outcome("cache-lost", finished=True, equal=scene.same(run))


# --------------------------------------------------------------------------------------------------------------- disks


def fill(path: Path) -> None:
    """Leave not a byte of a disk."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@in_ci
@as_root
def test_a_full_disk_is_named_and_more_room_finishes_the_work(scene: Scene, outcome):
    scene.finished_until("RESOLVE")
    with scene.small_disk(scene.work, 150_000) as room:
        row = scene.failed(scene.resume("one"), "s1")
        outcome("disk-full-in-a-task", finished=False, equal=False, error=row["error"])
        filler = scene.work / "filler"
        fill(filler)
        row = scene.failed(scene.resume("one"), "s1")
        outcome("disk-full-before-a-task", finished=False, equal=False, error=row["error"])
        filler.unlink()
        room(400 << 20)
        equal = scene.same(scene.resume("one"))
    outcome("disk-full-in-a-task", finished=True, equal=equal, error="disk-full")
    outcome("disk-full-before-a-task", finished=True, equal=equal, error="disk-full")


@by_hand
@as_root
def test_the_results_disk_is_full(scene: Scene, outcome):
    scene.finished_until("ASSEMBLE")
    with scene.small_disk(scene.results, 200_000) as room:
        run = scene.resume("one")
        assert run.code not in (0, None), run.out
        assert "failed: s1" in run.out, run.out
        error = "disk-full" if "No space left on device" in run.out else said_error(run.out)
        room(400 << 20)
        equal = scene.same(scene.resume("one"))
    outcome("results-disk-full", finished=True, equal=equal, error=error)


# -------------------------------------------------------------------------------------------------------------- damage


def cut(path: Path) -> None:
    """Leave half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def chunks(bundle: Path) -> list[Path]:
    """Files with the pixels of a bundle."""
    return sorted(path for path in bundle.rglob("*") if path.is_file() and path.suffix != ".json")


@in_ci
def test_a_cut_bundle_is_named_and_made_anew(scene: Scene, outcome):
    scene.finished_until("SEGMENT_GENERIC")
    made_by = scene.folder_of("PATCHIFY", "s1")
    cut(chunks(made_by / "bundles" / "bundle_000.zarr")[0])
    row = scene.failed(scene.resume("one"), "s1")
    assert row["stage"] == "SEGMENT_GENERIC"
    outcome("bundle-cut", finished=False, equal=False, error=row["error"])
    assert f"{made_by.parent.name}/{made_by.name}" in row["hint"], row
    shutil.rmtree(made_by)
    outcome("bundle-cut", finished=True, equal=scene.same(scene.resume("one")), error=row["error"])


@by_hand
def test_other_work_files_are_damaged(scene: Scene, outcome):
    scene.finished_until("SEGMENT_GENERIC")
    made_by = scene.folder_of("PATCHIFY", "s1")
    chunks(made_by / "bundles" / "bundle_000.zarr")[-1].unlink()
    first = scene.failed(scene.resume("one"), "s1")["error"]
    scene.finished_until("RESOLVE")
    made_by = scene.folder_of("SEGMENT_GENERIC", "s1", 1)
    (cells,) = made_by.glob("*.parquet")
    cut(cells)
    row = scene.failed(scene.resume("one"), "s1")
    assert f"{made_by.parent.name}/{made_by.name}" in row["hint"], row
    shutil.rmtree(made_by)
    equal = scene.same(scene.resume("one"))
    outcome("bundle-chunk-lost", finished=True, equal=equal, error=first)
    outcome("patch-cells-cut", finished=True, equal=equal, error=row["error"])


@by_hand
def test_inputs_change_under_the_run(scene: Scene, outcome):
    """CONVERT is stopped at its start, the input spoilt, and CONVERT let go on."""
    scene.finished_until("CONVERT", ("s2",))
    ends = []
    image, table = scene.slide("s2") / "image.ome.tif", scene.slide("s2") / "transcripts.parquet"
    for name, path in (("image-cut", image), ("transcripts-cut", table), ("input-vanishes", table)):
        kept = path.with_name(f"{path.name}.kept")
        shutil.copy2(path, kept)
        going = scene.start("two", "-resume")
        converting = going.program("convert.py")
        kill(converting, signal.SIGSTOP)
        if name == "input-vanishes":
            path.unlink()
        else:
            cut(path)
        kill(converting, signal.SIGCONT)
        row = scene.failed(going.finish(), "s2", "two")
        assert (row["stage"], path.name in row["cause"]) == ("CONVERT", True), row
        ends.append((name, row["error"]))
        path.unlink(missing_ok=True)
        kept.rename(path)
    aside = image.rename(image.with_name("aside"))
    image.symlink_to(scene.folder / "nowhere")
    run = scene.resume("two")
    assert run.code not in (0, None)
    ends.append(("input-unreachable", said_error(run.out)))
    image.unlink()
    aside.rename(image)
    equal = scene.same(scene.resume("two"), "two")
    for name, error in ends:
        outcome(name, finished=True, equal=equal, error=error)


# ---------------------------------------------------------------------------------------------- time and surroundings


def date(days: int, *folders: Path) -> None:
    """Date files by days from now."""
    stamp = time.time() + 86400 * days
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (stamp, stamp), follow_symlinks=False)


@by_hand
def test_work_files_from_tomorrow(scene: Scene, outcome):
    scene.finished_until("")
    made_by = scene.folder_of("RESOLVE", "s1")
    date(1, made_by / "s1.cells.zarr")
    run = scene.resume("one")
    assert run.status("RESOLVE", "s1:generic") == ["CACHED"]
    assert run.status("AGGREGATE", "s1:generic") == ["COMPLETED"]
    outcome("results-of-tomorrow", finished=True, equal=scene.same(run))


@by_hand
@as_root
def test_odd_surroundings(scene: Scene, outcome):
    """All at once: what comes through them together comes through each."""
    scene.fresh()
    stamps = {path: path.stat() for path in scene.slide("s1").rglob("*")}
    date(1, scene.slide("s1"))
    shut, elsewhere = scene.folder / "shut", scene.folder / "elsewhere"
    shut.mkdir()
    elsewhere.mkdir()
    (scene.folder / "linked").symlink_to(elsewhere)
    slides = scene.folder / "sim"
    subprocess.run(["mount", "--bind", slides, slides], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", slides], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", shut], check=True)
        before = os.umask(0o077)
        try:
            going = scene.start("one", NXF_WORK=str(scene.folder / "linked"), TMPDIR=str(shut), HOME=None, LC_ALL="C")
        finally:
            os.umask(before)
        run = going.finish()
        assert list(elsewhere.glob("*/*/.command.run"))
        assert not scene.work.exists()
        equal = scene.same(run)
        assert (scene.results / "samples.tsv").stat().st_mode & 0o077 == 0
    finally:
        subprocess.run(["umount", shut], check=False)
        subprocess.run(["umount", slides], check=True)
        for path, stamp in stamps.items():
            os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    for name in (
        "inputs-read-only", "inputs-of-tomorrow", "work-linked", "work-elsewhere", "tmpdir-not-writable", "home-unset",
        "umask-077", "locale-c",
    ):  # fmt: skip
        outcome(name, finished=True, equal=equal)


# ------------------------------------------------------------------------------------------------------------ two runs


@in_ci
def test_one_run_an_output_folder(scene: Scene, outcome):
    scene.finished_until("AGGREGATE")
    first = scene.start("one", "-resume")
    held = first.program("aggregate.py")
    kill(held, signal.SIGSTOP)
    other = scene.folder / "other"
    other.mkdir(exist_ok=True)
    refused = scene.start("one", "--outdir", scene.results, folder=other).finish()
    assert refused.code not in (0, None)
    same_folder = scene.start("one", "-resume").finish()
    assert same_folder.code not in (0, None)
    assert "lock" in same_folder.out.lower(), same_folder.out
    kill(held, signal.SIGCONT)
    run = first.finish()
    equal = scene.same(run)
    # All stages of one slide, a second task of patches, and the folder for the viewer.
    assert len(run.trace) == len(STAGES) + 2, "the first run's trace is whole"
    outcome("two-runs", finished=True, equal=equal, error=said_error(refused.out))
    outcome("two-runs-same-folder", finished=True, equal=equal, error="nextflow")

    scene.finished_until("ASSEMBLE")
    first = scene.start("one", "-resume")
    first.program("assemble.py")
    first.stop(signal.SIGKILL)
    second = scene.resume("one", "--outdir", scene.results)
    outcome("two-runs-first-killed", finished=True, equal=scene.same(second))


# ---------------------------------------------------------------------------------------------------------------- code


def again(run) -> set[str]:
    """Stages that ran, others were cached."""
    return {task["process"].split(":")[-1] for task in run.trace if task["status"] == "COMPLETED"}


@by_hand
def test_changed_code_runs_what_it_concerns(scene: Scene, outcome):
    module, program, config = (
        scene.pipeline / name for name in ("modules/aggregate/main.nf", "bin/aggregate.py", "nextflow.config")
    )
    kept = {path: path.read_text() for path in (module, program, config)}
    affected = {"AGGREGATE", "ASSEMBLE", "REPORT", "EXPLORER", "SAMPLES"}
    ends = {}
    try:
        scene.finished_until("")
        module.write_text(kept[module].replace("    aggregate.py", "    true\n    aggregate.py"))
        run = scene.resume("one")
        assert again(run) >= affected - {"SAMPLES"}
        assert not again(run) - affected
        ends["stage-changed"] = scene.same(run)
        module.write_text(kept[module])

        scene.finished_until("")
        program.write_text(kept[program] + "# changed\n")
        run = scene.resume("one")
        assert again(run) >= affected - {"SAMPLES"}
        assert not again(run) - affected
        ends["program-changed"] = scene.same(run)
        program.write_text(kept[program])

        scene.finished_until("")
        config.write_text(kept[config].replace(f"'{VERSION}'", f"'{VERSION}.post1'"))
        run = scene.resume("one")
        assert again(run) >= set(STAGES) - {"SAMPLES"}
        ends["version-changed"] = scene.same(run)
    finally:
        for path, text in kept.items():
            path.write_text(text)
    for name, equal in ends.items():
        outcome(name, finished=True, equal=equal)


@by_hand
def test_a_container_that_is_killed_for_memory(scene: Scene, outcome):
    """The patch tasks in the core image, with a limit that the first attempt does not fit into."""
    image = f"localhost/cellquilt-core:{VERSION}"
    podman = ROOT / "scripts" / "podman"
    if subprocess.run([podman, "image", "exists", image], check=False).returncode:
        pytest.skip(f"FAULT NOT INJECTED: there is no image {image} (make images)")
    said = subprocess.run([podman, "--print-env"], capture_output=True, text=True, check=True).stdout
    store = dict(word.split("=", 1) for word in shlex.split(said) if "=" in word)
    scene.finished_until("SEGMENT_GENERIC")
    memory = "task.attempt == 1 ? 20.MB : 2.GB"
    patches = (
        f"withName: SEGMENT_GENERIC {{ container = '{image}'; containerOptions = '--user=0'; memory = {{ {memory} }} }}"
    )
    text = f"podman.enabled = true\nprocess {{ {patches} }}\n"
    run = scene.resume("one", *scene.config(text), **store)
    tries = [(task["attempt"], task["exit"]) for task in run.trace if task["process"].endswith("SEGMENT_GENERIC")]
    assert sorted(tries) == [("1", "137"), ("1", "137"), ("2", "0"), ("2", "0")], run.out
    outcome("memory-kill", finished=True, equal=scene.same(run))


# --------------------------------------------------------------------------------------------------------------- Slurm


@by_hand
def test_slurm_loses_its_parts(scene: Scene, outcome, tmp_path):
    slurm = Slurm(tmp_path / "slurm")
    scene.fresh()
    arguments = ("-profile", "slurm", *scene.config(QUICK))
    try:
        going = scene.start("one", *arguments, **slurm.environment)
        going.program("convert.py")
        slurm.kill("slurmd")
        time.sleep(3)
        slurm.start("slurmd")

        going.program("tissue.py")
        slurm.command("scancel", *map(str, slurm.jobs()))

        going.program("patchify.py")
        node = slurm.command("sinfo", "-h", "-o", "%n")
        slurm.command("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
        until("a job that waits", lambda: slurm.jobs("PD"))
        slurm.command("scontrol", "update", f"nodename={node}", "state=resume")

        going.program("segment.py")
        slurm.kill("node")
        until("the node to be given up", lambda: "down" in slurm.node(), 180)
        slurm.start("slurmd")

        held = going.program("aggregate.py")
        kill(held, signal.SIGSTOP)
        time.sleep(12)  # until the controller has written down that it runs
        slurm.kill("slurmctld")
        kill(held, signal.SIGCONT)
        time.sleep(20)
        slurm.start("slurmctld")
        run = going.finish()
        equal = scene.same(run)
        assert ("1", "FAILED") in attempts(run, "TISSUE")
        assert attempts(run, "CONVERT") == [("1", "COMPLETED")]
        for name in ("slurmd-killed", "job-cancelled", "node-drained", "node-lost", "slurmctld-killed"):
            outcome(name, finished=True, equal=equal)

        stamps = {path: path.stat() for path in scene.slide("s1").rglob("*")}
        date(-1, scene.slide("s1"), scene.work)
        try:
            run = scene.resume("one", *arguments, **slurm.environment)
        finally:
            for path, stamp in stamps.items():
                os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert {task["status"] for task in run.trace} == {"CACHED"}, run.out
        outcome("slurm-files-of-yesterday", finished=True, equal=scene.same(run))
    finally:
        slurm.down()
