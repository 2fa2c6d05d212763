"""NanoString / Bruker CosMx: fields of view, stitched; transcripts, cells and counts of AtomX' flat files.

The folder holds ``<slide>_fov_positions_file.csv``, ``<slide>_tx_file.csv``, ``<slide>_exprMat_file.csv``,
``<slide>_metadata_file.csv`` and ``<slide>-polygons.csv`` (each may be gzipped), and in it or below it ``Morphology2D``
(a TIFF of five stains a field), ``CellComposite`` (a picture in three colours), ``CellLabels`` (masks) and, for
proteins, ``FOV<n>/ProteinImages`` (a TIFF a protein).

A field's local y grows upwards in its files: pixel row r lies at y = height - r. Global y is taken as row of the
stitched image, as Sopa and spatialdata-io do.
"""

import csv
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.shapes import ShapesTable
from cellquilt.core.store import Store
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, identity, scale, translation
from cellquilt.geometry.polygonize import labels_to_polygons
from cellquilt.readers.base import ImageSource, PointsSource, Reader, Request, Slide
from cellquilt.readers.picture import SUFFIXES, Picture
from cellquilt.readers.tiff import TiffImage, unique_names
from cellquilt.readers.transcript_table import TranscriptTable
from cellquilt.readers.vendor_table import TABLE, Pairing, pair, write_vendor_table
from cellquilt.readers.vertices import polygons_of_vertices

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

IMAGE, TRANSCRIPTS, CELLS = "morphology", "transcripts", "vendor_cells"
PIXEL_UM = 0.120280945  # of the machine's camera; its files do not say it
Z_STEP_UM = 0.8  # between the planes that transcripts lie in
_POSITIONS, _TX, _COUNTS = "_fov_positions_file.csv", "_tx_file.csv", "_exprMat_file.csv"
_METADATA, _POLYGONS = "_metadata_file.csv", "-polygons.csv"
_FOLDERS = {"morphology": "Morphology2D", "composite": "CellComposite"}
_LABELS, _PROTEINS = "CellLabels", "ProteinImages"
_FOV = re.compile(r".*_F(\d+)")
_FOV_FOLDER = re.compile(r"FOV0*(\d+)", re.IGNORECASE)
_IMAGES = (".tif", ".tiff", *SUFFIXES)
#: How the positions' file calls its columns (in lower case), and how many µm a unit is; None: a pixel.
_STYLES = (("x_global_px", "y_global_px", None), ("x_mm", "y_mm", 1e3), ("x_global_mm", "y_global_mm", 1e3))
_DEPTH = 5  # folders below the slide's that are looked into
_MOST_FOLDERS = 20_000
_LARGEST_UM = 120_000  # a glass slide is 75 mm long
_LARGEST_FILE = 64 << 20  # of positions: a slide has a thousand fields at most
_BLOCK_BYTES = 16 << 20
_OFF_PX = 2.0  # by which a field may lie off its place in the positions' file without a word
_COPY = "export it again from AtomX, with all flat CSV files"


def open_cosmx(request: Request) -> Slide:
    """Open a slide's folder; see `Reader`."""
    folder, source, settings = request.path, request.source, request.settings
    if not folder.is_dir():
        raise CellquiltError("cosmx-no-folder", f"{source} is no folder", f"name the folder that holds *{_POSITIONS}")
    files = _Files.find(folder, source)
    pixel = float(settings["pixel_size_um"] or PIXEL_UM)
    slide = Slide(inputs=[files.positions])
    slide.facts["pixel_size_um"] = [pixel, pixel]
    slide.facts["pixel_size_from"] = "settings" if settings["pixel_size_um"] else "machine"
    fields = _Fields.read(files.positions, files.name(files.positions), pixel)
    fields.settle(files.evidence(), slide)
    kind = str(settings["cosmx_image"])
    if kind != "none":
        _Stitched(request, files, fields, pixel, slide).add(kind)
    transforms = {MICRONS: identity(), GLOBAL: scale(1 / pixel)}
    path = request.transcripts or files.of(_TX)
    if path is not None:
        name = files.name(path) if request.transcripts is None else path.name
        slide.points[TRANSCRIPTS] = _transcripts(path, name, request, fields, pixel, transforms)
        slide.inputs.append(path)
    elif not files.proteins:
        raise CellquiltError(
            "cosmx-no-transcripts",
            f"{source} has no *{_TX} and no {_PROTEINS}; it has {_listed(folder)}",
            _COPY + "; for images alone use technology ome_tif",
        )
    _add_cells(files, fields, pixel, slide, request)
    slide.facts["n_fields"] = len(fields.number)
    return slide


READER = Reader("cosmx", "CosMx", open_cosmx)


# --- the folder


