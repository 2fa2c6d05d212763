"""Fixtures of the fault tests: one scene for all of them, and the table of what was injected and how it ended."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pipeline"))

from faults_table import FAULTS, RECORD, page, write_page
from runner import LAUNCHER, ROOT
from scene import Scene

OUTCOMES: dict[str, dict[str, object]] = {}


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    """Two slides, the pipeline's own copy, and a finished run that faults start from."""
    if not ((ROOT / ".venv/nextflow/jars").exists() or os.access(LAUNCHER, os.X_OK)):
        pytest.skip("Nextflow is not set up: make setup")
    # A folder that is kept: the finished run in it is made once, for who works on one fault.
    kept = os.environ.get("CELLQUILT_FAULTS_FOLDER")
    made = Scene(Path(kept) if kept else tmp_path_factory.mktemp("faults"))
    made.prepare()
    yield made
    made.close()


@pytest.fixture
def outcome():
    """Say how a fault of the table ended: ``outcome(name, finished=…, equal=…, error=…)``."""

    def say(name: str, *, finished: bool, equal: bool, error: str = "") -> None:
        expected = FAULTS[name].error
        assert error == expected, f"{name}: ended in {error or 'no error'}, expected {expected or 'none'}"
        assert equal or not finished, f"{name}: other tables"
        OUTCOMES[name] = {"finished": finished, "equal": equal, "error": error}

    return say


def pytest_sessionfinish() -> None:
    """With CELLQUILT_RECORD_FAULTS, what was seen goes into the record and the page is made of it."""
    if OUTCOMES and os.environ.get("CELLQUILT_RECORD_FAULTS"):
        known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        merged = {name: OUTCOMES.get(name) or known.get(name) for name in FAULTS}
        RECORD.write_text(
            json.dumps({name: end for name, end in merged.items() if end}, indent=1, sort_keys=True) + "\n"
        )
        write_page(page(json.loads(RECORD.read_text())))
