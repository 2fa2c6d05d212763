"""Any TIFF, with a table of transcripts beside it or without."""

import numpy as np

from cellquilt.core.errors import CellquiltError
from cellquilt.core.transforms import GLOBAL, MICRONS, identity
from cellquilt.readers.base import PointsSource, Reader, Request, Slide
from cellquilt.readers.channels import whole_file
from cellquilt.readers.tiff import TiffImage
from cellquilt.readers.transcript_table import TranscriptTable

IMAGE, TRANSCRIPTS = "image", "transcripts"


def open_ome_tif(request: Request) -> Slide:
    """Open an image and its table; see `Reader`."""
    settings, source = request.settings, request.source
    if request.path.is_dir():
        raise CellquiltError("not-a-tiff", f"{source} is a folder, no TIFF", "name the image file")
    image = request.resources.enter_context(TiffImage(request.path, source, memory_mb=int(settings["memory_mb"])))
    slide = Slide(inputs=[request.path])
    slide.images[IMAGE] = whole_file(image, image.channel_names, request, slide)
    to_um = slide.images[IMAGE].transforms[MICRONS]
    if request.transcripts is not None:
        table = TranscriptTable(
            request.transcripts,
            x=settings["x_column"],
            y=settings["y_column"],
            z=settings["z_column"],
            gene=settings["gene_column"],
        )
        # `z_step_um` of the settings is a default; what the file says about its own planes is better.
        step = settings["z_step_um"] if _given(settings, "z_step_um") or not image.z_step_um else image.z_step_um
        unit = to_um if settings["transcripts_unit"] == "px" else None
        slide.points[TRANSCRIPTS] = PointsSource(
            {MICRONS: identity(), GLOBAL: np.linalg.inv(to_um)},
            lambda: table.batches(to_um=unit, z_step_um=float(step), min_qv=settings["min_qv"]),
            table.about_rows,
        )
        slide.inputs.append(request.transcripts)
        slide.facts["transcripts_columns"] = {
            kind: name for kind, name in vars(table.columns).items() if name is not None
        }
    return slide


READER = Reader("ome_tif", "OME-TIFF", open_ome_tif)


def _given(settings: object, name: str) -> bool:
    return name in getattr(settings, "given", settings)  # type: ignore[operator]
