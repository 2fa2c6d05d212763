"""`cellquilt doctor`: what it says of fake programs on a PATH of their own, and of this machine; it never hangs."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from cellquilt import __version__, doctor
from cellquilt.cli import main
from cellquilt.core.errors import CellquiltError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Put fake programs on a PATH that has nothing else but the shell's own and `df`."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{tmp_path / 'base'}")
    monkeypatch.setenv("CELLQUILT_CACHE", str(tmp_path / "nothing"))
    (tmp_path / "base").mkdir()
    for name in ("sh", "sleep", "df"):
        real = next(Path(place) / name for place in ("/bin", "/usr/bin") if (Path(place) / name).exists())
        (tmp_path / "base" / name).symlink_to(real)

    def add(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return add


@pytest.fixture
def clone(tmp_path):
    """A clone without environments."""
    (tmp_path / "clone" / "scripts").mkdir(parents=True)
    return tmp_path / "clone"


def checks(clone: Path, **options) -> dict[str, doctor.Check]:
    found = doctor.run_checks(root=clone, seconds=20, **options)
    by_name = {check.name: check for check in found}
    assert len(by_name) == len(found)
    return by_name


def in_process(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_nothing_on_path_is_missing_with_a_hint_each(programs, clone, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = checks(clone)
    for name in ("nextflow", "java", "sbatch", "bsub", "qsub", "kubectl", "aws", "gcloud", "az", "docker", "podman",
                 "apptainer", "singularity", "proseg", "baysor"):  # fmt: skip
        assert found[name].status == "missing", name
        assert found[name].hint, name
    assert found["core"].status == "ok"  # this very environment
    assert f"python {sys.version.split()[0]}" in found["core"].found


def test_versions_are_those_that_the_programs_say(programs, clone):
    programs("sbatch", "echo slurm 23.11.4")
    programs("qsub", "echo 'pbs_version = 22.05.11' >&2")
    programs("docker", 'case "$1" in info) echo fine;; --version) echo "Docker version 28.1.1, build 4eba377";; esac')
    programs("java", "echo 'openjdk version \"21.0.8\" 2025-07-15' >&2")
    programs("nextflow", "echo '      version 25.04.4 build 5944'")
    programs("proseg", "echo proseg 3.2.0")
    programs("baysor", "echo 0.7.1")
    found = checks(clone)
    said = {"sbatch": "23.11.4", "qsub": "22.05.11", "docker": "28.1.1", "java": "21.0.8", "nextflow": "25.04.4",
            "proseg": "3.2.0", "baysor": "0.7.1"}  # fmt: skip
    for name, version in said.items():
        assert (found[name].status, found[name].found.split(" at ")[0]) == ("ok", version)
        assert found[name].requirement == name


def test_programs_that_are_there_and_do_not_work_are_warnings(programs, clone):
    programs("docker", "echo 'Cannot connect to the Docker daemon'; exit 1")
    programs("nextflow", "echo '      version 23.04.1 build 5866'")
    programs("proseg", "echo proseg 1.1.9")
    programs("baysor", "echo 0.5.2")
    programs("sbatch", "echo no such cluster >&2; exit 3")
    programs("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    found = checks(clone)
    for name, why in {
        "docker": "Cannot connect to the Docker daemon",
        "nextflow": "too old",
        "proseg": "1.1.9",
        "baysor": "0.5.2",
        "sbatch": "no such cluster",
        "gpu": "NVIDIA-SMI has failed",
    }.items():
        assert found[name].status == "warning", name
        assert why in found[name].found
        assert found[name].hint, name


def test_gpus_are_listed(programs, clone):
    programs("nvidia-smi", "echo 'NVIDIA L4, 23034 MiB, 550.54'; echo 'NVIDIA L4, 23034 MiB, 550.54'")
    assert checks(clone)["gpu"].found == "NVIDIA L4, 23034 MiB, 550.54; NVIDIA L4, 23034 MiB, 550.54"


def test_images_are_tried_by_running_what_is_in_them(programs, clone, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLQUILT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "containers").mkdir(parents=True)
    (tmp_path / "cache" / "containers" / "storage.conf").write_text("")
    programs(
        "podman",
        """case "$1$CONTAINERS_STORAGE_CONF" in
        info*) echo fine;;
        images) echo registry.example.org/x/cellquilt-core:0.1.0; echo debian:12; echo cellquilt-proseg:3;;
        images*) echo localhost/cellquilt-cellpose:0.1.0;;
        run*) case "$*" in
            *--network=none*--entrypoint=cellquilt*-core:*--version) echo cellquilt, version 0.1.0;;
            *--entrypoint=cellquilt*localhost/cellquilt-cellpose:*) echo 0.1.0;;
            *--entrypoint=proseg*) echo exec format error; exit 126;;
            esac;;
        --version*) echo podman version 5.0.1;;
        esac""",
    )
    found = checks(clone)
    assert found["podman"].found.startswith("5.0.1 at ")
    core = "registry.example.org/x/cellquilt-core:0.1.0"
    assert found[core] == doctor.Check("stage", core, "ok", "image with cellquilt 0.1.0", "", "core")
    assert found["localhost/cellquilt-cellpose:0.1.0"].requirement == "cellpose3"
    assert found["cellquilt-proseg:3"].status == "warning"
    assert "exec format error" in found["cellquilt-proseg:3"].found
    assert "debian:12" not in found
    # A stage may be in its image alone; a program that works in neither is missing.
    assert found["cellpose3"].status == "missing"
    doctor.require(found.values(), ["cellpose3", "core"])
    with pytest.raises(CellquiltError, match="proseg"):
        doctor.require(found.values(), ["proseg"])


def test_a_program_that_hangs_is_stopped_with_what_it_started(programs, clone, monkeypatch):
    monkeypatch.setattr(doctor, "_QUICK", 0.5)
    programs("sbatch", "sleep 987654 & sleep 987654")
    start = time.monotonic()
    answer = doctor._ask(["sbatch", "--version"], 0.5)
    assert answer == (None, "no answer within 0.5 s")
    assert time.monotonic() - start < 5
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"987654" in _read(path)]
    for _ in range(50):
        left = [path for path in left if b"987654" in _read(path)]
        if not left:
            break
        time.sleep(0.1)
    assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_grandchild_that_keeps_the_output_open_keeps_no_one_waiting(programs):
    programs("sbatch", "sleep 60 & echo slurm 1.2.3")
    start = time.monotonic()
    assert doctor._ask(["sbatch"], 30).version == "1.2.3"
    assert time.monotonic() - start < 5


def test_a_program_that_cannot_be_started_or_says_bytes_is_an_answer(programs):
    path = programs("sbatch", "")
    path.write_bytes(b"\x7fELF broken")
    assert doctor._ask([path]).code in (None, 127)
    programs("bsub", r"printf '\377\376 4.5.6'")
    assert doctor._ask(["bsub"]).version == "4.5.6"


def test_a_check_that_raises_is_a_line(clone, programs, monkeypatch):
    def explode(*_):
        raise PermissionError("no")

    monkeypatch.setattr(doctor, "_machine", explode)
    monkeypatch.setattr(doctor, "_weights", explode)
    found = checks(clone)
    assert found["machine"].status == found["weights"].status == "warning"
    assert found["machine"].found == "could not be checked: PermissionError: no"


def test_environments_that_are_broken_or_of_another_kind(clone, programs):
    for name, script in {
        "cellpose3": """echo 'FOUND{"python": "3.12.1", "cellquilt": "%s", "cellpose": "4.0.6", "torch": "2.9"}'""",
        "cellpose4": """echo 'FOUND{"python": "3.12.1", "cellquilt": "%s", "cellpose": "4.0.6", "torch": "2.9"}'""",
        "stardist": """echo 'FOUND{"python": "3.12.1", "cellquilt": "0.0.1", "stardist": "1", "tensorflow": "2"}'""",
        "domains": "echo ModuleNotFoundError: torch >&2; exit 1",
    }.items():
        python = clone / ".venv" / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\n{script.replace('%s', __version__)}\n")
        python.chmod(0o755)
    found = checks(clone)
    assert found["cellpose3"].status == "missing"
    assert "cellpose 3.x" in found["cellpose3"].found
    assert found["cellpose4"] == doctor.Check(
        "stage", "cellpose4", "ok", ".venv/cellpose4: python 3.12.1, cellpose 4.0.6, torch 2.9", "", "cellpose4"
    )
    assert found["stardist"].status == "warning"
    assert found["domains"].status == "missing"
    assert "ModuleNotFoundError: torch" in found["domains"].found
    assert found["torch in domains"].status == "warning"


def test_the_record_of_weights_is_that_of_the_files():
    wrong = {
        file: doctor._sha256(doctor.PACKAGE / file)
        for files in doctor.shipped_weights().values()
        for file, sha256 in files.items()
        if doctor._sha256(doctor.PACKAGE / file) != sha256
    }
    assert wrong == {}, "these files have changed: put the new checksums into cellquilt/weights.json"
    shipped = {path.relative_to(doctor.PACKAGE).as_posix() for suffix in ("npz", "h5", "safetensors", "pt", "pth")
               for path in doctor.PACKAGE.rglob(f"*.{suffix}")}  # fmt: skip
    recorded = {file for files in doctor.shipped_weights().values() for file in files}
    assert shipped <= recorded


def test_weights_that_are_absent_or_changed(tmp_path, clone, programs):
    package = tmp_path / "package"
    for files in doctor.shipped_weights().values():
        for file in files:
            (package / file).parent.mkdir(parents=True, exist_ok=True)
            (package / file).write_bytes((doctor.PACKAGE / file).read_bytes())
    first = next(iter(doctor.shipped_weights()["cellpose3"]))
    (package / first).write_bytes(b"other")
    (package / "domains/models/default/model.safetensors").unlink()
    found = checks(clone, package=package)
    assert found["cellpose3 model"].status == "warning"
    assert first in found["cellpose3 model"].found
    assert found["domains model"].status == "missing"
    assert found["stardist model"].status == "ok"


def test_free_disk_of_folders_that_are_not_there_yet(tmp_path, clone, programs):
    found = checks(clone, folders={"outdir": tmp_path / "not" / "yet", "workdir": tmp_path})
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / 2**30
    for name in ("outdir", "workdir"):
        assert found[name].status == ("ok" if free >= 1 else "warning")
        assert float(found[name].found.split()[0]) == pytest.approx(free, rel=0.05)
    assert not (tmp_path / "not").exists()


def test_umask_and_the_cache_of_kernels(tmp_path, monkeypatch):
    before = os.umask(0o077)
    try:
        user = next(check for check in doctor._machine() if check.name == "user")
    finally:
        os.umask(before)
    assert (user.status, user.found) == ("warning", f"uid {os.getuid()}, umask 077")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache" / "below"))
    assert doctor._numba_cache(doctor.PACKAGE).status == "ok"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x.nbc").write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with monkeypatch.context() as image:
        image.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
        image.setenv("NUMBA_CACHE_LOCATOR_CLASSES", "kernels.Ours")
        assert doctor._numba_cache(doctor.PACKAGE).status == "ok"
    assert doctor._numba_cache(doctor.PACKAGE).status == "warning"


def test_require_fails_by_name_and_only_then(capsys, programs, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.run_checks, "__kwdefaults__", {**doctor.run_checks.__kwdefaults__, "root": tmp_path})
    code, out, err = in_process(capsys, "--require", "core")
    assert (code, err) == (0, "")
    assert "missing  container docker" in out
    code, out, err = in_process(capsys, "--require", "core,docker", "--require", "sbatch")
    assert code == 1
    assert "missing  container docker" in out
    assert err.startswith(
        "error: [requirement-missing] not all that is required works here: docker: not on PATH; sbatch"
    )


def test_a_requirement_that_is_not_known_is_said_before_anything_is_checked(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "run_checks", lambda *_, **__: pytest.fail("checked"))
    code, _, err = in_process(capsys, "--require", "cellpos")
    assert code == 1
    assert "[requirement-unknown]" in err
    assert 'did you mean "cellpose' in err
    assert doctor.known_requirements(["cellpose", " cellpose3", ""]) == ["cellpose3"]


def test_json_holds_every_check(capsys, programs, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.run_checks, "__kwdefaults__", {**doctor.run_checks.__kwdefaults__, "root": tmp_path})
    code, out, _ = in_process(capsys, "--json", "--outdir", str(tmp_path))
    said = json.loads(out)
    assert code == 0
    assert said["version"] == __version__
    assert {check["status"] for check in said["checks"]} <= {"ok", "warning", "missing"}
    assert {"core", "docker", "outdir", "memory"} <= {check["name"] for check in said["checks"]}


def test_the_table_is_aligned():
    rows = [
        doctor.Check("stage", "core", "ok", "THIS"),
        doctor.Check("executor", "sbatch", "missing", "THIS", "take that"),
    ]
    lines = doctor.table(rows).splitlines()
    assert {line.index("THIS") for line in lines[2:4]} == {lines[0].index("found")}
    assert lines[4].strip() == "hint: take that"


def test_explain_reads_the_catalogue(capsys):
    code, out, _ = in_process(capsys, "--explain", "disk-full")
    assert code == 0
    assert out.startswith("disk-full (The run and the machine)")


@pytest.mark.slow
def test_this_machine_has_what_set_up_made():
    found = {check.name: check for check in doctor.run_checks()}
    for stage in ("core", "cellpose3"):
        if (REPOSITORY / ".venv" / stage / "bin" / "python").exists():
            assert found[stage].status == "ok", found[stage]
    if (REPOSITORY / ".venv" / "nextflow" / "jars").is_dir():
        assert found["nextflow"].status == found["java"].status == "ok"
    with pytest.raises(CellquiltError):
        doctor.require(found.values(), ["core", "bsub"])
