"""Bundles of transcript patches as `patches.transcripts` writes them, made by hand; tests and benchmarks share them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cellquilt.core import zarr_json
from cellquilt.patches.priors import PriorCentres
from cellquilt.patches.transcripts import MIN_PRIOR_TRANSCRIPTS, SCHEMA


def write_transcript_bundle(
    folder: Path,
    patches: Sequence[Mapping[str, Any]],
    *,
    width: float,
    genes: list[str],
    engine: Mapping[str, Any],
    prior: Mapping[str, Any] | None = None,
    left: float = 0.0,
) -> Path:
    """A bundle of patches (columns of `SCHEMA`) side by side, each reaching 5 µm into its neighbours.

    The prior is shapes with as many cells as the transcripts name, or none if they name none.
    """
    records = []
    for index, columns in enumerate(patches):
        x0, x1 = left + index * width, left + (index + 1) * width
        inner = [x0 - 5 * (index > 0), 0.0, x1 + 5 * (index + 1 < len(patches)), width]
        window = dict(zip(("x0", "y0", "x1", "y1"), inner, strict=True))
        records.append({"index": index, **window, "core": [x0, 0.0, x1, width], "n_transcripts": len(columns["x_um"])})
        (folder / f"patch_{index:06d}").mkdir(parents=True)
        table = pa.table({name: pa.array(values) for name, values in columns.items()}).cast(SCHEMA)
        pq.write_table(table, folder / f"patch_{index:06d}" / "transcripts.parquet")
    n_cells = max((int(np.max(columns["prior_cell"], initial=0)) for columns in patches), default=0)
    centres = PriorCentres(n_cells)
    for columns, record in zip(patches, records, strict=True):
        x0, y0, x1, y1 = record["core"]
        x, y = (np.asarray(columns[name], dtype=np.float64) for name in ("x_um", "y_um"))
        own = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        centres.add(np.asarray(columns["prior_cell"], dtype=np.int32)[own], x[own], y[own])
    found = {
        "from": "shapes" if n_cells else "none",
        "name": "cells" if n_cells else "",
        "n_cells": n_cells,
        "spacing_um": centres.spacing_um(MIN_PRIOR_TRANSCRIPTS),
        "min_transcripts": MIN_PRIOR_TRANSCRIPTS,
    }
    attributes = {
        "format": 1,
        "kind": "transcripts",
        "sample": "liver",
        "bundle": 0,
        "n_bundles": 1,
        "n_patches": len(patches),
        "pixel_size_um": None,
        "transforms": {},
        "engine": dict(engine),
        "prior": {**found, **(prior or {})},
        "genes": genes,
        "patches": records,
    }
    zarr_json.write_group(folder, {"cellquilt": attributes})
    return folder
