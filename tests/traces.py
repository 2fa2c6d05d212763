"""What a run took, from Nextflow's trace."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MB = {"B": 2**-20, "KB": 2**-10, "MB": 1.0, "GB": 2.0**10}


def seconds(text: str) -> float:
    """``1m 4.5s`` in seconds."""
    return sum(float(number) * _SECONDS[unit] for number, unit in re.findall(r"([\d.]+)(ms|s|m|h|d)", text))


def megabytes(text: str) -> float:
    """``1.2 GB`` in MiB."""
    number, unit = text.split()
    return float(number) * _MB[unit]


def process(task: Mapping[str, str]) -> str:
    """A task's process by its last name."""
    return task["process"].split(":")[-1]


def took(tasks: Iterable[Mapping[str, str]]) -> tuple[Counter[str], float, float]:
    """Tasks by process, seconds of CPU that all of them used, and memory of the largest in MiB."""
    done = list(tasks)
    cpu = sum(seconds(task["realtime"]) * float(task["%cpu"].rstrip("%")) / 100 for task in done)
    return Counter(map(process, done)), cpu, max(megabytes(task["peak_rss"]) for task in done)
