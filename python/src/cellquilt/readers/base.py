"""What all readers share: a slide as streams, and the one function that writes them into a raw store.

To add a machine, add a module of the technology's name to this folder with a ``READER = Reader(...)`` in it, and the
name to `cellquilt.core.settings.TECHNOLOGIES`. A reader only *opens*: it checks the machine's files and returns a
`Slide`, whose images, points and shapes are functions that stream. `convert_slide` does the rest.
"""

import hashlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.log import LOG
from cellquilt.core.privacy import scrub
from cellquilt.core.settings import TABLES, TECHNOLOGIES, Settings
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, identity

if TYPE_CHECKING:
    import pyarrow as pa

    from cellquilt.core.shapes import ShapesTable
    from cellquilt.core.store import Store

#: Largest file that is hashed whole; of larger ones 64 pieces of 1 MiB, evenly spread.
_HASH_WHOLE = 64 << 20


@dataclass
class ImageSource:
    """An image to be streamed.

    Attributes
    ----------
    shape
        (channels, height, width).
    dtype
        Of the pixels.
    channels
        Their names.
    transforms
        Coordinate system → (3, 3) map from pixels.
    window_px
        Width of a chunk → (height, width) of the windows to ask for, multiples of it.
    read
        (channel, y0, y1, x0, x1) → (h, w) pixels.
    interleaved
        Whether to ask for all channels of a window before the next window; else for all windows of a channel.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    channels: list[str]
    transforms: dict[str, Affine]
    window_px: Callable[[int], tuple[int, int]]
    read: Callable[[int, int, int, int, int], np.ndarray]
    interleaved: bool = False


@dataclass
class PointsSource:
    """Transcripts to be streamed.

    Attributes
    ----------
    transforms
        Coordinate system → (3, 3) map from the batches' x, y.
    batches
        Batches in µm, as `cellquilt.core.points` describes the columns.
    about_rows
        How many there are, told without reading them.
    """

    transforms: dict[str, Affine]
    batches: Callable[[], Iterator["pa.Table"]]
    about_rows: Callable[[], int]


@dataclass
class Slide:
    """A machine's output, opened and checked.

    Attributes
    ----------
    images, points, shapes
        Element name → source.
    tables
        Element name → what writes the table of that name, and the labels that it annotates if they are its own, into
        a store that is being made, and tells its rows.
    inputs
        The files it is made of, for the record.
    facts
        What the reader found out.
    """

    images: dict[str, ImageSource] = field(default_factory=dict)
    points: dict[str, PointsSource] = field(default_factory=dict)
    shapes: dict[str, Callable[[], "ShapesTable"]] = field(default_factory=dict)
    tables: dict[str, Callable[["Store", str], int]] = field(default_factory=dict)
    inputs: list[Path] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Request:
    """What a reader is asked for.

    Attributes
    ----------
    path
        The machine's folder or file.
    transcripts
        Table beside an image.
    settings
        Values in force.
    source
        The slide's name for messages: it may have been staged under another.
    resources
        Files to close when the slide is written.
    """

    path: Path
    transcripts: Path | None
    settings: Mapping[str, Any]
    source: str
    resources: ExitStack


@dataclass(frozen=True)
class Reader:
    """A machine.

    Attributes
    ----------
    technology
        Its name in the sample sheet, and of its module.
    title
        For people.
    open
        Checks the files and returns the streams.
    needs_path
        Whether there must be a folder or file; else a table of transcripts stands in for it.
    """

    technology: str
    title: str
    open: Callable[[Request], Slide]
    needs_path: bool = True


def reader_of(technology: str) -> Reader:
    """The reader of a technology, imported when it is asked for.

    Raises
    ------
    CellquiltError
        ``technology-unknown`` with the nearest known name.
    """
    if technology in TABLES:
        raise CellquiltError(
            "technology-table", f"{technology} is a table of cells: there is nothing to convert",
            "find its domains with cellquilt domains",
        )  # fmt: skip
    if technology not in TECHNOLOGIES:
        raise CellquiltError(
            "technology-unknown", f'unknown technology "{technology}"', did_you_mean(technology, TECHNOLOGIES)
        )
    return importlib.import_module(f"cellquilt.readers.{technology}").READER


def convert_slide(
    slide: Path | str | None,
    *,
    technology: str | None,
    sample: str | None = None,
    transcripts: Path | str | None = None,
    prior_cells: Path | str | None = None,
    regions: Path | str | None = None,
    output: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    source: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Read a machine's output into a raw store: images, points, vendor shapes.

    Parameters
    ----------
    slide
        The machine's folder or file.
    technology
        The machine.
    sample
        The sample's name; default: the output's.
    transcripts
        Table of transcripts beside an image, or all there is.
    prior_cells
        GeoParquet or GeoJSON of cells to start from: the shapes element ``prior_cells``.
    regions
        GeoJSON of regions that the slide is to be split into: the shapes element ``regions``.
    output
        The store to make; default: beside the slide.
    settings
        Groups ``convert`` and ``resources``.
    source
        The slide's name in messages, where it was staged under another.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        The store.

    Raises
    ------
    CellquiltError
        ``technology-missing``, ``technology-unknown``, ``slide-missing``, ``slide-not-found``,
        ``transcripts-not-found``, ``prior-cells-not-found``, ``regions-not-found``, ``image-not-finite``, what
        `read_regions` refuses, and those of the reader.
    """
    from cellquilt.core.points import PointsWriter
    from cellquilt.core.record import Record
    from cellquilt.core.shapes import write_shapes
    from cellquilt.core.store import new_store
    from cellquilt.readers.prior_cells import read_prior_cells
    from cellquilt.readers.regions import read_regions

    settings = Settings() if settings is None else settings
    if not technology:
        raise CellquiltError("technology-missing", "no technology given", f"one of {', '.join(TECHNOLOGIES)}")
    reader = reader_of(technology)
    slide, transcripts, prior_cells, regions = (
        Path(path) if path is not None and str(path) else None for path in (slide, transcripts, prior_cells, regions)
    )
    given = {"path": slide, "transcripts": transcripts, "prior_cells": prior_cells, "regions": regions}
    if slide is None and not reader.needs_path:
        slide, transcripts = transcripts, None
    if slide is None:
        what = "no path given" if reader.needs_path else "no table of transcripts given"
        raise CellquiltError("slide-missing", f"{what}; {reader.title} needs one", "name its folder or file")
    name = source or slide.name
    if not slide.exists():
        raise CellquiltError("slide-not-found", f"{source or slide} does not exist", "check the path")
    for file, what in ((transcripts, "transcripts"), (prior_cells, "prior-cells"), (regions, "regions")):
        if file is not None and not file.is_file():
            raise CellquiltError(f"{what}-not-found", f"{file} does not exist or is no file", "check the path")
    output = slide.with_name(f"{slide.name}.zarr") if output is None else Path(output)
    sample = sample or output.name.removesuffix(".zarr").removesuffix(".raw")
    parameters = settings.of_stage("convert") if isinstance(settings, Settings) else dict(settings)
    record = Record("convert", sample, {"technology": technology, **parameters})
    with ExitStack() as resources, new_store(output, sample=sample, overwrite=overwrite) as store:
        opened = reader.open(Request(slide, transcripts, settings, name, resources))
        if prior_cells is not None:
            frame = _frame(opened, str(settings["prior_cells_unit"]))
            opened.inputs.append(prior_cells)
            opened.shapes["prior_cells"] = lambda: read_prior_cells(prior_cells, frame)
        if regions is not None:  # read now: mistakes in it are told before the slide is
            image = next(iter(opened.images.values()), None)
            found = read_regions(
                regions, _frame(opened, str(settings["regions_unit"])), None if image is None else image.shape[1:]
            )
            opened.inputs.append(regions)
            opened.shapes["regions"] = lambda: found
        for element, image in opened.images.items():
            write_image(store.new_element("images", element), image, settings, sample)
        for element, points in opened.points.items():
            with PointsWriter(store.new_element("points", element), points.transforms) as writer:
                for batch in points.batches():
                    writer.write(batch)
            opened.facts[f"n_{element}"] = writer.n_rows
            LOG.info("%s: %d %s", sample, writer.n_rows, element)
        for element, shapes in opened.shapes.items():
            table = shapes()
            write_shapes(store.new_element("shapes", element), table)
            opened.facts[f"n_{element}"] = len(table)
        for element, write_to in opened.tables.items():
            opened.facts[f"n_{element}"] = write_to(store, element)
        record.facts.update(opened.facts)
        record.facts["sources"] = {column: path.name for column, path in given.items() if path is not None}
        if given["path"] is not None:
            record.facts["sources"]["path"] = re.split(r"[/\\]", name.rstrip("/\\"))[-1] or slide.name
        record.facts["inputs"] = [_describe_input(path, given) for path in opened.inputs]
        store.annotate(technology=technology, source=scrub(name), inputs=record.facts["inputs"])
        store.add_record(record.finish())
    return output


