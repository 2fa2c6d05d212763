"""Baysor by its executable, 0.6 or 0.7."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cellquilt.core.errors import CellquiltError
from cellquilt.segment.baysor.call import INSTALL, contract_of, version_in
from cellquilt.segment.baysor.config import CONTRACTS
from cellquilt.segment.executable import Ended, run_executable

_PROBE_MIN = 5.0  # Julia may have to compile first


class BaysorExecutable:
    """See `call.Door`.

    Parameters
    ----------
    path
        The executable.
    threads
        Threads of Julia.
    timeout_min
        Longest time for one call in minutes; None for no limit.

    Raises
    ------
    CellquiltError
        ``baysor-version`` if it is no version whose contract is known.
    """

    def __init__(self, path: Path, *, threads: int = 1, timeout_min: float | None = None) -> None:
        self.path = path.absolute()
        self.timeout_min = timeout_min
        self._environment = {"JULIA_NUM_THREADS": str(threads)}
        version = self._probe()
        self.contract = contract_of(version)
        self.facts: dict[str, Any] = {"door": "executable", "version": version, "threads": threads}

    def _probe(self) -> str:
        said = self._ask("--version")
        version = version_in(said)
        if contract_of(version) in CONTRACTS:
            return version
        # Baysor 0.6 does not know its own version, but its flags are its own.
        flags = "" if version else self._ask("run", "--help")
        for contract, flag in (("0.6", "save-polygons"), ("0.7", "polygon-format")):
            if flag in flags:
                return contract
        raise CellquiltError(
            "baysor-version",
            f"{self.path} says that its version is {version or said[:80]!r}; Baysor {' or '.join(CONTRACTS)} is needed",
            INSTALL,
        )

    def _ask(self, *arguments: str) -> str:
        with tempfile.TemporaryDirectory(prefix="cellquilt-baysor-") as scratch:
            folder = Path(scratch)
            return self._run(arguments, folder / "said.txt", folder, _PROBE_MIN).said.strip()

    def _run(self, arguments: Sequence[str], log: Path, folder: Path, timeout_min: float | None) -> Ended:
        return run_executable(
            [self.path, *arguments],
            name="baysor",
            log=log,
            folder=folder,
            timeout_min=timeout_min,
            environment=self._environment,
        )

    def run(self, arguments: Sequence[str], log: Path) -> Ended:
        """See `call.Door.run`.

        Raises
        ------
        CellquiltError
            ``baysor-timeout``.
        """
        return self._run(arguments, log, log.parent, self.timeout_min)
