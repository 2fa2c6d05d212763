"""Any image that the package bioio and its plug-ins read: CZI, ND2, LIF, DV, OME-Zarr and so on.

The package is an extra. Every format needs a plug-in of its own, which bioio finds by itself where it is installed.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.privacy import scrub
from cellquilt.core.transforms import GLOBAL, MICRONS, identity
from cellquilt.readers.base import ImageSource, Reader, Request, Slide, choose_planes, project
from cellquilt.readers.channels import distinct_names, refuse_transcripts, resolve_pixel_size, some
from cellquilt.readers.tiff import OF_THE_GLASS, TiffImage, kept_dtype, sniff, um_in

IMAGE = "image"
#: More than compression and places without tiles make of a file; below a size nobody is harmed.
_MOST_FOLD, _ANY_SIZE = 10_000, 1 << 30
_INSTALL = "install cellquilt[bioio], and the format's plug-in, such as bioio-czi or bioio-nd2"


def open_bioio(request: Request) -> Slide:
    """Open an image; see `Reader`."""
    refuse_transcripts(request, "bioio")
    try:
        from bioio import BioImage
    except ImportError as error:
        raise CellquiltError(
            "package-missing", f"{request.source} needs the package bioio to be read", _INSTALL
        ) from error
    image = _guarded(request, lambda: BioImage(request.path))
    slide = Slide(inputs=[request.path])
    _guarded(request, lambda: _choose_scene(image, request, slide))
    slide.images[IMAGE] = _guarded(request, lambda: _image(image, request, slide))
    return slide


READER = Reader("bioio", "An image that bioio reads", open_bioio)


def _guarded(request: Request, act: Callable[[], Any]) -> Any:
    """What `act` gives; errors of plug-ins, which are of any kind, with the file's name."""
    import logging
    import warnings

    for package in ("bioio", "tifffile"):  # they log, with whole paths, what they then raise
        logging.getLogger(package).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return act()
    except CellquiltError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {scrub(str(error))}"
        if type(error).__name__ == "UnsupportedFileFormatError":
            raise CellquiltError(
                "bioio-format", f"{request.source}: no plug-in of bioio that is installed reads it: {text}", _INSTALL
            ) from error
        raise CellquiltError(
            "bioio-unreadable", f"{request.source} cannot be read: {text}", "copy it again, or write it as OME-TIFF"
        ) from error


def _choose_scene(image: Any, request: Request, slide: Slide) -> None:
    """Set the scene that is asked for: by number or name; without a wish the first that is none of the glass slide."""
    scenes, wanted = _scene_names(image), request.settings["bioio_scene"]
    of_the_glass = [bool(OF_THE_GLASS.fullmatch(scene.strip())) for scene in scenes]
    shown = some([f"{number} ({scene})" for number, scene in enumerate(scenes) if not of_the_glass[number]])
    if wanted is None:
        number = next((number for number, glass in enumerate(of_the_glass) if not glass), -1)
    elif wanted in scenes:
        number = scenes.index(wanted)
    elif wanted in image.scenes:
        number = list(image.scenes).index(wanted)
    else:
        number = int(wanted) if wanted.isdecimal() and wanted.isascii() and int(wanted) < len(scenes) else -1
        if number < 0:
            raise CellquiltError(
                "bioio-scene",
                f'{request.source} has no scene "{wanted}"; there are: {shown}',
                f"{did_you_mean(wanted, scenes)} Name it or give its number with bioio_scene.",
            )
    if number < 0 or of_the_glass[number]:
        raise CellquiltError(
            "bioio-scene",
            f"{request.source}: the scene is a picture of the glass slide; others: {shown or 'none'}",
            "choose another with bioio_scene",
        )
    image.set_scene(number)
    slide.facts["scene"] = number


