"""The images that this machine has, or can build in the time that tests may take."""

import os
import shutil
import subprocess

import pytest
from container_engine import BUILT, ROOT, STAGES, Engine


@pytest.fixture(scope="session")
def version() -> str:
    config = (ROOT / "nextflow.config").read_text()
    return config.split("version         = '")[1].split("'")[0]


@pytest.fixture(scope="session")
def engine(version) -> Engine:
    """The engine, with the images that tests build; the reason is said where the machine runs no containers."""
    if not shutil.which("podman") and (os.getuid() != 0 or not shutil.which("apt-get")):
        pytest.skip("CONTAINERS NOT TESTED: no podman here, and it cannot be installed")
    made = subprocess.run([ROOT / "scripts" / "images.sh", *BUILT], capture_output=True, text=True)
    if made.returncode == 3:
        pytest.skip(f"CONTAINERS NOT TESTED: {made.stderr.strip()}")
    assert made.returncode == 0, made.stderr
    return Engine(version)


@pytest.fixture(params=STAGES)
def stage(request, engine) -> str:
    if not engine.facts(request.param):
        pytest.skip(f"the image of {request.param} is not built: scripts/images.sh {request.param}")
    return request.param
