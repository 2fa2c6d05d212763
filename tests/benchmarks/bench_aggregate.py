"""Aggregate transcripts and channels into cells: ours and Sopa's on the same data.

Cells are near-circles of 32 vertices on a jittered grid that do not overlap; transcripts lie anywhere, in no order;
images are noise. Every case runs in a process of its own, on data that another process has put on disk:

    python tests/benchmarks/bench_aggregate.py                     # all cases
    python tests/benchmarks/bench_aggregate.py --cases count-1m    # one
    python tests/benchmarks/bench_aggregate.py --peer              # with the Python of sopa's environment

One JSON line a case: seconds of CPU and wall for the step alone (cells in memory, code imported and compiled), peak
memory of the process, and sums of the result for comparison. ``count-*`` stream transcripts from Parquet.
``channels-*`` read the image from a store, each tool from one that it wrote itself; ``kernel-*`` take it from memory.
(Counts must be equal. Sopa's intensities are off for cells that lie across its chunks.)
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shapely

N_GENES = 300
N_CHANNELS = 4
CASES: dict[str, dict[str, int]] = {
    "warm-count": {"cells": 400, "transcripts": 20_000, "side": 800},
    "warm-channels": {"cells": 400, "pixels": 1024, "side": 1024},
    "count-1m": {"cells": 10_000, "transcripts": 1_000_000, "side": 4000},
    "count-10m": {"cells": 100_000, "transcripts": 10_000_000, "side": 12_650},
    "channels-4k": {"cells": 10_000, "pixels": 4096, "side": 4096},
    "channels-8k": {"cells": 42_000, "pixels": 8192, "side": 8192},
    "kernel-4k": {"cells": 10_000, "pixels": 4096, "side": 4096},
    "kernel-8k": {"cells": 42_000, "pixels": 8192, "side": 8192},
}


def make_cells(n: int, side: int, seed: int = 0) -> np.ndarray:
    """(n, 33, 2) closed outlines in a square of `side` pixels."""
    rng = np.random.default_rng(seed)
    per_side = int(np.ceil(np.sqrt(n)))
    step = side / per_side
    grid = np.stack(np.meshgrid(np.arange(per_side), np.arange(per_side)), axis=-1).reshape(-1, 1, 2)[:n]
    angle = np.append(np.linspace(0, 2 * np.pi, 32, endpoint=False), 0.0)
    radius = step * rng.uniform(0.35, 0.44, (n, 1)) * (1 + 0.06 * np.sin(3 * angle + rng.uniform(0, 6, (n, 1))))
    centre = (grid + 0.5) * step + rng.uniform(-0.03, 0.03, (n, 1, 2)) * step
    return centre + radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def make_transcripts(folder: Path, n: int, side: int, seed: int = 1) -> None:
    """Parquet with x, y, gene and is_control (none is), row groups of a million."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    names = pa.array([f"gene{i:03d}" for i in range(N_GENES)])
    writer = None
    for start in range(0, n, 1_000_000):
        m = min(1_000_000, n - start)
        gene = (N_GENES * rng.random(m) ** 2).astype(np.int32)
        table = pa.table(
            {
                "x": rng.uniform(0, side, m),
                "y": rng.uniform(0, side, m),
                "gene": pa.DictionaryArray.from_arrays(gene, names),
                "is_control": np.zeros(m, dtype=bool),
            }
        )
        writer = writer or pq.ParquetWriter(folder / "transcripts.parquet", table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def make_image(pixels: int, seed: int = 2) -> np.ndarray:
    """(4, pixels, pixels) uint16 with the noise of a 12-bit camera."""
    rng = np.random.default_rng(seed)
    return rng.integers(200, 4096, (N_CHANNELS, pixels, pixels), dtype=np.uint16)


def prepare(case: str, folder: Path, peer: bool) -> None:
    """Put a case's data on disk."""
    size = CASES[case]
    np.save(folder / "cells.npy", make_cells(size["cells"], size["side"]))
    if "transcripts" in size:
        make_transcripts(folder, size["transcripts"], size["side"])
    elif case.startswith("kernel"):
        np.save(folder / "image.npy", make_image(size["pixels"]))
    elif peer:
        import spatialdata

        image = _sopa_image(make_image(size["pixels"]))
        spatialdata.SpatialData(images={"image": image}).write(folder / "store.zarr")
    else:
        from cellquilt.core.images import ImageWriter

        image = make_image(size["pixels"])
        channels = [f"c{i}" for i in range(N_CHANNELS)]
        element = folder / "store.zarr" / "images" / "image"
        with ImageWriter(element, image.shape, image.dtype, channels, {"global": np.eye(3)}) as writer:
            writer.write(image, 0, 0)


# --- ours


def load_ours(case: str, folder: Path) -> Callable[[], dict[str, Any]]:
    """The timed step, with what it may have ready."""
    from cellquilt.aggregation.channels import ChannelTable, measure_channels
    from cellquilt.aggregation.counts import TranscriptCounter, count_transcripts
    from cellquilt.core.images import Image
    from cellquilt.geometry.intensities import Intensities
    from cellquilt.geometry.locate import PolygonIndex
    from cellquilt.geometry.polygons import Rings

    cells = shapely.polygons(np.load(folder / "cells.npy"))
    if "count" in case:
        import pyarrow as pa
        import pyarrow.parquet as pq

        def count() -> dict[str, Any]:
            with pq.ParquetFile(folder / "transcripts.parquet", read_dictionary=["gene"]) as file:
                batches = (pa.Table.from_batches([batch]) for batch in file.iter_batches(batch_size=1_000_000))
                index = PolygonIndex(Rings.from_shapely(cells))
                return sums_of_counts(count_transcripts(batches, TranscriptCounter(index, np.eye(3))).matrix)

        return count
    if case.startswith("kernel"):
        pixels = np.load(folder / "image.npy")

        def kernel() -> dict[str, Any]:
            got = Intensities(len(cells), N_CHANNELS, pixels.dtype)
            got.add(pixels, 0, 0, Rings.from_shapely(cells))
            return sums_of_means(got.mean())

        return kernel

    def channels() -> dict[str, Any]:
        table: ChannelTable = measure_channels(
            Image(folder / "store.zarr" / "images" / "image"), Rings.from_shapely(cells)
        )
        return sums_of_means(table.mean)

    return channels


# --- sopa


def _sopa_image(pixels: np.ndarray) -> Any:
    from spatialdata.models import Image2DModel

    names = [f"c{i}" for i in range(N_CHANNELS)]
    return Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=names, chunks=(N_CHANNELS, 1024, 1024))


