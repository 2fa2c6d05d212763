"""Intensity normalisation, decided once per slide: a pixel gets the same value in every patch.

Percentiles of whole slides fail, because they are percentiles of the background: the 99th percentile of the same nuclei
falls from 1073 to 287 when tissue fills only a tenth of the slide. Percentiles of a patch fail, because the same cell
then looks different in two patches, and a seam shows. So here they are percentiles of tissue pixels at full resolution,
after the slide has been flattened by a smooth field:

1. A seeded sample of small blocks in tissue gives each its level and contrast. Only *blocks with signal* (contrast well
   above their noise) count, so that neither the density of cells nor the share of background changes the result.
2. Local linear regression (Cleveland 1979, with a Gaussian kernel and shrunken slopes) of the blocks' level and
   log-contrast gives both on a grid of about 500 µm; where there is too little tissue, wider kernels take over.
3. The percentiles of the sampled pixels, flattened by that field, become 0 and 1.

A grid point's contrast is never taken for less than a part of the slide's or a multiple of the noise: dim fields are
not blown up to noise.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:
    from cellquilt.core.images import Image

MODES = ("field", "global", "none", "patch")

_BLOCK_UM = 25.0  # a few cells wide: contains both cell and background where there are cells
_WINDOW_PX = 256
_MAX_WINDOWS = 20_000  # bounds memory and time on any slide
_WINDOWS_PER_NODE = 8
_SAMPLES_PER_WINDOW = 4096
_NOISE_FACTOR = 4.0  # pure noise has a block contrast of about 2 sigma
_LEAST_PART = 0.1  # of the slide's contrast
_SHRINK = 0.02  # of a kernel's variance, against wild slopes
_FEW_BLOCKS = 0.3
_TRIM = 3.0
_TRIM_ROUNDS = 4
_KERNEL = 0.35  # sigma of the regression's kernel in units of `field_um`
#: Grid points for each `field_um`: a kernel is then wider than their spacing, so that what is interpolated between them
#: does not depend on where the grid happens to lie on the tissue.
_FINER = 4


@dataclass(frozen=True)
class Normalization:
    """Values that become 0 and 1, on a grid over the slide.

    Attributes
    ----------
    mode
        One of `MODES`; ``patch`` takes each patch's own percentiles and is a negative control only.
    low, high
        (C, ny, nx) float64 intensities.
    spacing_px
        (y, x) distance of grid points; the first lies on the image's corner, the last on the opposite one.
    percentiles
        The lower and upper percentile.
    """

    mode: str
    low: np.ndarray
    high: np.ndarray
    spacing_px: tuple[float, float]
    percentiles: tuple[float, float] = (1.0, 99.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a bundle."""
        return {
            "mode": self.mode,
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "spacing_px": list(self.spacing_px),
            "percentiles": list(self.percentiles),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Normalization":
        """The inverse of `as_dict`."""
        return cls(
            data["mode"],
            np.array(data["low"], dtype=np.float64),
            np.array(data["high"], dtype=np.float64),
            (float(data["spacing_px"][0]), float(data["spacing_px"][1])),
            (float(data["percentiles"][0]), float(data["percentiles"][1])),
        )

    @classmethod
    def nothing(cls, n_channels: int) -> "Normalization":
        """Leaves intensities as they are."""
        return cls("none", np.zeros((n_channels, 1, 1)), np.ones((n_channels, 1, 1)), (1.0, 1.0))

    def apply(self, pixels: np.ndarray, y0: int, x0: int) -> np.ndarray:
        """Normalise a part of the slide.

        Parameters
        ----------
        pixels
            (C, h, w) of any real dtype.
        y0, x0
            The slide's pixel that ``pixels[:, 0, 0]`` is.

        Returns
        -------
        numpy.ndarray
            (C, h, w) float32; for one slide pixel the same bits whatever part it came in.
        """
        if self.mode == "none":
            return np.ascontiguousarray(pixels, dtype=np.float32)
        low, high = (self.low, self.high) if self.mode != "patch" else self._own(pixels)
        out = np.empty(pixels.shape, dtype=np.float32)
        for channel in range(pixels.shape[0]):
            plane = np.ascontiguousarray(pixels[channel])
            _apply(plane, low[channel], high[channel], *self.spacing_px, y0, x0, out[channel])
        return out

    def _own(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = np.percentile(pixels.reshape(len(pixels), -1), self.percentiles, axis=1)
        high = np.maximum(values[1], values[0] + 1e-6)
        return values[0].reshape(-1, 1, 1), high.reshape(-1, 1, 1)


@numba.njit(cache=True, nogil=True)
def _apply(plane, low, high, spacing_y, spacing_x, y0, x0, out):  # type: ignore[no-untyped-def]
    """(value - low) / (high - low) with bilinearly interpolated low and high, constant beyond the outer grid points."""
    ny, nx = low.shape
    height, width = plane.shape
    left = np.empty(width, np.int64)
    share = np.empty(width, np.float64)
    for j in range(width):
        at = min(max((x0 + j + 0.5) / spacing_x, 0.0), nx - 1.0)
        left[j] = min(int(at), max(nx - 2, 0))
        share[j] = at - left[j]
    for i in range(height):
        at = min(max((y0 + i + 0.5) / spacing_y, 0.0), ny - 1.0)
        top = min(int(at), max(ny - 2, 0))
        v = at - top
        below = min(top + 1, ny - 1)
        for j in range(width):
            a, b, u = left[j], min(left[j] + 1, nx - 1), share[j]
            lo = (low[top, a] * (1 - u) + low[top, b] * u) * (1 - v) + (low[below, a] * (1 - u) + low[below, b] * u) * v
            hi = (high[top, a] * (1 - u) + high[top, b] * u) * (1 - v) + (
                high[below, a] * (1 - u) + high[below, b] * u
            ) * v
            out[i, j] = (plane[i, j] - lo) / (hi - lo)


def estimate_normalization(
    image: "Image",
    channels: "list[int] | list[str]",
    *,
    mode: str = "field",
    regions: np.ndarray | None = None,
    low: float = 1.0,
    high: float = 99.0,
    field_um: float = 500.0,
    seed: int = 0,
    joint: bool = False,
) -> Normalization:
    """Decide the normalisation of a slide from a seeded sample of its tissue at full resolution.

    Parameters
    ----------
    image
        The slide.
    channels
        Segmentation channels, by name or number.
    mode
        ``field`` (grid of percentiles), ``global`` (one pair for the slide) or ``none``; ``patch`` for experiments.
    regions
        (n,) tissue polygons in global pixels; None takes the whole image.
    low, high
        Percentiles that become 0 and 1.
    field_um
        Spacing of the grid in µm.
    seed
        Seed of the sample.
    joint
        One pair of values for all channels, which keeps colours.

    Returns
    -------
    Normalization
        With values for every grid point; where there is too little tissue, those of the neighbourhood.
    """
    n_channels = len(channels)
    height, width = int(image.shape[1]), int(image.shape[2])
    if mode == "none":
        return Normalization.nothing(n_channels)
    if mode == "patch":
        return Normalization(
            "patch", np.zeros((n_channels, 1, 1)), np.ones((n_channels, 1, 1)), (1.0, 1.0), (low, high)
        )
    pixel = image.pixel_size_um or 1.0
    step = field_um / pixel
    # Intervals of the grid; the sample is balanced over them in any mode.
    parts = max(1, round(height / step)), max(1, round(width / step))
    spacing = (height / parts[0], width / parts[1])
    blocks = _sample(image, channels, regions, parts, spacing, pixel, seed)
    if joint:
        blocks = _joined(blocks)
    nodes = (1, 1) if mode == "global" else (parts[0] * _FINER, parts[1] * _FINER)
    spacing = (height / nodes[0], width / nodes[1])
    fields = [
        _field(blocks, channel, mode, nodes, spacing, _KERNEL * step, (low, high))
        for channel in range(1 if joint else n_channels)
    ] * (n_channels if joint else 1)
    return Normalization(
        mode, np.stack([field[0] for field in fields]), np.stack([field[1] for field in fields]), spacing, (low, high)
    )


@dataclass(frozen=True)
class _Blocks:
    """Sampled blocks of tissue: (n, 2) centre in pixels (y, x), (n, C, k) pixels, (n, C) level, contrast, noise."""

    centre: np.ndarray
    pixels: np.ndarray
    level: np.ndarray
    contrast: np.ndarray
    noise: np.ndarray


def _joined(blocks: _Blocks) -> _Blocks:
    """The channels of every block as one: from the lowest level to the highest light."""
    level = blocks.level.min(axis=1, keepdims=True)
    return _Blocks(
        blocks.centre,
        blocks.pixels.reshape(len(blocks.pixels), 1, -1),
        level,
        (blocks.level + blocks.contrast).max(axis=1, keepdims=True) - level,
        blocks.noise.max(axis=1, keepdims=True),
    )


def _sample(
    image: "Image",
    channels: Any,
    regions: np.ndarray | None,
    n_nodes: tuple[int, int],
    spacing: tuple[float, float],
    pixel_um: float,
    seed: int,
) -> _Blocks:
    height, width = int(image.shape[1]), int(image.shape[2])
    side = min(_WINDOW_PX, height, width)
    block = int(np.clip(round(_BLOCK_UM / pixel_um), 8, max(8, side // 2)))
    block = min(block, side)
    windows = _choose(height, width, side, regions, n_nodes, spacing, seed)
    per_side = side // block
    kept = max(16, _SAMPLES_PER_WINDOW // per_side**2)
    picks = np.sort(np.random.default_rng(seed).permutation(block * block)[:kept])
    chunk = max(int(image.chunk_px), side)
    order = np.lexsort((windows[:, 1], windows[:, 0], windows[:, 1] // chunk, windows[:, 0] // chunk))
    windows = windows[order]
    # One read for all windows of a chunk: a chunk is decompressed whole anyway.
    keys = (windows // chunk)[:, 0] * (width // chunk + 1) + (windows // chunk)[:, 1]
    bounds = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1], True]) if len(keys) else np.array([0])
    parts: list[tuple[np.ndarray, ...]] = []
    for begin, end in itertools.pairwise(bounds):
        y0, x0 = windows[begin:end].min(axis=0)
        y1, x1 = windows[begin:end].max(axis=0) + side
        pixels = image.read(int(y0), int(y1), int(x0), int(x1), channels=channels)
        for y, x in windows[begin:end] - (y0, x0):
            square = pixels[:, y : y + per_side * block, x : x + per_side * block]
            blocks = square.reshape(len(square), per_side, block, per_side, block).transpose(1, 3, 0, 2, 4)
            blocks = blocks.reshape(per_side**2, len(square), block, block)
            sample = blocks.reshape(*blocks.shape[:2], -1)[:, :, picks]
            corner = np.stack(np.meshgrid(*2 * [np.arange(per_side) * block], indexing="ij"), axis=-1).reshape(-1, 2)
            parts.append((corner + (y0 + y, x0 + x) + block / 2, sample, *_statistics(blocks)))
    if not parts:
        empty = np.empty((0, len(channels)))
        return _Blocks(np.empty((0, 2)), np.empty((0, len(channels), kept)), empty, empty, empty)
    return _Blocks(*(np.concatenate(items) for items in zip(*parts, strict=True)))


def _choose(
    height: int,
    width: int,
    side: int,
    regions: np.ndarray | None,
    n_nodes: tuple[int, int],
    spacing: tuple[float, float],
    seed: int,
) -> np.ndarray:
    """A seeded choice of (n, 2) window corners (y, x) in tissue, at most some for every interval of the grid."""
    # The last window ends with the slide, or up to a window's width of tissue there would never be sampled.
    ys, xs = (np.unique(np.r_[0 : length - side + 1 : side, length - side]) for length in (height, width))
    corners = np.stack(np.meshgrid(ys, xs, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.int64)
    if regions is not None and len(regions):
        import shapely

        boxes = shapely.box(corners[:, 1], corners[:, 0], corners[:, 1] + side, corners[:, 0] + side)
        hit = np.unique(shapely.STRtree(boxes).query(np.asarray(regions, dtype=object), predicate="intersects")[1])
        corners = corners[hit]
    centre = corners + side / 2
    node_y = np.minimum((centre[:, 0] / spacing[0]).astype(np.int64), n_nodes[0] - 1)
    node_x = np.minimum((centre[:, 1] / spacing[1]).astype(np.int64), n_nodes[1] - 1)
    node = node_y * n_nodes[1] + node_x
    count = n_nodes[0] * n_nodes[1]
    cap = int(np.clip(_MAX_WINDOWS // count, 1, _WINDOWS_PER_NODE if count > 1 else 64 * _WINDOWS_PER_NODE))
    key = np.random.default_rng([seed, 1]).random(len(corners))
    order = np.lexsort((key, node))
    sorted_node = node[order]
    first = np.searchsorted(sorted_node, sorted_node, side="left")
    chosen = np.sort(order[np.arange(len(order)) - first < cap])
    return corners[chosen]


def _statistics(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, C) level, contrast and noise of (n, C, b, b) blocks.

    Level: 2nd percentile of 2 × 2 means. Contrast: from there to the 98th. Noise: sigma from the lower quartile of
    diagonal differences (for Gaussian noise 0.3186 sqrt(2) sigma), which edges of cells hardly touch.
    """
    values = blocks.astype(np.float32)
    if values.shape[-1] < 2:  # of a slide that is a line of pixels
        values = values.repeat(2, axis=-1).repeat(2, axis=-2)
    difference = np.abs(values[..., 1:, 1:] - values[..., :-1, :-1]).reshape(*values.shape[:2], -1)
    noise = np.quantile(difference, 0.25, axis=-1) / (0.31864 * np.sqrt(2.0))
    even = values.shape[-1] // 2 * 2
    values = values[..., :even, :even]
    means = (values[..., ::2, ::2] + values[..., 1::2, ::2] + values[..., ::2, 1::2] + values[..., 1::2, 1::2]) / 4
    low, high = np.quantile(means.reshape(*means.shape[:2], -1), (0.02, 0.98), axis=-1)
    return low.astype(np.float64), (high - low).astype(np.float64), noise.astype(np.float64)


def _field(
    blocks: _Blocks,
    channel: int,
    mode: str,
    parts: tuple[int, int],
    spacing: tuple[float, float],
    sigma_px: float,
    percentiles: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Values of one channel that become 0 and 1, each (ny, nx) on the grid, (1, 1) for ``global``."""
    shape = (1, 1) if mode == "global" else (parts[0] + 1, parts[1] + 1)
    if not len(blocks.centre):
        return np.zeros(shape), np.ones(shape)
    contrast, noise, level = blocks.contrast[:, channel], blocks.noise[:, channel], blocks.level[:, channel]
    sigma = float(np.median(noise))
    above = contrast > np.maximum(_NOISE_FACTOR * noise, 1e-9)
    if not above.any():
        # Nothing but background: a span that keeps its noise small.
        floor = float(np.median(blocks.pixels[:, channel]))
        return np.full(shape, floor), np.full(shape, floor + max(10 * sigma, 1e-3 * max(abs(floor), 1.0)))
    signal = above & (contrast > _LEAST_PART * np.quantile(contrast[above], 0.9))
    signal[signal] = _within_tissue(level[signal], blocks.centre[signal], parts, spacing, sigma_px, sigma)
    contrast, level, centre = contrast[signal], level[signal], blocks.centre[signal]
    pixels = blocks.pixels[signal, channel].astype(np.float64)
    if mode == "global":
        low, high = np.percentile(pixels, percentiles)
        return np.full(shape, low), np.full(shape, max(high, low + 6 * sigma, low + 1e-9))
    values = np.stack([level, np.log(contrast)])
    smooth_level, smooth_log = _local_linear(values, centre, parts, spacing, sigma_px)
    typical = float(np.median(contrast))
    smooth_contrast = np.maximum(np.exp(smooth_log), max(6 * sigma, _LEAST_PART * typical))
    at_level, at_contrast = (_bilinear(field, centre / spacing) for field in (smooth_level, smooth_contrast))
    low, high = np.percentile((pixels - at_level[:, None]) / at_contrast[:, None], percentiles)
    return smooth_level + low * smooth_contrast, smooth_level + max(high, low + 1e-6) * smooth_contrast


def _within_tissue(
    level: np.ndarray,
    centre: np.ndarray,
    parts: tuple[int, int],
    spacing: tuple[float, float],
    sigma_px: float,
    noise: float,
) -> np.ndarray:
    """(n,) bool: blocks whose level is not far below that of the blocks around them.

    Blocks on the outline of the tissue show cells as well as the darker slide beside it, and would make a background
    of the latter. They are outliers of the smooth level on one side; fitting without them and judging all by that fit
    again (one-sided trimming, scale from the median absolute residual) takes a few rounds.
    """
    kept = np.ones(len(level), dtype=bool)
    least = max(noise, 1e-6 * float(np.abs(level).max()))  # where all blocks are alike, rounding makes no outlier
    for _ in range(_TRIM_ROUNDS):
        (smooth,) = _local_linear(level[None, kept], centre[kept], parts, spacing, sigma_px)
        residual = level - _bilinear(smooth, centre / spacing)
        scale = 1.4826 * float(np.median(np.abs(residual[kept] - np.median(residual[kept]))))
        kept = residual >= -max(_TRIM * scale, least)
    return kept


def _bilinear(field: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(n,) values of a grid at (n, 2) positions in intervals."""
    at = np.clip(at, 0, np.array(field.shape) - 1.0)
    corner = np.minimum(at.astype(np.int64), np.maximum(np.array(field.shape) - 2, 0))
    (v, u), (i, j) = (at - corner).T, corner.T
    below, right = np.minimum(i + 1, field.shape[0] - 1), np.minimum(j + 1, field.shape[1] - 1)
    return (field[i, j] * (1 - u) + field[i, right] * u) * (1 - v) + (
        field[below, j] * (1 - u) + field[below, right] * u
    ) * v


def _local_linear(
    values: np.ndarray,
    centre: np.ndarray,
    parts: tuple[int, int],
    spacing: tuple[float, float],
    sigma_px: float,
) -> np.ndarray:
    """Local linear regression of (k, n) values at (n, 2) places onto the points of the grid: (k, ny, nx).

    Kernels are separable and places are binned to a quarter of the grid's spacing, so that the sums over all blocks
    are a few products of small matrices.
    """
    bins = [4 * n for n in parts]
    width = [step / 4 for step in spacing]
    index = [np.minimum((centre[:, k] / width[k]).astype(np.int64), bins[k] - 1) for k in (0, 1)]
    flat = index[0] * bins[1] + index[1]
    count = np.bincount(flat, minlength=bins[0] * bins[1]).reshape(bins).astype(np.float64)
    totals = [np.bincount(flat, value, bins[0] * bins[1]).reshape(bins) for value in values]
    distance = [
        (np.arange(bins[k]) + 0.5)[None, :] * width[k] - (np.arange(parts[k] + 1) * spacing[k])[:, None] for k in (0, 1)
    ]
    moments: dict[tuple[int, int], np.ndarray] = {}
    products: dict[tuple[int, int], np.ndarray] = {}
    for widen, factor in ((1.0, 1.0), (4.0, 1e-3), (16.0, 1e-6), (256.0, 1e-9)):
        kernel = [np.exp(-0.5 * (d / (widen * sigma_px)) ** 2) for d in distance]
        for p, q in ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)):
            left, right = kernel[0] * distance[0] ** p, (kernel[1] * distance[1] ** q).T
            moments[p, q] = moments.get((p, q), 0.0) + factor * (left @ count @ right)
            if p + q < 2:
                sums = np.stack([left @ total @ right for total in totals])
                products[p, q] = products.get((p, q), 0.0) + factor * sums
    weight = np.maximum(moments[0, 0], 1e-300)
    y, x = moments[1, 0] / weight, moments[0, 1] / weight
    mean = products[0, 0] / weight
    # Slopes about the blocks' own centre of mass, shrunken where they are few or lie close together.
    extra = sigma_px**2 * (_SHRINK + _FEW_BLOCKS / np.maximum(weight, 1e-9))
    yy = np.maximum(moments[2, 0] / weight - y * y, 0) + extra
    xx = np.maximum(moments[0, 2] / weight - x * x, 0) + extra
    yx = moments[1, 1] / weight - y * x
    vy, vx = products[1, 0] / weight - mean * y, products[0, 1] / weight - mean * x
    determinant = np.maximum(yy * xx - yx * yx, 1e-300)
    slope_y, slope_x = (vy * xx - vx * yx) / determinant, (vx * yy - vy * yx) / determinant
    # From the centre of mass to the grid point, but not far beyond what a kernel reaches.
    reach = np.minimum(1.0, 1.5 * sigma_px / np.maximum(np.hypot(y, x), 1e-9))
    return mean - (slope_y * y + slope_x * x) * reach
