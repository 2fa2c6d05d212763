"""Running Nextflow in tests: the one that `make setup` found or made."""

import csv
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "scripts" / "nextflow"


@dataclass
class Run:
    """One finished call of Nextflow."""

    code: int
    out: str
    err: str
    folder: Path
    trace: list[dict[str, str]] = field(default_factory=list)

    def status(self, process: str, tag: str = "") -> list[str]:
        """Status of all tasks of a process (its last name), in the order of the trace; of one tag only if given."""
        return [
            task["status"]
            for task in self.trace
            if task["process"].split(":")[-1] == process and tag in ("", task["tag"])
        ]


@dataclass
class Nextflow:
    """Starts Nextflow in a folder of its own."""

    folder: Path

    def command(self, *arguments: object) -> list[str]:
        """The command line of a call."""
        return [str(LAUNCHER), *map(str, arguments)]

    def environment(self, **more: str) -> dict[str, str]:
        """The caller's environment, without colours."""
        return {**os.environ, "NXF_ANSI_LOG": "false", **more}

    def __call__(self, *arguments: object, trace: str = "results/pipeline_info/trace.txt", **environment: str) -> Run:
        """Run ``nextflow ARGUMENTS`` in the folder and wait for it."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        tasks: list[dict[str, str]] = []
        table = self.folder / trace
        if table.exists():
            with table.open(newline="") as file:
                tasks = list(csv.DictReader(file, delimiter="\t"))
        return Run(done.returncode, done.stdout, done.stderr, self.folder, tasks)

    def pipeline(self, *arguments: object, **environment: str) -> Run:
        """Run this repository's pipeline with results in ``results``."""
        return self("run", ROOT / "main.nf", "--outdir", "results", *arguments, **environment)
