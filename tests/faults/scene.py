"""Where faults are injected: small slides, a copy of the pipeline, and a finished run to start from at any stage."""

import csv
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from runner import LAUNCHER, ROOT, Nextflow, Run
from test_pipeline import GENERIC, fingerprint

#: What makes up the pipeline; its environments are linked to.
PIPELINE = (
    "main.nf",
    "nextflow.config",
    "nextflow_schema.json",
    "conf",
    "lib",
    "modules",
    "subworkflows",
    "bin",
    "assets",
)
#: The stages of a slide, in order, as their programs are called.
STAGES = {
    "CONVERT": "convert.py", "TISSUE": "tissue.py", "PATCHIFY": "patchify.py", "SEGMENT_GENERIC": "segment.py",
    "RESOLVE": "resolve.py", "AGGREGATE": "aggregate.py", "ASSEMBLE": "assemble.py", "REPORT": "report.py",
    "SAMPLES": "samples.py",
}  # fmt: skip
#: No fault may take longer to come to an end.
LIMIT_S = float(os.environ.get("CELLQUILT_FAULT_LIMIT_S", "600"))


def until[T](what: str, found: Callable[[], T], limit_s: float = LIMIT_S) -> T:
    """Wait for something to be there."""
    deadline = time.monotonic() + limit_s
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.02)
    return value


def processes(folder: Path, word: str = "") -> list[int]:
    """Processes that work below a folder, whose command line has a word."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            where = Path(os.readlink(entry / "cwd"))
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if where.is_relative_to(folder) and word in line:
                found.append(int(entry.name))
    return sorted(found)


def programs(folder: Path, program: str) -> list[int]:
    """Python processes of a task's program; its shell and what only names the program are left out."""
    return [pid for pid in processes(folder, f"/{program} ") if _is_python(pid)]


def _is_python(pid: int) -> bool:
    with suppress(OSError):
        return "python" in Path(f"/proc/{pid}/comm").read_text() or "python" in os.readlink(f"/proc/{pid}/exe")
    return False


def _hears_interrupts() -> None:
    """As from a terminal: what a shell starts in the background does not hear SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    """Send a signal; one that has ended by itself is none the worse."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass
