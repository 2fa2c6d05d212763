"""All benchmarks, ours and Sopa's side by side.

    python tests/benchmarks/compare.py                                    # ours only
    python tests/benchmarks/compare.py --peer /path/to/python             # a Python that has sopa 2.2.11
    python tests/benchmarks/compare.py --peer … --cases 'resolve-*,count-1m' --repeats 3
    python tests/benchmarks/compare.py --peer … --quick                   # small sizes: does all of it work?

Every run of a case is a process of its own; ours and the peer's take turns on the same input. The line of a case is
the median over its runs. CPU time is user and system time of the process, its threads and its children, so that
neither tool gains by threads. What has run is kept in the JSON file after every case.
"""

import argparse
import contextlib
import fnmatch
import importlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import MODULES, OURS, PEER, STARTED, Case, tail

HERE = Path(__file__).resolve().parent
#: Memory is flat if no larger image takes more than this times what the smallest one takes.
FLAT = 1.25
ENGINE_EXTRA_MB = 512
_LONGEST_S = 7200.0  # of anything that has no limit of its own

Run = dict[str, Any]


# --- verdicts: from numbers to words


@dataclass(frozen=True)
class Ratio:
    """How many times as much the peer took; `at_least` if it was stopped before its end."""

    value: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'> ' if self.at_least else ''}{self.value:.1f}"


def median(runs: Sequence[Run], key: str) -> float | None:
    """Median of a number over the runs that have it."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return statistics.median(values) if values else None


def ratio_of(ours: Sequence[Run], peers: Sequence[Run], basis: str) -> Ratio | None:
    """The peer's median cost over ours; None where one of them has none.

    A run that was stopped counts with what it had taken by then: the ratio is at least that.
    """
    mine, theirs = median(ours, basis), median(peers, basis)
    if not mine or theirs is None:
        return None
    return Ratio(theirs / mine, any("stopped_s" in run for run in peers))


def verdict(case: Case, ours: Sequence[Run], peers: Sequence[Run]) -> tuple[str, list[str]]:
    """Whether a case shows what it must.

    Returns
    -------
    word : str
        ``met``, ``NOT MET``, ``open`` where it cannot be said (no peer, or a peer that was stopped too early), or an
        empty string where nothing is asked.
    reasons : list of str
        What is not met or open.
    """
    missed, unknown = [], []
    asked = False
    if case.target is not None:
        asked = True
        ratio = ratio_of(ours, peers, case.basis)
        if ratio is None:
            unknown.append("no ratio")
        elif ratio.value < case.target:
            (unknown if ratio.at_least else missed).append(f"{ratio} times, {case.target:g} wanted")
    if case.max_peak_mb is not None:
        asked = True
        peak = _largest(ours, "peak_mb")
        if peak is None:
            unknown.append("no memory measured")
        elif peak > case.max_peak_mb:
            missed.append(f"{peak:.0f} MB, at most {case.max_peak_mb:.0f} wanted")
    engine = median(ours, "engine_mb")
    if engine is not None:
        asked = True
        peak = max(stage["peak_mb"] for run in ours for stage in run.get("stages", []))
        if peak > engine + ENGINE_EXTRA_MB:
            missed.append(f"{peak:.0f} MB, engine and weights take {engine:.0f} and {ENGINE_EXTRA_MB} more are allowed")
    if case.no_larger:
        asked = True
        mine, theirs = median(ours, "bytes"), median(peers, "bytes")
        if mine is None or theirs is None:
            unknown.append("no sizes to compare")
        elif mine > theirs:
            missed.append(f"{mine / 1e6:.1f} MB on disk, the peer {theirs / 1e6:.1f}")
    if any("failed" in run for run in ours):
        asked = True
        missed.append("failed")
    word = "NOT MET" if missed else "open" if unknown else "met" if asked else ""
    return word, missed + unknown


def is_whole(run: Run) -> bool:
    """Whether a run came to its end."""
    return "stopped_s" not in run and "failed" not in run


def _largest(runs: Sequence[Run], key: str) -> float | None:
    return max((run[key] for run in runs if run.get(key) is not None), default=None)


def memory_is_flat(peaks: Sequence[float]) -> bool:
    """Whether memory stays the same from the smallest image on; `peaks` by growing width."""
    return bool(peaks) and max(peaks) <= FLAT * peaks[0]


def share_done(log: str) -> float | None:
    """Share of the work that the last progress bar in a log shows."""
    shown = [part.rsplit("%|", 1)[0] for part in log.replace("\r", "\n").split("\n") if "%|" in part]
    if not shown:
        return None
    digits = shown[-1].split()[-1]
    return int(digits) / 100 if digits.isdigit() else None


def mostly_fixed(stages: Sequence[Run], fixed: Sequence[Run]) -> list[str]:
    """Stages at least half of whose CPU time their processes take on any image, however small."""
    cost = {stage["stage"]: stage["cpu_s"] / stage["tasks"] for stage in fixed}
    return [
        stage["stage"]
        for stage in stages
        if stage["stage"] in cost and cost[stage["stage"]] * stage["tasks"] >= stage["cpu_s"] / 2
    ]


# --- running


@dataclass(frozen=True)
class Bench:
    """How to run."""

    pythons: dict[str, str]
    repeats: int
    limit_s: float
    quick: bool
    scratch: Path

    def child(self, module: str, case: Case, do: str, tool: str, folder: Path, limit_s: float) -> Run:
        """One step in a process of its own; a failure and a stop are answers, too."""
        python = self.pythons[tool if do in ("prepare", "measure") else OURS]
        command = [python, "child.py", module, case.name, do, tool, str(folder), *(["--quick"] if self.quick else [])]
        (folder / STARTED).unlink(missing_ok=True)
        out, log = folder / f"{do}.{tool}.out", folder / f"{do}.{tool}.log"
        with out.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(command, cwd=HERE, stdout=stdout, stderr=stderr, start_new_session=True)
            stopped = wait(process, folder / STARTED, limit_s)
        if stopped is not None:
            return {**stopped, "share_done": share_done(log.read_text(errors="replace"))}
        if process.returncode:
            return {"failed": tail(log)}
        return json.loads(out.read_text().strip().splitlines()[-1])

    def run(self, module: str, case: Case) -> dict[str, Any]:
        """All runs of a case."""
        line: dict[str, Any] = {"case": case.name, "sizes": case.sizes_of(self.quick), OURS: [], PEER: []}
        folder = Path(tempfile.mkdtemp(prefix=f"{case.name}-", dir=self.scratch))
        try:
            tools = [OURS, PEER] if case.peer and PEER in self.pythons else [OURS]
            made = [self.child(module, case, "input", OURS, folder, _LONGEST_S)]
            made += [self.child(module, case, "prepare", tool, folder, _LONGEST_S) for tool in tools]
            failed = [answer for answer in made if "failed" in answer]
            if failed:
                line[OURS] = failed
                return line
            limits = {OURS: _LONGEST_S, PEER: max(self.limit_s, case.limit_s)}
            for _ in range(self.repeats):
                for tool in tools:
                    if not all(map(is_whole, line[tool])):
                        continue  # once is enough
                    line[tool].append(self.child(module, case, "measure", tool, folder, limits[tool]))
            whole = all(line[tool] and is_whole(line[tool][-1]) for tool in tools)
            if whole and len(tools) == 2:
                line["compared"] = self.child(module, case, "compare", OURS, folder, _LONGEST_S)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return line


def wait(process: "subprocess.Popen[bytes]", started: Path, limit_s: float) -> Run | None:
    """Wait for a process; stop it and its children when its step has taken too long.

    Returns
    -------
    dict or None
        For a stopped process ``stopped_s``, and what it had taken by then: ``cpu_s`` and ``wall_s`` of the step.
    """
    since = time.monotonic()
    step_since: float | None = None
    while process.poll() is None:
        if step_since is None and started.is_file():
            step_since = time.monotonic()
        # Imports and inputs have a limit, too, though not a tight one.
        if time.monotonic() - (step_since or since) > (limit_s if step_since else _LONGEST_S):
            cpu = _cpu_of(process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            before = json.loads(started.read_text())["cpu_s"] if step_since else 0.0
            return {"stopped_s": limit_s, "cpu_s": round(max(cpu - before, 0.0), 1), "wall_s": limit_s}
        time.sleep(0.05)
    return None


def _cpu_of(pid: int) -> float:
    """CPU seconds of a running process and of its finished children."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


