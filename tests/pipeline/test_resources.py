"""What tasks ask for and what the disk needs, as the head job works it out: the same numbers as the package's."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from cellquilt.core.sizes import size_of
from cellquilt.costs.table import memory_mb, minutes, table
from runner import ROOT

pytestmark = pytest.mark.slow


def store(folder: Path, **size: int) -> Path:
    folder.mkdir(parents=True)
    document = {"attributes": {"cellquilt": {"size": size}}, "zarr_format": 3, "node_type": "group"}
    (folder / "zarr.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def inputs(tmp_path) -> list[list[Path]]:
    """What tasks may be given: stores, bundles, files, folders, and what cannot be read."""
    raw = store(tmp_path / "raw.zarr", pixels=5_000_000_000, transcripts=40_000_000, cells=300_000)
    small = store(tmp_path / "small.zarr", pixels=1000, cells=3)
    bundles = [store(tmp_path / f"b{k}.zarr", pixels=k * 10**7, patch_pixels=10**6 * (9 - k)) for k in (1, 2)]
    molecules = store(tmp_path / "m.zarr", transcripts=7_000_000, patch_transcripts=3_500_000)
    table = tmp_path / "cells.parquet"
    table.write_bytes(bytes(3_000_000))
    folder = tmp_path / "machine"
    (folder / "images").mkdir(parents=True)
    for name, n in (("images/a.tif", 5_000_000), ("cell_boundaries.parquet", 2_000_000), ("other.csv", 1)):
        (folder / name).write_bytes(bytes(n))
    broken = tmp_path / "broken.zarr"
    broken.mkdir()
    (broken / "zarr.json").write_text("{")
    (broken / "chunk").write_bytes(bytes(1_500_000))
    (tmp_path / "link.zarr").symlink_to(raw)
    return [
        [], [raw], [small], [raw, small], bundles, [molecules], [table, raw], [folder], [broken],
        [tmp_path / "missing"], [tmp_path / "link.zarr"],
    ]  # fmt: skip


def test_memory_time_and_room_are_those_of_the_package(nextflow, inputs):
    work = nextflow.folder / "wd"
    task = work / "3f" / ("8a" * 15)
    bundle = store(task / "bundles" / "bundle_000.zarr", pixels=1)
    outside = store(nextflow.folder / "data" / "precious.zarr", pixels=1)
    for folder in (bundle, outside):
        (folder / "patch_000000").mkdir()
        (folder / "patch_000000" / "chunk").write_bytes(b"pixels")
    (task / "input.zarr").symlink_to(outside)
    before = bundle.stat()
    merscope = nextflow.folder / "region"
    (merscope / "images").mkdir(parents=True)
    for name, n in (
        ("images/mosaic_DAPI_z0.tif", 3000),
        ("images/mosaic_DAPI_z1.tif", 3000),
        ("detected_transcripts.csv", 500),
    ):
        (merscope / name).write_bytes(bytes(n))
    (merscope / "cell_by_gene.csv").write_bytes(bytes(10**6))

    rng = np.random.default_rng(0)
    tasks = [
        {
            "process": process,
            "inputs": [str(path) for path in inputs[number % len(inputs)]],
            "memory_mb": int(rng.choice([200, 1500, 20_000])),
            "attempt": int(rng.choice([1, 2, 3])),
        }
        for number, process in enumerate(sorted(table()["processes"]) * 4)
    ]
    gb = 10**9
    cases = {
        "tasks": tasks,
        "work": str(work),
        "names": ["A:B:RESOLVE", "RESOLVE_TRANSCRIPTS", "X:SEGMENT_CELLPOSE4", "PREVIEW_STARDIST", "SEGMENT_MINE"],
        "empty": [str(bundle), str(task / "input.zarr"), str(outside)],
        "ours": [str(bundle), str(task / "input.zarr"), str(outside), str(task), str(nextflow.folder / "no")],
        "read": [
            {"technology": "merscope", "path": str(merscope), "transcripts": [], "prior_cells": []},
            {"technology": "ome_tif", "path": str(merscope / "detected_transcripts.csv"), "prior_cells": []},
        ],
        "shortage": [
            {"read": 10 * gb, "cleanup": False, "work": 26 * gb, "results": 26 * gb, "same": True},
            {"read": 10 * gb, "cleanup": False, "work": 24 * gb, "results": 24 * gb, "same": True},
            {"read": 10 * gb, "cleanup": True, "work": 24 * gb, "results": 24 * gb, "same": True},
            {"read": 10 * gb, "cleanup": False, "work": 100 * gb, "results": 9 * gb, "same": False},
            {"read": 10 * gb, "cleanup": False, "work": -1, "results": -1, "same": False},
        ],
        "params": {
            "input": "it's a sheet.csv",
            "outdir": "x",
            "estimate": True,
            "expand_um": 3,
            "prices": "p.yml",
            "z": None,
        },
    }
    (nextflow.folder / "cases.json").write_text(json.dumps(cases))
    run = nextflow(
        "run", ROOT / "tests/pipeline/check_resources", "-lib", ROOT / "lib",
        "--cases", "cases.json", "--repository", ROOT, "--output", "found.json",
    )  # fmt: skip
    assert run.code == 0, run.out + run.err
    found = json.loads((nextflow.folder / "found.json").read_text())
    for case, theirs in zip(tasks, found["tasks"], strict=True):
        sizes = size_of(Path(path) for path in case["inputs"])
        assert theirs["sizes"] == sizes, case
        assert theirs["memory_mb"] == memory_mb(case["process"], sizes, case["memory_mb"], case["attempt"]), case
        assert theirs["minutes"] == minutes(case["process"], sizes, case["attempt"]), case

    own, longer, fourth, alias, unknown = found["names"]
    assert (own, longer, fourth) == ("RESOLVE", "RESOLVE_TRANSCRIPTS", "SEGMENT_CELLPOSE4")
    assert (alias, unknown) == ("PREVIEW", "OTHERS")

    # A task's own folder is emptied, but keeps its name, its description and its times; nothing else is touched.
    assert found["ours"] == [True, False, False, False, False]
    assert [path.name for path in bundle.rglob("*")] in (["zarr.json", "patch_000000"], ["patch_000000", "zarr.json"])
    assert bundle.stat().st_mtime_ns == before.st_mtime_ns
    assert (outside / "patch_000000" / "chunk").read_bytes() == b"pixels"

    assert found["read"] == [3500, 500]
    enough, short, cleaned, results, endless = found["shortage"]
    assert (enough, cleaned, endless) == ("", "", "")
    assert "10.0 GB of input" in short
    assert "about 25.0 GB, free 24.0 GB" in short
    assert "--cleanup" in short
    assert "results: about 10.0 GB, free 9.0 GB" in results
    assert "work folder" not in results.split("hint")[0]
    assert "'" not in found["request"]
    assert json.loads(found["request"]) == {"expand_um": 3, "sheet": os.path.join(nextflow.folder, "it's a sheet.csv")}