class Started:
    """A run that goes on."""

    scene: "Scene"
    process: subprocess.Popen
    folder: Path
    log: Path

    def program(self, name: str, *, count: int = 1) -> list[int]:
        """Wait for the program of a task (``segment.py``); its processes."""

        def look() -> list[int]:
            found = programs(self.scene.folder, name)
            assert found or self.process.poll() is None, f"the run ended before {name}\n{self.text()}"
            return found if len(found) >= count else []

        return until(name, look)

    def text(self) -> str:
        """What the run has said."""
        return self.log.read_text(errors="replace")

    def finish(self) -> Run:
        """Wait for its end."""
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired as error:
            self.stop(signal.SIGKILL)
            raise AssertionError(f"the run hangs\n{self.text()}") from error
        trace = self.folder / "results" / "pipeline_info" / "trace.txt"
        tasks: list[dict[str, str]] = []
        if trace.exists():
            with trace.open(newline="") as file:
                tasks = list(csv.DictReader(file, delimiter="\t"))
        return Run(self.process.returncode, self.text(), "", self.folder, tasks)

    def signal(self, number: int) -> Run:
        """A signal to Nextflow alone; the run's end."""
        self.process.send_signal(number)
        return self.finish()

    def stop(self, number: int) -> Run:
        """A signal to Nextflow and all its tasks, as a terminal or a machine's end sends; the run's end."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()
            kill(processes(self.scene.folder))
        return self.finish()


@dataclass
class Scene:
    """One folder in which runs are started, and put back to what a finished run left there."""

    folder: Path
    prints: dict[str, dict[str, str]] = field(default_factory=dict)
    trace: list[dict[str, str]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """Where Nextflow is started."""
        return self.folder / "run"

    @property
    def results(self) -> Path:
        """What it publishes."""
        return self.run / "results"

    @property
    def work(self) -> Path:
        """Where its tasks work."""
        return self.run / "work"

    @property
    def kept(self) -> Path:
        """What the finished run left there."""
        return self.folder / "kept"

    @property
    def pipeline(self) -> Path:
        """The pipeline that is run, for faults to change."""
        return self.folder / "pipeline"

    def slide(self, sample: str) -> Path:
        """The input of ``s1`` or ``s2``."""
        return self.folder / "sim" / f"slide_{int(sample[1:]) - 1}"

    def prepare(self) -> None:
        """Slides, sheets ``one.csv`` and ``two.csv``, and a finished run of both slides."""
        if not self.kept.exists():
            self._make()
        with (self.kept / "results" / "pipeline_info" / "trace.txt").open(newline="") as file:
            self.trace = list(csv.DictReader(file, delimiter="\t"))
        self.prints = {name: fingerprint(self.kept / "results" / name / f"{name}.zarr") for name in ("s1", "s2")}

    def _make(self) -> None:
        from cellquilt.simulate import simulate

        self.pipeline.mkdir(parents=True)
        for name in PIPELINE:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, self.pipeline / name)
        (self.pipeline / ".venv").symlink_to(ROOT / ".venv")
        simulate(self.folder / "sim", width_px=320, slides=2, seed=3)
        rows = ["sample,technology,path,transcripts"]
        for sample in ("s1", "s2"):
            slide = self.slide(sample)
            rows.append(f"{sample},ome_tif,{slide / 'image.ome.tif'},{slide / 'transcripts.parquet'}")
        (self.folder / "one.csv").write_text("\n".join(rows[:2]) + "\n")
        (self.folder / "two.csv").write_text("\n".join(rows) + "\n")
        self.run.mkdir()
        done = self.start("two").finish()
        assert done.code == 0, done.out
        subprocess.run(["cp", "-a", self.run, self.kept], check=True)

    def fresh(self) -> None:
        """An empty folder."""
        self._ended()
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir()

    def finished_until(self, stage: str, samples: tuple[str, ...] = ("s1", "s2")) -> None:
        """As after a run that ended before a stage of these samples; nothing is published yet."""
        self.fresh()
        self.run.rmdir()
        subprocess.run(["cp", "-a", self.kept, self.run], check=True)
        shutil.rmtree(self.results)
        names = list(STAGES)
        gone = names[names.index(stage) :] if stage else []
        for task in self.trace:
            sample = task["tag"].split(":")[0]
            if task["process"].split(":")[-1] in gone and sample in (*samples, "-"):
                shutil.rmtree(self.task_folder(task))

    def task_folder(self, task: dict[str, str]) -> Path:
        """The work folder of a task of a trace."""
        start, rest = task["hash"].split("/")
        (found,) = (self.work / start).glob(f"{rest}*")
        return found

    def folder_of(self, stage: str, sample: str, number: int = 0) -> Path:
        """The work folder of a task of the finished run."""
        tasks = [t for t in self.trace if t["process"].endswith(stage) and t["tag"].split(":")[0] == sample]
        return self.task_folder(sorted(tasks, key=lambda task: task["tag"])[number])

    def start(
        self, sheet: str = "one", *arguments: object, folder: Path | None = None, **environment: str | None
    ) -> Started:
        """Start a run of a sheet; variables of the environment that are None are taken away."""
        folder = folder or self.run
        given = Nextflow(folder).environment(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1")
        given |= {name: value for name, value in environment.items() if value is not None}
        for name in [name for name, value in environment.items() if value is None]:
            given.pop(name, None)
        outdir = () if "--outdir" in arguments else ("--outdir", "results")
        log = self.folder / f"said_{time.monotonic_ns()}.txt"
        asked = ("--input", self.folder / f"{sheet}.csv", *GENERIC, *outdir, *arguments)
        with log.open("w") as out:
            process = subprocess.Popen(
                [str(word) for word in (LAUNCHER, "run", self.pipeline / "main.nf", *asked)],
                cwd=folder, env=given, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_hears_interrupts,
            )  # fmt: skip
        return Started(self, process, folder, log)

    def resume(self, sheet: str = "one", *arguments: object, **environment: str | None) -> Run:
        """Go on with the run, to its end."""
        return self.start(sheet, "-resume", *arguments, **environment).finish()

    def config(self, text: str) -> tuple[str, Path]:
        """Options that add a configuration."""
        path = self.folder / "more.config"
        path.write_text(text)
        return "-c", path

    def samples(self, results: Path | None = None) -> dict[str, dict[str, str]]:
        """Rows of samples.tsv."""
        with ((results or self.results) / "samples.tsv").open(newline="") as file:
            return {row["sample"]: row for row in csv.DictReader(file, delimiter="\t")}

    def same(self, run: Run, sheet: str = "one", results: Path | None = None) -> bool:
        """Whether a run came through with the tables of the finished one; fails with its words if it did not."""
        results = results or self.results
        assert run.code == 0, run.out
        expected = ("s1",) if sheet == "one" else ("s1", "s2")
        rows = self.samples(results)
        assert [(name, row["status"]) for name, row in rows.items()] == [(name, "done") for name in expected], rows
        self._ended()
        return {name: fingerprint(results / name / f"{name}.zarr") for name in expected} == {
            name: self.prints[name] for name in expected
        }

    def failed(self, run: Run, sample: str, sheet: str = "one") -> dict[str, str]:
        """The row of a sample that a run names as failed; the others of the sheet are done, and none is missing."""
        assert run.code not in (0, None), run.out
        rows = self.samples()
        assert list(rows) == (["s1"] if sheet == "one" else ["s1", "s2"]), rows
        assert {name: row["status"] for name, row in rows.items()} == {
            name: "failed" if name == sample else "done" for name in rows
        }, run.out
        assert f"failed: {sample}" in run.out
        assert rows[sample]["cause"]
        assert rows[sample]["error"]
        assert not (self.results / sample / f"{sample}.zarr").exists()
        return rows[sample]

    @contextmanager
    def small_disk(self, where: Path, free: int) -> Iterator[Callable[[int], None]]:
        """Move a folder onto a disk of its own with so many bytes free; gives a function that makes room."""
        where.mkdir(exist_ok=True)
        aside = where.with_name(f"{where.name}.aside")
        where.rename(aside)
        where.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "none", where], check=True)
        try:
            subprocess.run(["cp", "-a", f"{aside}/.", where], check=True)
            disk = os.statvfs(where)
            used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize

            def resize(bytes_free: int) -> None:
                subprocess.run(["mount", "-o", f"remount,size={used + bytes_free}", where], check=True)

            resize(free)
            yield resize
            shutil.rmtree(aside)
            subprocess.run(["cp", "-a", where, aside], check=True)
        finally:
            kill(processes(where))
            until("the disk to be let go", lambda: subprocess.run(["umount", where], check=False).returncode == 0, 30)
            where.rmdir()
            aside.rename(where)

    def _ended(self) -> None:
        """Nothing of a run that ended works on."""
        left = lambda: not [pid for pid in processes(self.folder) if pid != os.getpid()]  # noqa: E731
        try:
            until("all processes to end", left, 30)
        except AssertionError:
            lines = [Path(f"/proc/{pid}/cmdline").read_bytes()[:200] for pid in processes(self.folder)]
            kill(processes(self.folder))
            raise AssertionError(f"left running: {lines}") from None

    def close(self) -> None:
        """End what is still there."""
        kill(processes(self.folder))
