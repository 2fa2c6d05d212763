"""The pipeline with each stage in its own image, as somebody who is not root, without network: the same tables."""

import csv
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from container_engine import ROOT, VERSION

pytestmark = pytest.mark.slow

SLIDE = (
    "--segmentation",
    "cellpose",
    "--compare",
    "cellpose+proseg",
    "--proseg_samples",
    "20",
    "--proseg_burnin_samples",
    "20",
)
STRICT = "podman.runOptions = '--network=none --pull=never --cap-drop=all --user 4321:4321'\n"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may look into, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="cellquilt-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def pipeline(folder: Path, *arguments: object, **environment: str) -> list[dict[str, str]]:
    """Run the test profile's slide in a folder that anyone may write to; the trace."""
    folder.mkdir()
    done = subprocess.run(
        [ROOT / "scripts" / "nextflow", "run", ROOT / "main.nf", "--outdir", "results", *SLIDE, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1800,
        umask=0,  # tasks run as another user than the one who makes their folders
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (folder / "results/pipeline_info/trace.txt").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def table_of(folder: Path) -> dict[str, str]:
    """Checksums of the arrays of the slide's table and of its outlines."""
    store = folder / "results/test/test.zarr"
    files = [
        path
        for part in ("tables/table", "shapes/cell_boundaries", "shapes/nucleus_boundaries")
        for path in sorted((store / part).rglob("*"))
        if path.is_file() and path.name != "zarr.json"
    ]
    assert files
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_pipeline_in_containers_gives_the_tables_of_the_local_run(engine, open_folder):
    said = subprocess.run([ROOT / "scripts" / "podman", "--print-env"], capture_output=True, text=True, check=True)
    store = dict(
        line.removeprefix("export ").split("=", 1)
        for line in said.stdout.replace(" CONTAINERS_CONF", "\nCONTAINERS_CONF").splitlines()
    )
    (open_folder / "strict.config").write_text(STRICT)
    pipeline(open_folder / "local", "-profile", "test")
    trace = pipeline(open_folder / "podman", "-profile", "test,podman", "-c", open_folder / "strict.config", **store)

    images = {task["process"].split(":")[-1]: task["container"] for task in trace}
    assert {
        stage: images[stage] for stage in ("CONVERT", "SEGMENT_CELLPOSE", "SEGMENT_PROSEG", "RESOLVE", "ASSEMBLE")
    } == {
        "CONVERT": f"localhost/cellquilt-core:{VERSION}",
        "SEGMENT_CELLPOSE": f"localhost/cellquilt-cellpose:{VERSION}",
        "SEGMENT_PROSEG": f"localhost/cellquilt-proseg:{VERSION}",
        "RESOLVE": f"localhost/cellquilt-core:{VERSION}",
        "ASSEMBLE": f"localhost/cellquilt-core:{VERSION}",
    }
    made = list((open_folder / "podman/work").glob("*/*/versions.yml"))
    assert len(made) == len(trace)
    assert {path.stat().st_uid for path in made} == {4321}
    assert table_of(open_folder / "podman") == table_of(open_folder / "local")
