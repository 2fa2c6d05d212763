"""10x Xenium: a region's bundle, as the machine (XOA 1 to 4) or ``xeniumranger`` writes it.

The folder holds ``experiment.xenium`` (JSON with the pixel size), ``transcripts.parquet`` in µm, the stains and, where
the machine segmented, ``cell_boundaries.parquet`` and ``nucleus_boundaries.parquet`` in µm. The stains are
``morphology_focus/morphology_focus_<n>.ome.tif`` (XOA 2 and 3), ``morphology_focus/ch<n>_<stain>.ome.tif`` (XOA 4), or
one ``morphology_focus.ome.tif`` and one ``morphology_mip.ome.tif`` (XOA 1); ``morphology.ome.tif`` is the z-stack of
DAPI. Microns and pixels share their origin.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.shapes import ShapesTable
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, identity, scale
from cellquilt.readers.base import ImageSource, PointsSource, Reader, Request, Slide, choose_planes, project
from cellquilt.readers.tiff import TiffImage, unique_names
from cellquilt.readers.transcript_table import TranscriptTable
from cellquilt.readers.vertices import polygons_of_vertices, runs

IMAGE, TRANSCRIPTS, CELLS, NUCLEI = "morphology", "transcripts", "vendor_cells", "vendor_nuclei"
EXPERIMENT = "experiment.xenium"
_TABLES = ("transcripts.parquet", "transcripts.csv.gz", "transcripts.csv")
_OUTLINES = {CELLS: "cell_boundaries.parquet", NUCLEI: "nucleus_boundaries.parquet"}
_FOCUS = "morphology_focus"
_SINGLE = {"focus": "morphology_focus.ome.tif", "mip": "morphology_mip.ome.tif", "stack": "morphology.ome.tif"}
_CHANNEL_FILE = re.compile(r"(?:morphology_focus_(\d{4})|ch(\d{4})_(.+))\.ome\.tiff?", re.IGNORECASE)
#: The stains of the segmentation kit, in the order of XOA 2 and 3, whose files are numbered only.
STAINS = ("DAPI", "ATP1A1/CD45/E-Cadherin", "18S", "AlphaSMA/Vimentin")


def open_xenium(request: Request) -> Slide:
    """Open a region's bundle; see `Reader`."""
    folder, source, settings = request.path, request.source, request.settings
    if not folder.is_dir():
        raise CellquiltError("xenium-no-folder", f"{source} is no folder", f"name the folder that holds {EXPERIMENT}")
    experiment = read_experiment(folder / EXPERIMENT, source)
    slide = Slide(inputs=[folder / EXPERIMENT])
    slide.facts["analysis_version"] = _version(experiment)
    pixel = _pixel_size(experiment, settings["pixel_size_um"], source, slide)
    if settings["xenium_image"] == "none":
        slide.facts["xenium_image"] = "none"
    else:
        slide.images[IMAGE] = _image(request, pixel, slide)
    in_um = {MICRONS: identity(), GLOBAL: scale(1 / pixel)}
    slide.points[TRANSCRIPTS] = _transcripts(request, in_um, slide)
    for element, file in _OUTLINES.items():
        path = folder / file
        if path.is_file() and not (element == NUCLEI and _nuclei_run_together(path, source, slide)):
            slide.shapes[element] = lambda path=path: read_outlines(path, f"{source}/{path.name}", in_um)  # type: ignore[misc]
            slide.inputs.append(path)
    return slide


READER = Reader("xenium", "Xenium", open_xenium)


# --- experiment.xenium