def _listed(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


@dataclass
class _Files:
    """What a slide's folder holds.

    Attributes
    ----------
    folder, source
        The folder, and its name for messages.
    positions
        The file with the fields' places; the others lie beside it and begin alike.
    prefix
        How they begin.
    folders
        Name → folders of that name, in order.
    labels
        Field → its mask.
    proteins
        Field → folder of its proteins' images.
    """

    folder: Path
    source: str
    positions: Path
    prefix: str
    folders: dict[str, list[Path]]
    labels: dict[int, Path]
    proteins: dict[int, Path]

    @classmethod
    def find(cls, folder: Path, source: str) -> "_Files":
        places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        found = [
            path
            for place in places
            for ending in (_POSITIONS, f"{_POSITIONS}.gz")
            for path in sorted(place.glob(f"*{ending}"))
            if not path.name.startswith(".")
        ]
        prefixes = {(path.parent, path.name.partition(_POSITIONS)[0]): path for path in reversed(found)}
        if len(prefixes) != 1:
            names = ", ".join(sorted(path.relative_to(folder).as_posix() for path in found))
            raise CellquiltError(
                "cosmx-fov-positions",
                f"{source} has several slides: {names}"
                if found
                else f"{source} has no *{_POSITIONS} (or .gz); it has {_listed(folder)}",
                "name the folder of one slide" if found else _COPY,
            )
        ((_, prefix), positions) = next(iter(prefixes.items()))
        folders, labels, proteins = _walk(folder)
        return cls(folder, source, positions, prefix, folders, labels, proteins)

    def name(self, path: Path) -> str:
        return f"{self.source}/{path.relative_to(self.folder).as_posix()}"

    def of(self, ending: str) -> Path | None:
        """A file of the slide, gzipped or not."""
        named = [self.positions.with_name(f"{self.prefix}{ending}{more}") for more in ("", ".gz")]
        return next((path for path in named if path.is_file()), None)

    def evidence(self) -> "NDArray[np.float64] | None":
        """(n, 5) field, local x, y and global x, y of what is placed in both; None where no file tells both."""
        for ending, names in (
            (_METADATA, [f"Center{axis}_{kind}_px" for kind in ("local", "global") for axis in "XY"]),
            (_TX, [f"{axis}_{kind}_px" for kind in ("local", "global") for axis in "xy"]),
            (_POLYGONS, [f"{axis}_{kind}_px" for kind in ("local", "global") for axis in "xy"]),
        ):
            path = self.of(ending)
            if path is None:
                continue
            table = _Csv(path, self.name(path))
            if {"fov", *names} <= set(table.names):
                for rows in table.blocks(["fov", *names]):
                    values = np.column_stack(rows)
                    return values[np.isfinite(values).all(axis=1)]
        return None


def _walk(folder: Path) -> tuple[dict[str, list[Path]], dict[int, Path], dict[int, Path]]:
    """Folders by name, masks and proteins by field, down to some depth, in one order whatever the disk's is."""
    folders: dict[str, list[Path]] = {}
    labels: dict[int, Path] = {}
    proteins: dict[int, Path] = {}
    for n, (place, below, files) in enumerate(os.walk(folder)):
        here = Path(place)
        below.sort()
        if n > _MOST_FOLDERS or len(here.relative_to(folder).parts) >= _DEPTH:
            below.clear()
        for name in below:
            folders.setdefault(name, []).append(here / name)
            field = _FOV_FOLDER.fullmatch(here.name)
            if name == _PROTEINS and field:
                proteins.setdefault(int(field[1]), here / name)
        for name in sorted(files):
            field = _FOV.match(Path(name).stem)
            if name.startswith(f"{_LABELS}_F") and field and name.lower().endswith((".tif", ".tiff")):
                labels.setdefault(int(field[1]), here / name)
    return folders, labels, dict(sorted(proteins.items()))


class _Csv:
    """A table of numbers as CSV, gzipped or not, read in blocks."""

    def __init__(self, path: Path, name: str, code: str = "cosmx-cells-unreadable") -> None:
        self.path, self.name, self._code = path, name, code
        with self._readable(), self._stream() as stream:
            head = stream.read(4 << 20)
        line = head.split(b"\n", 1)[0]
        try:
            self.names = next(csv.reader([line.decode("utf-8-sig").rstrip("\r")]), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise self.bad(f"cannot be read as CSV: {error}") from error
        if not self.names or b"\x00" in line:
            raise self.bad("is empty" if not head else "is no CSV")
        double = sorted({name for name in self.names if self.names.count(name) > 1}) if len(self.names) < 5000 else []
        if double:
            raise self.bad(f'has the column "{double[0]}" more than once')

    def bad(self, what: str) -> CellquiltError:
        return CellquiltError(self._code, f"{self.name} {what}", f"{_COPY}, or leave it out of the folder")

    def _stream(self) -> Any:
        return pa.input_stream(str(self.path), compression="gzip" if self.path.name.endswith(".gz") else None)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError, OSError, EOFError) as error:
            raise self.bad(f"cannot be read: {error}") from error

    def blocks(self, names: list[str], dtype: pa.DataType | None = None) -> Iterator[list[NDArray]]:
        """The columns named, as (m,) arrays (float64 by default), some rows at a time; at least one block."""
        from pyarrow import csv as reader

        dtype = dtype or pa.float64()
        read = reader.ReadOptions(column_names=self.names, skip_rows=1, block_size=_BLOCK_BYTES, use_threads=False)
        convert = reader.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, dtype))
        empty = True
        with self._readable(), self._stream() as stream:
            try:
                opened = reader.open_csv(stream, read_options=read, convert_options=convert)
            except pa.ArrowInvalid as error:
                if "Empty CSV" not in str(error):
                    raise
                opened = []
            for batch in opened:
                empty = False
                if any(column.null_count for column in batch.columns):
                    raise self.bad("has empty fields where numbers are expected")
                yield [column.to_numpy(zero_copy_only=False) for column in batch.columns]
        if empty:
            yield [np.zeros(0, dtype.to_pandas_dtype()) for _ in names]