def _frame(slide: Slide, unit: str) -> dict[str, Affine]:
    """Coordinate systems of outlines in µm, or in pixels of the main image."""
    if slide.images:
        to_um = next(iter(slide.images.values())).transforms[MICRONS]
    else:
        to_um = np.linalg.inv(next(iter(slide.points.values())).transforms[GLOBAL])
    if unit == "px":
        return {GLOBAL: identity(), MICRONS: to_um}
    return {MICRONS: identity(), GLOBAL: np.linalg.inv(to_um)}


def write_image(element: Path, image: ImageSource, settings: Mapping[str, Any], sample: str) -> None:
    """Write an image element, window by window; settings ``chunk_px`` and ``threads``."""
    from cellquilt.core.images import ImageWriter
    from cellquilt.core.log import progress

    chunk = int(settings["chunk_px"])
    high, wide = image.window_px(chunk)
    _, height, width = image.shape
    windows = [
        (channel, y0, min(y0 + high, height), x0, min(x0 + wide, width))
        for channel in range(image.shape[0])
        for y0 in range(0, height, high)
        for x0 in range(0, width, wide)
    ]
    if image.interleaved:
        windows.sort(key=lambda window: (window[1], window[3], window[0]))
    LOG.info("%s: image of %d channels, %d × %d pixels", sample, *image.shape)
    with ImageWriter(
        element,
        image.shape,
        image.dtype,
        image.channels,
        image.transforms,
        chunk_px=chunk,
        # Kept twice, in the work folder and published: 7 to 10 % less of real mosaics than by default, 0.6 s a GB more.
        compression="zstd",
        threads=int(settings["threads"]),
    ) as writer:
        for channel, y0, y1, x0, x1 in progress(windows, f"{sample}: image"):
            pixels = image.read(channel, y0, y1, x0, x1)
            if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
                y, x = np.argwhere(~np.isfinite(pixels))[0] + (y0, x0)
                raise CellquiltError(
                    "image-not-finite",
                    f"sample {sample}, channel {image.channels[channel]}: the pixel in row {y}, column {x} is "
                    f"{pixels[y - y0, x - x0]}",
                    "replace such values, for example by 0",
                )
            writer.write(pixels, y0, x0, channel)


