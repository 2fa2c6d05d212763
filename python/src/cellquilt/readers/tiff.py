"""Any TIFF, window by window: of a 40 GB file no more is in memory than the segments under one window."""

import math
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from cellquilt.core.errors import CellquiltError

_TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_OTHER_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PAR1": "Parquet",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"PK\x03\x04": "zip",
    b"\x89HDF": "HDF5",
    b"%PDF": "PDF",
}
#: µm in one unit of OME-XML and ImageJ.
_UNIT_UM = {
    "pm": 1e-6, "å": 1e-4, "angstrom": 1e-4, "nm": 1e-3, "nanometer": 1e-3,
    "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometre": 1.0,
    "\\u00b5m": 1.0,
    "mm": 1e3, "millimeter": 1e3, "cm": 1e4, "centimeter": 1e4, "m": 1e6, "in": 25400.0, "inch": 25400.0,
}  # fmt: skip
#: What scanners call pictures of the whole glass slide: its label may show a name.
OF_THE_GLASS = re.compile(r"(label|macro|thumbnail|overview|barcode|map)([ _-]image)?", re.IGNORECASE)
#: What is no channel's name among ImageJ's labels: headers, names of files, and whatever is longer.
_NO_LABEL = re.compile(r"[\n\r\\]|\.(tiff?|jpe?g|png|bmp|dcm|czi|nd2|lif|svs|ims|dv|qptiff)$|.{41}", re.IGNORECASE)
#: What Bio-Formats puts before a channel's name in ImageJ's labels.
_POSITION = re.compile(r"^(?:[czt]:\d+/\d+[ ;]*)+-\s*")
# A resolution tag coarser than this is a printer's or a screen's (72, 96, 300 dots an inch), not a microscope's.
_COARSEST_TAG_UM = 20.0


def sniff(path: Path) -> str:
    """What a file is by its first bytes: ``tiff``, another format's name, ``empty`` or ``unknown``."""
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        return "empty"
    if head[:4] in _TIFF_MAGIC:
        return "tiff"
    return next((name for magic, name in _OTHER_MAGIC.items() if head.startswith(magic)), "unknown")


def um_in(unit: str) -> float | None:
    """µm in one unit of length, by its name or symbol; None for others.

    Examples
    --------
    >>> um_in("mm"), um_in("pixel")
    (1000.0, None)
    """
    return _UNIT_UM.get(unit.strip().lower())


def kept_dtype(dtype: np.dtype, name: str) -> np.dtype:
    """The dtype in which pixels are kept: exact for all integers up to 24 bits.

    Raises
    ------
    CellquiltError
        ``tiff-dtype``.
    """
    if dtype.kind == "b":
        return np.dtype("uint8")
    if dtype.kind == "u" and dtype.itemsize <= 4:
        return dtype.newbyteorder("=")
    if dtype.kind == "f" or (dtype.kind == "i" and dtype.itemsize <= 4):
        return np.dtype("float32")
    raise CellquiltError("tiff-dtype", f"{name} has pixels of type {dtype}", "convert it to uint8, uint16 or float32")


