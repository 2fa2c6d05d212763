"""Write an image of four channels with its pyramid: ours in tiles as a reader hands them on, Sopa as its readers do.

Sopa's readers make a lazy image with chunks of (1, 1024, 1024) and scale factors 2, 2, 2, 2, and write it as part of a
SpatialData object. Both get the same pixels from memory, so that reading a file is not part of it. Compared are the
pixels of the full level, read back by each tool, and the bytes on disk of all levels.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import OURS, PEER, Case, Comparison, disk_bytes

CHANNELS = ("DAPI", "PolyT", "Cellbound1", "Cellbound2")
TILE = 2048
N_TILES = 4

CASES = tuple(
    Case(
        f"write-{size // 1024}k",
        {"pixels": size},
        quick={"pixels": 1536},
        warm={"pixels": 1026},
        target=5.0,
        no_larger=True,
    )
    for size in (4096, 8192, 16384)
)


def noisy_tile(number: int, channel: int, size: int = TILE, seed: int = 0) -> np.ndarray:
    """A tile of a 16-bit micrograph: nuclei-like spots on a background, with photon and read noise.

    Returns
    -------
    numpy.ndarray
        (size, size) uint16.
    """
    rng = np.random.default_rng((seed, channel, number))
    y, x = np.mgrid[-16:17, -16:17]
    spot = np.exp(-(((y**2 + x**2) / (2 * 6.0**2)) ** 2))
    signal = np.full((size + 32, size + 32), 400.0, dtype=np.float32)
    count = size * size // 4000
    for top, left, height in zip(
        rng.integers(0, size, count), rng.integers(0, size, count), rng.gamma(3.0, 500.0, count), strict=True
    ):
        signal[top : top + 33, left : left + 33] += (height * spot).astype(np.float32)
    signal = signal[16:-16, 16:-16]
    # Photon noise grows with the square root of the signal: a normal draw of that width is what counts look like.
    noise = rng.standard_normal(signal.shape, dtype=np.float32) * np.sqrt(2.0 * signal)
    return np.clip(signal + noise, 0, 65535).astype(np.uint16)


def make_input(sizes: dict[str, Any], folder: Path) -> None:
    """Four tiles a channel, repeated over the image: compressors look back less far than a tile."""
    tiles = [[noisy_tile(number, channel) for number in range(N_TILES)] for channel in range(len(CHANNELS))]
    np.save(folder / "tiles.npy", np.asarray(tiles))


def prepare(sizes: dict[str, Any], folder: Path, tool: str) -> None:
    """Nothing: the pixels come from memory."""


def blocks(tiles: np.ndarray, pixels: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """(channel, y0, x0, block) of the image, by channel and in raster order."""
    for channel, drawn in enumerate(tiles):
        corners = [(y, x) for y in range(0, pixels, TILE) for x in range(0, pixels, TILE)]
        for number, (y, x) in enumerate(corners):
            yield channel, y, x, drawn[number % N_TILES][: pixels - y, : pixels - x]


def load(sizes: dict[str, Any], folder: Path, tool: str) -> Callable[[], Path]:
    """The writing, with the pixels in memory."""
    tiles = np.load(folder / "tiles.npy")
    target = folder / f"{tool}.zarr"
    shutil.rmtree(target, ignore_errors=True)
    return _load_ours(tiles, sizes["pixels"], target) if tool == OURS else _load_peer(tiles, sizes["pixels"], target)


def _load_ours(tiles: np.ndarray, pixels: int, target: Path) -> Callable[[], Path]:
    from cellquilt.core.images import ImageWriter

    shape = (len(CHANNELS), pixels, pixels)
    maps = {"global": np.eye(3), "microns": np.diag([0.1, 0.1, 1.0])}

    def write() -> Path:
        with ImageWriter(target / "images" / "image", shape, np.uint16, CHANNELS, maps) as writer:
            for channel, y, x, block in blocks(tiles, pixels):
                writer.write(block, y, x, channel)
        return target

    return write


def _load_peer(tiles: np.ndarray, pixels: int, target: Path) -> Callable[[], Path]:
    import dask.array as da
    import spatialdata
    from sopa.io.reader.utils import _default_image_kwargs
    from spatialdata.models import Image2DModel

    options, _ = _default_image_kwargs()
    across = -(-pixels // TILE)
    planes: list[Any] = []
    for channel in range(len(CHANNELS)):
        parts = [block for number, _, _, block in blocks(tiles, pixels) if number == channel]
        lazy = [da.from_array(block[None], chunks=(1, 1024, 1024), name=False) for block in parts]
        planes.append(da.block([lazy[row * across : (row + 1) * across] for row in range(across)]))

    def write() -> Path:
        image = da.concatenate(planes, axis=0).rechunk(options["chunks"])
        model = Image2DModel.parse(image, dims=("c", "y", "x"), c_coords=CHANNELS, **options)
        spatialdata.SpatialData(images={"image": model}).write(target)
        return target

    return write


def finish(result: Path, sizes: dict[str, Any], folder: Path, tool: str) -> dict[str, Any]:
    """Bytes on disk, and the checksum of the full level."""
    element = result / "images" / "image"
    line = {
        "bytes": disk_bytes(element),
        "bytes_of_pixels": len(CHANNELS) * sizes["pixels"] ** 2 * 2,
        "files": sum(1 for path in element.rglob("*") if path.is_file()),
        "checksum": _checksum_ours(element) if tool == OURS else _checksum_peer(result),
    }
    (folder / f"{tool}.json").write_text(json.dumps(line))
    shutil.rmtree(result)
    return line


def _checksum_ours(element: Path) -> int:
    from cellquilt.core.images import Image

    image, total = Image(element), 0
    _, height, width = image.shape
    for y in range(0, height, TILE):
        total = zlib.crc32(np.ascontiguousarray(image.read(y, min(y + TILE, height), 0, width)).tobytes(), total)
    return total


def _checksum_peer(store: Path) -> int:
    import spatialdata

    pixels, total = spatialdata.read_zarr(store)["image"]["scale0"].image.data, 0
    for y in range(0, pixels.shape[1], TILE):
        total = zlib.crc32(np.ascontiguousarray(pixels[:, y : y + TILE].compute()).tobytes(), total)
    return total


def compare(sizes: dict[str, Any], folder: Path) -> Comparison:
    """Pixels equal? Whose store is larger?"""
    ours, peer = (json.loads((folder / f"{tool}.json").read_text()) for tool in (OURS, PEER))
    equal = ours["checksum"] == peer["checksum"]
    size = f"{ours['bytes'] / 1e6:.1f} MB in {ours['files']} files against {peer['bytes'] / 1e6:.1f} in {peer['files']}"
    return Comparison(equal, f"full level {'the same' if equal else 'DIFFERS'}; {size}")
