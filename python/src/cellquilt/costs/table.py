"""The table of what each process costs: memory and CPU time from how much a task gets.

`resources.json` beside this file (and in ``assets``) is written by `tests/benchmarks/bench_resources.py`.
`lib/Resources.groovy` reads the same table by the same formulas, and a test compares them.
"""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("resources.json")


@cache
def table() -> dict[str, Any]:
    """The table; docs/resources.md explains its entries."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _amount(coefficients: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    return sum(each * sizes.get(name, 0) / 1e6 for name, each in coefficients.items())


def peak_mb(process: str, sizes: Mapping[str, int], memory_setting_mb: float | None = None) -> float:
    """Peak memory of a task in MiB, as it was measured: without any safety.

    Parameters
    ----------
    process
        Its name, for example ``RESOLVE``.
    sizes
        What it gets, see `core.sizes`.
    memory_setting_mb
        The setting ``memory_mb``, which bounds what is streamed.
    """
    costs = table()["processes"][process]["memory"]
    bound = table()["memory_setting_mb"] if memory_setting_mb is None else memory_setting_mb
    streamed = min(float(bound), _amount(costs["streamed_mb"], sizes))
    return costs["base_mb"] + streamed + _amount(costs["held_mb"], sizes)


def cpu_seconds(process: str, sizes: Mapping[str, int]) -> float:
    """CPU time of a task in seconds, as it was measured: without any safety."""
    costs = table()["processes"][process]["cpu"]
    return costs["base_s"] + _amount(costs["per_million_s"], sizes)


def memory_mb(process: str, sizes: Mapping[str, int], memory_setting_mb: float | None = None, attempt: int = 1) -> int:
    """Memory in MiB that the pipeline asks for."""
    known = table()
    needed = peak_mb(process, sizes, memory_setting_mb) * known["memory_safety"]
    once = max(known["least_mb"], math.ceil(needed / 256) * 256)
    return min(once * attempt, known["most_mb"])


def minutes(process: str, sizes: Mapping[str, int], attempt: int = 1) -> int:
    """Time limit in minutes that the pipeline sets."""
    known = table()
    once = max(known["least_minutes"], math.ceil(cpu_seconds(process, sizes) * known["time_safety"] / 60))
    return min(once * attempt, known["most_minutes"])
