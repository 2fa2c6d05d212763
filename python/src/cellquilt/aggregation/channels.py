"""Channel intensities per cell, streamed over the windows of an image."""

from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.core.images import Image
from cellquilt.core.transforms import Affine, apply
from cellquilt.geometry.intensities import Intensities
from cellquilt.geometry.locate import in_threads
from cellquilt.geometry.outlines import Outlines
from cellquilt.geometry.polygons import Rings, offsets_of

Statistic = Literal["mean", "min", "max"]
_MIN_CELLS_PER_THREAD = 256
_WINDOW_BYTES = 64 << 20
_BYTES_A_VERTEX = 16


@dataclass
class ChannelTable:
    """Intensities of cells.

    Attributes
    ----------
    channels
        Names of the channels, in the image's order.
    mean, min, max
        (n_cells, n_channels) float64; NaN for a cell that has no pixel centre inside the image.
    n_pixels
        (n_cells,) int64, pixel centres of the cell that lie inside the image.
    """

    channels: list[str]
    mean: NDArray[np.float64]
    min: NDArray[np.float64]
    max: NDArray[np.float64]
    n_pixels: NDArray[np.int64]

    def take(self, rows: NDArray) -> "ChannelTable":
        """The given cells (index or boolean mask)."""
        return ChannelTable(self.channels, self.mean[rows], self.min[rows], self.max[rows], self.n_pixels[rows])


def measure_channels(
    image: Image,
    cells: Rings,
    *,
    to_pixels: Affine | None = None,
    window_px: int | None = None,
    threads: int = 1,
) -> ChannelTable:
    """Mean, least and greatest pixel of every channel in every cell.

    Parameters
    ----------
    image
        The image; only windows that hold a cell are read.
    cells
        The cells' outlines. A pixel belongs to a cell if its centre lies inside (see `geometry.rasterize`); of
        overlapping cells each gets all its pixels. Cells may reach over the image's edges.
    to_pixels
        (3, 3) map from the outlines' coordinates to the image's pixels. Default: they are in pixels.
    window_px
        Width of the windows that are read at a time. Default: a chunk, or more of them where chunks are small (64 MiB
        of pixels at most). The result does not depend on it: sums of integers are exact (float sums agree to
        rounding).
    threads
        Threads that share the cells of a window.
    """
    if to_pixels is not None and not np.array_equal(to_pixels, np.eye(3)):
        cells = Rings(apply(to_pixels, cells.coords), cells.ring_offsets, cells.polygon_offsets, cells.exterior)
    n_channels, height, width = image.shape
    size = window_px or _window_size(image)
    columns = -(-width // size)
    out = Intensities(len(cells), n_channels, image.dtype)
    offsets, members = _cells_by_window(cells.bounds(), size, -(-height // size), columns)
    for y0, y1, x0, x1 in image.windows(size):
        window = y0 // size * columns + x0 // size
        here = members[offsets[window] : offsets[window + 1]]
        if here.size == 0:
            continue
        _add_window(out, image.read(y0, y1, x0, x1), y0, x0, cells, here, threads)
    return ChannelTable(list(image.channels), out.mean(), out.min(), out.max(), out.n_pixels)


def measure_outlines(
    image: Image, cells: Outlines, *, to_pixels: Affine, memory_mb: int = 1500, threads: int = 1
) -> ChannelTable:
    """As `measure_channels`, for cells whose outlines together may be more than memory holds.

    Parameters
    ----------
    image, to_pixels, threads
        As in `measure_channels`.
    cells
        The cells' outlines. They are taken by strips of the image; the file is read once for each strip.
    memory_mb
        An eighth of it bounds the outlines of a strip.
    """
    n, n_channels = len(cells), image.shape[0]
    mean, low, high = (np.full((n, n_channels), np.nan) for _ in range(3))
    table = ChannelTable(list(image.channels), mean, low, high, np.zeros(n, dtype=np.int64))
    strip = _strips(image, cells, to_pixels, memory_mb * 1_000_000 // 8)
    for number in range(strip.max(initial=-1) + 1):
        here = strip == number
        part = measure_channels(image, cells.rings(here, matrix=to_pixels), threads=threads)
        table.mean[here], table.min[here], table.max[here] = part.mean, part.min, part.max
        table.n_pixels[here] = part.n_pixels
    return table


def _strips(image: Image, cells: Outlines, to_pixels: Affine, budget: int) -> NDArray[np.int64]:
    """Strip of every cell: runs of the image's windows, row by row, whose cells take no more than the budget."""
    size = _window_size(image)
    x, y = np.nan_to_num(apply(to_pixels, cells.traits.centroids)).T // size
    order = np.lexsort((x, y))
    ends = np.cumsum(np.maximum(cells.traits.n_vertices[order], 1) * _BYTES_A_VERTEX)
    strip = np.zeros(order.size, dtype=np.int64)
    if order.size:
        n_strips = -(-ends[-1] // budget)
        strip[order] = (ends - 1) * n_strips // ends[-1]
    return strip


def _add_window(
    out: Intensities, block: NDArray, y0: int, x0: int, cells: Rings, here: NDArray[np.int64], threads: int
) -> None:
    # Cells of one slice are no other slice's: threads never write to the same place.
    in_threads(lambda part: out.add(block, y0, x0, cells, here[part]), here.size, threads, _MIN_CELLS_PER_THREAD)


def _window_size(image: Image) -> int:
    """A multiple of the chunk width with at most `_WINDOW_BYTES` of pixels, and at least one chunk."""
    chunk = image.chunk_px
    widest = int((_WINDOW_BYTES / (image.shape[0] * image.dtype.itemsize)) ** 0.5)
    return chunk * max(1, min(widest, 2048) // chunk)


def _cells_by_window(
    bounds: NDArray[np.float64], size: int, rows: int, columns: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The cells whose boxes reach into each window of a grid: offsets and members, in the cells' order."""
    with np.errstate(invalid="ignore"):
        low = np.floor(bounds[:, :2] / size)
        high = np.floor(bounds[:, 2:] / size)
    limits = np.array([columns - 1, rows - 1])
    usable = np.isfinite(bounds).all(axis=1) & (high >= 0).all(axis=1) & (low <= limits).all(axis=1)
    low = np.where(usable[:, None], np.clip(low, 0, limits), 0).astype(np.int64)
    high = np.where(usable[:, None], np.clip(high, 0, limits), -1).astype(np.int64)
    counts = np.zeros(rows * columns, dtype=np.int64)
    _visit_windows(low, high, columns, counts, np.empty(0, dtype=np.int64))
    offsets = offsets_of(counts)
    members = np.empty(offsets[-1], dtype=np.int64)
    _visit_windows(low, high, columns, offsets[:-1].copy(), members)
    return offsets, members


@numba.njit(cache=True, nogil=True)
def _visit_windows(low, high, columns, at, members):
    """Count the cells of each window in `at`, or, given room for them, put each cell at its windows' next places."""
    for cell in range(low.shape[0]):
        for row in range(low[cell, 1], high[cell, 1] + 1):
            for column in range(low[cell, 0], high[cell, 0] + 1):
                window = row * columns + column
                if members.size:
                    members[at[window]] = cell
                at[window] += 1