def load_peer(case: str, folder: Path) -> Callable[[], dict[str, Any]]:
    """The same with sopa."""
    import dask.dataframe as dd
    import geopandas as gpd
    import spatialdata
    from sopa.aggregation import aggregate_channels, count_transcripts
    from spatialdata.models import PointsModel, ShapesModel

    cells = gpd.GeoDataFrame(geometry=shapely.polygons(np.load(folder / "cells.npy")))
    shapes = {"cells": ShapesModel.parse(cells)}
    if "count" in case:
        # Pandas categories known in advance, as sopa's own readers have them.
        frame = dd.read_parquet(folder / "transcripts.parquet", split_row_groups=True)
        frame["gene"] = frame["gene"].astype("category").cat.set_categories([f"gene{i:03d}" for i in range(N_GENES)])
        points = PointsModel.parse(frame, coordinates={"x": "x", "y": "y"}, feature_key="gene")
        sdata = spatialdata.SpatialData(points={"points": points}, shapes=shapes)
        return lambda: sums_of_counts(
            count_transcripts(sdata, gene_column="gene", shapes_key="cells", points_key="points").X
        )
    if case.startswith("kernel"):
        image = _sopa_image(np.load(folder / "image.npy"))
    else:
        image = spatialdata.read_zarr(folder / "store.zarr")["image"]
    sdata = spatialdata.SpatialData(images={"image": image}, shapes=shapes)

    def channels() -> dict[str, Any]:
        return sums_of_means(aggregate_channels(sdata, image_key="image", shapes_key="cells").X)

    return channels


# --- both


def sums_of_counts(matrix: Any) -> dict[str, Any]:
    """What two right results have in common."""
    rows = np.asarray(matrix.sum(axis=1)).ravel().astype(np.int64)
    columns = np.sort(np.asarray(matrix.sum(axis=0)).ravel().astype(np.int64))
    return {"total": int(rows.sum()), "rows": zlib.crc32(rows.tobytes()), "columns": zlib.crc32(columns.tobytes())}


def sums_of_means(mean: np.ndarray) -> dict[str, Any]:
    """The same for intensities."""
    return {"mean": round(float(np.nanmean(mean)), 4), "sd": round(float(np.nanstd(mean)), 4)}


def measure(case: str, folder: Path, warm_folder: Path, peer: bool) -> None:
    """Run one case and print its line."""
    load = load_peer if peer else load_ours
    warm = "warm-count" if "count" in case else ("kernel-warm" if case.startswith("kernel") else "warm-channels")
    load(warm, warm_folder)()  # compile and import before the clock starts
    step = load(case, folder)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = time.perf_counter(), time.process_time()
    result = step()
    line = {
        "benchmark": case,
        "tool": "sopa" if peer else "cellquilt",
        **CASES[case],
        "cpu_s": round(time.process_time() - cpu, 3),
        "wall_s": round(time.perf_counter() - wall, 3),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "rss_before_mb": round(before_mb),
        "result": result,
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    """Prepare and measure the cases, each in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in CASES if not name.startswith("warm")]
    parser.add_argument("--cases", default=",".join(names), help="cases, separated by commas")
    parser.add_argument("--peer", action="store_true", help="run sopa instead")
    parser.add_argument("--do", choices=("prepare", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--warm-folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do == "prepare":
        prepare(options.cases, options.folder, options.peer)
        return
    if options.do == "measure":
        measure(options.cases, options.folder, options.warm_folder, options.peer)
        return

    def child(do: str, case: str, *arguments: str) -> None:
        command = [sys.executable, __file__, "--do", do, "--cases", case, *arguments]
        subprocess.run([*command, "--peer"] if options.peer else command, check=True)

    for case in options.cases.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            data, warm = Path(scratch, "data"), Path(scratch, "warm")
            data.mkdir()
            warm.mkdir()
            child("prepare", case, "--folder", str(data))
            child("prepare", "warm-count" if "count" in case else "warm-channels", "--folder", str(warm))
            if case.startswith("kernel"):
                np.save(warm / "image.npy", make_image(CASES["warm-channels"]["pixels"]))
            child("measure", case, "--folder", str(data), "--warm-folder", str(warm))


if __name__ == "__main__":
    main()
