"""Aggregate transcripts and channels into cells: ours and Sopa's on the same data.

Cells are near-circles of 32 vertices on a jittered grid that do not overlap; transcripts lie anywhere, in no order;
images are noise. ``count-*`` stream transcripts from Parquet. ``channels-*`` read the image from a store, each tool
from one that it wrote itself in its usual chunks; ``kernel-*`` take it from memory.

Counts must be equal entry by entry. Intensities are not: Sopa counts pixels whose corner lies in the cell, we those
whose centre does; and where a cell lies across Sopa's chunks it puts the cell's mask on the wrong pixels. So the
comparison tells cells inside a chunk from cells across chunks, and ours is checked against brute force.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from harness import OURS, PEER, Case, Comparison

N_GENES = 300
N_CHANNELS = 4
PEER_CHUNK = 1024
NAMES = [f"c{number}" for number in range(N_CHANNELS)]

_WARM_COUNT = {"cells": 400, "transcripts": 20_000, "side": 800}
_WARM_CHANNELS = {"cells": 400, "side": 1024}
_QUICK_COUNT = {"cells": 2000, "transcripts": 200_000, "side": 1800}
_QUICK_CHANNELS = {"cells": 2000, "side": 2048}


def _count(name: str, target: float, **sizes: int) -> Case:
    return Case(name, {"kind": "count", **sizes}, _QUICK_COUNT, _WARM_COUNT, target)


def _channels(kind: str, side: int, cells: int, target: float) -> Case:
    sizes = {"kind": kind, "cells": cells, "side": side}
    return Case(f"{kind}-{side // 1024}k", sizes, _QUICK_CHANNELS, _WARM_CHANNELS, target)


CASES = (
    _count("count-1m", 8.0, cells=10_000, transcripts=1_000_000, side=4000),
    _count("count-10m", 5.0, cells=100_000, transcripts=10_000_000, side=12_650),
    _channels("channels", 4096, 10_000, 10.0),
    _channels("channels", 8192, 42_000, 10.0),
    _channels("kernel", 4096, 10_000, 30.0),
    _channels("kernel", 8192, 42_000, 30.0),
)


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


def make_transcripts(path: Path, n: int, side: int, seed: int = 1) -> None:
    """Parquet with x, y, gene and is_control (none is), row groups of a million."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    names = pa.array([f"gene{number:03d}" for number in range(N_GENES)])
    columns = [("x", pa.float64()), ("y", pa.float64()), ("gene", pa.dictionary(pa.int32(), pa.string()))]
    with pq.ParquetWriter(path, pa.schema([*columns, ("is_control", pa.bool_())])) as writer:
        for start in range(0, n, 1_000_000):
            m = min(1_000_000, n - start)
            gene = (N_GENES * rng.random(m) ** 2).astype(np.int32)
            table = {
                "x": rng.uniform(0, side, m),
                "y": rng.uniform(0, side, m),
                "gene": pa.DictionaryArray.from_arrays(gene, names),
                "is_control": np.zeros(m, dtype=bool),
            }
            writer.write_table(pa.table(table, schema=writer.schema))


def make_image(side: int, seed: int = 2) -> np.ndarray:
    """(4, side, side) uint16 with the noise of a 12-bit camera."""
    rng = np.random.default_rng(seed)
    return rng.integers(200, 4096, (N_CHANNELS, side, side), dtype=np.uint16)


def make_input(sizes: dict[str, Any], folder: Path) -> None:
    """Cells, and transcripts or image."""
    np.save(folder / "cells.npy", make_cells(sizes["cells"], sizes["side"]))
    if sizes["kind"] == "count":
        make_transcripts(folder / "transcripts.parquet", sizes["transcripts"], sizes["side"])
    else:
        np.save(folder / "image.npy", make_image(sizes["side"]))


