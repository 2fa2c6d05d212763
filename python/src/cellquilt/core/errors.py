"""One exception for everything a user can get wrong.

An error names what it is about (file, sample, column, value), what was expected and how to fix it. It has a stable
code, so that tests, logs and `samples.tsv` can tell causes apart without reading prose.
"""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class CellquiltError(Exception):
    """A mistake in the input, the settings or the machine that the user can mend.

    Parameters
    ----------
    code
        Stable, kebab-case name of the cause, for example ``"transcripts-column-missing"``.
    message
        What is wrong, naming the file, sample, column and value.
    hint
        How to fix it.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"[{self.code}] {self.message}{hint}"

    def as_dict(self) -> dict[str, str]:
        """The error as plain data, for records and for `samples.tsv`."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class SeveralErrors(CellquiltError):
    """All mistakes of one input in one message."""

    def __init__(self, code: str, title: str, errors: list[CellquiltError]) -> None:
        lines = "".join(f"\n  - {error.message}{f' ({error.hint})' if error.hint else ''}" for error in errors)
        super().__init__(code, f"{title}{lines}")
        self.errors = errors


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """A hint that offers the nearest known names, or lists the known ones.

    Examples
    --------
    >>> did_you_mean("xenum", ["merscope", "xenium"])
    'did you mean "xenium"?'
    """
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
    if near:
        return f'did you mean "{near[0]}"?'
    return f"known: {', '.join(names)}"


def did_you_mean_file(path: Path) -> str:
    """A hint that offers the file of the same folder whose name is nearest; empty if there is none like it."""
    beside = sorted(os.listdir(path.parent)) if os.path.isdir(path.parent) else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"?' if near else ""
