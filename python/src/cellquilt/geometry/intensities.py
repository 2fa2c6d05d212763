"""Sum, least and greatest pixel of every channel inside polygons, straight from the outlines.

The pixels of a polygon are those of `rasterize`: pixel (row i, column j) if its centre (j + 0.5, i + 0.5) is inside.
Each polygon is measured for itself, so overlapping polygons each get their own exact values, and no label image is
made. A window's contribution is added to what other windows gave, so a polygon may lie across any number of them.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.rasterize import row_crossings, rows_in_window, run_between


class Intensities:
    """Running sums, minima and maxima of polygons × channels.

    Parameters
    ----------
    n_polygons, n_channels
        The size of the result.
    dtype
        Of the pixels. Integers are summed exactly (in 64 bits), floats in float64.

    Attributes
    ----------
    n_pixels
        (n_polygons,) int64, pixel centres inside.
    sums
        (n_polygons, n_channels) uint64, int64 or float64.
    lowest, highest
        (n_polygons, n_channels) in the pixels' dtype; meaningless where `n_pixels` is 0.
    """

    def __init__(self, n_polygons: int, n_channels: int, dtype: np.dtype) -> None:
        dtype = np.dtype(dtype)
        if dtype.kind not in "uif":
            raise TypeError(f"pixels of type {dtype} cannot be measured, expected integers or floats")
        sum_type = {"u": np.uint64, "i": np.int64, "f": np.float64}[dtype.kind]
        least, greatest = (-np.inf, np.inf) if dtype.kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        shape = (n_polygons, n_channels)
        self.n_pixels = np.zeros(n_polygons, dtype=np.int64)
        self.sums = np.zeros(shape, dtype=sum_type)
        self.lowest = np.full(shape, greatest, dtype=dtype)
        self.highest = np.full(shape, least, dtype=dtype)

    def add(self, block: NDArray, y0: int, x0: int, rings: Rings, subset: NDArray[np.int64] | None = None) -> None:
        """Add the pixels of one window; windows must not overlap.

        Parameters
        ----------
        block
            (n_channels, height, width) pixels of the type given at the start.
        y0, x0
            Position of the window's first pixel.
        rings
            The polygons, in pixels.
        subset
            Positions of the polygons that may reach into the window. Default: all. Two threads may add at the same
            time if their subsets have no polygon in common.
        """
        if block.ndim != 3 or block.shape[0] != self.sums.shape[1] or block.dtype != self.lowest.dtype:
            raise ValueError(
                f"block of shape {block.shape} and type {block.dtype}, "
                f"expected {self.sums.shape[1]} channels of type {self.lowest.dtype}"
            )
        if subset is None:
            subset = np.arange(len(rings), dtype=np.int64)
        _accumulate(
            np.ascontiguousarray(block), y0, x0, rings.coords, rings.ring_offsets, rings.polygon_offsets, subset,
            self.n_pixels, self.sums, self.lowest, self.highest,
        )  # fmt: skip

    def mean(self) -> NDArray[np.float64]:
        """(n_polygons, n_channels) float64; NaN for a polygon without a pixel centre."""
        out = np.full(self.sums.shape, np.nan)
        np.divide(self.sums, self.n_pixels[:, None], out=out, where=self.n_pixels[:, None] > 0)
        return out

    def min(self) -> NDArray[np.float64]:
        """(n_polygons, n_channels) float64; NaN for a polygon without a pixel centre."""
        return np.where(self.n_pixels[:, None] > 0, self.lowest.astype(np.float64), np.nan)

    def max(self) -> NDArray[np.float64]:
        """(n_polygons, n_channels) float64; NaN for a polygon without a pixel centre."""
        return np.where(self.n_pixels[:, None] > 0, self.highest.astype(np.float64), np.nan)


def accumulate_channels(
    block: NDArray, origin: tuple[int, int], rings: Rings, subset: NDArray[np.int64] | None, out: Intensities
) -> None:
    """Add one window, whose first pixel is at `origin` (y0, x0), to `out`; see `Intensities.add`."""
    out.add(block, *origin, rings, subset)


@numba.njit(cache=True, nogil=True)
def _accumulate(
    block, y0, x0, coords, ring_offsets, polygon_offsets, subset, n_pixels, sums, lowest, highest
):  # fmt: skip
    n_channels, h, w = block.shape
    starts = np.empty(h + 1, dtype=np.int64)
    xs = np.empty(256, dtype=np.float64)
    lefts = np.empty(256, dtype=np.int32)
    rights = np.empty(256, dtype=np.int32)
    rows = np.empty(256, dtype=np.int32)
    for k in range(subset.size):
        p = subset[k]
        ring_start, ring_stop = polygon_offsets[p], polygon_offsets[p + 1]
        row, n_rows = rows_in_window(coords[ring_offsets[ring_start] : ring_offsets[ring_stop]], y0, x0, h, w)
        if n_rows == 0:
            continue
        xs = row_crossings(coords, ring_start, ring_stop, ring_offsets, row, n_rows, starts, xs)
        # First the runs of pixels, then channel by channel, so that each channel's sums stay in registers.
        if xs.size > lefts.size:
            lefts = np.empty(xs.size, dtype=np.int32)
            rights = np.empty(xs.size, dtype=np.int32)
            rows = np.empty(xs.size, dtype=np.int32)
        n_runs = 0
        n = 0
        for i in range(n_rows):
            for c in range(starts[i], starts[i + 1] - 1, 2):
                left, right = run_between(xs[c], xs[c + 1], x0, w)
                if left < right:
                    rows[n_runs], lefts[n_runs], rights[n_runs] = row - y0 + i, left, right
                    n_runs += 1
                    n += right - left
        if n == 0:
            continue
        n_pixels[p] += n
        for channel in range(n_channels):
            total = sums[p, channel]
            least = lowest[p, channel]
            greatest = highest[p, channel]
            for run in range(n_runs):
                pixels = block[channel, rows[run], lefts[run] : rights[run]]
                for x in range(pixels.size):  # three loops are faster than one: the compiler can use vectors
                    total += pixels[x]
                for x in range(pixels.size):
                    least = min(least, pixels[x])
                for x in range(pixels.size):
                    greatest = max(greatest, pixels[x])
            sums[p, channel] = total
            lowest[p, channel] = least
            highest[p, channel] = greatest