class TiffImage:
    """The largest image of a TIFF file at full resolution, as channels × z-planes.

    Parameters
    ----------
    path
        The file.
    name
        What to call it in messages.
    memory_mb
        Bound for decoded segments that are kept for the next window.
    alone
        Take the planes that lie in this file for all there are, whatever its OME-XML says about other files.

    Attributes
    ----------
    shape
        (channels, z-planes, height, width). Axes of the file that are neither z, y, x nor time count as channels.
    dtype
        uint8, uint16, uint32 or float32. Signed integers and other floats become float32.
    channel_names
        From OME-XML or ImageJ's labels; ``r, g, b`` for colours; else ``channel_0`` and so on. Distinct.
    pixel_size_um
        (x, y) in µm from OME-XML, ImageJ, Aperio or the resolution tags; None if the file does not say.
    pixel_size_from
        Where it stands in the file.
    z_step_um
        Distance of z-planes in µm, if the file says.
    interleaved
        Whether a decoded segment holds several channels: then they are best read together.
    description
        What the first page says about itself; OME-XML where there is some.

    Raises
    ------
    CellquiltError
        ``tiff-empty``, ``not-a-tiff``, ``tiff-unreadable``, ``tiff-truncated``, ``tiff-time-series``, ``tiff-dtype``,
        ``tiff-planes-missing``, ``tiff-segment-too-large``, ``pixel-size-invalid``.
    """

    def __init__(self, path: Path, name: str | None = None, *, memory_mb: int = 1500, alone: bool = False) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self._alone = alone
        self._budget = memory_mb * 1_000_000 * 4 // 10
        self._cache: OrderedDict[tuple[int, int], np.ndarray | None] = OrderedDict()
        self._cached_bytes = 0
        self._check_magic()
        self._file = self._open()
        try:
            self._check_directories()
            self._series = self._largest_series()
            self._lay_out()
            self._check_segments()
            self._read_metadata()
        except CellquiltError:
            self.close()
            raise
        except Exception as error:  # tifffile meets damaged files with errors of any kind
            self.close()
            raise self._unreadable(error) from error

    def __enter__(self) -> "TiffImage":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.release()
        self._file.close()

    def release(self) -> None:
        """Forget decoded segments and let go of the file until the next window is read."""
        self._cache.clear()
        self._cached_bytes = 0
        self._file.filehandle.close()

    # --- opening

    def _check_magic(self) -> None:
        kind = sniff(self.path)
        if kind == "empty":
            raise CellquiltError("tiff-empty", f"{self.name} is an empty file", "copy it again from the machine")
        if kind != "tiff":
            what = "no TIFF" if kind == "unknown" else f"a {kind} file, no TIFF"
            raise CellquiltError("not-a-tiff", f"{self.name} is {what}", "convert it to OME-TIFF")

    def _unreadable(self, error: Exception) -> CellquiltError:
        return CellquiltError("tiff-unreadable", f"{self.name} cannot be read as TIFF: {error}", "write it again")

    def _truncated(self, need: int) -> CellquiltError:
        return CellquiltError(
            "tiff-truncated",
            f"{self.name} is cut short: it has {self.path.stat().st_size} bytes, its contents reach to byte {need}",
            "copy it again from the machine",
        )

    def _open(self) -> Any:
        import logging

        import tifffile

        # tifffile logs what it then raises, or what the checks here find.
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)
        try:
            # Without its OME-XML a file is no part of a set.
            file = tifffile.TiffFile(self.path, is_ome=False if self._alone else None)
            first = file.pages.first
        except Exception as error:  # tifffile meets damaged files with errors of any kind
            offset = self._first_directory()
            if offset >= self.path.stat().st_size:
                raise self._truncated(offset) from error
            raise self._unreadable(error) from error
        if not first.shape or 0 in first.shape:
            file.close()
            raise CellquiltError("tiff-unreadable", f"{self.name} has no image", "write it again")
        return file

    def _first_directory(self) -> int:
        with self.path.open("rb") as file:
            head = file.read(16)
        order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
        return int.from_bytes(head[8:16] if b"+" in head[2:4] else head[4:8], order)

    def _check_directories(self) -> None:
        """Follow the chain of directories: tifffile takes one that is cut short for a shorter file."""
        if self._file.is_ndpi:
            return  # has offsets of its own kind
        size, big = self.path.stat().st_size, self._file.is_bigtiff
        order: Literal["little", "big"] = "little" if self._file.byteorder == "<" else "big"
        count_bytes, tag_bytes, offset_bytes = (8, 20, 8) if big else (2, 12, 4)
        seen: set[int] = set()
        with self.path.open("rb") as file:
            offset = self._first_directory()
            while offset and offset not in seen:
                seen.add(offset)
                if offset + count_bytes > size:
                    raise self._truncated(offset + count_bytes)
                file.seek(offset)
                end = offset + count_bytes + int.from_bytes(file.read(count_bytes), order) * tag_bytes
                if end + offset_bytes > size:
                    raise self._truncated(end + offset_bytes)
                file.seek(end)
                offset = int.from_bytes(file.read(offset_bytes), order)

    def _largest_series(self) -> Any:
        series = [entry for entry in self._file.series if "Y" in entry.axes and "X" in entry.axes]
        if not series:
            raise CellquiltError("tiff-unreadable", f"{self.name} has no image with axes y and x", "write it again")
        if self._file.is_ome and all(entry.kind != "ome" for entry in series):
            raise CellquiltError(
                "ome-xml-invalid", f"{self.name} has OME-XML that does not fit its images", "write it again"
            )
        series = [entry for entry in series if not OF_THE_GLASS.fullmatch(entry.name.strip())] or series
        # Pyramids without SubIFDs are further series of smaller images.
        area = [entry.shape[entry.axes.index("Y")] * entry.shape[entry.axes.index("X")] for entry in series]
        return series[int(np.argmax(area))]

    def _lay_out(self) -> None:
        """Find out which page and sample holds which channel and z-plane."""
        series = self._series
        self._key = series.keyframe
        self._page_axes = self._key.axes
        if series.axes[len(series.axes) - len(self._page_axes) :] != self._page_axes or "Z" in self._page_axes:
            raise CellquiltError("tiff-unreadable", f"{self.name} has axes {series.axes}", "write it as OME-TIFF")
        sizes = dict(zip(series.axes, series.shape, strict=True))
        leading = series.axes[: len(series.axes) - len(self._page_axes)]
        if sizes.get("T", 1) > 1:
            raise CellquiltError(
                "tiff-time-series", f"{self.name} has {sizes['T']} time points", "write the one wanted to its own file"
            )
        pages = np.arange(math.prod(sizes[axis] for axis in leading)).reshape([sizes[axis] for axis in leading])
        z = leading.find("Z")
        pages = np.moveaxis(pages, z, -1).reshape(-1, sizes["Z"]) if z >= 0 else pages.reshape(-1, 1)
        samples = sizes.get("S", 1)
        self._rgb = "S" in sizes and samples in (3, 4) and int(self._key.photometric) in (2, 6)
        self._samples = 3 if self._rgb else samples  # the alpha channel of colours is no measurement
        self._all_samples = samples
        self._pages = pages
        channels = len(pages) * self._samples
        self.shape = (channels, pages.shape[1], sizes["Y"], sizes["X"])
        self.file_dtype = np.dtype(series.dtype).newbyteorder(self._file.byteorder)
        self.dtype = kept_dtype(self.file_dtype, self.name)
        key = self._key
        self._planar = "S" in self._page_axes and self._page_axes[0] == "S"
        self.interleaved = self._samples > 1 and not self._planar
        height, width = self.shape[2:]
        self._segment = (key.tilelength, key.tilewidth) if key.is_tiled else (min(key.rowsperstrip, height), width)
        self._columns = -(-width // self._segment[1])
        self._rows = -(-height // self._segment[0])
        # One run of plain pixels: rows are read from the file where they lie. Its position is checked below.
        plain = series.dtype.kind != "b" and not series.is_multifile
        self._contiguous: int | None = series.dataoffset if plain else None
        if key.is_tiled:
            # Tiles are read once but for those that windows share: keep some rows of them, not all that strips need.
            self._keep_bytes = min(self._budget, 200_000_000)
        else:
            self._keep_bytes = self._budget

    def _check_segments(self) -> None:
        size = self.path.stat().st_size
        if self._contiguous is not None:
            end = self._contiguous + math.prod(self._series.shape) * self.file_dtype.itemsize
            if end > size:
                raise self._truncated(end)
            return
        if len(self._series.pages) < self._pages.size or any(page is None for page in self._series.pages):
            raise CellquiltError(
                "tiff-planes-missing",
                f"{self.name} announces {self._pages.size} planes, not all of them are there",
                "a multi-file OME-TIFF must be in one folder, complete",
            )
        for page in self._series.pages:
            if page.parent is not self._file:
                continue  # another file of a multi-file OME-TIFF; reading it says if it is cut short
            offsets, counts = np.asarray(page.dataoffsets, np.int64), np.asarray(page.databytecounts, np.int64)
            expected = self._rows * self._columns * (self._all_samples if self._planar else 1)
            if len(offsets) != len(counts) or len(offsets) < expected:
                raise CellquiltError(
                    "tiff-unreadable",
                    f"{self.name} has {len(offsets)} segments on a plane, {expected} expected",
                    "write it again",
                )
            end = int((offsets + counts).max(initial=0))
            if end > size:
                raise self._truncated(end)
        segment = math.prod(self._segment) * self.file_dtype.itemsize * (1 if self._planar else self._all_samples)
        if segment > self._budget:
            raise CellquiltError(
                "tiff-segment-too-large",
                f"{self.name} is compressed in pieces of {segment / 1e6:.0f} MB ({self._segment[0]} × "
                f"{self._segment[1]} pixels); at most {self._budget / 1e6:.0f} MB fit the memory setting",
                "write it tiled (for example with bfconvert -tilex 512 -tiley 512), or raise memory_mb",
            )

    # --- what the file says about itself

    def _read_metadata(self) -> None:
        self.pixel_size_um: tuple[float, float] | None = None
        self.pixel_size_from = ""
        self.z_step_um: float | None = None
        self.description = str(self._file.pages.first.description or "")
        names: list[str | None] = [None] * self.shape[0]
        if self._file.is_ome and self._file.ome_metadata:
            names = self._from_ome(self._file.ome_metadata, names)
        elif self._file.is_imagej and self._file.imagej_metadata:
            self._from_imagej(self._file.imagej_metadata)
            names = self._from_labels(self._file.imagej_metadata.get("Labels"), names)
        else:
            self._from_tags()
        if self._rgb and len(self._pages) == 1:
            names = ["r", "g", "b"]
        self.channel_names = unique_names([name or f"channel_{c}" for c, name in enumerate(names)])
        if self.pixel_size_um is not None:
            for size in self.pixel_size_um:
                if not (math.isfinite(size) and size > 0):
                    raise CellquiltError(
                        "pixel-size-invalid",
                        f"{self.name} says its pixels are {size} µm wide ({self.pixel_size_from})",
                        "correct the file's metadata, or give pixel_size_um and a file without it",
                    )

    def _from_ome(self, xml: str, names: list[str | None]) -> list[str | None]:
        if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
            raise CellquiltError(
                "ome-xml-invalid", f"{self.name} has OME-XML with a document type", "write it again without"
            )
        try:
            root = ElementTree.fromstring(xml.encode() if isinstance(xml, str) else xml)
        except ElementTree.ParseError as error:
            raise CellquiltError(
                "ome-xml-invalid", f"{self.name} has OME-XML that cannot be parsed: {error}", "write it again"
            ) from error
        images = [element for element in root.iter() if element.tag.rpartition("}")[2] == "Image"]
        position = next(k for k, entry in enumerate(self._file.series) if entry is self._series)
        pixels = [
            child for image in images for child in image if child.tag.rpartition("}")[2] == "Pixels"
        ]  # one an image, in the order of the series
        if not pixels:
            return names
        chosen = pixels[position if position < len(pixels) else 0]
        sizes = [self._ome_length(chosen, axis) for axis in ("X", "Y", "Z")]
        if sizes[0] is not None or sizes[1] is not None:
            # A side that the file leaves out is like the other; one that it says is 0 is refused below.
            x, y = (sizes[k] if sizes[k] is not None else sizes[1 - k] for k in (0, 1))
            self.pixel_size_um = (float(x or 0), float(y or 0))
            self.pixel_size_from = "OME-XML"
        self.z_step_um = sizes[2] if sizes[2] and math.isfinite(sizes[2]) and sizes[2] > 0 else None
        channels = [child for child in chosen if child.tag.rpartition("}")[2] == "Channel"]
        found: list[str | None] = []
        for channel in channels:
            label = channel.get("Name") or None
            samples = min(int(channel.get("SamplesPerPixel") or 1), self._samples)
            found += [label] if samples == 1 else [f"{label}_{s}" if label else None for s in range(samples)]
        return found if len(found) == len(names) else names

    def _ome_length(self, pixels: ElementTree.Element, axis: str) -> float | None:
        text = pixels.get(f"PhysicalSize{axis}")
        factor = um_in(pixels.get(f"PhysicalSize{axis}Unit") or "µm")
        if text is None or factor is None:  # "pixel" and "reference frame" are no lengths
            return None
        try:
            return float(text) * factor
        except ValueError:
            return math.nan

    def _from_imagej(self, metadata: dict[str, Any]) -> None:
        unit = um_in(str(metadata.get("unit", "")))
        x, y = self._resolution("XResolution"), self._resolution("YResolution")
        if unit is None or not x or not y:
            self._from_tags()
            return
        self.pixel_size_um, self.pixel_size_from = (unit / x, unit / y), "ImageJ"
        spacing = metadata.get("spacing")
        self.z_step_um = float(spacing) * unit if spacing else None

    def _from_labels(self, labels: Any, names: list[str | None]) -> list[str | None]:
        """ImageJ's labels, one a plane, where they tell channels apart and read like names of them.

        A label may as well be the name of a file or the header of one, with whatever that tells of a person.
        """
        if not isinstance(labels, list | tuple) or len(labels) != self._pages.size or self._samples > 1:
            return names
        found = [_POSITION.sub("", str(labels[int(page)])).strip() for page in self._pages[:, 0]]
        if len(set(found)) < 2 or any(map(_NO_LABEL.search, found)):
            return names
        return [label or None for label in found]

    def descriptions(self) -> list[str]:
        """What the page of each channel, of the first plane, says about itself: no more than some text to look into."""
        if self._file.filehandle.closed:
            self._file.filehandle.open()
        pages = [self._series.pages[int(self._pages[channel // self._samples, 0])] for channel in range(self.shape[0])]
        return [str(getattr(page, "description", "") or "") for page in pages]

    def _from_tags(self) -> None:
        page = self._key
        aperio = re.search(r"\|\s*MPP\s*=\s*([\d.eE+-]+)", str(page.description or ""))
        if aperio:
            size = float(aperio.group(1))
            self.pixel_size_um, self.pixel_size_from = (size, size), "Aperio"
            return
        unit = {2: 25400.0, 3: 10000.0}.get(int(page.tags.valueof("ResolutionUnit", 2) or 0))
        x, y = self._resolution("XResolution"), self._resolution("YResolution")
        if unit and x and y and max(unit / x, unit / y) <= _COARSEST_TAG_UM:
            self.pixel_size_um, self.pixel_size_from = (unit / x, unit / y), "resolution tags"

    def _resolution(self, tag: str) -> float | None:
        value = self._key.tags.valueof(tag)
        if not value or not value[1] or not value[0]:
            return None
        return float(value[0]) / float(value[1])

    # --- pixels

    def window_px(self, chunk_px: int) -> tuple[int, int]:
        """(height, width) of windows that read no segment more often than memory makes necessary.

        One chunk, unless segments are strips and a row of chunks of them does not fit in memory: then as many chunks
        beside each other as do.
        """
        if self._contiguous is not None:
            return chunk_px, chunk_px
        per_pixel = self.file_dtype.itemsize * (1 if self._planar else self._all_samples)
        rows = chunk_px + 2 * self._segment[0]
        if self._key.is_tiled or rows * self.shape[3] * per_pixel <= self._budget:
            return chunk_px, chunk_px
        chunks = max(1, self._budget // (chunk_px * chunk_px * per_pixel))
        return chunk_px, chunks * chunk_px

    def read(self, channel: int, z: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """A window of one channel and z-plane: (y1 - y0, x1 - x0) of `dtype`.

        Raises
        ------
        CellquiltError
            ``tiff-undecodable`` naming the segment.
        """
        page, sample = divmod(channel, self._samples)
        index = int(self._pages[page, z])
        if self._contiguous is not None:
            return self._plain(index, sample)[y0:y1, x0:x1].astype(self.dtype)
        out = np.zeros((y1 - y0, x1 - x0), self.dtype)
        high, wide = self._segment
        for row in range(y0 // high, -(-y1 // high)):
            for column in range(x0 // wide, -(-x1 // wide)):
                number = row * self._columns + column
                if self._planar:
                    number += sample * self._rows * self._columns
                pixels = self._decoded(index, number)
                if pixels is None:
                    continue  # a segment of no bytes is empty: 0
                part = pixels[..., 0 if self._planar or "S" not in self._page_axes else sample]
                top, left = row * high, column * wide
                bottom, right = min(top + part.shape[0], y1), min(left + part.shape[1], x1)
                a, b = max(top, y0), max(left, x0)
                out[a - y0 : bottom - y0, b - x0 : right - x0] = part[a - top : bottom - top, b - left : right - left]
        return out

    def _plain(self, page: int, sample: int) -> np.ndarray:
        """One channel of a page that lies in the file as plain pixels, mapped: nothing is read before it is used."""
        assert self._contiguous is not None
        shape = self._key.shape
        offset = self._contiguous + page * math.prod(shape) * self.file_dtype.itemsize
        # A new map for each window: pages of an old one would stay in memory.
        mapped = np.memmap(self.path, self.file_dtype, mode="r", offset=offset, shape=shape)
        if "S" not in self._page_axes:
            return mapped
        return mapped[sample] if self._planar else mapped[..., sample]

    def _decoded(self, page_index: int, number: int) -> np.ndarray | None:
        key = (page_index, number)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        page = self._series.pages[page_index]
        offset, count = page.dataoffsets[number], page.databytecounts[number]
        pixels: np.ndarray | None = None
        if count:
            try:
                handle = page.parent.filehandle
                if handle.closed:
                    handle.open()
                handle.seek(offset)
                data = handle.read(count)
                if len(data) < count:
                    raise ValueError("the file ends within it")
                decoded = page.keyframe.decode(
                    data, number, jpegtables=page.jpegtables, jpegheader=page.keyframe.jpegheader
                )
                pixels = decoded[0][0] if decoded[0] is not None else None
            except Exception as error:  # codecs raise errors of their own kinds
                compression = page.keyframe.compression  # of an unknown one only its number
                raise CellquiltError(
                    "tiff-undecodable",
                    f"{self.name}: segment {number} of plane {page_index} "
                    f"({getattr(compression, 'name', compression)}) cannot be decoded: {error}",
                    "copy the file again, or write it with a common compression (zlib, LZW, zstd)",
                ) from error
        self._cache[key] = pixels
        self._cached_bytes += 0 if pixels is None else pixels.nbytes
        while self._cached_bytes > self._keep_bytes and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._cached_bytes -= 0 if old is None else old.nbytes
        return pixels


def unique_names(names: list[str]) -> list[str]:
    """Names made distinct: a name that was there before gets ``_2``, ``_3`` and so on.

    Examples
    --------
    >>> unique_names(["DAPI", "FITC", "DAPI"])
    ['DAPI', 'FITC', 'DAPI_2']
    """
    taken: dict[str, int] = {}
    out: list[str] = []
    for name in names:
        count = taken.get(name, 0) + 1
        candidate = name if count == 1 else f"{name}_{count}"
        while candidate in out or (count > 1 and candidate in names):
            count += 1
            candidate = f"{name}_{count}"
        taken[name] = count
        out.append(candidate)
    return out