def read_experiment(path: Path, source: str) -> dict[str, Any]:
    """The bundle's manifest.

    Raises
    ------
    CellquiltError
        ``xenium-no-experiment``, ``xenium-experiment-invalid``.
    """
    name = f"{source}/{path.name}"
    if not path.is_file():
        below = sorted(entry.parent.name for entry in path.parent.glob(f"*/{EXPERIMENT}"))
        hint = "name the region's folder as the machine wrote it, the one that holds this file"
        if below:
            hint = f"name the region's own folder: {', '.join(f'{source}/{folder}' for folder in below[:3])}"
            hint += f" or one of {len(below) - 3} more" if len(below) > 3 else ""
        raise CellquiltError("xenium-no-experiment", f"{name} does not exist", hint)
    hint = "copy it again from the machine"
    try:
        experiment = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CellquiltError("xenium-experiment-invalid", f"{name} is no JSON: {error}", hint) from error
    if not isinstance(experiment, dict):
        raise CellquiltError(
            "xenium-experiment-invalid", f"{name} holds a {type(experiment).__name__}, an object was expected", hint
        )
    return experiment


def _version(experiment: dict[str, Any]) -> str:
    """Version of the software that wrote the bundle: that of ``xeniumranger``, where it came after the machine."""
    ranger = experiment.get("xenium_ranger")
    later = ranger.get("version") if isinstance(ranger, dict) else None
    return str(later or experiment.get("analysis_sw_version") or "")


def _pixel_size(experiment: dict[str, Any], given: float | None, source: str, slide: Slide) -> float:
    """In µm: the user's word counts; where the file disagrees that is logged and recorded."""
    name, found = f"{source}/{EXPERIMENT}", experiment.get("pixel_size")
    slide.facts["pixel_size_from"] = EXPERIMENT if given is None else "settings"
    if given is None and found is None:
        raise CellquiltError(
            "pixel-size-unknown",
            f'{name} has no "pixel_size"',
            "copy it again from the machine, or give pixel_size_um (a column of the sheet, or --pixel_size_um)",
        )
    stated = float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan
    if given is None and not (math.isfinite(stated) and stated > 0):
        raise CellquiltError(
            "pixel-size-invalid", f'{name}: "pixel_size" is {found!r}, a length in µm was expected', "correct it"
        )
    size = stated if given is None else given
    if given is not None and abs(stated / given - 1) > 0.01:
        _warn(slide, f"{name}: pixel_size_um is {given:g}, the file says {stated:g}; taking {given:g}")
    slide.facts["pixel_size_um"] = [size, size]
    return size


def _warn(slide: Slide, text: str) -> None:
    LOG.warning(text)
    slide.facts["warnings"] = [*slide.facts.get("warnings", []), text]


# --- image


