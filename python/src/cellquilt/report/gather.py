"""Everything the report draws, gathered in one pass over the transcripts and a few reads of the image."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellquilt.core.points import iter_points, points_columns, points_transforms, xy
from cellquilt.core.transforms import GLOBAL, apply
from cellquilt.report.cells import Cells
from cellquilt.report.view import View
from cellquilt.report.zooms import MAX_DOTS, Zoom

_BINS = 180
_MIN_BIN_UM = 8.0
_CELLS_A_BIN = 3


@dataclass
class Maps:
    """The slide on a coarse grid.

    Attributes
    ----------
    bin_px, cell_bin_px
        Width of a bin in pixels of the main image: of transcripts; of cells, which are fewer.
    pixel_size_um
        Microns a pixel.
    cells
        (h, w) cells a bin.
    counted
        (h, w) sum over a bin's cells of their counted transcripts.
    transcripts
        (h', w') transcripts a bin that could be counted; None without transcripts.
    """

    bin_px: float
    cell_bin_px: float
    pixel_size_um: float
    cells: np.ndarray
    counted: np.ndarray
    transcripts: np.ndarray | None = None

    @property
    def per_cell(self) -> np.ndarray:
        """(h, w) mean counted transcripts a cell; NaN where there is no cell."""
        return np.divide(self.counted, self.cells, out=np.full(self.cells.shape, np.nan), where=self.cells > 0)


@dataclass
class Dots:
    """Transcripts of a window: (n, 2) pixels of those in a cell and of those in none."""

    assigned: list[np.ndarray] = field(default_factory=list)
    free: list[np.ndarray] = field(default_factory=list)


def extent_px(view: View, cells: Cells) -> tuple[int, int]:
    """(height, width) of what is drawn: the image's, or what the cells take up."""
    if view.image_size is not None:
        return view.image_size
    reach = apply(view.to_pixels, cells.xy_um).max(axis=0, initial=1.0)
    return int(reach[1]) + 1, int(reach[0]) + 1


def make_maps(view: View, cells: Cells, zooms: list[Zoom], tissue_um2: float | None = None) -> tuple[Maps, list[Dots]]:
    """Maps of cells and transcripts, and the transcripts of some windows.

    Parameters
    ----------
    view, cells
        The sample.
    zooms
        Windows whose transcripts are wanted.
    tissue_um2
        Area of the tissue, to find a bin that holds a few cells. Default: all that is drawn.

    Returns
    -------
    maps : Maps
    dots : list of Dots
        One a window.
    """
    height, width = extent_px(view, cells)
    bin_px = max(max(height, width) / _BINS, _MIN_BIN_UM / view.pixel_size_um)
    area_px = tissue_um2 / view.pixel_size_um**2 if tissue_um2 else float(height * width)
    cell_bin_px = bin_px
    if len(cells):
        cell_bin_px = min(max(bin_px, np.sqrt(_CELLS_A_BIN * area_px / len(cells))), max(height, width) / 4)
    shape = _shape(height, width, cell_bin_px)
    place, inside = _bins(apply(view.to_pixels, cells.xy_um), cell_bin_px, shape, (height, width))
    size = shape[0] * shape[1]
    per_bin = np.bincount(place, minlength=size).reshape(shape)
    counted = np.bincount(place, weights=cells.transcripts[inside], minlength=size).reshape(shape)
    maps = Maps(bin_px, float(cell_bin_px), view.pixel_size_um, per_bin, counted)
    shape = _shape(height, width, bin_px)
    size = shape[0] * shape[1]
    dots = [Dots() for _ in zooms]
    element = view.find("points", "transcripts")
    if element is None:
        return maps, dots
    there = points_columns(element)
    wanted = [name for name in ("x", "y", "is_control", "passes_qv", "cell_id") if name in there]
    to_pixels = points_transforms(element)[GLOBAL]
    total = np.zeros(size, dtype=np.int64)
    for batch in iter_points(element, wanted):
        pixels = apply(to_pixels, xy(batch))
        good = np.ones(len(pixels), dtype=bool)
        if "is_control" in there:
            good &= ~batch.column("is_control").to_numpy()
        if "passes_qv" in there:
            good &= batch.column("passes_qv").to_numpy()
        pixels = pixels[good]
        total += np.bincount(_bins(pixels, bin_px, shape, (height, width))[0], minlength=size)
        assigned = _assigned(batch)[good]
        for zoom, found in zip(zooms, dots, strict=True):
            y0, y1, x0, x1 = zoom.window
            here = (pixels[:, 0] >= x0) & (pixels[:, 0] < x1) & (pixels[:, 1] >= y0) & (pixels[:, 1] < y1)
            found.assigned.append(pixels[here & assigned])
            found.free.append(pixels[here & ~assigned])
    maps.transcripts = total.reshape(shape)
    return maps, dots


def _shape(height: int, width: int, bin_px: float) -> tuple[int, int]:
    return max(1, int(np.ceil(height / bin_px))), max(1, int(np.ceil(width / bin_px)))


def _assigned(batch: Any) -> np.ndarray:
    if "cell_id" not in batch.schema.names:
        return np.zeros(batch.num_rows, dtype=bool)
    return batch.column("cell_id").is_valid().to_numpy()


def _bins(
    pixels: np.ndarray, bin_px: float, shape: tuple[int, int], extent: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Flat bin of every point inside the extent, and which points these are."""
    x, y = pixels.T
    inside = (x >= 0) & (x < extent[1]) & (y >= 0) & (y < extent[0])
    row, column = (y[inside] // bin_px).astype(np.int64), (x[inside] // bin_px).astype(np.int64)
    return row * shape[1] + column, inside


def thinned(dots: Dots) -> tuple[np.ndarray, np.ndarray, int]:
    """(n, 2) dots to draw in a cell and in none, and one in how many they are."""
    assigned = np.concatenate(dots.assigned) if dots.assigned else np.zeros((0, 2))
    free = np.concatenate(dots.free) if dots.free else np.zeros((0, 2))
    every = max(1, -(-(len(assigned) + len(free)) // MAX_DOTS))
    return assigned[::every], free[::every], every