def project(read: Callable[[int], np.ndarray], planes: Sequence[int], how: str) -> np.ndarray:
    """A window of one plane, or of a projection along z, one plane at a time.

    Parameters
    ----------
    read
        Plane → (h, w) pixels.
    planes
        The planes; one only is returned as it is.
    how
        ``max`` or ``mean``; integers' means round half up.

    Returns
    -------
    numpy.ndarray
        (h, w) of the pixels' dtype.
    """
    first = read(planes[0])
    if len(planes) == 1:
        return first
    if how == "max":
        out = first.copy()
        for plane in planes[1:]:
            np.maximum(out, read(plane), out=out)
        return out
    total = first.astype(np.float64 if first.dtype.kind == "f" else np.uint64)
    for plane in planes[1:]:
        total += read(plane)
    if first.dtype.kind == "f":
        return (total / len(planes)).astype(first.dtype)
    return ((total + len(planes) // 2) // len(planes)).astype(first.dtype)


def choose_planes(setting: str, planes: Sequence[int], source: str) -> list[int]:
    """The planes that the setting ``z`` takes of those there are.

    Raises
    ------
    CellquiltError
        ``z-plane-unknown``.
    """
    if setting in ("max", "mean"):
        return list(planes)
    if setting == "middle":
        return [planes[len(planes) // 2]]
    plane = int(setting)
    if plane not in planes:
        raise CellquiltError(
            "z-plane-unknown",
            f"{source} has no z-plane {plane}; planes: {', '.join(map(str, planes))}",
            "choose one of them, or z=max, mean or middle",
        )
    return [plane]


def _describe_input(path: Path, given: Mapping[str, Path | None]) -> dict[str, Any]:
    """An input with the column of the sheet that it came by; a file of the slide's folder by its place in it."""
    column = next((column for column, place in given.items() if place == path), "path")
    folder = given["path"]
    inside = column == "path" and folder is not None and folder.is_dir() and path.is_relative_to(folder)
    name = path.relative_to(folder).as_posix() if inside and folder is not None else path.name
    return {"column": column, **describe_file(path), "name": name}


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size and checksum of an input; of a folder its files together, by their places in it.

    Files above 64 MiB are hashed by 64 pieces of 1 MiB, evenly spread and the ends included: reading 40 GB twice
    would cost more than converting them.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        files = sorted((entry.relative_to(path).as_posix(), entry) for entry in path.rglob("*") if entry.is_file())
        size = 0
        for place, entry in files:
            about = describe_file(entry)
            size += about.pop("bytes")
            digest.update(f"{place}\0{about.get('sha256') or about['sha256_sampled']}\n".encode())
        return {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _HASH_WHOLE:
            while piece := file.read(1 << 20):
                digest.update(piece)
            return {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}
        for offset in np.linspace(0, size - (1 << 20), 64).astype(np.int64).tolist():
            file.seek(offset)
            digest.update(file.read(1 << 20))
    return {"name": path.name, "bytes": size, "sha256_sampled": digest.hexdigest()}
