"""Where the tissue is, from a pyramid level.

Fluorescence: tissue is where intensity varies more than its noise, in windows of a few cells. Unlike a threshold on
intensity this does not depend on how much of the slide is background, on the background's level or on slow changes of
illumination. Bright field: tissue is where colour is saturated (HSV).

The result only decides which patches are worth segmenting and where intensities are sampled; cells are never clipped
at it, and it is generous: a margin is added, small holes are filled.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cellquilt.core.errors import CellquiltError, did_you_mean

if TYPE_CHECKING:
    from cellquilt.core.images import Image

MODES = ("auto", "staining", "saturation", "none")

_LEVEL_UM = 2.0  # pixel size of the level that is looked at: a nucleus is still a few pixels wide
_BLOCK_UM = 12.0  # resolution of the outline
_NOISE_FACTOR = 3.0
_LEAST_PART = 0.1  # of the contrast in well stained tissue
_LEAST_SATURATION = 0.05


@dataclass(frozen=True)
class Tissue:
    """The tissue of a slide.

    Attributes
    ----------
    polygons
        (n,) object array of shapely polygons in global pixels, by position (y, then x).
    mode
        How it was found.
    level
        Pyramid level that was looked at.
    area_um2
        Area in µm².
    empty
        True if there is none: an empty slide, whose correct result is no cells.
    """

    polygons: np.ndarray
    mode: str
    level: int
    area_um2: float

    @property
    def empty(self) -> bool:
        """Whether there is no tissue at all."""
        return len(self.polygons) == 0

    def as_dict(self) -> dict[str, Any]:
        """Facts for the record."""
        return {
            "mode": self.mode,
            "level": self.level,
            "tissue_area_um2": round(self.area_um2, 3),
            "n_regions": len(self.polygons),
            "empty": self.empty,
        }


def tissue_polygons(
    image: "Image",
    *,
    mode: str = "auto",
    channels: "list[str] | list[int] | None" = None,
    level: int | None = None,
    min_area_um2: float = 2000.0,
    min_hole_um2: float = 10_000.0,
    margin_um: float = 12.0,
) -> Tissue:
    """Find the tissue of a slide.

    Parameters
    ----------
    image
        The slide.
    mode
        ``staining``, ``saturation``, ``none`` (the whole image), or ``auto``: saturation for 8-bit RGB images with a
        bright background, staining for others.
    channels
        Channels to look at; default all. Tissue is where any of them shows some.
    level
        Pyramid level; default the coarsest with pixels of at most 2 µm.
    min_area_um2
        Regions smaller than this are specks of dust.
    min_hole_um2
        Holes smaller than this are filled.
    margin_um
        How much regions are grown.

    Returns
    -------
    Tissue

    Raises
    ------
    CellquiltError
        ``parameter-choice`` for an unknown mode, ``tissue-saturation-channels`` if an image without three channels is
        to be searched by saturation.
    """
    if mode not in MODES:
        raise CellquiltError("parameter-choice", f"tissue mode is {mode!r}", did_you_mean(mode, MODES))
    height, width = int(image.shape[1]), int(image.shape[2])
    pixel = image.pixel_size_um or 1.0
    if mode == "none":
        import shapely

        whole = np.empty(1, dtype=object)
        whole[0] = shapely.box(0, 0, width, height)
        return Tissue(whole, "none", 0, height * width * pixel**2)
    level = _pick_level(image, pixel) if level is None else min(level, image.n_levels - 1)
    pixel_level = pixel * 2**level
    block = max(2, round(_BLOCK_UM / pixel_level))
    if mode == "auto":
        mode = "saturation" if _is_bright_field(image) else "staining"
    if mode == "saturation":
        if image.shape[0] != 3:
            raise CellquiltError(
                "tissue-saturation-channels",
                f"tissue by saturation needs three colour channels, the image has {image.shape[0]}",
                "use --tissue_mode staining",
            )
        mask = _saturated(image, level, block)
    else:
        mask = _stained(image, level, block, channels)
    block_um = block * pixel_level
    mask = _clean(mask, block_um, min_area_um2, min_hole_um2, margin_um)
    polygons = _outlines(mask, block * 2**level, (height, width))
    import shapely

    return Tissue(polygons, mode, level, float(shapely.area(polygons).sum()) * pixel**2)


def _pick_level(image: "Image", pixel: float) -> int:
    levels = [k for k in range(image.n_levels) if pixel * 2**k <= _LEVEL_UM and min(image.level_shape(k)[-2:]) >= 32]
    return max(levels, default=0)


def _is_bright_field(image: "Image") -> bool:
    if image.shape[0] != 3 or np.dtype(image.dtype) != np.uint8:
        return False
    names = [str(name).lower() for name in image.channels]
    if names in (["r", "g", "b"], ["red", "green", "blue"]):
        return True
    level = image.n_levels - 1
    height, width = image.level_shape(level)[-2:]
    part = image.read(0, min(height, 2048), 0, min(width, 2048), level=level)
    return bool(np.median(part) > 128)


def _block_sums(values: np.ndarray, block: int) -> np.ndarray:
    """Sums over blocks of a (h, w) array whose sides are multiples of `block`."""
    height, width = values.shape
    return values.reshape(height // block, block, width // block, block).sum(axis=(1, 3), dtype=np.float64)


def _padded(part: np.ndarray, block: int) -> np.ndarray:
    """Extend (C, h, w) to multiples of `block` with the edge's values."""
    bottom, right = (-part.shape[1]) % block, (-part.shape[2]) % block
    return np.pad(part, ((0, 0), (0, bottom), (0, right)), mode="edge") if bottom or right else part