def prepare(sizes: dict[str, Any], folder: Path, tool: str) -> None:
    """The image as a store of the tool."""
    if sizes["kind"] != "channels":
        return
    image = np.load(folder / "image.npy")
    if tool == OURS:
        from cellquilt.core.images import ImageWriter

        element = folder / f"{tool}.zarr" / "images" / "image"
        with ImageWriter(element, image.shape, image.dtype, NAMES, {"global": np.eye(3)}) as writer:
            writer.write(image, 0, 0)
    else:
        import spatialdata

        spatialdata.SpatialData(images={"image": _peer_image(image)}).write(folder / f"{tool}.zarr")


def load(sizes: dict[str, Any], folder: Path, tool: str) -> Callable[[], Any]:
    """The aggregation, with the cells in memory."""
    loaders = {"count": (_count_ours, _count_peer)}.get(sizes["kind"], (_channels_ours, _channels_peer))
    return loaders[tool == PEER](sizes, folder)


def _cells(folder: Path) -> np.ndarray:
    return shapely.polygons(np.load(folder / "cells.npy"))


# --- ours


def _count_ours(sizes: dict[str, Any], folder: Path) -> Callable[[], Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from cellquilt.aggregation.counts import TranscriptCounter, count_transcripts
    from cellquilt.geometry.locate import PolygonIndex
    from cellquilt.geometry.polygons import Rings

    cells = _cells(folder)

    def count() -> Any:
        with pq.ParquetFile(folder / "transcripts.parquet", read_dictionary=["gene"]) as file:
            batches = (pa.Table.from_batches([batch]) for batch in file.iter_batches(batch_size=1_000_000))
            index = PolygonIndex(Rings.from_shapely(cells))
            counts = count_transcripts(batches, TranscriptCounter(index, np.eye(3)))
        return counts.matrix, counts.genes

    return count


def _channels_ours(sizes: dict[str, Any], folder: Path) -> Callable[[], Any]:
    from cellquilt.aggregation.channels import measure_channels
    from cellquilt.core.images import Image
    from cellquilt.geometry.intensities import Intensities
    from cellquilt.geometry.polygons import Rings

    cells = _cells(folder)
    if sizes["kind"] == "channels":
        element = folder / f"{OURS}.zarr" / "images" / "image"
        return lambda: measure_channels(Image(element), Rings.from_shapely(cells)).mean
    pixels = np.load(folder / "image.npy")

    def kernel() -> np.ndarray:
        sums = Intensities(len(cells), N_CHANNELS, pixels.dtype)
        sums.add(pixels, 0, 0, Rings.from_shapely(cells))
        return sums.mean()

    return kernel


# --- sopa


def _peer_image(pixels: np.ndarray) -> Any:
    from spatialdata.models import Image2DModel

    chunks = (1, PEER_CHUNK, PEER_CHUNK)
    return Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=NAMES, chunks=chunks)


def _peer_shapes(folder: Path) -> dict[str, Any]:
    import geopandas as gpd
    from spatialdata.models import ShapesModel

    return {"cells": ShapesModel.parse(gpd.GeoDataFrame(geometry=_cells(folder)))}


def _count_peer(sizes: dict[str, Any], folder: Path) -> Callable[[], Any]:
    import dask.dataframe as dd
    import spatialdata
    from sopa.aggregation import count_transcripts
    from spatialdata.models import PointsModel

    # Pandas categories known in advance, as sopa's own readers have them.
    frame = dd.read_parquet(folder / "transcripts.parquet", split_row_groups=True)
    names = [f"gene{number:03d}" for number in range(N_GENES)]
    frame["gene"] = frame["gene"].astype("category").cat.set_categories(names)
    points = PointsModel.parse(frame, coordinates={"x": "x", "y": "y"}, feature_key="gene")
    sdata = spatialdata.SpatialData(points={"points": points}, shapes=_peer_shapes(folder))

    def count() -> Any:
        table = count_transcripts(sdata, gene_column="gene", shapes_key="cells", points_key="points")
        return table.X, list(table.var_names)

    return count


