"""A table of transcripts and no image: of any machine, or of none of those we read."""

import numpy as np

from cellquilt.core.errors import CellquiltError
from cellquilt.core.transforms import GLOBAL, MICRONS, identity
from cellquilt.readers.base import PointsSource, Reader, Request, Slide
from cellquilt.readers.transcript_table import TranscriptTable

TRANSCRIPTS = "transcripts"


def open_transcripts(request: Request) -> Slide:
    """Open a table of transcripts; see `Reader`.

    ``global`` is µm too, unless `pixel_size_um` says that there is an image somewhere: then it is its pixels.
    """
    settings = request.settings
    path = request.path
    if request.transcripts is not None:
        raise CellquiltError(
            "transcripts-twice",
            f"{request.source} and {request.transcripts.name} are given; technology transcripts has one table",
            "leave path empty",
        )
    if path.is_dir():
        raise CellquiltError(
            "transcripts-unreadable", f"{path.name} is a folder", "name a table of transcripts (CSV, CSV.GZ or Parquet)"
        )
    table = TranscriptTable(
        path,
        x=settings["x_column"],
        y=settings["y_column"],
        z=settings["z_column"],
        gene=settings["gene_column"],
    )
    pixel_um, in_pixels = settings["pixel_size_um"], settings["transcripts_unit"] == "px"
    if in_pixels and pixel_um is None:
        raise CellquiltError(
            "pixel-size-unknown",
            f"{table.name} is in pixels, and nothing says how large they are",
            "give pixel_size_um (a column of the sheet, or --pixel_size_um)",
        )
    to_um = identity() if pixel_um is None else np.diag([pixel_um, pixel_um, 1.0])
    slide = Slide(inputs=[path])
    slide.points[TRANSCRIPTS] = PointsSource(
        {MICRONS: identity(), GLOBAL: np.linalg.inv(to_um)},
        lambda: table.batches(
            to_um=to_um if in_pixels else None, z_step_um=float(settings["z_step_um"]), min_qv=settings["min_qv"]
        ),
        table.about_rows,
    )
    slide.facts["transcripts_columns"] = {kind: name for kind, name in vars(table.columns).items() if name is not None}
    return slide


READER = Reader("transcripts", "A table of transcripts", open_transcripts, needs_path=False)
