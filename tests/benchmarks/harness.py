"""What all benchmarks have in common: cases, and the measuring of a step or of a process. Standard library only.

A module of cases (``bench_*.py``) has

``CASES``
    Its `Case` objects.
``make_input(sizes, folder)``
    Puts on disk what both tools read; run with our Python.
``prepare(sizes, folder, tool)``
    Makes what each tool reads in a form of its own, such as a store; run with the tool's Python.
``load(sizes, folder, tool)``
    Everything the clock must not see; returns the step to measure, a function without arguments.
``finish(result, sizes, folder, tool)``
    After the clock: keeps the result for the comparison, returns more numbers for the line.
``compare(sizes, folder)``
    `Comparison` of both tools' last results; run with our Python.
"""

import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS, PEER = "cellquilt", "sopa"
#: Modules with cases, in the order of the table.
MODULES = (
    "bench_images",
    "bench_resolve",
    "bench_aggregate",
    "bench_transcripts",
    "bench_explorer",
    "bench_domains",
    "bench_spatial",
    "bench_path",
)
#: Written when the clock starts: a time limit is for the step, not for imports and inputs.
STARTED = "started.json"


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes
    ----------
    name
        Unique name.
    sizes
        What the module's functions are given.
    quick
        Changes to `sizes` for a run that only shows that all code works.
    warm
        Changes to `sizes` for the run before the clock starts, which imports and compiles; None runs nothing.
    target
        Wanted ratio, the peer's cost over ours; None if the issue names none.
    basis
        Cost that the target is about: ``cpu_s`` or ``wall_s``.
    max_peak_mb
        Most memory that ours may take.
    no_larger
        Ours may not take more bytes on disk than the peer.
    peer
        Whether the peer can do it.
    limit_s
        Time limit of the peer where the usual one is too short.
    """

    name: str
    sizes: dict[str, Any]
    quick: dict[str, Any] = field(default_factory=dict)
    warm: dict[str, Any] | None = None
    target: float | None = None
    basis: str = "cpu_s"
    max_peak_mb: float | None = None
    no_larger: bool = False
    peer: bool = True
    limit_s: float = 0.0

    def sizes_of(self, quick: bool) -> dict[str, Any]:
        """The sizes in force."""
        return {**self.sizes, **self.quick} if quick else self.sizes


@dataclass(frozen=True)
class Comparison:
    """Whether two results are equal, None if that cannot be said, and how they differ."""

    equal: bool | None
    text: str

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"equal": self.equal, "text": self.text}


def cpu_seconds() -> float:
    """User and system time of this process so far, all its threads and its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_mb() -> float:
    """Peak memory in MiB: this process, or the largest of its finished children if that is larger."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def measured(folder: Path, step: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Run a step and say what it took.

    Returns
    -------
    result
        What the step returned.
    line
        ``cpu_s`` (threads and children included), ``wall_s``, ``peak_mb`` of the process, and ``before_mb``, which it
        held or had held when the clock started.
    """
    before = peak_mb()
    cpu = cpu_seconds()
    (folder / STARTED).write_text(json.dumps({"cpu_s": cpu}))
    wall = time.perf_counter()
    result = step()
    wall = time.perf_counter() - wall
    cpu = cpu_seconds() - cpu
    return result, {
        "cpu_s": round(cpu, 3),
        "wall_s": round(wall, 3),
        "peak_mb": round(peak_mb(), 1),
        "before_mb": round(before, 1),
    }


class ProcessFailed(RuntimeError):
    """A process that a benchmark started did not end well."""


def run_process(
    command: Sequence[str | Path], *, name: str, log: Path, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run one process to its end.

    Parameters
    ----------
    command
        Program and arguments.
    name
        What to call it.
    log
        File for what it prints.
    environment
        Variables over those of this process.

    Returns
    -------
    dict
        ``stage``, ``cpu_s``, ``wall_s``, ``peak_mb`` (of the process or its largest child).

    Raises
    ------
    ProcessFailed
        With the end of the log.
    """
    wall = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # so that the object does not wait again
    wall = time.perf_counter() - wall
    if process.returncode:
        raise ProcessFailed(f"{name} ended with {process.returncode}: {tail(log)}")
    return {
        "stage": name,
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "wall_s": round(wall, 3),
        "peak_mb": round(usage.ru_maxrss / 1024, 1),
    }


def tail(log: Path, characters: int = 600) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-characters:].strip() if log.is_file() else ""


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(os.path.getsize(Path(root) / name) for root, _, names in os.walk(folder) for name in names)
