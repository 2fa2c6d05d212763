"""What readers of images share: files of a folder, one image of a TIFF a channel or of one file, names, pixel sizes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.log import LOG
from cellquilt.core.transforms import GLOBAL, MICRONS, identity
from cellquilt.readers.base import ImageSource, Request, Slide, choose_planes, project
from cellquilt.readers.tiff import OF_THE_GLASS, TiffImage, unique_names

_TIFF = re.compile(r"(?:\.ome)?\.tiff?$", re.IGNORECASE)
_SHOWN = 6  # names in a message


@dataclass
class ChannelFile:
    """A TIFF that holds one channel.

    Attributes
    ----------
    name
        Of the channel.
    image
        The file, open.
    offset_px
        (y, x) of its corner in the image that is put together.
    """

    name: str
    image: TiffImage
    offset_px: tuple[int, int] = (0, 0)


# --- files of a folder


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in names as numbers.

    Examples
    --------
    >>> sorted(["z10", "z2", "Z1"], key=natural_key)
    ['Z1', 'z2', 'z10']
    """
    return [
        (0, int(part), "") if part.isdecimal() and part.isascii() else (1, 0, part.casefold())
        for part in re.findall(r"[0-9]+|[^0-9]+", name)
    ] + [(2, 0, name)]


def stem_of(path: Path) -> str:
    """A TIFF's name without ``.tif``, ``.tiff``, ``.ome.tif`` or ``.ome.tiff``; another file's name as it is."""
    found = _TIFF.search(path.name)
    return path.name[: found.start()] if found else path.name


