"""``morphology.ome.tif``: the image as the viewer reads it, 8 bits, tiles of 1024 px, a pyramid."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.core.images import Image
from cellquilt.core.log import progress
from cellquilt.core.tiff_pyramid import write_pyramid
from cellquilt.explorer.slide import ViewedSlide

TILE_PX = 1024
#: Level of the pyramid that the brightness is taken from: its longer side, at most. Means, so no single bright pixel.
_LOOKED_AT_PX = 1024
_SAMPLED = 4_000_000  # pixels
#: Share of these pixels that are at most the white of the picture.
_WHITE = 0.9995


def write_image(slide: ViewedSlide, path: Path, *, compression: str) -> dict[str, Any]:
    """Write the slide's image, tile by tile; a blank one for a slide that has none.

    Parameters
    ----------
    slide
        The slide.
    path
        File to write.
    compression
        ``deflate`` or ``jpeg2000``, both without loss.

    Returns
    -------
    dict
        Channel → intensity that became white.
    """
    height, width = slide.size_px
    channels = slide.image.channels if slide.image is not None else ["none"]
    white = {} if slide.image is None else whites(slide.image)
    write_pyramid(
        path,
        _blank(height, width) if slide.image is None else _tiles(slide.image, white, slide.store.name),
        (len(channels), height, width),
        np.uint8,
        tile_px=TILE_PX,
        compression=compression,
        pixel_size_um=slide.pixel_um,
        metadata=ome_metadata(slide.store.name, slide.pixel_um, channels),
    )
    return white


def ome_metadata(name: str, pixel_um: float, channels: list[str]) -> dict[str, Any]:
    """What tifffile turns into the OME-XML. The UUID is made from the name: the same slide, the same bytes."""
    return {
        "axes": "CYX",
        "Name": name,
        "UUID": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'cellquilt-explorer/{name}')}",
        "SignificantBits": 8,
        "PhysicalSizeX": pixel_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": pixel_um,
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": channels},
    }


def whites(image: Image) -> dict[str, float]:
    """Channel → the intensity that becomes 255, those above it too; images of 8 bits stay as they are.

    It is the brightest of a level of the pyramid of 1024 px, 0.05 % of it left out.
    """
    if image.dtype == np.uint8:
        return dict.fromkeys(image.channels, 255.0)
    sizes = [max(image.level_shape(level)[1:]) for level in range(image.n_levels)]
    level = next((level for level, size in enumerate(sizes) if size <= _LOOKED_AT_PX), image.n_levels - 1)
    _, height, width = image.level_shape(level)
    step = max(int(np.ceil(np.sqrt(height * width / _SAMPLED))), 1)
    out = {}
    for channel in image.channels:
        parts = [
            image.read(y0, y1, x0, x1, channels=[channel], level=level)[0, ::step, ::step].ravel()
            for y0, y1, x0, x1 in image.windows(_LOOKED_AT_PX, level)
        ]
        pixels = np.concatenate(parts)
        white = float(np.quantile(pixels, _WHITE)) if pixels.size else 0.0
        # Of a channel that is nearly empty, what there is.
        out[channel] = white if white > 0 else float(max(pixels.max(initial=0), 1.0))
    return out


def to_8_bits(pixels: NDArray, white: float, out: NDArray[np.uint8]) -> None:
    """Fill `out` with pixels of 8 bits: 0 stays 0, `white` becomes 255, linear between, rounded."""
    if pixels.dtype == np.uint8:
        out[:] = pixels
    elif pixels.dtype == np.uint16:
        table = np.minimum(np.arange(1 << 16) * (255.0 / white) + 0.5, 255).astype(np.uint8)
        _look_up(table, pixels, out)
    else:
        out[:] = np.clip(pixels * (255.0 / white) + 0.5, 0, 255).astype(np.uint8)


@numba.njit(cache=True, nogil=True)
def _look_up(table, pixels, out):
    for i in range(pixels.shape[0]):
        for j in range(pixels.shape[1]):
            out[i, j] = table[pixels[i, j]]


def _tiles(image: Image, white: dict[str, float], name: str) -> Iterator[NDArray[np.uint8]]:
    """The tiles of all channels, channel by channel; each chunk of the store is decoded once where they fit tiles."""
    _, height, width = image.shape
    step = max(image.chunk_px // TILE_PX, 1) * TILE_PX
    strips = [(channel, y0) for channel in image.channels for y0 in range(0, height, step)]
    for channel, y0 in progress(strips, f"{name}: image for the viewer"):
        y1 = min(y0 + step, height)
        strip = np.empty((y1 - y0, width), np.uint8)
        for x0 in range(0, width, step):
            x1 = min(x0 + step, width)
            to_8_bits(image.read(y0, y1, x0, x1, channels=[channel])[0], white[channel], strip[:, x0:x1])
        for top in range(0, y1 - y0, TILE_PX):
            for left in range(0, width, TILE_PX):
                yield strip[top : top + TILE_PX, left : left + TILE_PX]


def _blank(height: int, width: int) -> Iterator[NDArray[np.uint8]]:
    tile = np.zeros((TILE_PX, TILE_PX), np.uint8)
    for y0 in range(0, height, TILE_PX):
        for x0 in range(0, width, TILE_PX):
            yield tile[: height - y0, : width - x0]