def _image(image: Any, request: Request, slide: Slide) -> ImageSource:
    settings = request.settings
    sizes = {axis: int(getattr(image.dims, axis)) for axis in image.dims.order}
    unknown = [axis for axis in sizes if axis not in "TCZYXS" and sizes[axis] > 1]
    if unknown:
        raise CellquiltError(
            "bioio-axes",
            f"{request.source} has the axes {image.dims.order}; {unknown[0]} is none that is known",
            "write the part that is wanted as OME-TIFF",
        )
    time = int(settings["bioio_timepoint"])
    if time >= sizes["T"]:
        raise CellquiltError(
            "bioio-timepoint",
            f"{request.source} has {sizes['T']} time points, from 0; bioio_timepoint is {time}",
            f"give a number below {sizes['T']}",
        )
    how = str(settings["z"])
    planes = choose_planes(how, range(sizes["Z"]), request.source)
    samples = min(sizes.get("S", 1), 3)  # the alpha channel of colours is no measurement
    channels, height, width = sizes["C"] * samples, sizes["Y"], sizes["X"]
    names = _names(image, sizes["C"], samples)
    pixel = resolve_pixel_size(request.source, *_pixel_size(image, request), settings["pixel_size_um"], slide)
    file_dtype = np.dtype(image.dtype)
    _refuse_emptiness(request, channels * height * width * file_dtype.itemsize)
    dtype = kept_dtype(file_dtype, request.source)
    slide.facts.update({"timepoint": time, "z": how, "z_planes": planes})
    slide.facts["channels"] = names = distinct_names(names, slide, request.source)

    def stack(channel: int) -> Any:
        where = {"T": time, "C": channel // samples}
        return image.get_image_dask_data("ZYX", **where, **({"S": channel % samples} if "S" in sizes else {}))

    stacks = [stack(channel) for channel in range(channels)]
    tall, wide = _chunk(stacks[0], len(planes), file_dtype, request)

    def read(channel: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        block = _guarded(request, lambda: stacks[channel][planes, y0:y1, x0:x1].compute(scheduler="synchronous"))
        return project(lambda k: block[k].astype(dtype), range(len(planes)), how)

    return ImageSource(
        (channels, height, width),
        dtype,
        names,
        {GLOBAL: identity(), MICRONS: np.diag([*pixel, 1.0])},
        # What is read at once is decoded at once: a window holds whole pieces of the file.
        lambda chunk_px: (-(-tall // chunk_px) * chunk_px, -(-wide // chunk_px) * chunk_px),
        read,
        samples > 1,
    )


def _refuse_emptiness(request: Request, n_bytes: int) -> None:
    """Refuse a file that announces far more pixels than it can hold: its header is damaged, or made to do harm."""
    size = request.path.stat().st_size if request.path.is_file() else n_bytes
    if n_bytes > max(_MOST_FOLD * size, _ANY_SIZE):
        raise CellquiltError(
            "bioio-unreadable",
            f"{request.source} announces {n_bytes / 1e9:.0f} GB of pixels and has {size} bytes",
            "copy it again from the microscope",
        )


def _chunk(stack: Any, n_planes: int, dtype: np.dtype, request: Request) -> tuple[int, int]:
    """(height, width) of the pieces that the plug-in decodes.

    Raises
    ------
    CellquiltError
        ``bioio-piece-too-large``.
    """
    tall, wide = max(stack.chunks[1]), max(stack.chunks[2])
    size = max(max(stack.chunks[0]), n_planes) * tall * wide * dtype.itemsize
    budget = int(request.settings["memory_mb"]) * 1_000_000 * 4 // 10
    if size > budget:
        raise CellquiltError(
            "bioio-piece-too-large",
            f"{request.source} is read in pieces of {size / 1e6:.0f} MB ({tall} × {wide} pixels); at most "
            f"{budget / 1e6:.0f} MB fit the memory setting",
            "raise memory_mb, or write it as tiled OME-TIFF (for example with bfconvert -tilex 512 -tiley 512)",
        )
    return tall, wide


def _names(image: Any, n: int, samples: int) -> list[str]:
    found = [str(name) for name in (image.channel_names or [])]
    names = found if len(found) == n else [f"channel_{k}" for k in range(n)]
    if samples == 1:
        return names
    return ["r", "g", "b"][:samples] if n == 1 else [f"{name}_{s}" for name in names for s in range(samples)]


def _pixel_size(image: Any, request: Request) -> tuple[tuple[float, float] | None, str]:
    """(x, y) in µm and where it stands; None where the file does not say."""
    pixels = _ome_pixels(image, image.current_scene_index)
    if pixels is None and request.path.is_file() and sniff(request.path) == "tiff":
        # Of a TIFF that does not say, bioio's plug-in makes 1 µm, or a printer's 72 dots an inch.
        try:
            with TiffImage(request.path, request.source) as tiff:
                return tiff.pixel_size_um, tiff.pixel_size_from
        except CellquiltError:
            return None, ""
    sizes, properties = image.physical_pixel_sizes, getattr(image, "dimension_properties", None)
    found = []
    for axis in "XY":
        size = getattr(sizes, axis)
        unit = getattr(getattr(properties, axis, None), "unit", None)
        unit = unit or getattr(getattr(pixels, f"physical_size_{axis.lower()}_unit", None), "value", None)
        factor = 1.0 if unit is None else um_in(str(unit))  # without a unit it is µm
        usable = size is not None and factor is not None and math.isfinite(size) and size > 0
        found.append(float(size) * float(factor or 1.0) if usable else None)
    x, y = found
    if x is None and y is None:
        return None, ""
    return (x or y or 0.0, y or x or 0.0), "bioio"


def _ome_pixels(image: Any, scene: int) -> Any:
    """The scene's entry in OME metadata, where the plug-in has such."""
    images = getattr(image.metadata, "images", None) or []
    return images[scene].pixels if len(images) == len(image.scenes) else None


def _scene_names(image: Any) -> list[str]:
    """Names of scenes; bioio gives numbers of images for OME-TIFF, their metadata have the names."""
    images = getattr(image.metadata, "images", None) or []
    scenes = [str(scene) for scene in image.scenes]
    if len(images) != len(scenes):
        return scenes
    return [str(entry.name or scene) for entry, scene in zip(images, scenes, strict=True)]