def tiff_files(folder: Path, *, below: bool = False) -> list[Path]:
    """The TIFFs of a folder in the natural order of their names, whatever the order on disk.

    Pictures of the glass slide (``label.tif``, ``macro.tif``, …) and hidden files are none of them.

    Parameters
    ----------
    folder
        The folder.
    below
        Whether to look into its folders, too.
    """
    entries = folder.rglob("*") if below else folder.iterdir()
    found = [
        path
        for path in entries
        if not path.name.startswith(".")
        and _TIFF.search(path.name)
        and not OF_THE_GLASS.fullmatch(stem_of(path))
        and path.is_file()
    ]
    return sorted(found, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def contents_of(folder: Path) -> str:
    """What is in a folder, for messages.

    Examples
    --------
    >>> contents_of(Path("a"))  # doctest: +SKIP
    'it holds b.csv, c and 2 more'
    """
    names = sorted((path.name for path in folder.iterdir() if not path.name.startswith(".")), key=natural_key)
    return f"it holds {some(names)}" if names else "it is empty"


def some(names: Sequence[str]) -> str:
    """The first names of many."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def need_folder(request: Request, title: str, holds: str) -> Path:
    """The folder that was named.

    Raises
    ------
    CellquiltError
        ``machine-no-folder``.
    """
    if not request.path.is_dir():
        raise CellquiltError(
            "machine-no-folder", f"{request.source} is no folder", f"name the {title} folder that holds {holds}"
        )
    return request.path


def refuse_transcripts(request: Request, title: str) -> None:
    """Refuse a table of transcripts beside images of proteins: nothing would read it.

    Raises
    ------
    CellquiltError
        ``machine-transcripts``.
    """
    if request.transcripts is not None:
        raise CellquiltError(
            "machine-transcripts",
            f"{request.source}: {request.transcripts.name} is given, but technology {title} has no transcripts",
            "leave transcripts empty; for an image with a table of any origin use technology ome_tif",
        )


def no_images(request: Request, wanted: str, hint: str) -> CellquiltError:
    """The error of a folder without images: what was looked for, and what is there."""
    return CellquiltError("machine-no-images", f"{request.source} has no {wanted}; {contents_of(request.path)}", hint)


def choose_region(given: str | None, regions: Sequence[str], request: Request, what: str) -> str:
    """The region of a folder that the setting ``vendor_region`` takes; it may be left out where there is one.

    Raises
    ------
    CellquiltError
        ``machine-region-needed``, ``machine-region-unknown``.
    """
    if given is None:
        if len(regions) == 1:
            return regions[0]
        raise CellquiltError(
            "machine-region-needed",
            f"{request.source} holds {len(regions)} {what}: {some(regions)}",
            "choose one with vendor_region (a column of the sheet: one row a region)",
        )
    if given not in regions:
        raise CellquiltError(
            "machine-region-unknown",
            f'{request.source} has no region "{given}"; there are: {some(regions)}',
            did_you_mean(given, regions),
        )
    return given


# --- names and pixel sizes


def warn(slide: Slide, text: str) -> None:
    """Log something that the user should know, and keep it in the record."""
    LOG.warning(text)
    slide.facts["warnings"] = [*slide.facts.get("warnings", []), text]


def distinct_names(names: Sequence[str], slide: Slide, source: str) -> list[str]:
    """Names of channels, those that come again with a number behind; that is logged and recorded."""
    names = [name.strip() for name in names]
    final = unique_names(names)
    changed = [f"{old} → {new}" for old, new in zip(names, final, strict=True) if old != new]
    if changed:
        warn(slide, f"{source}: names of channels that come again: {some(changed)}")
    return final


def resolve_pixel_size(
    name: str, found: tuple[float, float] | None, where: str, given: float | None, slide: Slide
) -> tuple[float, float]:
    """(x, y) in µm: the user's word counts; where the file disagrees that is logged and recorded.

    Parameters
    ----------
    name
        The file, for messages.
    found
        What the file says, (x, y) in µm.
    where
        Where it says so.
    given
        The setting ``pixel_size_um``.
    slide
        Whose facts get the sizes.

    Raises
    ------
    CellquiltError
        ``pixel-size-unknown``.
    """
    slide.facts["pixel_size_from"] = "settings" if given is not None else where
    if found is not None:
        slide.facts["pixel_size_of_file_um"] = list(found)
    if given is None:
        if found is None:
            raise CellquiltError(
                "pixel-size-unknown",
                f"{name} does not say how large its pixels are",
                "give pixel_size_um (a column of the sheet, or --pixel_size_um)",
            )
        slide.facts["pixel_size_um"] = list(found)
        return found
    slide.facts["pixel_size_um"] = [given, given]
    if found is not None and max(abs(size / given - 1) for size in found) > 0.01:
        warn(
            slide,
            f"{name}: pixel_size_um is {given:g}, the file says {found[0]:g} × {found[1]:g} ({where}); "
            f"taking {given:g}",
        )
    return given, given


# --- images


def open_tiff(request: Request, path: Path) -> TiffImage:
    """A TIFF of the slide, closed when the slide is written; it holds nothing until a window is read."""
    inside = request.path.is_dir()
    name = f"{request.source}/{path.relative_to(request.path).as_posix()}" if inside else request.source
    image = request.resources.enter_context(TiffImage(path, name, memory_mb=int(request.settings["memory_mb"])))
    image.release()
    return image


def whole_file(image: TiffImage, names: list[str], request: Request, slide: Slide) -> ImageSource:
    """The image of one file, with the z-planes that the setting ``z`` takes.

    Raises
    ------
    CellquiltError
        ``pixel-size-unknown``, ``z-plane-unknown``.
    """
    settings = request.settings
    size = resolve_pixel_size(image.name, image.pixel_size_um, image.pixel_size_from, settings["pixel_size_um"], slide)
    channels, n_planes, height, width = image.shape
    how = str(settings["z"])
    planes = choose_planes(how, range(n_planes), request.source) if n_planes > 1 or how.isdigit() else [0]
    slide.facts.update({"z": how, "z_planes": planes, "channels": names})

    def read(channel: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        return project(lambda z: image.read(channel, z, y0, y1, x0, x1), planes, how)

    return ImageSource(
        (channels, height, width),
        image.dtype,
        names,
        {GLOBAL: identity(), MICRONS: np.diag([*size, 1.0])},
        image.window_px,
        read,
        image.interleaved,
    )


def stack_files(files: Sequence[ChannelFile], request: Request, slide: Slide) -> ImageSource:
    """One image of files that hold a channel each; where a file does not reach, it is 0.

    Raises
    ------
    CellquiltError
        ``machine-image-channels``, ``machine-images-differ``, ``pixel-size-unknown``.
    """
    first = files[0].image
    for file in files:
        image = file.image
        if image.shape[:2] != (1, 1):
            raise CellquiltError(
                "machine-image-channels",
                f"{image.name} holds {image.shape[0]} channels and {image.shape[1]} planes, one of each expected",
                "give the files as the machine wrote them, one a channel",
            )
        if image.dtype != first.dtype:
            raise _differ(image, first, f"pixels of {image.dtype}", f"of {first.dtype}")
        own, other = image.pixel_size_um, first.pixel_size_um
        given = request.settings["pixel_size_um"] is not None
        if not given and own is not None and other is not None and not np.allclose(own, other, rtol=0.01):
            raise _differ(image, first, f"pixels of {own} µm", f"of {other} µm")
    stated = next((file.image for file in files if file.image.pixel_size_um is not None), first)
    size = resolve_pixel_size(
        stated.name, stated.pixel_size_um, stated.pixel_size_from, request.settings["pixel_size_um"], slide
    )
    height = max(file.image.shape[2] + file.offset_px[0] for file in files)
    width = max(file.image.shape[3] + file.offset_px[1] for file in files)
    names = distinct_names([file.name for file in files], slide, request.source)
    slide.inputs += [file.image.path for file in files]
    slide.facts["channels"] = names
    return ImageSource(
        (len(files), height, width),
        first.dtype,
        names,
        {GLOBAL: identity(), MICRONS: np.diag([*size, 1.0])},
        lambda chunk_px: tuple(np.max([file.image.window_px(chunk_px) for file in files], axis=0).tolist()),
        _reader_of(files),
    )


def same_size(files: Sequence[ChannelFile]) -> None:
    """Refuse files of different size.

    Raises
    ------
    CellquiltError
        ``machine-images-differ``.
    """
    first = files[0].image
    for file in files:
        (height, width), (other_height, other_width) = file.image.shape[2:], first.shape[2:]
        if (height, width) != (other_height, other_width):
            raise _differ(file.image, first, f"{height} × {width} pixels", f"{other_height} × {other_width}")


def _differ(image: TiffImage, first: TiffImage, what: str, other: str) -> CellquiltError:
    return CellquiltError(
        "machine-images-differ",
        f"{image.name} has {what}, {first.name} {other}",
        "all channels of a slide must be alike; remove what is not part of it",
    )


def _reader_of(files: Sequence[ChannelFile]) -> Callable[[int, int, int, int, int], np.ndarray]:
    """Reads windows channel after channel; of the files before, nothing stays in memory or open."""
    current: list[TiffImage] = []

    def read(channel: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        file = files[channel]
        if current != [file.image]:
            for image in current:
                image.release()
            current[:] = [file.image]
        (top, left), (height, width) = file.offset_px, file.image.shape[2:]
        a, b = np.clip([y0 - top, y1 - top], 0, height).tolist()
        c, d = np.clip([x0 - left, x1 - left], 0, width).tolist()
        if (b - a, d - c) == (y1 - y0, x1 - x0):
            return file.image.read(0, 0, a, b, c, d)
        out = np.zeros((y1 - y0, x1 - x0), file.image.dtype)
        if a < b and c < d:
            out[a + top - y0 : b + top - y0, c + left - x0 : d + left - x0] = file.image.read(0, 0, a, b, c, d)
        return out

    return read
