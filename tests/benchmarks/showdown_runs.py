"""Running a tool while its processes are watched, killing all of them at a moment, and what is left on disk.

Linux only: processes are found and measured through ``/proc``.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from harness import ProcessFailed, tail

#: How often processes are looked at, and how often the disk is (seconds).
LOOK_S, DISK_S = 0.25, 3.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Taken:
    """What a run took.

    Attributes
    ----------
    wall_s, cpu_s
        Time by the clock, and processor time of all processes. Of a killed run the processor time is that of the
        processes that were alive at the kill and of those that they had waited for.
    largest_mb
        Peak memory of the largest process, in MiB.
    together_mb
        Most memory of all processes at one moment (their proportional shares), in MiB; between two looks more may
        have been held.
    peak_bytes
        Most bytes on disk at one moment, looked at every few seconds.
    killed
        Whether it was killed.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    largest_mb: float = 0.0
    together_mb: float = 0.0
    peak_bytes: int = 0
    killed: bool = False

    def then(self, other: "Taken") -> "Taken":
        """This run and the one after it, together."""
        return Taken(
            self.wall_s + other.wall_s,
            self.cpu_s + other.cpu_s,
            max(self.largest_mb, other.largest_mb),
            max(self.together_mb, other.together_mb),
            max(self.peak_bytes, other.peak_bytes),
            self.killed or other.killed,
        )


def alive(session: int) -> list[int]:
    """Processes of a session."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _of_session(int(entry), session)]


def _of_session(pid: int, session: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z" and int(fields[3]) == session


def _stat(pid: int) -> list[str]:
    """A process's line of ``/proc``, from its state on; empty if it is no more."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _used_s(pid: int) -> float:
    """Processor seconds of a process and of the children that it has waited for."""
    fields = _stat(pid)
    return sum(int(number) for number in fields[11:15]) / _TICKS if fields else 0.0


def _held_kb(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def disk_use(*folders: Path) -> tuple[int, int]:
    """Bytes and number of files below folders; a file with several names counts once.

    Parameters
    ----------
    *folders
        Folders; those that are not there hold nothing.
    """
    seen: dict[tuple[int, int], int] = {}
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                with suppress(OSError):
                    about = os.stat(os.path.join(root, name), follow_symlinks=False)
                    seen[about.st_dev, about.st_ino] = about.st_size
    return sum(seen.values()), len(seen)


@dataclass
class Watch:
    """Starts commands, each with all its processes in a session of its own.

    Attributes
    ----------
    folder
        Where they run and what their bytes are counted of; logs are beside it.
    environment
        Variables over those of this process.
    """

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(
        self,
        command: Sequence[object],
        *,
        log: Path,
        kill_when: Callable[[], bool] | None = None,
        on_look: Callable[[], None] | None = None,
    ) -> Taken:
        """Run a command to its end, or until it is killed.

        Parameters
        ----------
        command
            Program and arguments.
        log
            File for what it prints.
        kill_when
            Asked again and again; as soon as it says yes, every process of the session gets SIGKILL.
        on_look
            Called again and again.

        Raises
        ------
        ProcessFailed
            With the end of the log, if the command failed by itself; or if it ended before it could be killed.
        """
        taken = Taken()
        wall = time.perf_counter()
        with log.open("wb") as out:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            ended = threading.Event()
            killer = threading.Thread(target=self._look, args=(process.pid, ended, taken, kill_when, on_look))
            killer.start()
            _, status, usage = os.wait4(process.pid, 0)
            ended.set()
            killer.join()
        process.returncode = os.waitstatus_to_exitcode(status)  # so that the object does not wait again
        taken.wall_s = time.perf_counter() - wall
        taken.largest_mb = max(taken.largest_mb, usage.ru_maxrss / 1024)
        taken.peak_bytes = max(taken.peak_bytes, disk_use(self.folder)[0])
        if taken.killed:
            return taken
        taken.cpu_s = usage.ru_utime + usage.ru_stime
        if process.returncode:
            raise ProcessFailed(f"{log.stem} ended with {process.returncode}: {tail(log, 1500)}")
        if kill_when is not None:
            raise ProcessFailed(f"{log.stem} ended before it could be killed")
        return taken

    def _look(
        self,
        session: int,
        ended: threading.Event,
        taken: Taken,
        kill_when: Callable[[], bool] | None,
        on_look: Callable[[], None] | None,
    ) -> None:
        next_disk = 0.0
        while not ended.wait(LOOK_S):
            pids = alive(session)
            taken.together_mb = max(taken.together_mb, sum(map(_held_kb, pids)) / 1024)
            if time.monotonic() > next_disk:
                taken.peak_bytes = max(taken.peak_bytes, disk_use(self.folder)[0])
                next_disk = time.monotonic() + DISK_S
            if on_look is not None:
                on_look()
            if kill_when is not None and kill_when():
                pids = alive(session)
                taken.cpu_s = sum(map(_used_s, pids))
                taken.killed = True
                kill_session(session)
                return


def kill_session(session: int) -> None:
    """SIGKILL to every process of a session, until none is left."""
    while pids := alive(session):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
