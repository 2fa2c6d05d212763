"""A Slurm of one node for tests: `scripts/slurm` brings it up, and down again."""

import atexit
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from runner import ROOT

SCRIPT = ROOT / "scripts" / "slurm"
#: Nextflow asks a queue once a minute, and waits minutes for what a lost task may still write: not in tests.
QUICK = "executor { pollInterval = '1 sec'; queueStatInterval = '2 sec'; exitReadTimeout = '10 sec' }\n"


class Slurm:
    """The daemons in a folder; without them the test is skipped, with the reason."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        atexit.register(self.down)
        up = self._script("up", check=False)
        if up.returncode == 77:
            pytest.skip(f"NO SLURM, NOT TESTED: {up.stderr.strip()}")
        assert up.returncode == 0, up.stderr
        (conf,) = shlex.split(up.stdout.removeprefix("export SLURM_CONF="))
        self.environment = {"SLURM_CONF": conf}

    def _script(self, verb: str, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        # The daemons keep what they are given open: to files, so that nobody waits for them.
        out, err = self.folder.with_suffix(".out"), self.folder.with_suffix(".err")
        with out.open("w") as to, err.open("w") as errors:
            done = subprocess.run([SCRIPT, verb, self.folder, *more], stdout=to, stderr=errors, check=check)
        return subprocess.CompletedProcess(done.args, done.returncode, out.read_text(), err.read_text())

    def kill(self, daemon: str) -> None:
        """SIGKILL to a daemon; ``node`` is slurmd and all that it started."""
        self._script("kill", daemon)

    def start(self, daemon: str) -> None:
        """Start a daemon again."""
        self._script("start", daemon)

    def down(self) -> None:
        """Stop all."""
        self._script("down", check=False)

    def command(self, *words: str) -> str:
        """What a command of Slurm's says."""
        done = subprocess.run(
            words, env={**os.environ, **self.environment}, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout.strip()

    def node(self) -> str:
        """State of the node, as sinfo says it."""
        return self.command("sinfo", "-h", "-o", "%T")

    def jobs(self, state: str = "R") -> list[int]:
        """Jobs in a state (R, PD)."""
        return [int(number) for number in self.command("squeue", "-h", "-t", state, "-o", "%i").split()]

    def submitted(self) -> list[int]:
        """All jobs that the controller's log tells of."""
        log = (self.folder / "slurmctld.log").read_text()
        return [int(number) for number in re.findall(r"_slurm_rpc_submit_batch_job: JobId=(\d+)", log)]

    def ends(self) -> list[tuple[int, int]]:
        """Jobs that came to an end on their node, with their exit codes."""
        log = (self.folder / "slurmctld.log").read_text()
        return [(int(job), int(code)) for job, code in re.findall(r"_job_complete: JobId=(\d+) WEXITSTATUS (\d+)", log)]
