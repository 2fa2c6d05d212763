"""One slide: everything about it that can be asked of any window."""

import math
from dataclasses import dataclass

import numpy as np

from cellquilt.simulate.calibration import Calibration, calibration
from cellquilt.simulate.cells import Cells, cells_in, reach_um
from cellquilt.simulate.expression import Expression, expression
from cellquilt.simulate.image import CHANNELS, pad_px, render
from cellquilt.simulate.masks import Masks, draw
from cellquilt.simulate.parameters import Parameters
from cellquilt.simulate.tissue import TissueMap, tissue_map
from cellquilt.simulate.transcripts import Transcripts, ambient_of, transcripts_of

_SPILL_UM = 8.0  # beyond its window a cell's own reach, a transcript may wander into a nucleus so far away

Window = tuple[int, int, int, int]  # y0, y1, x0, x1 in pixels


@dataclass(frozen=True)
class OwnedCells:
    """The cells of a window: those whose centre (moved onto the canvas) lies in it and that touch the canvas.

    Attributes
    ----------
    index
        (n,) int64 index into the window's `Cells`.
    area_um2, nucleus_area_um2
        (n,) float64 area on the canvas.
    """

    index: np.ndarray
    area_um2: np.ndarray
    nucleus_area_um2: np.ndarray


@dataclass(frozen=True)
class Tile:
    """A window of a slide, made alone.

    Attributes
    ----------
    window
        (y0, y1, x0, x1) in pixels, inside the canvas.
    margin
        Pixels that masks reach over the window on every side.
    cells, masks
        All cells around, and their labels.
    owned
        The cells that belong to this window.
    """

    window: Window
    margin: int
    cells: Cells
    masks: Masks
    owned: OwnedCells

    @property
    def origin(self) -> tuple[int, int]:
        """(y, x) of the masks' corner in pixels."""
        return self.window[0] - self.margin, self.window[2] - self.margin

    def crop(self, array: np.ndarray) -> np.ndarray:
        """A mask without its margin."""
        y0, y1, x0, x1 = self.window
        return array[self.margin : self.margin + y1 - y0, self.margin : self.margin + x1 - x0]


class Slide:
    """A simulated slide. Nothing is computed before it is asked for, and every answer is the same for any tiling.

    Parameters
    ----------
    parameters
        What it is made of.
    number
        Slide of the cohort, from 0: own cells and tissue, the cohort's cell types and domains.
    panels, panel_overlap, batch_effect
        See `expression.expression`.
    """

    def __init__(
        self,
        parameters: Parameters,
        number: int = 0,
        *,
        panels: int = 1,
        panel_overlap: float = 0.7,
        batch_effect: float = 0.25,
        numbers: Calibration | None = None,
    ) -> None:
        self.parameters = parameters
        self.number = number
        self.seed = int(np.random.SeedSequence([parameters.seed, number]).generate_state(1, np.uint64)[0] >> 2)
        self.calibration = calibration() if numbers is None else numbers
        self.tissue: TissueMap = tissue_map(parameters, self.seed)
        self.expression: Expression = expression(
            parameters, self.calibration, number, panels, panel_overlap, batch_effect
        )

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.parameters.height_px, self.parameters.width_px

    @property
    def control_rate(self) -> float:
        """Share of controls among transcripts."""
        given = self.parameters.control_rate
        return self.calibration.control_rate if given is None else given

    def tile(self, window: Window) -> Tile:
        """Cells and labels of a window (y0, y1, x0, x1 in pixels)."""
        pixel = self.parameters.pixel_size_um
        reach = reach_um(self.parameters)
        # A cell of this window reaches `reach` out of it, its competitors' sites lie as far again. A multiple of 8
        # keeps the coarse pixels of the haze on one lattice.
        margin = 8 * math.ceil((2 * reach + _SPILL_UM) / pixel / 8)
        y0, y1, x0, x1 = window
        outer = (y0 - margin, y1 + margin + -(y1 - y0) % 8, x0 - margin, x1 + margin + -(x1 - x0) % 8)
        around = reach + 2.0
        cells = cells_in(
            self.parameters, self.seed, self.tissue, outer[2] * pixel - around, outer[0] * pixel - around,
            outer[3] * pixel + around, outer[1] * pixel + around,
        )  # fmt: skip
        masks = draw(cells, outer, self.canvas, pixel)
        return Tile(window, margin, cells, masks, self._owned(window, cells, masks))

    def _owned(self, window: Window, cells: Cells, masks: Masks) -> OwnedCells:
        y0, y1, x0, x1 = window
        pixel = self.parameters.pixel_size_um
        row = np.clip(np.floor(cells.xy[:, 1] / pixel), 0, self.canvas[0] - 1)
        column = np.clip(np.floor(cells.xy[:, 0] / pixel), 0, self.canvas[1] - 1)
        inside = (row >= y0) & (row < y1) & (column >= x0) & (column < x1)
        areas = np.bincount(masks.cells.ravel(), minlength=len(cells) + 1)[1:]
        nucleus_areas = np.bincount(masks.nuclei.ravel(), minlength=len(cells) + 1)[1:]
        index = np.flatnonzero(inside & (areas > 0))
        return OwnedCells(index, areas[index] * pixel**2, nucleus_areas[index] * pixel**2)

    def image(self, tile: Tile, channels: tuple[str, ...] = CHANNELS, plane: int | None = None) -> np.ndarray:
        """(c, h, w) uint16 image of a tile."""
        pad = pad_px(self.parameters)
        cut = tile.margin - pad
        y0, y1, x0, x1 = tile.window
        height, width = tile.masks.cells.shape
        masks = tile.masks.crop(cut)
        padded = (y0 - pad, y0 - pad + height - 2 * cut, x0 - pad, x0 - pad + width - 2 * cut)
        image = render(self.parameters, self.seed, tile.cells, masks, padded, channels, plane)
        return image[:, : y1 - y0, : x1 - x0]

    def transcripts(self, tile: Tile) -> Transcripts:
        """Transcripts of a tile's own cells, cell by cell, then those of the ambient."""
        numbers = self.calibration
        of_cells = transcripts_of(
            self.parameters, self.seed, tile.cells, tile.owned.index, tile.masks.nuclei, tile.masks.cells, tile.origin,
            self.expression, numbers.rate_um2, numbers.enrichment, numbers.z_profile, self.control_rate,
        )  # fmt: skip
        ambient = ambient_of(
            self.parameters, self.seed, self.tissue, tile.window, tile.masks.nuclei, tile.origin, self.expression,
            numbers.density_um2, numbers.z_profile, self.control_rate,
        )  # fmt: skip
        names = ("xy", "plane", "gene", "cell", "in_nucleus", "origin")
        return Transcripts(*(np.concatenate([getattr(of_cells, name), getattr(ambient, name)]) for name in names))

    def windows(self, tile_px: int) -> list[Window]:
        """Windows of the canvas in raster order."""
        height, width = self.canvas
        return [
            (y, min(y + tile_px, height), x, min(x + tile_px, width))
            for y in range(0, height, tile_px)
            for x in range(0, width, tile_px)
        ]
