"""Any TIFF, with a table of transcripts beside it or without."""

import numpy as np

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.transforms import GLOBAL, MICRONS, identity
from cellquilt.readers.base import ImageSource, PointsSource, Reader, Request, Slide, choose_planes, project
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
    x_um, y_um = _pixel_size(image, settings["pixel_size_um"], slide)
    to_um = np.diag([x_um, y_um, 1.0])
    channels, n_planes, height, width = image.shape
    how = str(settings["z"])
    planes = choose_planes(how, range(n_planes), source) if n_planes > 1 or how.isdigit() else [0]
    slide.facts.update({"z": how, "z_planes": planes, "channels": image.channel_names})

    def read(channel: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        return project(lambda z: image.read(channel, z, y0, y1, x0, x1), planes, how)

    slide.images[IMAGE] = ImageSource(
        (channels, height, width),
        image.dtype,
        image.channel_names,
        {GLOBAL: identity(), MICRONS: to_um},
        image.window_px,
        read,
        image.interleaved,
    )
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


def _pixel_size(image: TiffImage, given: float | None, slide: Slide) -> tuple[float, float]:
    """(x, y) in µm: the user's word counts; where the file disagrees that is logged and recorded."""
    found = image.pixel_size_um
    slide.facts["pixel_size_from"] = "settings" if given is not None else image.pixel_size_from
    if found is not None:
        slide.facts["pixel_size_of_file_um"] = list(found)
    if given is None:
        if found is None:
            raise CellquiltError(
                "pixel-size-unknown",
                f"{image.name} does not say how large its pixels are",
                "give pixel_size_um (a column of the sheet, or --pixel_size_um)",
            )
        slide.facts["pixel_size_um"] = list(found)
        return found
    slide.facts["pixel_size_um"] = [given, given]
    if found is not None and max(abs(size / given - 1) for size in found) > 0.01:
        text = (
            f"{image.name}: pixel_size_um is {given:g}, the file says {found[0]:g} × {found[1]:g} "
            f"({image.pixel_size_from}); taking {given:g}"
        )
        LOG.warning(text)
        slide.facts["warnings"] = [*slide.facts.get("warnings", []), text]
    return given, given
