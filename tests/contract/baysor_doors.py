"""The ways to Baysor that its contract is tested through: stand-ins, or real ones if CELLQUILT_REAL_BAYSOR is set.

A plugin of `test_baysor`.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FAKES = Path(__file__).resolve().parents[1] / "fakes"
sys.path.insert(0, str(FAKES))
REAL = bool(os.environ.get("CELLQUILT_REAL_BAYSOR"))


def _doors() -> list[str]:
    if not REAL:
        return ["executable 0.6.2", "executable 0.7.1", "julia 0.7.1"]
    doors = ["executable real"] if shutil.which("baysor") else []
    doors += ["julia real"] if find_spec("juliacall") else []
    return doors or ["none"]


@dataclass
class Door:
    """One way to Baysor.

    Attributes
    ----------
    via
        ``executable`` or ``julia``.
    version
        What is behind it; ``real`` for a real one.
    calls
        A stand-in's record of its calls.
    """

    via: str
    version: str
    folder: Path

    @property
    def contract(self) -> str:
        return ".".join(self.version.split(".")[:2])

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"baysor_via": self.via}
        return settings if REAL or self.via == "julia" else {**settings, "baysor_executable": str(self.executable)}

    @property
    def executable(self) -> Path:
        """The stand-in with this Python, whatever Python is on PATH."""
        path = self.folder / "bin" / "baysor"
        if not path.exists():
            path.parent.mkdir()
            # -S: it needs no packages, and starts thrice as fast without looking for them.
            path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S '{FAKES / 'baysor'}' \"$@\"\n")
            path.chmod(0o755)
        return path

    @property
    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(params=_doors())
def door(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    """Every way to Baysor that there is."""
    via, _, version = request.param.partition(" ")
    if via == "none":
        pytest.fail("no baysor on PATH, and no juliacall in this environment", pytrace=False)
    door = Door(via, version, tmp_path)
    if not REAL:
        import fake_julia

        monkeypatch.setenv("FAKE_BAYSOR_VERSION", version)
        monkeypatch.setenv("FAKE_BAYSOR_CALLS", str(tmp_path / "calls.jsonl"))
        monkeypatch.setitem(sys.modules, "juliacall", fake_julia)
        fake_julia.CALLS.clear()
        for name in ("PYTHON_JULIACALL_THREADS", "PYTHON_JULIACALL_HANDLE_SIGNALS", "PYTHON_JULIAPKG_OFFLINE"):
            monkeypatch.setenv(name, "")  # so that what the bridge sets is taken back
            monkeypatch.delenv(name)
    return door


@pytest.fixture
def misbehave(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Tell the stand-in to go wrong: ``misbehave(fail="…")``. A real Baysor cannot be told."""
    if REAL:
        pytest.skip("only a stand-in goes wrong on demand")

    def tell(**how: object) -> None:
        for name, value in how.items():
            monkeypatch.setenv(f"FAKE_BAYSOR_{name.upper()}", str(value))

    return tell
