"""What the writers of protein machines share: channels of a slide, made tile by tile, and what cells show of them.

A protein's image is flat inside a cell: its level for the cell's type and domain, brighter in brighter cells, and
background everywhere, with the camera's noise. DAPI is the simulator's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa

from cellquilt.core.log import progress
from cellquilt.core.parquet import write_parquet
from cellquilt.simulate.proteins import PROTEINS, stains
from cellquilt.simulate.randomness import cheap_normal, place_key
from cellquilt.simulate.slide import Slide, Tile, Window
from cellquilt.simulate.transcripts import Transcripts
from cellquilt.simulate.writer import Spool, TruthWriter, What, tile_outlines

NUCLEI = "DAPI"
#: Read as a protein, it is an image of the background alone, as after bleaching.
BLANK = ""
_STREAM_MARKER = 20500  # and the following, one a protein
_READ_NOISE = 4.0


@dataclass
class Planes:
    """Channels of a slide on disk, and its truth, not yet closed.

    Attributes
    ----------
    channels
        Their names.
    spools
        Their pixels, one a channel: uint16.
    truth
        The slide's truth.
    """

    channels: list[str]
    spools: list[Spool]
    truth: TruthWriter
    _parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def measure(self, tile: Tile, pixels: np.ndarray) -> None:
        """Add up what a tile's pixels, (c, h, w), give to its cells."""
        labels = tile.crop(tile.masks.cells)
        found, inverse = np.unique(labels, return_inverse=True)
        inverse = inverse.ravel()
        counts = np.bincount(inverse, minlength=len(found))
        sums = np.stack([np.bincount(inverse, channel.ravel(), len(found)) for channel in pixels.astype(np.float64)])
        inside = found > 0
        self._parts.append((tile.cells.ids[found[inside] - 1], counts[inside], sums[:, inside]))

    def write_intensities(self) -> None:
        """Write ``truth/intensities.parquet``: cell_id, n_pixels and the mean of every channel, by cell."""
        ids, first = np.unique(np.concatenate([part[0] for part in self._parts]), return_inverse=True)
        counts = np.bincount(first, np.concatenate([part[1] for part in self._parts]), len(ids))
        sums = np.concatenate([part[2] for part in self._parts], axis=1)
        means = {
            channel: np.bincount(first, row, len(ids)) / counts
            for channel, row in zip(self.channels, sums, strict=True)
        }
        table = pa.table({"cell_id": ids, "n_pixels": counts.astype(np.int64), **means})
        write_parquet(self.truth.folder / "intensities.parquet", table)


def make_planes(
    slide: Slide,
    folder: Path,
    name: str,
    what: What,
    channels: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    on_tile: Callable[[Tile, Transcripts], None] | None = None,
) -> Planes:
    """Make a slide's channels and truth in `folder`, made here where it is not there.

    Parameters
    ----------
    slide
        The slide.
    folder
        For spools and ``truth/``.
    name
        Of the slide, for the progress.
    what
        Of it `tile_px` and `transcripts` count.
    channels
        ``DAPI``, always, proteins (`proteins.PROTEINS`) and `BLANK`, in the files' order.
    names
        What a reader is to call them; default: as they are.
    on_tile
        Called with every tile and its transcripts, in the order of tiles.
    """
    folder.mkdir(parents=True, exist_ok=True)
    transcripts_too = what.transcripts and on_tile is not None
    truth = TruthWriter(folder / "truth", slide, transcripts_too)
    spools = [Spool(folder / f".{k}.spool", slide.canvas, np.dtype(np.uint16)) for k in range(len(channels))]
    planes = Planes(list(channels if names is None else names), spools, truth)
    light = _Light(slide)
    for window in progress(slide.windows(what.tile_px), f"simulate {name}"):
        tile = slide.tile(window)
        transcripts = slide.transcripts(tile) if transcripts_too else None
        truth.write(tile, tile_outlines(tile.masks.cells, tile), transcripts)
        if on_tile is not None and transcripts is not None:
            on_tile(tile, transcripts)
        nuclei = slide.image(tile, (NUCLEI,))[0]
        pixels = np.stack([nuclei if channel == NUCLEI else light.of(channel, tile, window) for channel in channels])
        for spool, channel_pixels in zip(spools, pixels, strict=True):
            spool.write(window, channel_pixels)
        planes.measure(tile, pixels)
    planes.write_intensities()
    return planes


class _Light:
    """Images of proteins."""

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        self._stains = stains(slide.parameters, slide.number, 0.0)

    def of(self, protein: str, tile: Tile, window: Window) -> np.ndarray:
        """(h, w) uint16 pixels of a window."""
        cells, found = tile.cells, self._stains
        k = list(PROTEINS).index(protein) if protein else 0
        level = np.zeros(len(cells) + 1)
        if protein:
            level[1:] = found.levels[cells.domain, cells.kind, k] * found.gain[k] * cells.brightness
        out = np.empty((window[1] - window[0], window[3] - window[2]), np.uint16)
        labels = np.ascontiguousarray(tile.crop(tile.masks.cells))
        stream = _STREAM_MARKER + (k if protein else len(PROTEINS))
        _expose(self._slide.seed, stream, labels, level + found.background[k], window[0], window[2], _READ_NOISE, out)
        return out


@numba.njit(cache=True, nogil=True)
def _expose(seed, stream, labels, level, y0, x0, read, out):
    """Pixels of the cells' levels, with shot and read noise that belong to the place."""
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            mean = level[labels[y, x]]
            noise = cheap_normal(place_key(seed, stream, x + x0, y + y0))
            out[y, x] = np.uint16(min(max(mean + np.sqrt(mean + read * read) * noise, 0.0), 65535.0) + 0.5)


def halved(spool: Spool, path: Path) -> Spool:
    """The plane at half the size, pixels as means of four, an odd last row and column left out; on disk, too."""
    height, width = spool.shape
    small = Spool(path, (height // 2, width // 2), spool.dtype)
    tile = spool.tile(0, 0).shape[0]
    for row in range(small.rows):
        for column in range(small.columns):
            block = np.zeros((2 * tile, 2 * tile), np.uint32)
            for y in range(2 * row, min(2 * row + 2, spool.rows)):
                for x in range(2 * column, min(2 * column + 2, spool.columns)):
                    a, b = (y - 2 * row) * tile, (x - 2 * column) * tile
                    block[a : a + tile, b : b + tile] = spool.tile(y, x)
            means = (block.reshape(tile, 2, tile, 2).sum(axis=(1, 3)) + 2) // 4
            high, wide = min(tile, small.shape[0] - row * tile), min(tile, small.shape[1] - column * tile)
            y0, x0 = row * tile, column * tile
            small.write((y0, y0 + high, x0, x0 + wide), means[:high, :wide].astype(spool.dtype))
    return small
