"""What it costs to write an image with its pyramid: CPU and wall seconds, bytes on disk, peak memory.

Run as ``python tests/benchmarks/bench_images.py --sizes 4096,8192``; one line of JSON a measurement, each in a process
of its own, so that peak memory is that of one image. `noisy_image` needs numpy alone: a peer in another environment
imports it from here and writes the same pixels.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CHANNELS = ("DAPI", "PolyT", "Cellbound1", "Cellbound2")
TILE = 2048


def noisy_tile(row: int, column: int, channel: int, size: int = TILE, seed: int = 0) -> np.ndarray:
    """A tile of a 16-bit micrograph: nuclei-like spots on a background, with photon and read noise.

    Returns
    -------
    numpy.ndarray
        (size, size) uint16, the same for the same arguments on any machine with the same numpy.
    """
    rng = np.random.default_rng((seed, channel, row, column))
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


def noisy_image(size: int) -> np.ndarray:
    """A whole image for peers that need one in memory: (4, size, size) uint16."""
    image = np.empty((len(CHANNELS), size, size), dtype=np.uint16)
    for channel, y, x, block in blocks(size):
        image[channel, y : y + TILE, x : x + TILE] = block
    return image


def blocks(size: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """(channel, y0, x0, block) of `noisy_image`, by channel and in raster order.

    Four tiles a channel are drawn before the first block and repeated: drawing must not count as writing, and
    compressors look back less far than a tile.
    """
    drawn = [[noisy_tile(0, number, channel) for number in range(4)] for channel in range(len(CHANNELS))]
    return _repeat(drawn, size)


def _repeat(drawn: list[list[np.ndarray]], size: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
    for channel, tiles in enumerate(drawn):
        corners = [(y, x) for y in range(0, size, TILE) for x in range(0, size, TILE)]
        for number, (y, x) in enumerate(corners):
            yield channel, y, x, tiles[number % len(tiles)][: size - y, : size - x]


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(os.path.getsize(Path(root) / name) for root, _, names in os.walk(folder) for name in names)


def measure(size: int, pyramid: bool) -> dict[str, object]:
    """Write one image and say what it took, without drawing it."""
    from cellquilt.core import images

    if not pyramid:
        images.SMALLEST_LEVEL_PX = size
    with tempfile.TemporaryDirectory() as scratch:
        element = Path(scratch) / "image"
        maps = {"global": np.eye(3), "microns": np.diag([0.1, 0.1, 1.0])}
        _warm(Path(scratch))
        source = blocks(size)
        cpu, wall = cpu_seconds(), time.perf_counter()
        with images.ImageWriter(element, (len(CHANNELS), size, size), np.uint16, CHANNELS, maps) as writer:
            for channel, y, x, block in source:
                writer.write(block, y, x, channel)
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
        raw = len(CHANNELS) * size * size * 2
        return {
            "bench": "write_image",
            "tool": "cellquilt",
            "size": size,
            "levels": len(images.level_shapes(size, size)),
            "cpu_s": round(cpu, 2),
            "wall_s": round(wall, 2),
            "bytes": disk_bytes(element),
            "bytes_s0": disk_bytes(element / "s0"),
            "raw_bytes_s0": raw,
            "zstd_default_bytes_s0": _zstd_size(element, size),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        }


def _warm(scratch: Path) -> None:
    """Compile or load the kernels: a fixed cost, not part of what an image takes."""
    from cellquilt.core.images import ImageWriter

    with ImageWriter(scratch / "warm", (1, 1026, 1026), np.uint16, ["a"], {}, chunk_px=2048) as writer:
        writer.write(np.ones((1, 1026, 1026), np.uint16), 0, 0)


def _zstd_size(element: Path, size: int) -> int:
    """Bytes of the full level as spatialdata writes it by default (plain zstd, level 0), from the first four chunks."""
    from cellquilt.core.images import Image
    from numcodecs import Zstd

    image, total, seen = Image(element), 0, 0
    for y0, y1, x0, x1 in list(image.windows(TILE))[:4]:
        for channel in range(len(CHANNELS)):
            pixels = image.read(y0, y1, x0, x1, channels=[channel])
            total, seen = total + len(Zstd(level=0).encode(pixels)), seen + pixels.nbytes
    return int(total * (len(CHANNELS) * size * size * 2 / seen))


def main() -> None:
    """Measure each size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4096,8192")
    parser.add_argument("--no-pyramid", action="store_true", help="the full level only")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, not arguments.no_pyramid)), flush=True)
        return
    flags = ["--no-pyramid"] if arguments.no_pyramid else []
    for size in arguments.sizes.split(","):
        subprocess.run([sys.executable, __file__, "--one", size.strip(), *flags], check=True)


if __name__ == "__main__":
    main()