# --- reporting


_COLUMNS = ("case", "ours: cpu s", "wall s", "MB", "sopa: cpu s", "wall s", "MB", "ratio", "target", "")


def row(case: Case, line: dict[str, Any], quick: bool = False) -> list[str]:
    """A case's line of the table."""
    ratio = ratio_of(line[OURS], line[PEER], case.basis)
    target = "" if case.target is None else f"≥ {case.target:g}{' wall' if case.basis == 'wall_s' else ''}"
    numbers = [_number(median(line[tool], key)) for tool in (OURS, PEER) for key in ("cpu_s", "wall_s", "peak_mb")]
    word = verdict(case, line[OURS], line[PEER])[0]
    return [case.name, *numbers, str(ratio or ""), target, f"quick: {word}" if quick and word else word]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def notes(case: Case, line: dict[str, Any], fixed: Sequence[Run]) -> list[str]:
    """What else there is to say about a case."""
    said = list(verdict(case, line[OURS], line[PEER])[1])
    for tool in (OURS, PEER):
        for run in line[tool]:
            if "failed" in run:
                said.append(f"{tool} failed: {run['failed']}")
            if "stopped_s" in run:
                share = "" if run["share_done"] is None else f", {run['share_done']:.0%} done"
                said.append(f"{tool} stopped at {run['stopped_s']:.0f} s{share}")
    compared = line.get("compared")
    if compared is not None:
        words = {True: "equal", False: "DIFFERENT", None: "alike"}
        said.append(compared.get("failed") or f"results {words[compared['equal']]}: {compared['text']}")
    for tool in (OURS, PEER):
        if line[tool] and "stages" in line[tool][-1]:
            said += _stage_notes(tool, line[tool][-1], fixed if tool == OURS else [])
    return said