def _image(request: Request, pixel: float, slide: Slide) -> ImageSource:
    kind, source = str(request.settings["xenium_image"]), request.source
    paths = _image_files(request.path, kind, source)
    memory = max(int(request.settings["memory_mb"]) // len(paths), 50)
    files = [
        request.resources.enter_context(
            # A stack is one file with planes; of the others each is a plane, though its OME-XML tells of all.
            TiffImage(path, f"{source}/{path.relative_to(request.path)}", memory_mb=memory, alone=kind != "stack")
        )
        for path in paths
    ]
    first = files[0]
    for file in files:
        if file.shape[0] != 1 or (kind != "stack" and file.shape[1] != 1):
            raise CellquiltError(
                "xenium-image-channels",
                f"{file.name} holds {file.shape[0]} channels and {file.shape[1]} planes, one of each expected",
                "give the files as the machine wrote them, one a stain",
            )
        if file.shape != first.shape or file.dtype != first.dtype:
            raise CellquiltError(
                "xenium-images-differ",
                f"{file.name} has {file.shape[2]} × {file.shape[3]} pixels of {file.dtype}, {first.name} "
                f"{first.shape[2]} × {first.shape[3]} of {first.dtype}",
                "all stains of a bundle must be alike; copy it again from the machine",
            )
    ome = _Ome.of(first.description)
    if ome.n_channels > len(files) and kind != "stack":
        raise CellquiltError(
            "xenium-channels-missing",
            f"{first.name} announces {ome.n_channels} channels, {len(files)} files are there: "
            f"{', '.join(path.name for path in paths)}",
            f"complete the folder {_FOCUS}",
        )
    if ome.pixel_um is not None and abs(ome.pixel_um / pixel - 1) > 0.01:
        _warn(slide, f"{first.name} says its pixels are {ome.pixel_um:g} µm wide; taking {pixel:g}")
    channels = _channel_names(paths, ome)
    how = str(request.settings["z"])
    planes = choose_planes(how, range(first.shape[1]), first.name) if kind == "stack" else [0]
    slide.inputs += paths
    slide.facts.update({"xenium_image": kind, "channels": channels})
    if kind == "stack":
        slide.facts.update({"z": how, "z_planes": planes})

    def read(channel: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        return project(lambda z: files[channel].read(0, z, y0, y1, x0, x1), planes, how)

    transforms = {GLOBAL: identity(), MICRONS: scale(pixel)}
    shape = (len(files), first.shape[2], first.shape[3])
    return ImageSource(shape, first.dtype, channels, transforms, first.window_px, read)


def _image_files(folder: Path, kind: str, source: str) -> list[Path]:
    """The files of an image, one a stain, in the order of their numbers."""
    if kind == "focus" and (folder / _FOCUS).is_dir():
        # A file beside them whose name starts with "._" is none of the machine's.
        numbered = {
            int(match[1] or match[2]): path
            for path in sorted((folder / _FOCUS).iterdir(), key=lambda path: path.name)
            if (match := _CHANNEL_FILE.fullmatch(path.name))
        }
        missing = sorted(set(range(max(numbered, default=-1) + 1)) - set(numbered))
        if missing:
            raise CellquiltError(
                "xenium-channels-missing",
                f"{source}/{_FOCUS} has no file number {', '.join(f'{number:04d}' for number in missing)}; it has "
                f"{', '.join(numbered[number].name for number in sorted(numbered))}",
                "complete the folder",
            )
        if numbered:
            return [numbered[number] for number in sorted(numbered)]
    if (folder / _SINGLE[kind]).is_file():
        return [folder / _SINGLE[kind]]
    wanted = f"{_FOCUS}/morphology_focus_0000.ome.tif, {_FOCUS}/ch0000_dapi.ome.tif or " if kind == "focus" else ""
    others = [other for other, file in _SINGLE.items() if other != kind and (folder / file).is_file()]
    others += ["focus"] if kind != "focus" and (folder / _FOCUS).is_dir() else []
    instead = f"take another image with xenium_image={' or '.join(others)}" if others else "complete the folder"
    raise CellquiltError(
        "xenium-no-image",
        f"{source} has no {wanted}{_SINGLE[kind]}",
        f"{instead}, or read it without an image with xenium_image=none",
    )


@dataclass
class _Ome:
    """What OME-XML says of the image that a file is part of.

    Attributes
    ----------
    names
        Of the channels; None where it says none.
    channel_of
        File → channel, where it tells of several files.
    n_channels
        Their number.
    pixel_um
        Width of a pixel.
    """

    names: list[str | None] = field(default_factory=list)
    channel_of: dict[str, int] = field(default_factory=dict)
    n_channels: int = 0
    pixel_um: float | None = None

    @classmethod
    def of(cls, description: str) -> "_Ome":
        """Parsed; of a description that is none, an empty one: the image can be read without it."""
        try:
            root = ElementTree.fromstring(description.encode())
            pixels = next(element for element in root.iter() if _tag(element) == "Pixels")
            names = [element.get("Name") or None for element in pixels if _tag(element) == "Channel"]
            channel_of = {
                Path(part.get("FileName", "")).name: int(data.get("FirstC") or 0)
                for data in pixels
                if _tag(data) == "TiffData"
                for part in data
                if _tag(part) == "UUID"
            }
            n_channels, pixel_um = int(pixels.get("SizeC") or 0), float(pixels.get("PhysicalSizeX") or "nan")
        except (ElementTree.ParseError, StopIteration, ValueError):
            return cls()
        in_um = (pixels.get("PhysicalSizeXUnit") or "µm") in ("µm", "μm", "um") and math.isfinite(pixel_um)
        return cls(names, channel_of, n_channels, pixel_um if in_um else None)


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _channel_names(paths: list[Path], ome: _Ome) -> list[str]:
    """Names of the stains: as the OME-XML says, else as the files are called, else those of the kit by number."""
    kit: list[str | None] = list(STAINS) if len(paths) == len(STAINS) else ["DAPI"] + [None] * (len(paths) - 1)
    found = []
    for number, path in enumerate(paths):
        channel = ome.channel_of.get(path.name, number)
        said = ome.names[channel] if len(ome.names) == len(paths) > channel else None
        match = _CHANNEL_FILE.fullmatch(path.name)
        named = match[3] if match else None
        found.append(said or ("DAPI" if named and named.lower() == "dapi" else named) or kit[number])
    return unique_names([name or f"channel_{number}" for number, name in enumerate(found)])


# --- transcripts


def _transcripts(request: Request, transforms: dict[str, Affine], slide: Slide) -> PointsSource:
    folder, source, settings = request.path, request.source, request.settings
    path = request.transcripts or next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    if path is None:
        raise CellquiltError(
            "xenium-no-transcripts",
            f"{source} has no {' or '.join(_TABLES)}",
            "complete the folder (transcripts.zarr.zip does not stand in for it); for images alone use ome_tif",
        )
    table = TranscriptTable(
        path,
        f"{source}/{path.name}",
        x=settings["x_column"] or "x_location",
        y=settings["y_column"] or "y_location",
        z=settings["z_column"],
        gene=settings["gene_column"] or "feature_name",
    )
    if table.columns.qv is None:
        _warn(slide, f"{table.name} has no column qv: all transcripts pass the quality filter")
    slide.inputs.append(path)
    controls_from = next((name for name in ("is_gene", "codeword_category") if name in table.names), "names")
    slide.facts["controls_from"] = controls_from

    def batches() -> Iterator[pa.Table]:
        for batch in table.batches(min_qv=settings["min_qv"]):
            yield _finish(batch, controls_from, table.name)

    return PointsSource(transforms, batches, table.about_rows)


def _finish(batch: pa.Table, controls_from: str, name: str) -> pa.Table:
    """Text that XOA 1 stores as bytes becomes text, and the machine's word on what is a control counts."""
    for k, column in enumerate(batch.schema):
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            batch = batch.set_column(k, column.name, _cast(batch, column.name, pa.string(), name))
    if controls_from == "names":
        return batch
    if controls_from == "is_gene":
        is_gene = _cast(batch, controls_from, pa.bool_(), name)
    else:
        is_gene = pc.ends_with(_cast(batch, controls_from, pa.string(), name), "_gene")
    # A custom gene may be called like a control; where the machine says nothing of a row, its name counts.
    control = pc.coalesce(pc.invert(is_gene), batch.column("is_control"))
    return batch.set_column(batch.schema.get_field_index("is_control"), "is_control", control)


def _cast(batch: pa.Table, column: str, kind: pa.DataType, name: str) -> pa.ChunkedArray:
    try:
        return batch.column(column).cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise CellquiltError(
            "transcripts-value", f'{name}: column "{column}" cannot be read as {kind}: {error}', "correct the values"
        ) from error


# --- cells and nuclei


def _nuclei_run_together(path: Path, source: str, slide: Slide) -> bool:
    """Whether a file of XOA 2.0 has the nuclei of a cell as one line: they cannot be told apart."""
    if not re.match(r"xenium-2\.", slide.facts["analysis_version"], re.IGNORECASE):
        return False
    if "label_id" in _names(path, source):
        return False
    _warn(slide, f"{source}/{path.name} has no column label_id: the nuclei of a cell cannot be told apart; left out")
    return True


def _names(path: Path, source: str) -> list[str]:
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(f"{source}/{path.name}", f"cannot be read: {error}") from error


def _unreadable(name: str, why: str) -> CellquiltError:
    hint = "give the file as the machine wrote it, or leave it out of the folder"
    return CellquiltError("xenium-cells-unreadable", f"{name} {why}", hint)


def read_outlines(path: Path, name: str, transforms: dict[str, Affine]) -> ShapesTable:
    """Cells or nuclei from a table of vertices.

    Parameters
    ----------
    path
        Parquet: a row a vertex, with ``cell_id``, ``vertex_x``, ``vertex_y`` (µm) and, since XOA 2, ``label_id``, the
        number of the outline.
    name
        What to call it in messages.
    transforms
        Coordinate system → (3, 3) map from µm.

    Returns
    -------
    ShapesTable
        In the order of the file. Ids are the machine's; the second nucleus of a cell gets ``<cell>_2``. Columns:
        ``entity_id``, the machine's cell, and ``label_id`` (int64) where the file has it. Outlines without area are
        left out and counted.

    Raises
    ------
    CellquiltError
        ``xenium-cells-unreadable``.
    """
    names = _names(path, name.removesuffix(f"/{path.name}"))
    missing = [column for column in ("cell_id", "vertex_x", "vertex_y") if column not in names]
    if missing:
        raise _unreadable(name, f"has no column {missing[0]}; columns: {', '.join(names)}")
    columns = ["cell_id", "vertex_x", "vertex_y", *(["label_id"] if "label_id" in names else [])]
    try:
        table = pq.read_table(path, columns=columns, read_dictionary=["cell_id"])
        xy = np.column_stack([table.column(f"vertex_{axis}").cast(pa.float64()).to_numpy() for axis in "xy"])
        cells = table.column("cell_id").combine_chunks()
        if not pa.types.is_dictionary(cells.type):  # XOA 1.0 numbered its cells
            cells = cells.dictionary_encode()
        entities = np.asarray(cells.dictionary.cast(pa.string()).to_pylist(), dtype=str)
        cell = cells.indices.cast(pa.int64()).to_numpy(zero_copy_only=False)
        label = table.column("label_id").cast(pa.int64()).to_numpy() if "label_id" in columns else None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise _unreadable(name, f"cannot be read: {error}") from error
    key = cell if label is None else label
    bad = np.flatnonzero(~(np.isfinite(xy).all(axis=1) & np.isfinite(cell) & np.isfinite(key)))
    if len(bad):
        raise _unreadable(name, f"has no coordinates, cell or label in row {bad[0] + 1}")
    order, starts, geometry = polygons_of_vertices(key, xy)
    cell, key = cell[order], key[order]
    there = shapely.area(geometry) > 0
    if not there.all():
        LOG.warning("%s: %d of %d outlines have no area and are left out", name, (~there).sum(), len(there))
    cell, key = cell[starts[there]], key[starts[there]]
    found = {"entity_id": entities[cell], **({} if label is None else {"label_id": key})}
    metadata = {"source": name, "n_without_outline": int((~there).sum())}
    return ShapesTable(_distinct(entities, cell), geometry[there], found, transforms, metadata)


def _distinct(entities: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Names of outlines: the cell's, and from its second on ``<cell>_<k>``."""
    order, starts = runs(cell)
    nth = np.empty(len(cell), np.int64)
    nth[order] = np.arange(len(cell)) - np.repeat(starts, np.diff(np.append(starts, len(cell))))
    ids = entities[cell].astype(object)
    again = np.flatnonzero(nth)
    ids[again] = [f"{name}_{k + 1}" for name, k in zip(ids[again].tolist(), nth[again].tolist(), strict=True)]
    return ids.astype(str)
