"""A stand-in for the Python package juliacall with Baysor 0.7.1 in it; what it runs is fake_baysor.

It answers what the bridge asks and refuses the rest, as Julia would refuse code that it does not understand.
"""

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import fake_baysor

__version__ = "0.9.34"

#: What was evaluated and called, in order.
CALLS: list[tuple[str, Any]] = []
#: Names that a Julia without Baysor, or with another one, has otherwise.
ANSWERS = {
    "import Baysor": None,
    "string(pkgversion(Baysor))": "0.7.1",
    "string(VERSION)": "1.10.5",
    "Threads.nthreads()": 1,
}


class JuliaError(Exception):
    """As in juliacall."""


class Module:
    """A Julia module as juliacall shows it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def seval(self, code: str) -> Any:
        code = code.strip()
        CALLS.append(("seval", code))
        if code in ANSWERS:
            answer = ANSWERS[code]
            if isinstance(answer, Exception):
                raise answer
            return answer
        if re.match(r"function \(arguments, path\)\n", code) and code.endswith("\nend"):
            return driver(code)
        raise JuliaError(f"ParseError: this Julia does not know {code!r}")


def newmodule(name: str) -> Module:
    CALLS.append(("newmodule", name))
    return Module(name)


def driver(code: str) -> Callable[[Sequence[str], str], int]:
    """The bridge's function: it must do what is needed around the one call, and end all blocks that it opens."""
    for needed in ("Baysor.command_main(String[", "redirect_stdio(", "showerror(", "global_logger(logger)"):
        if needed not in code:
            raise JuliaError(f"UndefVarError: {needed} not defined")
    blocks = re.sub(r"\[[^\]]*\]", "", code)  # a comprehension's `for` opens none
    opened = len(re.findall(r"\b(?:function|try|do|if|for|while|begin|let)\b", blocks))
    if opened != len(re.findall(r"^\s*end\b", code, re.MULTILINE)):
        raise JuliaError("ParseError: premature end of input")

    def run(arguments: Sequence[str], path: str) -> int:
        if not isinstance(path, str) or not all(isinstance(each, str) for each in arguments):
            raise JuliaError("MethodError: no method matching open(::Py, ::String)")
        CALLS.append(("command_main", list(arguments)))
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                return fake_baysor.main(list(arguments))
        finally:
            with open(path, "a", encoding="utf-8") as log:
                log.write(said.getvalue())

    return run
