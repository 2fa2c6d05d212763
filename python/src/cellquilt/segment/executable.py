"""Segmentation methods that are executables: finding, asking and running one, and what the way it ended means."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.record import peak_rss_mb, rss_mb

#: Exit codes of a process that was killed: by itself, and under a shell.
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
_ABORTED = (-signal.SIGABRT, 128 + signal.SIGABRT)
_REPORT_SECONDS = 60.0


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes
    ----------
    code
        Exit code, negative for a signal.
    seconds
        Wall time.
    peak_rss_mb
        Peak resident memory in MiB.
    said
        What it wrote to its standard output and standard error.
    """

    code: int
    seconds: float
    peak_rss_mb: float
    said: str

    @property
    def out_of_memory(self) -> bool:
        """Whether it was killed, as systems do when memory runs out, or ended itself for want of memory."""
        return self.code in _KILLED or (self.code in _ABORTED and "memory allocation of" in self.said)

    @property
    def how(self) -> str:
        """In words."""
        return f"was ended by signal {-self.code}" if self.code < 0 else f"ended with exit code {self.code}"


def find_executable(setting: str, given: str | None, name: str, places: Iterable[Path]) -> Path | None:
    """The executable that was named, else the first of that name on PATH or in some folders.

    Parameters
    ----------
    setting
        The setting that names it, for messages.
    given
        Its path, or its name on PATH; None looks for `name`.
    name
        The executable's usual name.
    places
        Folders to look in after PATH.

    Returns
    -------
    pathlib.Path or None
        None if nothing was named and nothing is there.

    Raises
    ------
    CellquiltError
        ``engine-missing`` if the one named is not there.
    """
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise CellquiltError(
                "engine-missing", f"{setting} {given} is no file that can be executed here", "check the path"
            )
        return Path(found)
    found = shutil.which(name) or next(filter(None, (shutil.which(name, path=str(place)) for place in places)), None)
    return Path(found) if found else None


def run_executable(
    command: Sequence[str | Path],
    *,
    name: str,
    log: Path,
    folder: Path,
    timeout_min: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run an executable to its end and watch it: a line in the log every minute.

    Parameters
    ----------
    command
        The executable and its arguments.
    name
        What to call it in messages.
    log
        File for what it says.
    folder
        Where it runs.
    timeout_min
        Longest time in minutes; None for no limit.
    environment
        Variables that it gets besides this process's own.

    Raises
    ------
    CellquiltError
        ``engine-not-runnable`` if it cannot be started, ``<name>-timeout`` if it took too long.
    """
    started = time.monotonic()
    with log.open("wb") as stream:
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                process_group=0,  # it may be a script around the real one: both must end
            )
        except OSError as error:
            raise CellquiltError(
                "engine-not-runnable", f"{command[0]} cannot be run: {error.strerror}", "install it anew"
            ) from error
    try:
        return _watch(process, name, log, started, timeout_min)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _watch(
    process: "subprocess.Popen[bytes]", name: str, log: Path, started: float, timeout_min: float | None
) -> Ended:
    reported, peak_mb = started, 0.0
    while True:
        peak_mb = max(peak_mb, _peak_mb(process.pid))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        now = time.monotonic()
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            said = log.read_text(encoding="utf-8", errors="replace")
            # The system's number starts at this process's own memory, which the child shared before it became another.
            whole_mb = rss_mb(usage)
            return Ended(process.returncode, now - started, whole_mb if whole_mb > peak_rss_mb() else peak_mb, said)
        if timeout_min is not None and now - started > 60 * timeout_min:
            raise CellquiltError(
                f"{name}-timeout",
                f"{name} was stopped after {timeout_min:g} min",
                f"raise {name}_timeout_min, or cut smaller patches",
            )
        if now - reported >= _REPORT_SECONDS:
            LOG.info("%s: running for %.0f min, at most %.0f MB so far", name, (now - started) / 60, peak_mb)
            reported = now
        # Often enough to see a peak that comes with the writing of the results, shortly before the end.
        time.sleep(0.01)


def _peak_mb(pid: int) -> float:
    """Peak resident memory in MiB of a process that runs; 0 where the system does not tell."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0
