"""Tiled TIFFs with a pyramid, written tile by tile: each level is made from the one before while that is written."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SMALLEST_LEVEL_PX = 256
MOST_LEVELS = 6


def n_levels(height: int, width: int) -> int:
    """Levels below the full one: halved while the longer side is larger than 256 px, six times at most."""
    levels = 0
    longer, shorter = max(height, width), min(height, width)
    while levels < MOST_LEVELS and longer >> levels > SMALLEST_LEVEL_PX and shorter >> levels > 1:
        levels += 1
    return levels


def write_pyramid(
    path: Path,
    tiles: Iterator[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.typing.DTypeLike,
    *,
    tile_px: int,
    compression: str | None,
    pixel_size_um: float | None = None,
    description: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write planes with levels of half the size each below them.

    Parameters
    ----------
    path
        File to write; what is between levels lies beside it meanwhile.
    tiles
        The full level's tiles, plane by plane, in raster order; those at the far sides may be cut.
    shape
        (height, width) or (planes, height, width).
    dtype
        Unsigned integer.
    tile_px
        Width of a tile; even.
    compression
        tifffile's name of a compression, or None.
    pixel_size_um
        Width of a pixel of the full level: each level states its own resolution.
    description
        OME-XML as it is to be written.
    metadata
        What tifffile makes OME-XML from instead.

    Notes
    -----
    A level has floor(size / 2) pixels of the level before, each the mean of 2 × 2, rounded half up: an odd last row
    or column is left out, as machines do. Takes a row of tiles of memory.
    """
    import tifffile

    dtype = np.dtype(dtype)
    height, width = shape[-2:]
    levels = n_levels(height, width)
    spools = [path.with_name(f".{path.name}.level{k}") for k in (0, 1)]
    try:
        with tifffile.TiffWriter(path, bigtiff=True, ome=True if metadata is not None else None) as tiff:
            for level in range(levels + 1):
                last = level == levels
                size = (height >> level, width >> level)
                following = spools[level % 2]
                source = tiles if level == 0 else _spooled(spools[1 - level % 2], dtype, tile_px)
                resolution = None if pixel_size_um is None else 1e4 / (pixel_size_um * 2**level)
                tiff.write(
                    source if last else _halving(source, following, size, dtype, tile_px),
                    shape=(*shape[:-2], *size),
                    dtype=dtype,
                    tile=(tile_px, tile_px),
                    # The name without "adobe" is that of an older code, which few programs read.
                    compression="adobe_deflate" if compression == "deflate" else compression,
                    compressionargs={"level": 1} if compression == "deflate" else None,
                    maxworkers=1,
                    photometric="minisblack",
                    software="cellquilt",
                    resolution=None if resolution is None else (resolution, resolution),
                    resolutionunit=None if resolution is None else "CENTIMETER",
                    metadata=dict(metadata) if metadata is not None and level == 0 else None,
                    description=description if level == 0 else None,
                    subifds=levels if level == 0 else None,
                    subfiletype=1 if level else 0,
                )
    finally:
        for spool in spools:
            spool.unlink(missing_ok=True)


def _spooled(path: Path, dtype: np.dtype, tile_px: int) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while data := file.read(tile_px * tile_px * dtype.itemsize):
            yield np.frombuffer(data, dtype).reshape(tile_px, tile_px)


def _halving(
    tiles: Iterator[np.ndarray], path: Path, size: tuple[int, int], dtype: np.dtype, tile_px: int
) -> Iterator[np.ndarray]:
    """Pass the tiles of planes of `size` on, and write the tiles of the level below to a file, in their order."""
    from cellquilt.core.pyramid import halve_integers

    height, width = size
    rows, columns = -(-height // tile_px), -(-width // tile_px)
    rows_below, columns_below = max(-(-(height // 2) // tile_px), 1), max(-(-(width // 2) // tile_px), 1)
    half = tile_px // 2
    below = np.zeros((columns_below, tile_px, tile_px), dtype)
    row = column = 0
    with path.open("wb") as file:
        for tile in tiles:
            high = min(tile_px, height - row * tile_px) // 2
            wide = min(tile_px, width - column * tile_px) // 2
            if high and wide:
                top, left = row % 2 * half, column % 2 * half
                target = below[column // 2, top : top + high, left : left + wide]
                # A copy that lies together is halved three times as fast.
                halve_integers(np.ascontiguousarray(tile[: 2 * high, : 2 * wide]), target)
            column += 1
            if column == columns:
                row, column = row + 1, 0
                if (row % 2 == 0 or row == rows) and (row - 1) // 2 < rows_below:
                    file.write(below.data)
                    below[:] = 0
                row %= rows
                if row == 0:
                    file.flush()  # nobody may ask for more after a plane's last tile
            yield tile
