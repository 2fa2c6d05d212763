"""The images that this machine has, or can build in the time that tests may take."""

import os
import shutil
import subprocess

import pytest
from container_engine import BUILT, OTHERS, ROOT, VERSION, Engine


@pytest.fixture(scope="session")
def version() -> str:
    return VERSION


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The engine, with the images that tests build; the reason is said where the machine runs no containers."""
    if not shutil.which("podman") and (os.getuid() != 0 or not shutil.which("apt-get")):
        pytest.skip("CONTAINERS NOT TESTED: no podman here, and it cannot be installed")
    made = subprocess.run([ROOT / "scripts" / "images.sh", *BUILT], capture_output=True, text=True)
    if made.returncode == 3:
        pytest.skip(f"CONTAINERS NOT TESTED: {made.stderr.strip()}")
    assert made.returncode == 0, made.stderr
    return Engine(VERSION)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Of the images that tests do not build, those that are there."""
    if "stage" in metafunc.fixturenames:
        found = [stage for stage in OTHERS if shutil.which("podman") and Engine(VERSION).facts(stage)]
        metafunc.parametrize("stage", [*BUILT, *found])