def _windows(image: "Image", level: int, block: int) -> Any:
    size = max(block, 2048 // block * block)
    yield from image.windows(size, level=level)


def _stained(image: "Image", level: int, block: int, channels: Any) -> np.ndarray:
    """Blocks whose surroundings vary more than noise, in any channel."""
    from scipy import ndimage

    height, width = image.level_shape(level)[-2:]
    picked = list(range(image.shape[0])) if channels is None else list(channels)
    grid = (-(-height // block), -(-width // block))
    mean = np.zeros((len(picked), *grid))
    square = np.zeros((len(picked), *grid))
    for y0, y1, x0, x1 in _windows(image, level, block):
        part = _padded(image.read(y0, y1, x0, x1, channels=picked, level=level).astype(np.float32), block)
        at = (
            slice(y0 // block, y0 // block + part.shape[1] // block),
            slice(x0 // block, x0 // block + part.shape[2] // block),
        )
        for k, plane in enumerate(part):
            # Subtracting a level close to the values keeps the squares exact enough.
            base = float(plane[0, 0])
            shifted = plane - base
            total = _block_sums(shifted, block) / block**2
            mean[k][at] = total + base
            square[k][at] = np.maximum(_block_sums(shifted * shifted, block) / block**2 - total**2, 0)
    noise = _noise(image, level, picked)
    mask = np.zeros(grid, dtype=bool)
    for k in range(len(picked)):
        # Variance over 3 × 3 blocks: within the blocks plus between their means.
        between = ndimage.uniform_filter(mean[k] ** 2, 3, mode="nearest") - (
            ndimage.uniform_filter(mean[k], 3, mode="nearest") ** 2
        )
        spread = np.sqrt(ndimage.uniform_filter(square[k], 3, mode="nearest") + np.maximum(between, 0))
        above = spread > max(_NOISE_FACTOR * noise[k], 1e-9)
        if above.any():
            mask |= above & (spread > _LEAST_PART * np.quantile(spread[above], 0.9))
    return mask


def _noise(image: "Image", level: int, channels: Any) -> np.ndarray:
    """White noise expected at a level, from diagonal differences at full resolution in a few places."""
    height, width = int(image.shape[1]), int(image.shape[2])
    side = min(256, height, width)
    if side < 2:  # a line of pixels has no diagonals
        return np.zeros(len(channels))
    ys, xs = (np.unique(np.linspace(0, length - side, 5).astype(int)) for length in (height, width))
    found = []
    for y in ys:
        for x in xs:
            part = image.read(int(y), int(y) + side, int(x), int(x) + side, channels=channels).astype(np.float32)
            difference = np.abs(part[:, 1:, 1:] - part[:, :-1, :-1]).reshape(len(part), -1)
            found.append(np.quantile(difference, 0.25, axis=1) / (0.31864 * np.sqrt(2.0)))
    return np.median(found, axis=0) / 2**level


def _saturated(image: "Image", level: int, block: int) -> np.ndarray:
    """Blocks whose mean saturation is above Otsu's threshold."""
    height, width = image.level_shape(level)[-2:]
    grid = (-(-height // block), -(-width // block))
    saturation = np.zeros(grid)
    for y0, y1, x0, x1 in _windows(image, level, block):
        part = _padded(image.read(y0, y1, x0, x1, level=level).astype(np.float32), block)
        top, bottom = part.max(axis=0), part.min(axis=0)
        value = np.divide(top - bottom, top, out=np.zeros_like(top), where=top > 0)
        at = (
            slice(y0 // block, y0 // block + part.shape[1] // block),
            slice(x0 // block, x0 // block + part.shape[2] // block),
        )
        saturation[at] = _block_sums(value, block) / block**2
    # Tissue that fills the image has no background to be split from: never ask for more than a third of its colour.
    threshold = min(_otsu(saturation.ravel()), float(np.quantile(saturation, 0.9)) / 3)
    return saturation > max(threshold, _LEAST_SATURATION)


def _otsu(values: np.ndarray) -> float:
    """Otsu's threshold (Otsu 1979): the split with the largest variance between the classes."""
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[1:] + edges[:-1]) / 2
    left, right = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    mean_left = np.cumsum(counts * centres) / np.maximum(left, 1)
    mean_right = (np.cumsum((counts * centres)[::-1]) / np.maximum(np.cumsum(counts[::-1]), 1))[::-1]
    between = left[:-1] * right[1:] * (mean_left[:-1] - mean_right[1:]) ** 2
    return float(centres[np.argmax(between)])


def _clean(mask: np.ndarray, block_um: float, min_area: float, min_hole: float, margin: float) -> np.ndarray:
    from scipy import ndimage

    mask = _drop_small(mask, min_area / block_um**2)
    mask = ~_drop_small(~mask, min_hole / block_um**2) if mask.any() else mask
    if margin > 0 and mask.any() and not mask.all():
        mask = ndimage.distance_transform_edt(~mask) * block_um <= margin + 0.5 * block_um
    return mask


def _drop_small(mask: np.ndarray, least: float) -> np.ndarray:
    """Keep 4-connected parts of at least this many blocks, or parts that no smaller image could hold."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    keep = sizes >= min(least, max(mask.size / 4, 1))
    keep[0] = False
    return keep[labels]


def _outlines(mask: np.ndarray, scale: int, shape: tuple[int, int]) -> np.ndarray:
    """Polygons in global pixels of the parts of a block mask."""
    import shapely
    from scipy import ndimage

    from cellquilt.geometry.polygonize import labels_to_polygons

    labels, count = ndimage.label(mask)
    if not count:
        return np.empty(0, dtype=object)
    geometry = np.asarray(labels_to_polygons(labels.astype(np.int32))[1], dtype=object)
    geometry = shapely.transform(geometry, lambda xy: xy * scale)
    geometry = shapely.intersection(geometry, shapely.box(0, 0, shape[1], shape[0]))
    return np.asarray(geometry[~shapely.is_empty(geometry)], dtype=object)
