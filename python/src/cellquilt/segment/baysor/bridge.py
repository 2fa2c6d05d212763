"""Baysor in this process, by juliacall: Baysor 0.7.1 on Julia 1.10, as ``cellquilt/juliapkg.json`` pins them.

The bridge enters where the executable does, at `Baysor.command_main`, with the same arguments: the same settings are
checked in the same way and the same files come out, so that one contract and one reader serve both. The functions
further in are exported nowhere, leave defaults to their caller and change between versions.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cellquilt.core.errors import CellquiltError
from cellquilt.core.record import peak_rss_mb
from cellquilt.segment.baysor.call import cause, contract_of
from cellquilt.segment.executable import Ended

_CONTRACT = "0.7"
_NO_JULIA = "run `python -c 'import juliacall'` once where there is a network, or use Baysor's executable"

# A function (arguments, log file) -> exit code, as the executable has one. Baysor replaces Julia's logger by one that
# writes to a file which it closes in the end; the next message would fail.
_DRIVER = """
function (arguments, path)
    logger = Base.CoreLogging.global_logger()
    open(path, "w") do log
        redirect_stdio(stdout=log, stderr=log) do
            try
                return Int(Baysor.command_main(String[string(each) for each in arguments]))
            catch problem
                print(stderr, "ERROR: ")
                showerror(stderr, problem)
                println(stderr)
                return 1
            finally
                Base.CoreLogging.global_logger(logger)
                GC.gc()
            end
        end
    end
end
"""


def has_juliacall() -> bool:
    """Whether the package juliacall is installed; Julia is not started to know."""
    from importlib.util import find_spec

    return find_spec("juliacall") is not None


class BaysorBridge:
    """See `call.Door`.

    Parameters
    ----------
    threads
        Threads of Julia; they cannot change in a process that has started it.

    Raises
    ------
    CellquiltError
        ``engine-missing`` without juliacall, Julia or Baysor; ``baysor-version`` if it is another Baysor.
    """

    contract = _CONTRACT

    def __init__(self, *, threads: int = 1) -> None:
        self._module = _start(threads)
        version = str(self._module.seval("string(pkgversion(Baysor))"))
        if contract_of(version) != _CONTRACT:
            raise CellquiltError(
                "baysor-version",
                f"Julia's Baysor is {version}; the bridge needs {_CONTRACT}",
                "let juliapkg resolve anew, or use the executable",
            )
        self._driver = self._module.seval(_DRIVER)
        self.facts: dict[str, Any] = {
            "door": "julia",
            "version": version,
            "julia": str(self._module.seval("string(VERSION)")),
            "threads": int(self._module.seval("Threads.nthreads()")),
        }

    def run(self, arguments: Sequence[str], log: Path) -> Ended:
        """See `call.Door.run`. A call in this process cannot be timed out."""
        started = time.monotonic()
        code = int(self._driver(list(arguments), str(log)))
        said = log.read_text(encoding="utf-8", errors="replace")
        return Ended(code, time.monotonic() - started, peak_rss_mb(), said)


def _start(threads: int) -> Any:
    """A Julia module of our own in which Baysor is loaded."""
    # Read by juliacall when it is imported first.
    os.environ.setdefault("PYTHON_JULIACALL_THREADS", str(threads))
    if threads > 1:
        os.environ.setdefault("PYTHON_JULIACALL_HANDLE_SIGNALS", "yes")
    if os.environ.get("CELLQUILT_TASK"):  # a task of the pipeline downloads nothing
        os.environ.setdefault("PYTHON_JULIAPKG_OFFLINE", "yes")
    try:
        import juliacall
    except ModuleNotFoundError as error:
        raise CellquiltError(
            "engine-missing", f"Baysor through Julia needs the package {error.name}", "pip install 'cellquilt[baysor]'"
        ) from error
    except Exception as error:  # Julia absent, its packages not resolved, its library not loadable
        raise CellquiltError("engine-missing", f"Julia cannot be started: {error}", _NO_JULIA) from error
    module = juliacall.newmodule("CellquiltBaysor")
    try:
        module.seval("import Baysor")
    except juliacall.JuliaError as error:
        raise CellquiltError("engine-missing", f"Julia has no Baysor: {cause(str(error))}", _NO_JULIA) from error
    return module
