"""Fixtures of the pipeline tests."""

import shutil
from pathlib import Path

import pytest
from runner import ROOT, Nextflow


@pytest.fixture(scope="session", autouse=True)
def _nextflow_is_set_up() -> None:
    if not ((ROOT / ".venv/nextflow/jars").exists() or shutil.which("nextflow")):
        pytest.skip("Nextflow is not set up: make setup")


@pytest.fixture
def nextflow(tmp_path: Path) -> Nextflow:
    """Nextflow in an empty folder."""
    return Nextflow(tmp_path)
