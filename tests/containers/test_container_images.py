"""The images as they are: what is in them, what is not, and that their stages work there."""

import json
import re
import subprocess
import time
import tomllib

import pytest
from container_engine import BUILT, ROOT

pytestmark = pytest.mark.slow

#: Most of an image in MB; those with the CUDA build of torch have no limit here.
LIMITS_MB = {"core": 1200, "proseg": 500}
RECIPES = {"cellpose4": "cellpose"}
#: A program that says which packages there are.
INSTALLED = (
    "import importlib.metadata as metadata, json;"
    "print(json.dumps({package.metadata['Name']: package.version for package in metadata.distributions()}))"
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, set[str]]:
    versions: dict[str, set[str]] = {}
    for package in tomllib.loads((ROOT / "python" / "uv.lock").read_text())["package"]:
        versions.setdefault(normal(package["name"]), set()).add(package["version"])
    return versions


def test_size(engine, stage):
    size_mb = engine.facts(stage)["Size"] / 1e6
    assert size_mb <= LIMITS_MB.get(stage, float("inf"))


def test_labels_user_and_no_entry_point(engine, stage, version):
    config = engine.facts(stage)["Config"]
    assert config["Labels"]["org.opencontainers.image.version"] == version
    assert config["Labels"]["org.opencontainers.image.title"].startswith("cellquilt ")
    assert config["Labels"]["org.opencontainers.image.licenses"].startswith("BSD-3-Clause")
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", config["Labels"]["org.opencontainers.image.revision"])
    assert re.fullmatch(r"[0-9a-f]{64}", config["Labels"]["cellquilt.source-hash"])
    assert config["User"] == "10001:10001"
    assert not config.get("Entrypoint")
    assert not any(name.partition("=")[0].endswith(("_CERT", "CERT_FILE")) for name in config["Env"])


def test_works_as_anyone_without_network_on_a_read_only_system(engine, stage):
    """`check-image` looks for build tools, root, network and a writable system, then runs the stage on a tiny slide.

    Nothing has to be compiled for that: the kernels were when the image was built.
    """
    command = ("bash", "/containers/common/check-image", RECIPES.get(stage, stage))
    said = engine.run(stage, *command, options=("--env=NUMBA_DEBUG_CACHE=1",))
    assert "data loaded from" in said
    assert "data saved to" not in said


def test_kernels_are_compiled_for_another_cpu(engine):
    """Though neither home nor system can be written to."""
    options = ("--env=NUMBA_DEBUG_CACHE=1", "--env=NUMBA_CPU_NAME=nocona")
    assert "data saved to" in engine.run("proseg", "bash", "/containers/proseg/smoke.sh", options=options)


def test_works_as_the_images_own_user(engine, stage):
    assert engine.run(stage, "id", "-u", user="10001:10001").strip() == "10001"
    assert engine.run(stage, "bash", "-c", "cellquilt --version", user="10001:10001").startswith("cellquilt")


def test_versions_are_those_of_the_lock(engine, stage):
    installed = json.loads(engine.run(stage, "python", "-c", INSTALLED))
    versions = locked()
    wrong = {name: version for name, version in installed.items() if version not in versions.get(normal(name), ())}
    assert not wrong
    assert {"cellquilt", "numpy", "pyarrow", "numba"} <= set(installed)
    # As in the environment of this machine that the same extras made, where there is one.
    environment = {"cellpose": "cellpose3"}.get(stage, stage)
    python = ROOT / ".venv" / environment / "bin" / "python"
    if python.exists() and stage != "proseg":
        here = json.loads(subprocess.run([python, "-c", INSTALLED], capture_output=True, text=True, check=True).stdout)
        here = {normal(name): version for name, version in here.items()}
        assert {name: here.get(normal(name)) for name in installed} == installed


def test_names_and_certificates_of_the_builder_are_not_in_the_image(engine, stage):
    history = engine.call("history", "--no-trunc", "--format", "{{.CreatedBy}}", engine.image(stage)).stdout
    assert "/run/secrets" not in history
    assert "CERT" not in history
    left = engine.run(
        stage, "bash", "-c", "find /run/secrets /var/cache/{uv,numba} /host /build -type f 2>/dev/null || true"
    )
    assert not left


def test_a_second_call_does_nothing(engine):
    """It compares what the images say they are made from; that takes seconds."""
    before = {stage: engine.facts(stage)["Id"] for stage in BUILT}
    start = time.monotonic()
    said = subprocess.run([ROOT / "scripts" / "images.sh", *BUILT], capture_output=True, text=True, check=True)
    seconds = time.monotonic() - start
    assert "building" not in said.stderr
    assert {stage: engine.facts(stage)["Id"] for stage in BUILT} == before
    assert seconds < 20
    table = dict(line.split() for line in said.stdout.splitlines()[1:])
    assert table == {engine.image(stage): str(engine.facts(stage)["Size"] // 10**6) for stage in BUILT}


def test_same_counts_as_outside_of_the_image(engine, tmp_path):
    """The cells of the tiny slide are counted and measured in the core image and here: the same bytes."""
    program = """
import hashlib, shutil, sys
from pathlib import Path
from cellquilt.aggregation.stage import aggregate_slide
from cellquilt.core.settings import Settings
import anndata

shutil.copytree(sys.argv[1], "slide.zarr")
aggregate_slide(Path("slide.zarr"), settings=Settings(), overwrite=True)
table = anndata.read_zarr("slide.zarr/tables/table")
parts = [table.X.data, table.X.indices, table.X.indptr, table.obsm["spatial"]]
print(table.shape, *(hashlib.sha256(part.tobytes()).hexdigest() for part in parts))
print(table.obs.to_csv())
"""
    slide = copy_out(engine, "slide.zarr", tmp_path)
    inside = engine.run("core", "python", "-c", program, "/opt/cellquilt/sample/slide.zarr")
    here = [ROOT / ".venv/core/bin/python", "-c", program, slide]
    assert subprocess.run(here, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == inside


def test_same_cells_of_cellpose_as_outside_of_the_image(engine, tmp_path):
    cellquilt = ROOT / ".venv" / "cellpose3" / "bin" / "cellquilt"
    if not engine.facts("cellpose") or not cellquilt.exists():
        pytest.skip("needs the image and the environment of Cellpose 3: scripts/images.sh cellpose")
    columns = (
        "import hashlib, pyarrow.parquet as pq; cells = pq.read_table('cells.parquet').combine_chunks();"
        "print(cells.num_rows, hashlib.sha256(repr(cells.to_pydict()).encode()).hexdigest())"
    )
    bundle = copy_out(engine, "bundles/bundle_000.zarr", tmp_path)
    segment = "cellquilt segment cellpose /opt/cellquilt/sample/bundles/bundle_000.zarr -o cells.parquet"
    command = f'{segment}; python -c "{columns}"'
    inside = engine.run("cellpose", "bash", "-euc", command)
    subprocess.run([cellquilt, "segment", "cellpose", bundle, "-o", tmp_path / "cells.parquet"], check=True)
    python = [cellquilt.parent / "python", "-c", columns]
    assert subprocess.run(python, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == inside


def copy_out(engine, name, folder):
    """A file or folder of the core image's sample."""
    container = engine.call("create", engine.image("core"), "true").stdout.strip()
    try:
        engine.call("cp", f"{container}:/opt/cellquilt/sample/{name}", str(folder / "copied"))
    finally:
        engine.call("rm", container)
    return folder / "copied"