def _channels_peer(sizes: dict[str, Any], folder: Path) -> Callable[[], Any]:
    import spatialdata
    from sopa.aggregation import aggregate_channels

    if sizes["kind"] == "channels":
        image = spatialdata.read_zarr(folder / f"{PEER}.zarr")["image"]
    else:
        image = _peer_image(np.load(folder / "image.npy"))
    sdata = spatialdata.SpatialData(images={"image": image}, shapes=_peer_shapes(folder))
    return lambda: aggregate_channels(sdata, image_key="image", shapes_key="cells").X


# --- both


def finish(result: Any, sizes: dict[str, Any], folder: Path, tool: str) -> dict[str, Any]:
    """Keep the whole table."""
    if sizes["kind"] != "count":
        mean = np.asarray(result)
        np.save(folder / f"{tool}.npy", mean)
        return {"mean": round(float(np.nanmean(mean)), 4)}
    import scipy.sparse

    matrix, genes = result
    scipy.sparse.save_npz(folder / f"{tool}.npz", scipy.sparse.csr_matrix(matrix), compressed=False)
    (folder / f"{tool}.genes").write_text("\n".join(genes))
    return {"counted": int(matrix.sum())}


def compare(sizes: dict[str, Any], folder: Path) -> Comparison:
    """Counts entry by entry; means by cell."""
    return _compare_counts(folder) if sizes["kind"] == "count" else _compare_means(sizes, folder)


def _compare_counts(folder: Path) -> Comparison:
    import scipy.sparse

    matrices = []
    for tool in (OURS, PEER):
        genes = np.asarray((folder / f"{tool}.genes").read_text().split("\n"))
        matrices.append(scipy.sparse.load_npz(folder / f"{tool}.npz")[:, np.argsort(genes)].astype(np.int64))
    ours, peer = matrices
    if ours.shape != peer.shape:
        return Comparison(False, f"tables of {ours.shape} against {peer.shape}")
    different = int((ours != peer).nnz)
    return Comparison(different == 0, f"{ours.sum()} counts; {different} of {ours.nnz} entries differ")


def _compare_means(sizes: dict[str, Any], folder: Path) -> Comparison:
    ours, peer = (np.load(folder / f"{tool}.npy") for tool in (OURS, PEER))
    bounds = shapely.bounds(_cells(folder))
    across = (np.floor(bounds[:, :2] / PEER_CHUNK) != np.floor(bounds[:, 2:] / PEER_CHUNK)).any(axis=1)
    off = np.abs(peer / ours - 1).max(axis=1)
    worst = _worst_against_brute_force(ours, sizes, folder)
    inner, outer = off[~across], off[across]
    text = f"ours within {worst:.0e} of brute force on 100 cells; sopa's cells inside a chunk differ by a median of "
    text += f"{np.median(inner):.2%} (another pixel rule)"
    if outer.size:
        text += f", those across chunks ({across.mean():.1%}) by a median of {np.median(outer):.2%} and up to "
        text += f"{outer.max():.0%} (mask on the wrong pixels)"
    # Equal only where both are right, and the rule about pixels on the outline is not the same.
    return Comparison(None if worst < 1e-6 else False, text)


def _worst_against_brute_force(mean: np.ndarray, sizes: dict[str, Any], folder: Path) -> float:
    """Largest relative error of our means in 100 cells, against every pixel whose centre lies in the cell."""
    cells, image = _cells(folder), np.load(folder / "image.npy", mmap_mode="r")
    worst = 0.0
    for number in np.linspace(0, len(cells) - 1, 100).astype(int):
        x0, y0, x1, y1 = (int(edge) for edge in cells[number].bounds)
        y, x = np.mgrid[y0 : y1 + 1, x0 : x1 + 1]
        inside = shapely.contains_xy(cells[number], x + 0.5, y + 0.5)
        pixels = image[:, y0 : y1 + 1, x0 : x1 + 1][:, inside[: image.shape[1] - y0, : image.shape[2] - x0]]
        worst = max(worst, float(np.abs(mean[number] / pixels.mean(axis=1, dtype=np.float64) - 1).max()))
    return worst
