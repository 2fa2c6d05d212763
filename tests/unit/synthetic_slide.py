"""A small slide whose numbers are known by hand, as the parts that the pipeline's steps leave.

400 × 600 px of 0.5 µm. Tissue: the upper 300 rows (300 × 150 µm). Two patches that overlap in columns 280-320. Cells:
15 × 7 squares of 20 px, centred on (30 + 40 i, 30 + 40 j).
"""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import shapely
from cellquilt.core import zarr_json
from cellquilt.core.images import ImageWriter
from cellquilt.core.points import PointsWriter
from cellquilt.core.shapes import ShapesTable, write_shapes
from cellquilt.core.store import Store, new_store

PIXEL_UM = 0.5
SIZE = (400, 600)
TRANSFORMS = {"global": np.eye(3), "microns": np.diag([PIXEL_UM, PIXEL_UM, 1.0])}
POINT_TRANSFORMS = {"global": np.diag([2.0, 2.0, 1.0]), "microns": np.eye(3)}
N_CELLS = 105
N_FAILING = 5
GENES = ["A", "B", "C"]
CENTRES_PX = np.array([(30.0 + 40 * i, 30.0 + 40 * j) for j in range(7) for i in range(15)])


def ids(sample: str = "s1") -> np.ndarray:
    return np.array([f"{sample}-{k + 1}" for k in range(N_CELLS)])


def squares(half: float) -> np.ndarray:
    x, y = CENTRES_PX.T
    return np.asarray(shapely.box(x - half, y - half, x + half, y + half), dtype=object)


def pixels() -> np.ndarray:
    """(2, 400, 600) uint16: nuclei in the first channel, a ramp in the second."""
    image = np.full((2, *SIZE), 100, dtype=np.uint16)
    for x, y in CENTRES_PX.astype(int):
        image[0, y - 5 : y + 5, x - 5 : x + 5] = 2000
    image[1] += np.arange(SIZE[1], dtype=np.uint16)
    return image


def transcripts() -> pa.Table:
    """Two transcripts in every cell (A in its nucleus, B beside), C in every second; and what is not counted.

    Not counted: 5 controls and 3 rows of low quality in cells; 10 controls and 20 genes between cells, 7 outside the
    image.
    """
    names = ids()
    rows: list[tuple] = []  # x_px, y_px, gene, cell, in_nucleus, control, passes
    for k, (x, y) in enumerate(CENTRES_PX):
        rows.append((x, y, "A", names[k], True, False, True))
        rows.append((x + 8, y, "B", names[k], False, False, True))
        if k % 2 == 0:
            rows.append((x, y + 8, "C", names[k], False, False, True))
    rows += [(*CENTRES_PX[k], "Blank-1", names[k], True, True, True) for k in range(5)]
    rows += [(*CENTRES_PX[k], "A", names[k], True, False, False) for k in range(3)]
    rows += [(50.0 + 40 * k, 50.0, "Blank-2", None, False, True, True) for k in range(10)]
    rows += [(10.0 + 20 * k, 350.0, "A", None, False, False, True) for k in range(20)]
    rows += [(700.0 + k, 50.0, "B", None, False, False, True) for k in range(7)]
    x, y, gene, cell, nucleus, control, passes = zip(*rows, strict=True)
    n = len(rows)
    return pa.table(
        {
            "x": np.array(x) * PIXEL_UM,
            "y": np.array(y) * PIXEL_UM,
            "z": (np.arange(n) % 2) * 1.5,
            "z_plane": (np.arange(n) % 2).astype(np.int32),
            "gene": pa.array(gene).dictionary_encode(),
            "transcript_id": np.arange(n, dtype=np.uint64),
            "is_control": np.array(control),
            "passes_qv": np.array(passes),
            "cell_id": pa.array(cell, type=pa.string()),
            "in_nucleus": np.array(nucleus),
        }
    )


def counts() -> np.ndarray:
    """(105, 3) int64."""
    matrix = np.ones((N_CELLS, 3), dtype=np.int64)
    matrix[1::2, 2] = 0
    return matrix


def table(sample: str = "s1", *, n: int = N_CELLS, genes: bool = True):
    import anndata
    import pandas as pd
    import scipy.sparse
    from spatialdata.models import TableModel

    names = ids(sample)[:n]
    passes = np.arange(n) < n - N_FAILING
    obs = pd.DataFrame(
        {
            "cell_id": names,
            "sample": sample,
            "region": pd.Categorical(["cell_boundaries"] * n, categories=["cell_boundaries"]),
            "area_um2": np.full(n, 100.0),
            "passes_qc": passes,
            "qc_reason": np.where(passes, "", "min_transcripts"),
            "n_control": (np.arange(n) < 5).astype(np.int64),
        },
        index=names,
    )
    columns = GENES if genes else []
    values = counts()[:n] if genes else np.zeros((n, 0), dtype=np.int64)
    adata = anndata.AnnData(scipy.sparse.csr_matrix(values), obs=obs, var=pd.DataFrame(index=columns))
    adata.obsm["spatial"] = CENTRES_PX[:n] * PIXEL_UM
    adata.obsm["intensities"] = pd.DataFrame({"DAPI": np.full(n, 575.0), "ramp": CENTRES_PX[:n, 0] + 100}, index=names)
    if n == 0:  # spatialdata refuses to parse a table without rows, but reads one
        adata.uns["spatialdata_attrs"] = {
            "region": "cell_boundaries",
            "region_key": "region",
            "instance_key": "cell_id",
        }
        return adata
    return TableModel.parse(adata, region="cell_boundaries", region_key="region", instance_key="cell_id")


