"""Images for the report: the slide from a pyramid level, windows at full resolution, maps. Never a whole image."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from cellquilt.core.transforms import round_length

if TYPE_CHECKING:
    from cellquilt.core.images import Image

OVERVIEW_PX = 1400
#: Most pixels (a channel) that are read at a time.
_BLOCK_PX = 2048
#: Colours of the channels that are shown together, the nuclear stain first.
COLOURS = ((0.42, 0.58, 1.0), (0.16, 0.62, 0.40))
GREY = (1.0, 1.0, 1.0)
#: Stops of the maps' colour scale, dark blue over teal to yellow: even in lightness, safe for colour-blind readers.
STOPS = np.array(
    [(38, 30, 92), (52, 68, 128), (47, 106, 138), (38, 143, 138), (68, 179, 118), (150, 208, 78), (250, 226, 62)]
)


@dataclass(frozen=True)
class Shown:
    """Which channels are shown in which colour.

    Attributes
    ----------
    channels
        Positions.
    names
        Their names.
    colours
        One (r, g, b) in 0..1 a channel.
    bright_field
        The three channels are red, green and blue of a bright-field image.
    """

    channels: tuple[int, ...]
    names: tuple[str, ...]
    colours: tuple[tuple[float, float, float], ...]
    bright_field: bool = False


def choose_channels(image: "Image", segmented: Sequence[str] = ()) -> Shown:
    """The nuclear stain and one more: another one that was segmented, else the next.

    More than two would only turn white where they overlap; the page shows every channel by itself, too.
    """
    from cellquilt.segment.engine import is_nuclear_stain

    names = [str(name) for name in image.channels]
    if len(names) == 3 and [name.lower()[:1] for name in names] == ["r", "g", "b"]:
        return Shown((0, 1, 2), tuple(names), ((1, 0, 0), (0, 1, 0), (0, 0, 1)), bright_field=True)
    nuclear = next((k for k, name in enumerate(names) if is_nuclear_stain([name])), 0)
    wanted = [names.index(name) for name in segmented if name in names]
    order = list(dict.fromkeys([nuclear, *wanted, *range(len(names))]))[: len(COLOURS)]
    colours = (GREY,) if len(order) == 1 else COLOURS[: len(order)]
    return Shown(tuple(order), tuple(names[k] for k in order), colours)


def read_reduced(image: "Image", max_px: int = OVERVIEW_PX) -> tuple[np.ndarray, float]:
    """The whole slide, small: from the pyramid, in blocks.

    Parameters
    ----------
    image
        The slide.
    max_px
        Longest side of the result.

    Returns
    -------
    pixels : numpy.ndarray
        (C, h, w) float32, means of blocks of pixels.
    step : float
        Pixels of the full image a pixel of the result.
    """
    enough = [k for k in range(image.n_levels) if max(image.level_shape(k)[1:]) >= max_px]
    level = max(enough, default=0)
    count, height, width = image.level_shape(level)
    factor = max(1, -(-max(height, width) // max_px))
    out = np.zeros((count, -(-height // factor), -(-width // factor)), dtype=np.float32)
    size = max(_BLOCK_PX // factor, 1) * factor
    for y0, y1, x0, x1 in image.windows(size, level):
        rows, columns = -(-(y1 - y0) // factor), -(-(x1 - x0) // factor)
        for channel in range(count):
            block = image.read(y0, y1, x0, x1, channels=[channel], level=level)[0].astype(np.float32)
            fill = ((0, rows * factor - block.shape[0]), (0, columns * factor - block.shape[1]))
            block = np.pad(block, fill, mode="edge").reshape(rows, factor, columns, factor)
            y, x = y0 // factor, x0 // factor
            out[channel, y : y + rows, x : x + columns] = block.mean(axis=(1, 3))
    return out, factor * image.shape[1] / height if height else 1.0


def mask_of(polygons: np.ndarray, shape: tuple[int, int], step: float) -> np.ndarray:
    """(h, w) bool: pixels of a reduced image inside polygons given in full pixels."""
    from PIL import Image as Picture
    from PIL import ImageDraw

    picture = Picture.new("1", (shape[1], shape[0]))
    draw = ImageDraw.Draw(picture)
    for polygon in shapely.get_parts(polygons):
        for ring, fill in [(polygon.exterior, 1), *((hole, 0) for hole in polygon.interiors)]:
            points = shapely.get_coordinates(ring) / step
            if len(points) > 2:
                draw.polygon([tuple(point) for point in points.tolist()], fill=fill)
    return np.asarray(picture, dtype=bool)


def limits(pixels: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """(C, 2) float: intensities shown as black and as full colour, the 1st and the 99.7th percentile."""
    chosen = pixels[:, mask] if mask is not None and mask.any() else pixels.reshape(len(pixels), -1)
    if not chosen.size:
        return np.tile([0.0, 1.0], (len(pixels), 1))
    return np.quantile(chosen.astype(np.float32), [0.01, 0.997], axis=1).T


def compose(pixels: np.ndarray, low_high: np.ndarray, shown: Shown) -> np.ndarray:
    """(h, w, 3) uint8: the chosen channels (C, h, w) in their colours."""
    if shown.bright_field:
        return np.clip(np.moveaxis(pixels, 0, -1), 0, 255).astype(np.uint8)
    out = np.zeros((*pixels.shape[1:], 3), dtype=np.float32)
    for channel, (low, high), colour in zip(pixels, low_high, shown.colours, strict=True):
        value = np.clip((channel.astype(np.float32) - low) / max(high - low, 1e-9), 0, 1) ** 0.8
        out += value[..., None] * np.asarray(colour, dtype=np.float32)
    return (np.clip(out, 0, 1) * 255).astype(np.uint8)


def data_uri(pixels: np.ndarray, *, lossless: bool = False, quality: int = 82) -> str:
    """An image as text to put into the page: WebP for photographs, PNG for maps ((h, w, 3 or 4) uint8)."""
    from PIL import Image as Picture

    buffer = io.BytesIO()
    picture = Picture.fromarray(np.ascontiguousarray(pixels))
    if lossless:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(buffer, "WEBP", quality=quality, method=4)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def colour_map(values: np.ndarray, high: float) -> np.ndarray:
    """(h, w, 4) uint8: values in the maps' colours, transparent where they are NaN."""
    position = np.clip(np.nan_to_num(values) / (high if high > 0 else 1.0), 0, 1) * (len(STOPS) - 1)
    low = np.minimum(position.astype(int), len(STOPS) - 2)
    part = (position - low)[..., None]
    out = np.zeros((*values.shape, 4), dtype=np.uint8)
    out[..., :3] = np.round(STOPS[low] * (1 - part) + STOPS[low + 1] * part)
    out[..., 3] = np.where(np.isnan(values), 0, 255)
    return out


