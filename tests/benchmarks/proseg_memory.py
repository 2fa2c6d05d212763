"""How much memory the real proseg takes, and how far the estimate of `segment/proseg/memory.py` is off.

    .venv/core/bin/python tests/benchmarks/proseg_memory.py [--output numbers.json] [--factor 5] [--threads 2]

Runs proseg on made-up slides that differ in one thing each (transcripts, cells, genes, area, layers), prints peak
resident memory beside the estimate, and fits the coefficients anew. A few iterations: 180 took 13 % more than 12.
"""

import argparse
import itertools
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cellquilt.core import zarr_json
from cellquilt.core.settings import Settings
from cellquilt.patches.transcripts import SCHEMA, TranscriptBundle
from cellquilt.segment.proseg import plan, segment_bundle
from cellquilt.segment.proseg.memory import terms_of
from cellquilt.segment.proseg.transcripts import look

SETTINGS = {"proseg_burnin_samples": 4, "proseg_samples": 8, "proseg_args": "--hillclimb 2", "proseg_memory_gb": 1000}


@dataclass(frozen=True)
class Case:
    """A slide of evenly spread round cells with a nucleus each."""

    transcripts: int = 200_000
    cells: int = 2_000
    genes: int = 300
    side_um: float = 632.0
    layers: int = 4


BASE = Case()
CASES = [
    BASE,
    replace(BASE, transcripts=50_000),
    replace(BASE, transcripts=800_000),
    replace(BASE, cells=500),
    replace(BASE, cells=8_000),
    replace(BASE, genes=60),
    replace(BASE, genes=2_000),
    replace(BASE, side_um=1265.0),
    replace(BASE, layers=1),
    replace(BASE, layers=8),
    replace(BASE, transcripts=1_000_000, genes=400),
    replace(BASE, transcripts=1_000_000, cells=10_000, genes=150, side_um=1414.0),
    replace(BASE, transcripts=1_000_000, cells=10_000, genes=400, side_um=1414.0),
]


def write_bundle(folder: Path, case: Case) -> Path:
    """The slide as one patch; half of the transcripts lie in nuclei, which are the prior cells."""
    rng = np.random.default_rng(0)
    per_row = int(np.ceil(np.sqrt(case.cells)))
    pitch = case.side_um / per_row
    cell = rng.integers(0, case.cells, case.transcripts)
    centre = np.column_stack([cell % per_row + 0.5, cell // per_row + 0.5]) * pitch
    offset = rng.uniform(-0.5, 0.5, (case.transcripts, 2)) * pitch
    inside = rng.random(case.transcripts) < 0.5
    offset[inside] *= 0.5
    kind = np.random.default_rng(1).permutation(case.genes)
    gene = np.where(
        rng.random(case.transcripts) < 0.5, kind[(cell * 7 + rng.integers(0, 20, case.transcripts)) % case.genes],
        rng.integers(0, case.genes, case.transcripts),
    )  # fmt: skip
    xy = centre + offset
    columns = {
        "transcript_id": np.arange(case.transcripts, dtype=np.uint64),
        "x_um": xy[:, 0],
        "y_um": xy[:, 1],
        "z_um": rng.uniform(0, 10, case.transcripts),
        "gene": gene,
        "prior_cell": np.where(inside, cell + 1, 0),
        "in_nucleus": inside,
    }
    (folder / "patch_000000").mkdir(parents=True)
    table = pa.table({name: pa.array(values) for name, values in columns.items()}).cast(SCHEMA)
    pq.write_table(table, folder / "patch_000000" / "transcripts.parquet")
    window = {"x0": 0.0, "y0": 0.0, "x1": case.side_um, "y1": case.side_um}
    record = {"index": 0, **window, "core": list(window.values()), "n_transcripts": case.transcripts}
    engine = plan(Settings({**SETTINGS, "proseg_voxel_layers": case.layers}))
    attributes = {
        "format": 1, "kind": "transcripts", "sample": "memory", "bundle": 0, "n_bundles": 1, "n_patches": 1,
        "pixel_size_um": None, "transforms": {}, "engine": engine, "genes": [f"gene{k}" for k in range(case.genes)],
        "prior": {"from": "shapes", "name": "nuclei", "n_cells": case.cells}, "patches": [record],
    }  # fmt: skip
    zarr_json.write_group(folder, {"cellquilt": attributes})
    return folder


def measure(case: Case, threads: int) -> dict:
    """Peak memory of one run in bytes, the estimate, and the terms of the estimate."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = write_bundle(Path(scratch) / "bundle.zarr", case)
        made = TranscriptBundle(bundle)
        contents = look(made, made.patches[0])
        (patch,) = segment_bundle(bundle, Path(scratch) / "out.result", settings={"threads": threads})["patches"]
    found = terms_of(contents, 1.0, case.layers)
    return {
        **asdict(case),
        "seconds": patch["seconds"],
        "peak_gb": patch["peak_rss_mb"] * 1024**2 / 1e9,
        "estimated_gb": patch["estimated_gb"],
        "terms": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--factor", type=float, default=1.0, help="scale of transcripts, cells and area")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows = []
    for case in CASES:
        scaled = replace(
            case, transcripts=int(case.transcripts * options.factor), cells=int(case.cells * options.factor),
            side_um=case.side_um * options.factor**0.5,
        )  # fmt: skip
        rows.append(measure(scaled, options.threads))
        print({name: value for name, value in rows[-1].items() if name != "terms"}, flush=True)
    fit(rows)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


def fit(rows: list[dict]) -> None:
    """Coefficients that are not negative, by least squares of the relative error."""
    matrix = np.array([list(row["terms"].values()) for row in rows], dtype=float)
    peak = np.array([row["peak_gb"] * 1e9 for row in rows])
    names = list(rows[0]["terms"])
    best = None
    for size in range(1, len(names) + 1):
        for used in itertools.combinations(range(len(names)), size):
            part = matrix[:, used] / peak[:, None]
            found, *_ = np.linalg.lstsq(part, np.ones(len(rows)), rcond=None)
            error = float(((part @ found - 1) ** 2).sum())
            if (found >= 0).all() and (best is None or error < best[0]):
                best = (error, dict(zip([names[k] for k in used], found.tolist(), strict=True)))
    assert best is not None
    fitted = matrix @ np.array([best[1].get(name, 0.0) for name in names])
    print("bytes for each:", {name: round(value, 2) for name, value in best[1].items()})
    print("fitted / measured:", np.round(fitted / peak, 2).tolist())
    print("estimated / measured:", np.round([row["estimated_gb"] / row["peak_gb"] for row in rows], 2).tolist())


if __name__ == "__main__":
    main()