# --- fields of view


@dataclass
class _Fields:
    """The fields of view and where they lie.

    Attributes
    ----------
    number
        (n,) int64, ascending.
    corner
        (n, 2) float64 place of local (0, 0) in global pixels.
    signs
        (2,) 1 where global x, y grow with local x, y, else -1.
    name
        The positions' file, for messages.
    origin
        (2,) global pixel that is the stitched image's corner, once it is settled.
    """

    number: NDArray[np.int64]
    corner: NDArray[np.float64]
    signs: NDArray[np.float64]
    name: str
    origin: NDArray[np.float64] | None = None

    @classmethod
    def read(cls, path: Path, name: str, pixel: float) -> "_Fields":
        def bad(what: str, hint: str = _COPY) -> CellquiltError:
            return CellquiltError("cosmx-fov-positions", f"{name} {what}", hint)

        if path.stat().st_size > _LARGEST_FILE:
            raise bad(f"has {path.stat().st_size} bytes: that is no table of fields of view")
        table = _Csv(path, name, "cosmx-fov-positions")
        lower = {column.lower(): column for column in reversed(table.names)}
        style = next((style for style in _STYLES if {"fov", *style[:2]} <= set(lower)), None)
        if style is None:
            wanted = " or ".join(", ".join(("fov", *style[:2])) for style in _STYLES)
            raise bad(f"has columns {', '.join(table.names)}; expected are {wanted}")
        columns = [lower["fov"], lower[style[0]], lower[style[1]]]
        rows = np.concatenate([np.column_stack(block) for block in table.blocks(columns)])
        if not len(rows):
            raise bad("has no fields of view")
        if not np.isfinite(rows).all() or (rows[:, 0] != np.rint(rows[:, 0])).any():
            row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1) | (rows[:, 0] != np.rint(rows[:, 0])))[0])
            raise bad(f"has no number of a field or no place in row {row + 1}: {rows[row].tolist()}")
        number, first = np.unique(rows[:, 0].astype(np.int64), return_index=True)
        if len(number) < len(rows):
            again = np.setdiff1d(np.arange(len(rows)), first)[0]
            raise bad(f"has field {int(rows[again, 0])} more than once", "name the folder of one slide")
        corner = rows[first, 1:] * (1.0 if style[2] is None else style[2] / pixel)
        spread = np.ptp(corner, axis=0) * pixel
        if spread.max() > _LARGEST_UM:
            far = int(np.argmax(np.abs(corner - np.median(corner, axis=0)).max(axis=1)))
            raise bad(
                f"has fields that lie {spread.max() / 1e3:.0f} mm apart, field {number[far]} at {corner[far].tolist()} "
                "pixels: more than a glass slide is long",
                "correct the file; is the unit that of the column's name?",
            )
        return cls(number, corner, np.ones(2), name)

    def settle(self, evidence: NDArray[np.float64] | None, slide: Slide) -> None:
        """Find where fields lie by what is placed in them: the file may name another corner of a field than the first.

        Parameters
        ----------
        evidence
            (n, 5) field, local x, y, global x, y.
        slide
            Gets facts and warnings.
        """
        if evidence is None or not len(evidence):
            slide.facts["fields_placed_by"] = "positions"
            return
        place = np.searchsorted(self.number, evidence[:, 0])
        known = place < len(self.number)
        known[known] = self.number[place[known]] == evidence[known, 0]
        if not known.all():
            raise CellquiltError(
                "cosmx-fov-positions",
                f"{self.name} has no field {int(evidence[~known, 0][0])}, which other files of the slide have",
                _COPY,
            )
        n = np.bincount(place, minlength=len(self.number))
        there = n > 0

        def means(values: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.bincount(place, values, len(self.number)) / np.maximum(n, 1)

        for axis, letter in enumerate("xy"):
            local, world = evidence[:, 1 + axis], evidence[:, 3 + axis]
            centred = local - means(local)[place]
            spread = float(centred @ centred)
            slope = float(centred @ (world - means(world)[place])) / spread if spread > 0 else 1.0
            if abs(abs(slope) - 1) > 0.01:
                raise CellquiltError(
                    "cosmx-fov-positions",
                    f"{self.name}: global {letter} grows by {slope:.4g} pixels a local pixel, 1 or -1 was expected",
                    "are the columns *_global_px of the slide's files in pixels?",
                )
            self.signs[axis] = 1.0 if slope > 0 else -1.0
            off = means(world - self.signs[axis] * local) - self.corner[:, axis]
            common = float(np.median(off[there]))
            if abs(common) < 1:  # centres of cells are rounded: the positions are as good
                common = 0.0
            odd = there & (np.abs(off - common) > _OFF_PX)
            if odd.any():
                text = (
                    f"{self.name}: {odd.sum()} fields, the first of them {self.number[odd][0]}, lie up to "
                    f"{np.abs(off - common)[odd].max():.0f} pixels off in {letter}; taking the place that cells and "
                    "transcripts have"
                )
                LOG.warning(text)
                slide.facts["warnings"] = [*slide.facts.get("warnings", []), text]
            self.corner[:, axis] += np.where(odd, off, common)
            slide.facts.setdefault("fields_off_px", []).append(round(common, 3))
        slide.facts["fields_placed_by"] = "cells and transcripts"

    def low(self, shape: tuple[int, int]) -> NDArray[np.float64]:
        """(n, 2) smallest global x, y of fields of (height, width) pixels."""
        return self.corner - np.where(self.signs < 0, [shape[1], shape[0]], [0.0, 0.0])

    def set_origin(self, shape: tuple[int, int] | None) -> NDArray[np.float64]:
        """The origin, settled when it is first asked for; without images by the fields' own corners."""
        if self.origin is None:
            self.origin = self.low(shape or (0, 0)).min(axis=0)
        return self.origin


# --- image


@dataclass
class _Plane:
    """A channel of one field: a file and its channel."""

    path: Path
    channel: int


class _Stitched:
    """The fields' images as one, read window by window and field by field."""

    def __init__(self, request: Request, files: _Files, fields: _Fields, pixel: float, slide: Slide) -> None:
        self._request, self._files, self._fields, self._pixel, self._slide = request, files, fields, pixel, slide
        self._memory = int(request.settings["memory_mb"])
        self._open: OrderedDict[Path, TiffImage | Picture] = OrderedDict()
        self._most_open, self._share = 2, self._memory
        self._planes: dict[int, dict[str, _Plane]] = {}
        self._shape: tuple[int, int] | None = None
        self._dtype: np.dtype = np.dtype(np.uint16)
        self._weights = np.zeros((0, 0), np.uint64)
        request.resources.callback(self._close)

    def _close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def add(self, kind: str) -> None:
        """Find the images, check them, and give the slide its image."""
        files, fields, source = self._files, self._fields, self._request.source
        place = self._folder(kind)
        if place is not None:
            for number, path in self._of_fields(place).items():
                file = self._opened(path)
                names = _stains(file) if place.name == _FOLDERS["morphology"] else file.channel_names
                self._check(file)
                self._planes[number] = {name: _Plane(path, channel) for channel, name in enumerate(names)}
        if kind == "auto":
            for number, folder in files.proteins.items():
                self._add_proteins(number, folder)
        if not self._planes or self._shape is None:
            raise CellquiltError(
                "cosmx-no-image",
                f"{source} has no images of fields in {' or '.join(_places(kind))}"
                f"{f' and no {_PROTEINS}' if kind == 'auto' else ''}",
                "complete the folder, or read it without an image with cosmx_image=none",
            )
        unplaced = sorted(set(self._planes) - set(fields.number.tolist()))
        if unplaced:
            raise CellquiltError(
                "cosmx-fov-positions", f"{fields.name} has no field {unplaced[0]}, of which there is an image", _COPY
            )
        channels = list(dict.fromkeys(name for number in sorted(self._planes) for name in self._planes[number]))
        self._warn_of_gaps(channels)
        height, width = self._shape
        corner = np.rint(fields.low(self._shape) - fields.set_origin(self._shape)).astype(np.int64)
        size = (int(corner[:, 1].max()) + height, int(corner[:, 0].max()) + width)
        first = self._opened(next(iter(self._planes[min(self._planes)].values())).path)
        piece = height * width * self._dtype.itemsize * (first.shape[0] if first.interleaved else 1) / 1e6
        # A field may be stored as one piece, which must fit what its file may keep; half the memory is for them all.
        self._close()
        self._share = int(3 * piece) + 10
        self._most_open = int(min(max(self._memory / self._share, 2), 64))
        used = np.isin(fields.number, list(self._planes))
        self._corner, self._number = corner[used], fields.number[used]
        self._channels = channels
        self._weights = _feather(height, width)
        self._slide.facts.update({"cosmx_image": kind, "channels": channels, "n_images": len(self._planes)})
        self._slide.facts["overlap_px"] = _overlap(self._corner, height, width)
        self._slide.images[IMAGE] = ImageSource(
            (len(channels), *size),
            self._dtype,
            channels,
            {GLOBAL: identity(), MICRONS: scale(self._pixel)},
            lambda chunk: (chunk, chunk),
            self._read,
            first.interleaved,
        )

    def _folder(self, kind: str) -> Path | None:
        for name in _places(kind):
            found = self._files.folders.get(name, [])
            found = [place for place in found if any(path.suffix.lower() in _IMAGES for path in place.iterdir())]
            if len(found) > 1:
                raise CellquiltError(
                    "cosmx-images-differ",
                    f"{self._request.source} has {len(found)} folders {name}: "
                    f"{', '.join(self._files.name(place) for place in found[:3])}",
                    "name the folder of one slide",
                )
            if found:
                return found[0]
        return None

    def _of_fields(self, folder: Path) -> dict[int, Path]:
        """Field → its image, in the order of fields."""
        found: dict[int, Path] = {}
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            match = _FOV.match(path.stem)
            if path.suffix.lower() not in _IMAGES or path.name.startswith(".") or match is None:
                continue
            number = int(match[1])
            if number in found:
                raise CellquiltError(
                    "cosmx-images-differ",
                    f"{self._files.name(folder)} has two images of field {number}: {found[number].name}, {path.name}",
                    "keep one of them",
                )
            found[number] = path
        return dict(sorted(found.items()))

    def _add_proteins(self, number: int, folder: Path) -> None:
        planes = self._planes.setdefault(number, {})
        named: list[tuple[str, Path]] = []
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            if path.suffix.lower() in (".tif", ".tiff") and not path.name.startswith("."):
                file = self._opened(path)
                self._check(file)
                if file.shape[0] != 1:
                    raise CellquiltError(
                        "cosmx-images-differ", f"{file.name} holds {file.shape[0]} channels, one was expected", _COPY
                    )
                shown = re.search(r'"DisplayName":\s*"([^"]+)"', file.description)
                named.append((shown[1] if shown else path.stem.rpartition("_")[2], path))
        named.sort(key=lambda entry: (entry[0].casefold(), entry[0], entry[1].name))
        names = unique_names([*planes, *(name for name, _ in named)])[len(planes) :]
        planes.update({name: _Plane(path, 0) for name, (_, path) in zip(names, named, strict=True)})

    def _check(self, file: TiffImage | Picture) -> None:
        if file.shape[1] != 1:
            raise CellquiltError(
                "cosmx-images-differ", f"{file.name} has {file.shape[1]} planes, one was expected", _COPY
            )
        if self._shape is None:
            self._shape, self._dtype, self._first = (file.shape[2], file.shape[3]), file.dtype, file.name
        elif file.shape[2:] != self._shape or file.dtype != self._dtype:
            raise CellquiltError(
                "cosmx-images-differ",
                f"{file.name} has {file.shape[2]} × {file.shape[3]} pixels of {file.dtype}, {self._first} has "
                f"{self._shape[0]} × {self._shape[1]} of {self._dtype}",
                "all images of a slide must be alike",
            )

    def _warn_of_gaps(self, channels: list[str]) -> None:
        without = sorted(set(self._fields.number.tolist()) - set(self._planes))
        texts = []
        if without:
            texts.append(f"{len(without)} fields have no image, the first of them {without[0]}: they stay black")
        lacking = [number for number, planes in sorted(self._planes.items()) if len(planes) < len(channels)]
        if lacking:
            gone = [name for name in channels if name not in self._planes[lacking[0]]]
            texts.append(f"{len(lacking)} fields lack channels, the first of them {lacking[0]}: {', '.join(gone)}")
        for text in texts:
            LOG.warning("%s: %s", self._request.source, text)
        if texts:
            self._slide.facts["warnings"] = [*self._slide.facts.get("warnings", []), *texts]
        self._slide.inputs += sorted({plane.path for planes in self._planes.values() for plane in planes.values()})

    def _opened(self, path: Path) -> TiffImage | Picture:
        file = self._open.get(path)
        if file is None:
            while len(self._open) >= self._most_open:
                self._open.popitem(last=False)[1].close()
            name, share = self._files.name(path), self._share
            picture = path.suffix.lower() in SUFFIXES
            file = (
                Picture(path, name, memory_mb=share) if picture else TiffImage(path, name, memory_mb=share, alone=True)
            )
            self._open[path] = file
        self._open.move_to_end(path)
        return file

    def _read(self, channel: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """A window of the stitched image; in overlaps the mean of fields, weighted by the distance to their borders."""
        assert self._shape is not None
        height, width = self._shape
        low = np.maximum(self._corner, [x0, y0])
        high = np.minimum(self._corner + np.array([width, height]), [x1, y1])
        hit = [
            k for k in np.flatnonzero((low < high).all(axis=1)).tolist()
            if self._channels[channel] in self._planes[int(self._number[k])]
        ]  # fmt: skip
        if not hit:
            return np.zeros((y1 - y0, x1 - x0), self._dtype)
        is_float = self._dtype.kind == "f"
        total: NDArray[Any] = np.zeros((y1 - y0, x1 - x0), np.float64 if is_float else np.uint64)
        weight = np.zeros((y1 - y0, x1 - x0), np.uint64)
        for k in hit:  # by number: the sum of floats does not depend on the disk's order
            (left, top), (right, bottom) = (low[k] - self._corner[k]).tolist(), (high[k] - self._corner[k]).tolist()
            part = self._field(int(self._number[k]), channel, top, bottom, left, right)
            here = np.s_[top + self._corner[k][1] - y0 : bottom + self._corner[k][1] - y0,
                         left + self._corner[k][0] - x0 : right + self._corner[k][0] - x0]  # fmt: skip
            if len(hit) == 1:
                out = np.zeros((y1 - y0, x1 - x0), self._dtype)
                out[here] = part
                return out
            weights = self._weights[top:bottom, left:right]
            total[here] += weights * part.astype(total.dtype)
            weight[here] += weights
        weight[weight == 0] = 1
        if is_float:
            return (total / weight).astype(self._dtype)
        return ((total + weight // 2) // weight).astype(self._dtype)

    def _field(self, number: int, channel: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """A part of a field's image as it lies in the stitched one; its files are upside down."""
        assert self._shape is not None
        height, width = self._shape
        plane = self._planes[number][self._channels[channel]]
        flip_y, flip_x = self._fields.signs[1] > 0, self._fields.signs[0] < 0
        if flip_y:
            top, bottom = height - bottom, height - top
        if flip_x:
            left, right = width - right, width - left
        pixels = self._opened(plane.path).read(plane.channel, 0, top, bottom, left, right)
        return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _places(kind: str) -> list[str]:
    """Names of folders that may hold the image that is asked for."""
    return list(_FOLDERS.values()) if kind == "auto" else [_FOLDERS[kind]]


def _feather(height: int, width: int) -> NDArray[np.uint64]:
    """(h, w) distance of each pixel to the nearest border of its field, from 1 on."""
    y, x = (np.minimum(np.arange(size), np.arange(size)[::-1]) + 1 for size in (height, width))
    return np.minimum(y[:, None], x[None]).astype(np.uint64)


def _overlap(corner: NDArray[np.int64], height: int, width: int) -> int:
    """Pixels that pairs of fields share, in all."""
    shared = 0
    for k in range(len(corner) - 1):  # a slide has hundreds of fields
        sides = np.maximum([width, height] - np.abs(corner[k + 1 :] - corner[k]), 0)
        shared += int(sides.prod(axis=1).sum())
    return shared


def _stains(file: TiffImage | Picture) -> list[str]:
    """Names of a field's stains, in the order of its pages: by the JSON that its first page describes itself with."""
    order, targets, ids = "", [], []
    try:
        document = json.loads(file.description)
    except (ValueError, RecursionError):
        document = None
    if document is not None:
        found: dict[str, list[str]] = {"ChannelOrder": [], "BiologicalTarget": [], "ChannelId": []}
        _collect(document, found)
        order, targets, ids = "".join(found["ChannelOrder"][:1]), found["BiologicalTarget"], found["ChannelId"]
    else:  # cut off, or with something around it
        texts = {
            key: re.findall(rf'"{key}":\s*"([^"]*)"', file.description)
            for key in ("ChannelOrder", "BiologicalTarget", "ChannelId")
        }
        order, targets, ids = "".join(texts["ChannelOrder"][:1]), texts["BiologicalTarget"], texts["ChannelId"]
    if len(order) != file.shape[0]:
        return file.channel_names
    named = dict(zip(reversed(ids), reversed(targets), strict=False)) if len(ids) == len(targets) else {}
    return unique_names([named.get(letter) or letter for letter in order])


def _collect(value: Any, found: dict[str, list[str]]) -> None:
    """Texts under certain keys, in the order of the document; JSON is no deeper than its parser lets it be."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in found and isinstance(inner, str):
                found[key].append(inner)
            else:
                _collect(inner, found)
    elif isinstance(value, list):
        for inner in value:
            _collect(inner, found)


# --- transcripts


def _transcripts(
    path: Path, name: str, request: Request, fields: _Fields, pixel: float, transforms: dict[str, Affine]
) -> PointsSource:
    settings = request.settings
    x, y = settings["x_column"] or "x_global_px", settings["y_column"] or "y_global_px"
    gene = settings["gene_column"] or "target"
    table = TranscriptTable(path, name, x=x, y=y, gene=gene, z=settings["z_column"])
    if settings["z_column"] is None and "z" in table.names:
        table = TranscriptTable(path, name, x=x, y=y, gene=gene, z="z", z_is_plane=True)
    left, top = fields.set_origin(None)
    to_um = scale(pixel) @ translation(-left, -top)
    step = float(settings["z_step_um"]) if "z_step_um" in getattr(settings, "given", settings) else Z_STEP_UM

    def batches() -> Iterator[pa.Table]:
        for batch in table.batches(to_um=to_um, z_step_um=step, min_qv=settings["min_qv"]):
            yield _with_cells(batch, table.name)

    return PointsSource(transforms, batches, table.about_rows)


def _with_cells(batch: pa.Table, name: str) -> pa.Table:
    """The machine's cell of each transcript, by a name that is its own on the whole slide, and whether in a nucleus."""
    if "CellComp" in batch.column_names:
        inside = pc.equal(batch.column("CellComp").cast(pa.string()), "Nuclear").fill_null(False)
        batch = batch.append_column("overlaps_nucleus", inside.cast(pa.uint8()))
    if not {"fov", "cell_ID"} <= set(batch.column_names):
        return batch
    try:
        fov, cell = (batch.column(column).cast(pa.int64()).fill_null(0).to_numpy() for column in ("fov", "cell_ID"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise CellquiltError(
            "transcripts-value", f"{name}: fov and cell_ID must be whole numbers: {error}", "correct the values"
        ) from error
    cell = np.maximum(cell, 0)
    keys, codes = np.unique(np.where(cell > 0, cell << 24 | fov & 0xFFFFFF, 0), return_inverse=True)
    names = np.where(keys > 0, cell_names(keys & 0xFFFFFF, keys >> 24), "UNASSIGNED")
    words = pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(names.tolist(), pa.string()))
    return batch.append_column("vendor_cell_id", words)


def cell_names(fov: NDArray[np.integer], cell: NDArray[np.integer]) -> NDArray[np.str_]:
    """(n,) names of cells that are theirs on the whole slide: number in the field, then the field.

    Examples
    --------
    >>> cell_names(np.array([3]), np.array([12])).tolist()
    ['12_3']
    """
    return np.char.add(np.char.add(np.asarray(cell, np.int64).astype(str), "_"), np.asarray(fov, np.int64).astype(str))


# --- cells


def _add_cells(files: _Files, fields: _Fields, pixel: float, slide: Slide, request: Request) -> None:
    """The machine's cells, by its outlines or else its masks, and its counts."""
    transforms = {GLOBAL: identity(), MICRONS: scale(pixel)}
    cells = _VendorCells(files, fields, transforms, int(request.settings["memory_mb"]))
    if cells.polygons is None and not files.labels:
        return
    slide.shapes[CELLS] = cells.outlines
    slide.inputs += [cells.polygons] if cells.polygons is not None else list(files.labels.values())
    if cells.counts is not None:
        slide.tables[TABLE] = cells.write_table
        slide.inputs.append(cells.counts.path)


class _VendorCells:
    """The machine's cells: outlines in the order of its table of counts, so that both are one table."""

    def __init__(self, files: _Files, fields: _Fields, transforms: dict[str, Affine], memory_mb: int) -> None:
        self._files, self._fields, self._transforms, self._memory = files, fields, transforms, memory_mb
        self.polygons = files.of(_POLYGONS)
        path = files.of(_COUNTS)
        self.counts = None if path is None else _Csv(path, files.name(path))
        self._written: tuple[ShapesTable, Pairing] | None = None
        if self.counts is not None and not {"fov", "cell_ID"} <= set(self.counts.names):
            raise self.counts.bad(f"has no columns fov and cell_ID; columns: {', '.join(self.counts.names[:8])}, …")

    def outlines(self) -> ShapesTable:
        """Outlines in pixels of the stitched image."""
        table = self._of_masks() if self.polygons is None else self._of_polygons(self.polygons)
        if self.counts is not None:
            rows = [cell_names(fov, cell)[cell > 0] for fov, cell in self.counts.blocks(["fov", "cell_ID"], pa.int64())]
            pairing = pair(table.ids, np.concatenate(rows).astype(str), self.counts.name)
            table = table.take(pairing.order)
            self._written = (table, pairing)
        return table

    def _of_polygons(self, path: Path) -> ShapesTable:
        table = _Csv(path, self._files.name(path))
        cell = next((name for name in ("cellID", "cell_ID") if name in table.names), "cellID")
        columns = ["fov", cell, "x_global_px", "y_global_px"]
        missing = [name for name in columns if name not in table.names]
        if missing:
            raise table.bad(f"has no column {missing[0]}; columns: {', '.join(table.names)}")
        parts = [np.column_stack(block) for block in table.blocks(columns)]
        rows = np.concatenate(parts)
        if not np.isfinite(rows).all():
            raise table.bad(f"has no number in row {int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0]) + 1}")
        fov, number = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)
        xy = rows[:, 2:] - self._fields.set_origin(None)
        order, starts, geometry = polygons_of_vertices(fov << 32 | number, xy)
        fov, number = fov[order][starts], number[order][starts]
        there = shapely.area(geometry) > 0
        return self._shapes(fov[there], number[there], geometry[there], table.name, int((~there).sum()))

    def _of_masks(self) -> ShapesTable:
        fovs, cells, geometry = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, object)]
        for number, path in sorted(self._files.labels.items()):
            if number not in self._fields.number:
                raise CellquiltError(
                    "cosmx-fov-positions", f"{self._fields.name} has no field {number}, of which there is a mask", _COPY
                )
            with TiffImage(path, self._files.name(path), memory_mb=self._memory, alone=True) as file:
                height, width = file.shape[2:]
                mask = file.read(0, 0, 0, height, 0, width)
            if mask.dtype.kind not in "ui":
                raise CellquiltError(
                    "cosmx-cells-unreadable", f"{file.name} holds {mask.dtype}, labels were expected", _COPY
                )
            signs = self._fields.signs
            mask = np.ascontiguousarray(mask[:: -1 if signs[1] > 0 else 1, :: -1 if signs[0] < 0 else 1])
            low = self._fields.low((height, width))[np.searchsorted(self._fields.number, number)]
            corner = np.rint(low - self._fields.set_origin((height, width)))
            found, outlines = labels_to_polygons(mask, (float(corner[0]), float(corner[1])))
            fovs.append(np.full(len(found), number, np.int64))
            cells.append(found.astype(np.int64))
            geometry.append(outlines)
        name = f"{self._files.source}/{_LABELS}"
        return self._shapes(np.concatenate(fovs), np.concatenate(cells), np.concatenate(geometry), name, 0)

    def _shapes(
        self, fov: NDArray[np.int64], cell: NDArray[np.int64], geometry: NDArray[np.object_], name: str, left_out: int
    ) -> ShapesTable:
        ids = cell_names(fov, cell)
        if left_out:
            LOG.warning("%s: %d outlines have no area and are left out", name, left_out)
        columns = {"entity_id": ids, "fov": fov, "cell_ID": cell}
        metadata = {"source": name, "n_without_outline": left_out}
        return ShapesTable(ids, geometry, columns, self._transforms, metadata)

    def write_table(self, store: Store, name: str) -> int:
        """Write the machine's counts."""
        assert self._written is not None
        assert self.counts is not None
        cells, pairing = self._written
        genes = [gene for gene in self.counts.names if gene not in ("fov", "cell_ID", "cell", "cell_id")]
        return write_vendor_table(store, name, CELLS, cells, pairing, self._blocks(genes), genes)

    def _blocks(self, genes: list[str]) -> Iterator["csr_matrix"]:
        from scipy.sparse import csr_matrix

        assert self.counts is not None
        for cell, *counts in self.counts.blocks(["cell_ID", *genes], pa.int64()):
            matrix = csr_matrix(
                np.column_stack(counts)[cell > 0] if counts else np.zeros((int((cell > 0).sum()), 0), np.int64)
            )
            if matrix.data.min(initial=0) < 0 or matrix.data.max(initial=0) > np.iinfo(np.int32).max:
                raise self.counts.bad("holds values that are no counts")
            yield matrix
