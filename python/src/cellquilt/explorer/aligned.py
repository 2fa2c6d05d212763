"""Other images of the same tissue, such as H&E after the run: into the store, and beside the viewer's files."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.record import Record
from cellquilt.core.settings import Settings
from cellquilt.core.store import result_of
from cellquilt.core.tiff_pyramid import write_pyramid
from cellquilt.core.transforms import MICRONS, length_scale
from cellquilt.explorer.image import TILE_PX, ome_metadata
from cellquilt.explorer.slide import ViewedSlide
from cellquilt.readers.base import ImageSource, describe_file, write_image
from cellquilt.readers.he_image import open_he_image


def align_image(
    slide: ViewedSlide,
    image: Path,
    matrix: Path | None,
    *,
    name: str | None = None,
    folder: Path | None = None,
    output: Path | None = None,
    to_store: bool = True,
    compression: str = "deflate",
    overwrite: bool = False,
) -> str:
    """Add an aligned image to a store, and to an Explorer folder as an image file and its alignment.

    Parameters
    ----------
    slide
        The slide.
    image
        TIFF of one plane.
    matrix
        CSV with the (3, 3) map from its pixels to those of the morphology image, as the viewer exports it; None for
        an image that begins at the slide's corner and says how large its pixels are.
    name
        Name of the image; default: its file's.
    folder
        Explorer folder: gets ``<name>.ome.tif`` with a pyramid, and ``<name>_alignment.csv``.
    output
        Delta store to make; None adds to the store itself.
    to_store
        Whether the store gets it.
    compression
        Of the folder's image.
    overwrite
        Replace what has this name.

    Returns
    -------
    str
        The name.

    Raises
    ------
    CellquiltError
        ``explorer-image-missing``, ``explorer-image-name``, ``explorer-no-folder``, ``output-exists``, and those of
        `open_he_image`.
    """
    for path, what in ((image, "image"), (matrix, "matrix")):
        if path is not None and not path.is_file():
            raise CellquiltError("explorer-image-missing", f"{what}: {path} does not exist or is no file", "check it")
    name = name or image.name.partition(".")[0]
    if not name or set(name) & set("/\\") or name.startswith((".", "_")):
        raise CellquiltError("explorer-image-name", f'"{name}" cannot be the name of an image', "give another name")
    if slide.image is None:
        raise CellquiltError(
            "image-missing", f"{slide.store.path} has no image to align with", "read the slide with its image"
        )
    if slide.image.element.name == name:
        raise CellquiltError("explorer-image-name", f'"{name}" is the morphology image', "give another name")
    if folder is not None and not folder.is_dir():
        raise CellquiltError("explorer-no-folder", f"{folder} is no folder", "write it first")
    record = Record("explorer_align", slide.store.name, {"image": image.name, "name": name})
    with ExitStack() as resources:
        to_um = slide.image.transforms[MICRONS] if MICRONS in slide.image.transforms else np.diag(
            [slide.pixel_um, slide.pixel_um, 1.0])  # fmt: skip
        source = open_he_image(image, matrix, main_to_um=to_um, resources=resources, memory_mb=slide.memory_mb)
        if to_store:
            record.facts["inputs"] = [describe_file(path) for path in (image, matrix) if path is not None]
            settings = Settings({"memory_mb": slide.memory_mb})
            with result_of(slide.store, output, overwrite=overwrite) as delta:
                write_image(delta.new_element("images", name), source, settings, slide.store.name)
                delta.add_record(record.finish())
        if folder is not None:
            _write_files(slide, source, folder, name, compression, overwrite)
    LOG.info("%s: image %s, %d × %d pixels", slide.store.name, name, *source.shape[1:])
    return name


def _write_files(
    slide: ViewedSlide, source: ImageSource, folder: Path, name: str, compression: str, overwrite: bool
) -> None:
    assert slide.image is not None
    to_pixels = np.linalg.inv(slide.image.transforms.get(MICRONS, np.diag([slide.pixel_um] * 2 + [1.0])))
    matrix = to_pixels @ source.transforms[MICRONS]
    um = length_scale(source.transforms[MICRONS])
    with atomic_path(folder / f"{name}.ome.tif", overwrite=overwrite) as aside:
        write_pyramid(
            aside, _tiles(source), source.shape, source.dtype, tile_px=TILE_PX, compression=compression,
            pixel_size_um=um,
            metadata={**ome_metadata(f"{slide.store.name}/{name}", um, list(source.channels)),
                      "SignificantBits": 8 * source.dtype.itemsize},
        )  # fmt: skip
    with atomic_path(folder / f"{name}_alignment.csv", overwrite=overwrite) as aside:
        aside.write_text("".join(",".join(f"{value!r}" for value in row) + "\n" for row in matrix.tolist()))


def _tiles(source: ImageSource) -> Iterator[NDArray]:
    channels, height, width = source.shape
    if source.dtype.kind != "u":
        raise CellquiltError(
            "explorer-image-type", f"the image has pixels of {source.dtype}; the viewer wants whole numbers from 0",
            "write it with 8 or 16 bits",
        )  # fmt: skip
    for channel in range(channels):
        for y0 in range(0, height, TILE_PX):
            for x0 in range(0, width, TILE_PX):
                yield source.read(channel, y0, min(y0 + TILE_PX, height), x0, min(x0 + TILE_PX, width))
