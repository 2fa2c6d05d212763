"""Patches around cells, cut from an image tile by tile.

Pixels of patches are means of the image's, weighted by triangles twice as wide as they are: no aliasing. Where pixels
are more than four times finer the image is first made smaller by a whole factor, as means of blocks counted from its
corner (or by its pyramid), so that triangles stay small. No patch depends on which others are cut with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.transforms import apply
from cellquilt.domains.images.slide_image import SlideImage

#: Pixels to one of a patch that are left to triangles.
_FINEST = 2.0


@dataclass(frozen=True)
class Cut:
    """How patches are cut.

    Attributes
    ----------
    patch_um
        Width of a patch.
    um_per_px
        Width of its pixels.
    """

    patch_um: float
    um_per_px: float

    @property
    def size(self) -> int:
        """Pixels along each side."""
        return max(1, round(self.patch_um / self.um_per_px))


def patches(
    image: SlideImage, xy_um: NDArray[np.float64], rows: NDArray[np.int64], cut: Cut, most: int, memory_mb: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Patches around cells.

    Parameters
    ----------
    image
        Where they are cut from. Beyond its border its last pixels are repeated.
    xy_um
        (n_cells, 2) centres of all cells.
    rows
        Cells whose patches are wanted.
    cut
        Their size.
    most
        Patches at once.
    memory_mb
        Memory for the window of the image that is open.

    Yields
    ------
    rows, patches
        (m,) and (m, channels, size, size) float32, by place and not in the order of `rows`. A patch's axes are those
        of the cells' coordinates, however the image is turned.

    Raises
    ------
    CellquiltError
        ``memory-too-small`` where a single patch needs more.
    """
    step = image.um_to_px[:2, :2] * cut.um_per_px
    reach = np.linalg.norm(step, axis=1)
    factor = np.maximum(np.floor(reach / _FINEST + 1e-6), 1).astype(np.int64)
    level = image.level(int(factor.min()))
    factor = np.maximum(factor >> level, 1)
    whole = factor * 2**level
    step, reach = step / whole[:, None], np.maximum(reach / whole, 1.0)
    centre = apply(image.um_to_px, xy_um[rows]) / whole
    reader = _Reader(image, level, int(factor[1]), int(factor[0]))
    half = np.abs(step).sum(axis=1) * (cut.size - 1) / 2 + reach + 1
    side = reader.side(memory_mb) - 2 * half.max()
    if side < 1:
        raise CellquiltError(
            "memory-too-small",
            f"a patch of {cut.patch_um:g} µm does not fit into {memory_mb} MB",
            "raise memory_mb, or use smaller patches",
        )
    tile = np.floor(centre / side).astype(np.int64)
    order = np.lexsort((rows, tile[:, 0], tile[:, 1]))
    borders = np.flatnonzero((np.diff(tile[order], axis=0) != 0).any(axis=1)) + 1
    kernel: Any = _sample if step[0, 1] or step[1, 0] else _sample_straight
    for group in np.split(order, borders) if order.size else []:
        low, high = centre[group].min(axis=0) - half, centre[group].max(axis=0) + half
        window, top, left = reader.window(low, high)
        for start in range(0, group.size, most):
            part = group[start : start + most]
            out = np.empty((part.size, image.shape[0], cut.size, cut.size), dtype=np.float32)
            kernel(window, top, left, *reader.shape, centre[part], step, reach, out)
            yield rows[part], out
        del window  # before the next is read


