"""Simulated slides with known truth.

``cellquilt.simulate(output, ...)`` makes a cohort, ``cellquilt.simulate.cell_tables(...)`` only its cell tables. This
module is itself callable, so that the function and the package that holds it can share the public name.
"""

import sys
from types import ModuleType
from typing import Any

__all__ = [
    "PRESETS",
    "Parameters",
    "Slide",
    "calibration_table",
    "cell_tables",
    "format_table",
    "make_parameters",
    "simulate",
    "truth_scores",
]

_HOMES = {
    "simulate": "cohort",
    "PRESETS": "parameters",
    "Parameters": "parameters",
    "make_parameters": "parameters",
    "Slide": "slide",
    "calibration_table": "calibration",
    "cell_tables": "tables",
    "format_table": "calibration",
    "truth_scores": "scores",
}


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from cellquilt.simulate.cohort import simulate

        return simulate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