def _record(stage: str, *, seconds: float, peak: float, parameters: dict | None = None, facts: dict | None = None):
    return {
        "stage": stage,
        "sample": "s1",
        "versions": {"cellquilt": "0.1.0", "python": "3.12.1"},
        "parameters": parameters or {},
        "facts": facts or {},
        "seconds": seconds,
        "peak_rss_mb": peak,
    }


def resolve_facts() -> dict:
    patches = [
        {"index": 0, "y0": 0, "y1": 400, "x0": 0, "x1": 320, "n_cells": 56, "seconds": 1.0, "error": None},
        {"index": 1, "y0": 0, "y1": 400, "x0": 280, "x1": 600, "n_cells": 56, "seconds": 1.0, "error": None},
    ]
    weights = {"weights": "nuclei.npz", "weights_sha256": "c0ffee", "engine_version": "3.1.1.3"}
    tasks = [
        {"stage": "segment", "seconds": 4.0, "peak_rss_mb": 700.0, "bundle": 0, "facts": weights},
        {"stage": "segment", "seconds": 6.0, "peak_rss_mb": 650.0, "bundle": 1, "facts": weights},
    ]
    return {
        "method": "cellpose",
        "expand_um": 5.0,
        "n_segmented": 112,
        "n_conflicts": 7,
        "conflict_rate": 7 / 105,
        "n_cut": 0,
        "n_merged": 0,
        "overlap_ratio_histogram": [5, *[0] * 18, 7],
        "patches": patches,
        "tasks": tasks,
        "n_cells": 105,
    }


def with_record(parts: list[Path], folder: Path, stage: str, *, facts: dict | None = None, **parameters) -> list[Path]:
    """The parts with other facts and parameters in one stage's record; the part in question is a copy in `folder`."""
    changed = []
    for part in parts:
        if Store(part).records[0]["stage"] == stage:
            part = Path(shutil.copytree(part, folder / part.name))
            (record,) = Store(part).records
            record["facts"] |= facts or {}
            record["parameters"] |= parameters
            Store(part).annotate(records=[record])
        changed.append(part)
    return changed


def make_parts(
    folder: Path,
    *,
    sample: str = "s1",
    points: bool = True,
    empty: bool = False,
) -> list[Path]:
    """The parts of the slide: raw, tissue, patches, cells, table.

    ``empty``: an image without tissue, no cell, a transcript table without rows. ``points=False``: no transcripts.
    """
    paths = [folder / f"{sample}.{name}.zarr" for name in ("raw", "tissue", "patches", "cells", "table")]
    n = 0 if empty else N_CELLS
    rows = transcripts().slice(0, 0) if empty else transcripts()
    with new_store(paths[0], sample=sample) as raw:
        image = np.full((2, *SIZE), 100, dtype=np.uint16) if empty else pixels()
        element = raw.new_element("images", "image")
        with ImageWriter(element, image.shape, image.dtype, ["DAPI", "ramp"], TRANSFORMS, chunk_px=256) as writer:
            for y in range(0, SIZE[0], 256):
                for x in range(0, SIZE[1], 256):
                    writer.write(image[:, y : y + 256, x : x + 256], y, x)
        if points:
            with PointsWriter(raw.new_element("points", "transcripts"), POINT_TRANSFORMS) as writer:
                writer.write(rows.drop_columns(["cell_id", "in_nucleus"]))
        given = {"pixel_size_um": 0.5, "z": "max"}
        raw.add_record(_record("convert", seconds=2.5, peak=300.0, parameters=given))
    with new_store(paths[1], sample=sample) as tissue:
        outline = [] if empty else [shapely.box(0, 0, 600, 300)]
        names = np.array(["region-1"][: len(outline)], dtype=str)
        write_shapes(
            tissue.new_element("shapes", "region_of_interest"),
            ShapesTable(names, np.array(outline, dtype=object), {}, TRANSFORMS),
        )
        tissue.add_record(_record("tissue", seconds=0.5, peak=200.0, parameters={"tissue_mode": "auto"}))
    with new_store(paths[2], sample=sample) as cut:
        boxes = [] if empty else [shapely.box(0, 0, 320, 400), shapely.box(280, 0, 600, 400)]
        names = np.array(["patch-0", "patch-1"][: len(boxes)], dtype=str)
        write_shapes(
            cut.new_element("shapes", "image_patches"),
            ShapesTable(names, np.array(boxes, dtype=object), {}, TRANSFORMS),
        )
        cut.add_record(_record("patchify", seconds=1.0, peak=250.0, parameters={"seed": 7, "patch_width_px": 300}))
    with new_store(paths[3], sample=sample) as cells:
        for name, half in (("cell_boundaries", 10.0), ("nucleus_boundaries", 5.0)):
            write_shapes(
                cells.new_element("shapes", name), ShapesTable(ids(sample)[:n], squares(half)[:n], {}, TRANSFORMS)
            )
        found = {"method": "cellpose", "patches": [], "tasks": []} if empty else resolve_facts()
        given = {"resolve_threshold": 0.5}
        cells.add_record(_record("resolve", seconds=1.5, peak=260.0, parameters=given, facts=found))
    with new_store(paths[4], sample=sample) as counted:
        table(sample, n=n, genes=points).write_zarr(counted.new_element("tables", "table"))
        zarr_json.update_attributes(
            counted.path / "tables" / "table",
            {
                "spatialdata-encoding-type": "ngff:regions_table",
                "region": "cell_boundaries",
                "region_key": "region",
                "instance_key": "cell_id",
                "version": "0.2",
            },
        )
        if points:
            with PointsWriter(counted.new_element("points", "transcripts"), POINT_TRANSFORMS) as writer:
                writer.write(rows.slice(0, 200))
                writer.write(rows.slice(200))
        counted.add_record(_record("aggregate", seconds=2.0, peak=400.0, parameters={"count_z": "all"}))
    return paths