def _stage_notes(tool: str, run: Run, fixed: Sequence[Run]) -> list[str]:
    parts = [
        f"{stage['stage']}{' ×' + str(stage['tasks']) if stage['tasks'] > 1 else ''} "
        f"{stage['cpu_s']:.1f} s {stage['peak_mb']:.0f} MB"
        for stage in run["stages"]
    ]
    said = [f"{tool}: {', '.join(parts)}; {run['cpu_s_per_mpx']:.2f} CPU-s a Mpx; {run['cells_out']} cells"]
    slow = mostly_fixed(run["stages"], fixed)
    if slow:
        said.append(f"mostly the fixed cost of a process: {', '.join(slow)}")
    return said


def flat_note(lines: Sequence[dict[str, Any]]) -> str:
    """What memory does with the width of the image, over the ``path-*`` cases."""
    paths = [line for line in lines if line["case"].startswith("path-") and line["case"] != "path-fixed"]
    peaks = [(line["case"], peak) for line in paths if (peak := _largest(line[OURS], "peak_mb")) is not None]
    if len(peaks) < 2:
        return ""
    word = "flat" if memory_is_flat([peak for _, peak in peaks]) else "NOT FLAT"
    return f"peak memory by width: {', '.join(f'{name} {peak:.0f} MB' for name, peak in peaks)}: {word}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left, the others to the right."""
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(rows[0]))]
    left, *others = widths
    return "\n".join(
        "  ".join([first.ljust(left), *(cell.rjust(width) for cell, width in zip(rest, others, strict=True))])
        for first, *rest in rows
    )


def machine(pythons: dict[str, str]) -> dict[str, Any]:
    """Where and with what this was measured."""
    ask = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    versions = {}
    for tool, python in pythons.items():
        answer = subprocess.run([python, "-c", ask, tool], capture_output=True, text=True, check=False)
        versions[tool] = answer.stdout.strip() or "not installed"
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    except OSError:
        model = ""
    return {
        "versions": versions,
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "started": time.strftime("%Y-%m-%d %H:%M"),
    }


def choose(patterns: str) -> list[tuple[str, Case]]:
    """(module, case) of the cases whose name fits one of the patterns."""
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    cases = [(name, case) for name in MODULES for case in importlib.import_module(name).CASES]
    return [(name, case) for name, case in cases if any(fnmatch.fnmatch(case.name, pattern) for pattern in wanted)]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=os.environ.get("PEER", ""), help="Python of an environment with sopa")
    parser.add_argument("--cases", default="*", help="names or patterns, separated by commas")
    parser.add_argument("--list", action="store_true", help="show the cases")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each tool (default 2)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a step of the peer (default 600)")
    parser.add_argument("--quick", action="store_true", help="small sizes; no target means anything then")
    parser.add_argument("--output", type=Path, default=Path("results", "benchmarks.json"), help="JSON file to write")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder for the data")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the cases, print the table; 1 if a run of ours failed."""
    options = parse()
    chosen = choose(options.cases)
    if options.list or not chosen:
        print("\n".join(case.name for _, case in chosen or choose("*")))
        return 0 if chosen else 2
    pythons = {OURS: sys.executable, **({PEER: options.peer} if options.peer else {})}
    bench = Bench(pythons, max(1, options.repeats), options.limit, options.quick, options.scratch)
    report: dict[str, Any] = {**machine(pythons), "quick": options.quick, "cases": []}
    print(f"{report['versions']}, {report['cpu']}, {report['cores']} cores, load {report['load_at_start']}", flush=True)
    if report["load_at_start"] > 0.5:
        print("the machine is busy: times say little")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Sequence[str]] = []
    fixed: list[Run] = []
    for module, case in chosen:
        line = bench.run(module, case)
        if case.name == "path-fixed" and line[OURS]:
            fixed = line[OURS][-1].get("stages", [])
        line["verdict"], line["reasons"] = verdict(case, line[OURS], line[PEER])
        line["notes"] = notes(case, line, fixed)
        report["cases"].append(line)
        report["memory"] = flat_note(report["cases"])
        options.output.write_text(json.dumps(report, indent=1))
        rows.append(row(case, line, options.quick))
        print(table([_COLUMNS, rows[-1]]))
        print("".join(f"    {note}\n" for note in line["notes"]), flush=True)
    print(f"\n{table([_COLUMNS, *rows])}\n{report['memory']}\n{options.output}")
    return int(any("failed" in run for line in report["cases"] for run in line[OURS]))


if __name__ == "__main__":
    sys.exit(main())
