"""What a slide holds, told from headers, footers and sizes of files: no pixel and no row is read."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellquilt.core.errors import CellquiltError
from cellquilt.core.settings import TABLES, Settings
from cellquilt.core.sheet import Row
from cellquilt.core.sizes import measured, size_of
from cellquilt.core.transforms import MICRONS, length_scale
from cellquilt.readers.base import Reader, Request, Slide, reader_of

#: Tissue a cell, where nothing else says how many there are (µm²), and transcripts a cell, where there is no image.
CELL_AREA_UM2, TRANSCRIPTS_A_CELL = 120.0, 100.0
#: Vertices of an outline in a table of vertices, and bytes of one in GeoJSON.
_VERTICES, _GEOJSON_BYTES = 25, 1500


@dataclass(frozen=True)
class Contents:
    """A slide's contents.

    Attributes
    ----------
    shape
        (channels, height, width) of the image that is kept; zeros without one.
    channels
        Their names.
    item_bytes
        Bytes of a pixel of a channel.
    pixel_size_um
        Size of a pixel; None without an image.
    transcripts
        Rows of the table of transcripts, controls included.
    vendor_cells
        Rows of the outlines that come with the slide: the machine's, of all kinds and planes, and the user's own.
    cells
        Cells to expect of a segmentation, or those of a table of cells.
    input
        What the first task gets, see `core.sizes`.
    raw_bytes
        Bytes of the files that are read.
    """

    shape: tuple[int, int, int] = (0, 0, 0)
    channels: tuple[str, ...] = ()
    item_bytes: int = 2
    pixel_size_um: float | None = None
    transcripts: int = 0
    vendor_cells: int = 0
    cells: int = 0
    input: Mapping[str, int] | None = None
    raw_bytes: int = 0

    @property
    def pixels(self) -> int:
        """Pixels of all channels."""
        channels, height, width = self.shape
        return channels * height * width

    @property
    def raw(self) -> dict[str, int]:
        """What the raw store will say of itself."""
        return {"pixels": self.pixels, "transcripts": self.transcripts, "cells": self.vendor_cells}


def contents_of(row: Row, settings: Settings) -> Contents:
    """Look into a sample's files.

    Parameters
    ----------
    row
        The sample.
    settings
        Its values in force.

    Raises
    ------
    CellquiltError
        What the reader refuses, with the sample's name.
    """
    given = [path for path in (row.path, row.transcripts, row.prior_cells) if path is not None]
    size = size_of(given)
    if row.technology in TABLES:
        assert row.path is not None
        return Contents(cells=_rows_of_table(row.path), input=size, raw_bytes=size.get("bytes", 0))
    try:
        with ExitStack() as resources:
            return _of_slide(row, _open(row, settings, resources), size)
    except CellquiltError as error:
        raise CellquiltError(error.code, f'sample "{row.sample}": {error.message}', error.hint) from error


def _open(row: Row, settings: Settings, resources: ExitStack) -> Slide:
    reader: Reader = reader_of(row.technology)
    path, transcripts = row.path, row.transcripts
    if path is None and not reader.needs_path:
        path, transcripts = transcripts, None
    assert path is not None
    return reader.open(Request(path, transcripts, settings, row.source or path.name, resources))


def _of_slide(row: Row, slide: Slide, size: Mapping[str, int]) -> Contents:
    image = next(iter(slide.images.values()), None)
    transcripts = sum(points.about_rows() for points in slide.points.values())
    outlines = [path for path in slide.inputs if "boundaries" in path.name or "boundaries" in path.parent.name]
    known = sum(_about_outlines(path) for path in outlines)
    own = _about_outlines(row.prior_cells) if row.prior_cells is not None else 0
    read = [*slide.inputs, *([row.prior_cells] if row.prior_cells is not None else [])]
    kept: dict[str, Any] = {
        "transcripts": transcripts,
        "vendor_cells": known + own,
        "input": size,
        "raw_bytes": sum(path.stat().st_size for path in read),
    }
    if image is None:
        return Contents(cells=own or known or round(transcripts / TRANSCRIPTS_A_CELL), **kept)
    pixel_um = length_scale(image.transforms[MICRONS])
    _, height, width = image.shape
    cells = round(height * width * pixel_um**2 / CELL_AREA_UM2)
    return Contents(image.shape, tuple(image.channels), image.dtype.itemsize, pixel_um, cells=cells, **kept)


def _about_outlines(path: Path) -> int:
    """Outlines in a file, about."""
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            footer = pq.read_metadata(path)
            vertices = "vertex_x" in pq.read_schema(path).names
        except (pa.ArrowInvalid, OSError):
            return 0  # the first task will say what is wrong with it
        return footer.num_rows // _VERTICES if vertices else footer.num_rows
    return path.stat().st_size // _GEOJSON_BYTES


def _rows_of_table(path: Path) -> int:
    """Cells of a table that was made elsewhere; 0 where it does not say."""
    if path.is_dir():
        from cellquilt.core.sizes import rows_of

        return rows_of(path) or measured(path).get("cells", 0)
    import h5py

    try:
        with h5py.File(path) as file:
            obs = file["obs"]
            index = obs[obs.attrs["_index"]] if "_index" in getattr(obs, "attrs", {}) else obs
            return int(index.shape[0])
    except (OSError, KeyError, AttributeError):
        return 0