def path_of(geometry: np.ndarray, *, origin: tuple[float, float] = (0.0, 0.0), step: float = 1.0) -> str:
    """SVG path data of polygons, in pixels from `origin` over `step`.

    Outlines along pixel edges are written as relative horizontal and vertical strokes, which takes a third of the room.
    """
    pieces: list[str] = []
    for ring in shapely.get_rings(shapely.get_parts(geometry)):
        xy = (shapely.get_coordinates(ring) - origin) / step
        if step == 1.0 and np.array_equal(xy, np.round(xy)):
            pieces.append(_lattice_path(xy.astype(int)))
        else:
            points = " ".join(f"{x:.1f} {y:.1f}" for x, y in xy[:-1].tolist())
            pieces.append(f"M{points}z")
    return "".join(pieces)


def _lattice_path(xy: np.ndarray) -> str:
    pieces = [f"M{xy[0, 0]} {xy[0, 1]}"]
    for dx, dy in np.diff(xy, axis=0)[:-1].tolist():
        pieces.append(f"h{dx}" if dy == 0 else f"v{dy}" if dx == 0 else f"l{dx} {dy}")
    return "".join(pieces) + "z"


def scale_bar(width: float, height: float, um_per_unit: float) -> str:
    """SVG of a scale bar in the lower left of a picture of so many units."""
    length_um = round_length(width * um_per_unit / 5)
    length = length_um / um_per_unit
    unit = width / 100
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    y = height - 3 * unit
    return (
        f'<g class="scale"><rect x="{2 * unit:.2f}" y="{y:.2f}" width="{length:.2f}" height="{0.8 * unit:.2f}"/>'
        f'<text x="{2 * unit:.2f}" y="{y - unit:.2f}" font-size="{2.8 * unit:.2f}">{text}</text></g>'
    )


def unique_id(*parts: Any) -> str:
    """An id for an SVG element."""
    return "-".join(re.sub(r"[^a-z0-9]+", "", str(part).lower()) for part in parts)
