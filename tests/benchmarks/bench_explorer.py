"""Write a slide for Xenium Explorer, whole and part by part: ours and Sopa's writer read the same published store.

Image of four channels with a pyramid, transcripts of 300 genes, cells with their counts and groups. Sopa compresses the
image with JPEG 2000, ours with Deflate (`compression="jpeg2000"` is the case of that name). Compared are the numbers of
transcripts, cells and entries of the matrix of both folders, and the bytes on disk.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_aggregate import make_cells
from bench_images import CHANNELS, N_TILES, TILE, noisy_tile
from harness import OURS, PEER, Case, Comparison, disk_bytes

N_GENES = 300
PIXEL_UM = 0.2125
_QUICK = {"pixels": 1024, "transcripts": 20_000, "cells": 400}


def _case(name: str, target: float | None, **sizes: Any) -> Case:
    return Case(
        f"explorer-{name}", {"mode": None, "compression": "deflate", **sizes}, quick=_QUICK, warm=_QUICK,
        target=target, max_peak_mb=1500,
    )  # fmt: skip


CASES = (
    _case("1m", 5.0, pixels=4096, transcripts=1_000_000, cells=4_000),
    _case("4m", 5.0, pixels=8192, transcripts=4_000_000, cells=16_000),
    _case("4m-jpeg2000", None, pixels=8192, transcripts=4_000_000, cells=16_000, compression="jpeg2000"),
    _case("4m-transcripts", None, pixels=8192, transcripts=4_000_000, cells=16_000, mode="+t"),
    _case("4m-cells", None, pixels=8192, transcripts=4_000_000, cells=16_000, mode="+bco"),
)


def make_input(sizes: dict[str, Any], folder: Path) -> None:
    """A store as the pipeline publishes it."""
    import pyarrow as pa
    import shapely
    from cellquilt.core.images import ImageWriter
    from cellquilt.core.points import PointsWriter
    from cellquilt.core.shapes import ShapesTable, write_shapes
    from cellquilt.core.store import consolidate, new_store

    pixels, rng = sizes["pixels"], np.random.default_rng(0)
    to_um = np.diag([PIXEL_UM, PIXEL_UM, 1.0])
    um = {"global": np.linalg.inv(to_um), "microns": np.eye(3)}
    with new_store(folder / "slide.zarr", sample="slide") as store:
        maps = {"global": np.eye(3), "microns": to_um}
        tiles = [[noisy_tile(number, channel) for number in range(N_TILES)] for channel in range(len(CHANNELS))]
        shape = (len(CHANNELS), pixels, pixels)
        with ImageWriter(store.new_element("images", "image"), shape, np.uint16, CHANNELS, maps) as writer:
            for channel, drawn in enumerate(tiles):
                corners = [(y, x) for y in range(0, pixels, TILE) for x in range(0, pixels, TILE)]
                for number, (y, x) in enumerate(corners):
                    writer.write(drawn[number % N_TILES][: pixels - y, : pixels - x], y, x, channel)
        names = pa.array([f"gene{number:03d}" for number in range(N_GENES)])
        with PointsWriter(store.new_element("points", "transcripts"), um) as points:
            for start in range(0, sizes["transcripts"], 250_000):
                n = min(250_000, sizes["transcripts"] - start)
                gene = (N_GENES * rng.random(n) ** 2).astype(np.int32)
                batch = {
                    "transcript_id": np.arange(start, start + n, dtype=np.uint64),
                    "x": rng.uniform(0, pixels * PIXEL_UM, n).astype(np.float32),
                    "y": rng.uniform(0, pixels * PIXEL_UM, n).astype(np.float32),
                    "z": rng.uniform(0, 20, n).astype(np.float32),
                    "gene": pa.DictionaryArray.from_arrays(gene, names),
                    "qv": rng.uniform(10, 40, n).astype(np.float32),
                }
                points.write(pa.table(batch))
        cells = make_cells(sizes["cells"], pixels)
        ids = np.array([f"slide-{number}" for number in range(1, len(cells) + 1)])
        geometry = shapely.polygons(cells)
        write_shapes(store.new_element("shapes", "cell_boundaries"), ShapesTable(ids, geometry, {}, maps))
        _write_table(store, ids, rng)
        consolidate(store.path)


def _write_table(store: Any, ids: np.ndarray, rng: np.random.Generator) -> None:
    import pandas as pd
    from cellquilt.core.tables import one_category, write_table
    from scipy.sparse import random as random_matrix

    counts = random_matrix(len(ids), N_GENES, 0.3, "csr", rng=rng, data_rvs=lambda n: rng.integers(1, 20, n))
    obs = pd.DataFrame({"cell_id": ids}, index=ids)
    obs["region"] = one_category("cell_boundaries", len(ids))
    obs["cell_type"] = pd.Categorical.from_codes(rng.integers(0, 12, len(ids)), [f"type {k}" for k in range(12)])
    obs["domain"] = pd.Categorical.from_codes(rng.integers(0, 7, len(ids)), [f"domain {k}" for k in range(7)])
    annotation = {"region": "cell_boundaries", "region_key": "region", "instance_key": "cell_id"}
    genes = [f"gene{number:03d}" for number in range(N_GENES)]
    write_table(store.new_element("tables", "table"), obs, genes, [counts.astype(np.int32)], annotation)


def prepare(sizes: dict[str, Any], folder: Path, tool: str) -> None:
    """Nothing: both read the store."""


def load(sizes: dict[str, Any], folder: Path, tool: str) -> Callable[[], Path]:
    """The writing; the store is opened before, its data is read by it."""
    target = folder / f"{tool}.explorer"
    shutil.rmtree(target, ignore_errors=True)
    return _load_ours(sizes, folder, target) if tool == OURS else _load_peer(sizes, folder, target)


def _load_ours(sizes: dict[str, Any], folder: Path, target: Path) -> Callable[[], Path]:
    from cellquilt import explorer

    def write() -> Path:
        explorer.write(folder / "slide.zarr", target, mode=sizes["mode"], compression=sizes["compression"])
        return target

    return write


def _load_peer(sizes: dict[str, Any], folder: Path, target: Path) -> Callable[[], Path]:
    import sopa
    import spatialdata

    sdata = spatialdata.read_zarr(folder / "slide.zarr")

    def write() -> Path:
        sopa.io.explorer.write(
            str(target), sdata, image_key="image", shapes_key="cell_boundaries", points_key="transcripts",
            gene_column="gene", pixel_size=PIXEL_UM, mode=sizes["mode"],
        )  # fmt: skip
        return target

    return write


def finish(result: Path, sizes: dict[str, Any], folder: Path, tool: str) -> dict[str, Any]:
    """Bytes on disk, and what is in the folder."""
    import zarr

    line: dict[str, Any] = {"bytes": disk_bytes(result)}
    for name, found in (("transcripts", "number_rnas"), ("cells", "number_cells")):
        path = result / f"{name}.zarr.zip"
        if path.exists():
            root = zarr.open_group(zarr.storage.ZipStore(path, mode="r", read_only=True), mode="r")
            line[name] = root.attrs[found]
    if (path := result / "cell_feature_matrix.zarr.zip").exists():
        root = zarr.open_group(zarr.storage.ZipStore(path, mode="r", read_only=True), mode="r")
        # Without the row of totals, the last one: sopa's has sums of genes, where sums of cells belong.
        line["entries"] = int(root["cell_features/indptr"][-2])
        line["sum"] = int(root["cell_features/data"][:].sum())
    (folder / f"{tool}.json").write_text(json.dumps(line))
    shutil.rmtree(result)
    return line


def compare(sizes: dict[str, Any], folder: Path) -> Comparison:
    """The same numbers of everything?"""
    ours, peer = (json.loads((folder / f"{tool}.json").read_text()) for tool in (OURS, PEER))
    keys = sorted(set(ours) - {"bytes"})
    equal = all(ours[key] == peer.get(key) for key in keys)
    said = ", ".join(f"{ours[key]} {key}" for key in keys)
    size = f"{ours['bytes'] / 1e6:.1f} MB against {peer['bytes'] / 1e6:.1f}"
    return Comparison(equal, f"{said} {'in both' if equal else 'DIFFER'}; {size}")