class _Reader:
    """Windows of an image that was made smaller by whole factors."""

    def __init__(self, image: SlideImage, level: int, high: int, wide: int) -> None:
        self.image, self.level, self.high, self.wide = image, level, high, wide
        self._whole = tuple(-(-n // 2**level) for n in image.shape[1:])
        self.shape = (-(-self._whole[0] // high), -(-self._whole[1] // wide))

    def side(self, memory_mb: int) -> float:
        """Width of a window that fits into memory."""
        # What is read is there more than once where chunks are put together.
        pixel = self.image.shape[0] * (3 * self.image.item_size * self.high * self.wide + 4)
        return float(np.sqrt(memory_mb * 2**20 / pixel))

    def window(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> tuple[NDArray[np.float32], int, int]:
        """The pixels between two corners (x, y), as far as there are any, and the first row and column."""
        height, width = self.shape
        x0, y0 = np.clip(np.floor(low).astype(np.int64), 0, [width - 1, height - 1]).tolist()
        x1, y1 = np.clip(np.ceil(high).astype(np.int64) + 1, [x0 + 1, y0 + 1], [width, height]).tolist()
        source = self.image.read(
            y0 * self.high, min(y1 * self.high, self._whole[0]), x0 * self.wide, min(x1 * self.wide, self._whole[1]),
            self.level,
        )  # fmt: skip
        out = np.empty((len(source), y1 - y0, x1 - x0), dtype=np.float32)
        kernel: Any = _means
        kernel(source.astype(source.dtype.newbyteorder("="), copy=False), self.high, self.wide, self.image.unit, out)
        return out, y0, x0


@numba.njit(cache=True, nogil=True, parallel=True)
def _means(source, high, wide, unit, out):
    channels, height, width = source.shape
    for row in numba.prange(out.shape[1]):
        for c in range(channels):
            for column in range(out.shape[2]):
                bottom, right = min((row + 1) * high, height), min((column + 1) * wide, width)
                total = 0.0
                for y in range(row * high, bottom):
                    for x in range(column * wide, right):
                        total += source[c, y, x]
                out[c, row, column] = total * unit / ((bottom - row * high) * (right - column * wide))


@numba.njit(cache=True, nogil=True)
def _taps(at, reach, length, start, place, weight):
    """Pixels along one axis around a place, those beyond the border being the last one, and their weights."""
    first, total = np.int64(np.ceil(at - reach)), 0.0
    for t in range(place.size):
        near = max(0.0, 1.0 - abs(first + t - at) / reach)
        place[t] = min(max(first + t, 0), length - 1) - start
        weight[t] = near
        total += near
    for t in range(place.size):
        weight[t] /= total


@numba.njit(cache=True, nogil=True, parallel=True)
def _sample(window, top, left, height, width, centre, step, reach, out):
    n, channels, size, _ = out.shape
    taps_x, taps_y = int(np.ceil(2 * reach[0] - 1e-9)), int(np.ceil(2 * reach[1] - 1e-9))
    for k in numba.prange(n):
        place_x, weight_x = np.empty(taps_x, np.int64), np.empty(taps_x, np.float32)
        place_y, weight_y = np.empty(taps_y, np.int64), np.empty(taps_y, np.float32)
        for i in range(size):
            v = i - (size - 1) / 2
            for j in range(size):
                u = j - (size - 1) / 2
                # Centres of pixels lie at halves.
                x = centre[k, 0] + step[0, 0] * u + step[0, 1] * v - 0.5
                y = centre[k, 1] + step[1, 0] * u + step[1, 1] * v - 0.5
                _taps(x, reach[0], width, left, place_x, weight_x)
                _taps(y, reach[1], height, top, place_y, weight_y)
                for c in range(channels):
                    total = np.float32(0.0)
                    for a in range(taps_y):
                        line = np.float32(0.0)
                        for b in range(taps_x):
                            line += weight_x[b] * window[c, place_y[a], place_x[b]]
                        total += weight_y[a] * line
                    out[k, c, i, j] = total


@numba.njit(cache=True, nogil=True, parallel=True)
def _sample_straight(window, top, left, height, width, centre, step, reach, out):
    """As `_sample` for images that are not turned: rows first, then columns."""
    n, channels, size, _ = out.shape
    taps_x, taps_y = int(np.ceil(2 * reach[0] - 1e-9)), int(np.ceil(2 * reach[1] - 1e-9))
    for k in numba.prange(n):
        place_x, weight_x = np.empty((size, taps_x), np.int64), np.empty((size, taps_x), np.float32)
        place_y, weight_y = np.empty(taps_y, np.int64), np.empty(taps_y, np.float32)
        for j in range(size):
            x = centre[k, 0] + step[0, 0] * (j - (size - 1) / 2) - 0.5
            _taps(x, reach[0], width, left, place_x[j], weight_x[j])
        low, high = place_x.min(), place_x.max() + 1
        place_x -= low
        line = np.empty(high - low, np.float32)
        for i in range(size):
            y = centre[k, 1] + step[1, 1] * (i - (size - 1) / 2) - 0.5
            _taps(y, reach[1], height, top, place_y, weight_y)
            for c in range(channels):
                line[:] = 0.0
                for a in range(taps_y):
                    row, weight = window[c, place_y[a], low:high], weight_y[a]
                    for x in range(line.size):
                        line[x] += weight * row[x]
                for j in range(size):
                    total = np.float32(0.0)
                    for b in range(taps_x):
                        total += weight_x[j, b] * line[place_x[j, b]]
                    out[k, c, i, j] = total
