"""10x Visium HD: the output of Space Ranger, with counts in squares of 2 µm and a microscope's image.

The folder holds ``binned_outputs/square_002um`` (and ``square_008um``, ``square_016um``) with
``filtered_feature_bc_matrix.h5``, ``raw_feature_bc_matrix.h5`` and ``spatial`` (``tissue_positions.parquet``,
``scalefactors_json.json``); since Space Ranger 4 also ``segmented_outputs`` with the cells that it found. The
microscope's image is an input of Space Ranger, not an output: it lies where the user put it, best in
``microscope_image``. Positions are in its pixels.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellquilt.core.bins import BINS, write_bins
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.shapes import ShapesTable
from cellquilt.core.store import Store
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, apply, identity, length_scale, scale
from cellquilt.readers.base import ImageSource, PointsSource, Reader, Request, Slide
from cellquilt.readers.picture import SUFFIXES, Picture
from cellquilt.readers.prior_cells import read_prior_cells
from cellquilt.readers.tiff import TiffImage, sniff
from cellquilt.readers.vendor_table import TABLE, Pairing, pair, write_vendor_table

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

IMAGE, TRANSCRIPTS, CELLS, NUCLEI = "tissue", "transcripts", "vendor_cells", "vendor_nuclei"
BINNED, SEGMENTED, MICROSCOPE = "binned_outputs", "segmented_outputs", "microscope_image"
POSITIONS, SCALES = "tissue_positions.parquet", "scalefactors_json.json"
_COUNTS = {"filtered": "filtered_feature_bc_matrix.h5", "raw": "raw_feature_bc_matrix.h5"}
_CELL_COUNTS = "filtered_feature_cell_matrix.h5"
_OUTLINES = {CELLS: "cell_segmentations.geojson", NUCLEI: "nucleus_segmentations.geojson"}
_HIRES = "tissue_hires_image.png"
_IMAGES = (".tif", ".tiff", ".btf", *SUFFIXES)
_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
_DIGITS = 5  # of a row or a column in the name of a bin
_BATCH_ROWS = 1 << 20
_MOST_ROWS = 1 << 28  # bins or cells of a matrix; a slide has 11 million
_BYTES_AN_ENTRY = 48
_OFF_GRID = 0.5  # of a bin, as for any table of bins
_CHUNK_BARCODES = 1 << 20
_COPY = "copy it again from Space Ranger's output"


def open_visium_hd(request: Request) -> Slide:
    """Open Space Ranger's output; see `Reader`."""
    folder, source, settings = request.path, request.source, request.settings
    if not folder.is_dir():
        raise CellquiltError("visium-hd-no-folder", f"{source} is no folder", f"name the folder that holds {BINNED}")
    bin_um = int(settings["visium_hd_bin_um"])
    place = _bins_folder(folder, bin_um, source)
    name = f"{source}/{place.relative_to(folder).as_posix()}"
    scales = _scales(place / "spatial" / SCALES, f"{name}/spatial/{SCALES}")
    _check_bin_size(scales, bin_um, f"{name}/spatial/{SCALES}")
    slide = Slide()
    image, to_main = _image(request, scales)
    positions = _Positions(place / "spatial" / POSITIONS, f"{name}/spatial/{POSITIONS}", bin_um)
    grid_to_px = positions.fit()
    if image is not None:
        _check_size(positions, image, to_main, request)
    grid_to_main = scale(to_main) @ grid_to_px
    pixel = _pixel_size(bin_um, grid_to_main, scales, to_main, settings["pixel_size_um"], name, slide)
    if image is not None:
        image.transforms.update({GLOBAL: identity(), MICRONS: scale(pixel)})
        slide.images[IMAGE] = image
    transforms = {GLOBAL: grid_to_main, MICRONS: scale(pixel) @ grid_to_main}
    counts = place / _COUNTS[str(settings["visium_hd_counts"])]
    matrix = Matrix(counts, f"{name}/{counts.name}")
    memory = int(settings["memory_mb"])
    binned = _Binned(matrix, bin_um, positions.shape, transforms, memory)
    slide.tables[BINS] = binned.write
    if settings["visium_hd_transcripts"]:
        slide.points[TRANSCRIPTS] = binned.transcripts()
    slide.inputs += [counts, positions.path, place / "spatial" / SCALES]
    slide.facts.update({"bin_um": bin_um, "visium_hd_counts": str(settings["visium_hd_counts"])})
    _add_cells(request, slide, {GLOBAL: scale(to_main), MICRONS: scale(pixel * to_main)}, memory)
    return slide


READER = Reader("visium_hd", "Visium HD", open_visium_hd)


# --- the folder


def _bins_folder(folder: Path, bin_um: int, source: str) -> Path:
    """The folder of bins of a width."""
    wanted = f"square_{bin_um:03d}um"
    outer = next((place for place in (folder / BINNED, folder) if any(place.glob("square_*um"))), None)
    if outer is None:
        below = sorted(found.parent.relative_to(folder).as_posix() for found in folder.glob(f"*/{BINNED}"))
        hint = "name Space Ranger's folder outs, complete"
        if below:
            hint = f"name the folder that holds {BINNED}: {', '.join(f'{source}/{name}' for name in below[:3])}"
        elif any(folder.glob("*.tar*")):
            hint = f"unpack the archives first ({', '.join(sorted(file.name for file in folder.glob('*.tar*'))[:3])})"
        raise CellquiltError("visium-hd-no-bins", f"{source} has no {BINNED}/{wanted}; it has {_listed(folder)}", hint)
    if not (outer / wanted).is_dir():
        widths = sorted(
            int(found[1]) for path in outer.iterdir() if (found := re.fullmatch(r"square_(\d+)um", path.name))
        )
        raise CellquiltError(
            "visium-hd-no-bins",
            f"{source} has no bins of {bin_um} µm ({wanted}); it has {', '.join(f'{width} µm' for width in widths)}",
            f"choose one of them with visium_hd_bin_um={widths[0]}, or complete the folder",
        )
    return outer / wanted


def _listed(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def _scales(path: Path, name: str) -> dict[str, float]:
    """The numbers of ``scalefactors_json.json``."""
    if not path.is_file():
        raise CellquiltError("visium-hd-scales", f"{name} does not exist", "complete the folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        return {
            key: float(value)
            for key, value in found.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
    except (ValueError, UnicodeDecodeError, AttributeError) as error:
        raise CellquiltError("visium-hd-scales", f"{name} is no JSON object: {error}", _COPY) from error


def _check_bin_size(scales: dict[str, float], bin_um: int, name: str) -> None:
    found = scales.get("bin_size_um")
    if found is not None and found != bin_um:
        raise CellquiltError(
            "visium-hd-scales", f"{name}: bin_size_um is {found:g}, the folder is that of {bin_um} µm", _COPY
        )


def _pixel_size(
    bin_um: int,
    grid_to_main: Affine,
    scales: dict[str, float],
    to_main: float,
    given: float | None,
    name: str,
    slide: Slide,
) -> float:
    """Width of a pixel in µm: that by which bins are as wide as they are; the user's word counts more."""
    measured = bin_um / length_scale(grid_to_main)
    said = scales.get("microns_per_pixel")
    if said is not None and abs(measured * to_main / said - 1) > 0.01:
        _warn(
            slide,
            f"{name}: microns_per_pixel is {said:g}, but bins of {bin_um} µm are "
            f"{bin_um / (measured * to_main):.4g} pixels wide: taking {measured * to_main:g}",
        )
    if given is not None and abs(measured / given - 1) > 0.01:
        _warn(slide, f"{name}: pixel_size_um is {given:g}, by the bins it is {measured:g}; taking {given:g}")
    size = measured if given is None else given
    slide.facts["pixel_size_um"] = [size, size]
    slide.facts["pixel_size_from"] = "bins" if given is None else "settings"
    return size


def _warn(slide: Slide, text: str) -> None:
    LOG.warning(text)
    slide.facts["warnings"] = [*slide.facts.get("warnings", []), text]


# --- image


def _image(request: Request, scales: dict[str, float]) -> tuple[ImageSource | None, float]:
    """The main image, and its pixels per pixel of the full resolution."""
    kind, source = str(request.settings["visium_hd_image"]), request.source
    if kind == "none":
        return None, 1.0
    if kind == "hires":
        path = next((found for found in _hires(request.path) if found.is_file()), None)
        if path is None:
            raise CellquiltError(
                "visium-hd-no-image",
                f"{source} has no spatial/{_HIRES}",
                "complete the folder, or visium_hd_image=none",
            )
        factor = scales.get("tissue_hires_scalef", math.nan)
        if not (math.isfinite(factor) and factor > 0):
            raise CellquiltError("visium-hd-scales", f"{source}: {SCALES} has no tissue_hires_scalef above 0", _COPY)
    else:
        path, factor = _fullres(request), 1.0
    name = (
        path.name if not path.is_relative_to(request.path) else f"{source}/{path.relative_to(request.path).as_posix()}"
    )
    memory = int(request.settings["memory_mb"])
    opened: TiffImage | Picture
    if sniff(path) in ("PNG", "JPEG"):
        opened = request.resources.enter_context(Picture(path, name, memory_mb=memory))
    else:
        opened = request.resources.enter_context(TiffImage(path, name, memory_mb=memory))
    channels, planes, height, width = opened.shape
    if planes > 1:
        raise CellquiltError("visium-hd-image-planes", f"{name} has {planes} planes", "write one plane to its own file")

    def read(channel: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        return opened.read(channel, 0, y0, y1, x0, x1)

    image = ImageSource(
        (channels, height, width), opened.dtype, opened.channel_names, {}, opened.window_px, read, opened.interleaved
    )
    return image, factor


def _hires(folder: Path) -> list[Path]:
    return [
        folder / "spatial" / _HIRES,
        *sorted(folder.glob(f"*/spatial/{_HIRES}")),
        *sorted(folder.glob(f"*/*/spatial/{_HIRES}")),
    ]


def _fullres(request: Request) -> Path:
    """The microscope's image: where the user says, in ``microscope_image``, or ``tissue_image`` beside the outputs."""
    folder, source, given = request.path, request.source, request.settings["fullres_image"]
    if given:
        path = Path(given)
        if not path.is_file():
            raise CellquiltError("visium-hd-no-image", f"fullres_image {given} does not exist", "give its path")
        return path
    inside = folder / MICROSCOPE
    found = [path for path in inside.iterdir() if _is_image(path)] if inside.is_dir() else []
    found = found or [path for path in folder.iterdir() if _is_image(path) and path.stem.endswith("tissue_image")]
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    if len(names) > 1:
        raise CellquiltError(
            "visium-hd-images-ambiguous",
            f"{source} has several images: {', '.join(names)}",
            "name one with fullres_image",
        )
    if not names:
        raise CellquiltError(
            "visium-hd-no-image",
            f"{source} has no image in {MICROSCOPE} and no tissue_image.btf, .tif or .png",
            "name the microscope's image, which Space Ranger was given, with fullres_image; or visium_hd_image=hires "
            "(small) or none",
        )
    return folder / names[0]


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in _IMAGES and not path.name.startswith(".")


def _check_size(positions: "_Positions", image: ImageSource, to_main: float, request: Request) -> None:
    """Whether the tissue's bins lie in the image: a picture of another size is not the one that Space Ranger had."""
    outside = positions.outside(image.shape[2] / to_main, image.shape[1] / to_main)
    if outside > 0.5:
        low, high = positions.extent
        raise CellquiltError(
            "visium-hd-image-size",
            f"{request.source}: the tissue's bins reach from pixel {low.round().tolist()} to {high.round().tolist()} "
            f"(x, y), but the image has {image.shape[2]} × {image.shape[1]} pixels; {outside:.0%} of them lie outside",
            "give the full-resolution image that Space Ranger was run with",
        )


# --- places of bins


def bin_places(barcodes: NDArray[np.uint8], bin_um: int) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """Row and column of bins by their names, such as ``s_002um_00012_00345-1``.

    Parameters
    ----------
    barcodes
        (n, length) bytes of the names.
    bin_um
        Width of a bin.

    Returns
    -------
    (row, column) or None
        (n,) int32; None where a name is of another form.
    """
    prefix = np.frombuffer(f"s_{bin_um:03d}um_".encode(), np.uint8)
    first, second = len(prefix), len(prefix) + _DIGITS + 1
    if barcodes.shape[1] < second + _DIGITS or not (barcodes[:, :first] == prefix).all():
        return None
    powers = 10 ** np.arange(_DIGITS - 1, -1, -1)
    found = []
    for start in (first, second):
        digits = barcodes[:, start : start + _DIGITS].astype(np.int32) - ord("0")
        if ((digits < 0) | (digits > 9)).any():
            return None
        found.append((digits @ powers).astype(np.int32))
    return found[0], found[1]


class _Positions:
    """``tissue_positions.parquet``: every bin of the grid and where it lies in the image, read in batches."""

    def __init__(self, path: Path, name: str, bin_um: int) -> None:
        self.path, self.name, self._bin_um = path, name, bin_um
        self.shape = (0, 0)
        self.extent = (np.full(2, np.inf), np.full(2, -np.inf))
        if not path.is_file():
            raise CellquiltError("visium-hd-positions", f"{name} does not exist", "complete the folder")
        try:
            found = pq.read_schema(path).names
        except (pa.ArrowInvalid, OSError) as error:
            raise self._bad(f"cannot be read as Parquet: {error}") from error
        missing = [column for column in _COLUMNS if column not in found]
        if missing:
            raise self._bad(f"has no column {missing[0]}; columns: {', '.join(found)}")

    def _bad(self, what: str) -> CellquiltError:
        return CellquiltError("visium-hd-positions", f"{self.name} {what}", _COPY)

    def _batches(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                    yield {name: batch.column(name) for name in columns}
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise self._bad(f"cannot be read: {error}") from error

    def _numbers(self, columns: list[str]) -> Iterator[list[NDArray[np.float64]]]:
        for batch in self._batches(columns):
            try:
                arrays = [batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in columns]
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise self._bad(f"holds something that is no number: {error}") from error
            for name, values in zip(columns, arrays, strict=True):
                if not np.isfinite(values).all():
                    raise self._bad(f'has no number in column "{name}" in one of its rows')
            yield arrays

    def fit(self) -> Affine:
        """The map from the grid to pixels of the full resolution, by least squares over the bins' centres."""
        product, target = np.zeros((3, 3)), np.zeros((3, 2))
        n, most = 0, np.zeros(2)
        low, high = self.extent
        for row, column, y, x, tissue in self._numbers([*_COLUMNS[2:], "in_tissue"]):
            if (
                min(row.min(initial=0), column.min(initial=0)) < 0
                or max(row.max(initial=0), column.max(initial=0)) >= 10**_DIGITS
            ):
                raise self._bad("has rows or columns of bins that are below 0 or beyond any slide")
            design = np.column_stack([column + 0.5, row + 0.5, np.ones(len(row))])
            product += design.T @ design
            target += design.T @ np.column_stack([x, y])
            n += len(row)
            most = np.maximum(most, [row.max(initial=0), column.max(initial=0)])
            there = tissue > 0
            if there.any():
                xy = np.column_stack([x[there], y[there]])
                low, high = np.minimum(low, xy.min(axis=0)), np.maximum(high, xy.max(axis=0))
        self.extent = (low, high)
        self.shape = (int(most[0]) + 1, int(most[1]) + 1)
        if n < 3 or np.linalg.matrix_rank(product) < 3:
            raise self._bad("has too few bins, or bins in one line: where the grid lies cannot be told")
        matrix = np.eye(3)
        matrix[:2] = np.linalg.solve(product, target).T
        if not abs(np.linalg.det(matrix)) > 0:
            raise self._bad("has all bins in one place")
        width = length_scale(matrix)
        for row, column, y, x in self._numbers(list(_COLUMNS[2:])):
            off = np.abs(apply(matrix, np.column_stack([column, row]) + 0.5) - np.column_stack([x, y])).max(initial=0)
            if not off <= _OFF_GRID * width:
                raise self._bad(f"has a bin that lies {off / width:.2g} bins off its row and column")
        self._check_names()
        return matrix

    def _check_names(self) -> None:
        """Names of bins say their place; whether they say the same as the columns is seen on the first batch."""
        for batch in self._batches(list(_COLUMNS[:1] + _COLUMNS[2:4])):
            names = np.asarray(batch["barcode"].cast(pa.string()).to_pylist(), dtype="S")
            found = bin_places(names.view(np.uint8).reshape(len(names), -1), self._bin_um) if len(names) else None
            rows, columns = (batch[name].cast(pa.int64()).to_numpy(zero_copy_only=False) for name in _COLUMNS[2:4])
            if found is None or not (np.array_equal(found[0], rows) and np.array_equal(found[1], columns)):
                raise self._bad(
                    f"has bins whose names do not tell their row and column; the first is "
                    f"{_text(names[0]) if len(names) else 'none'}, expected is s_{self._bin_um:03d}um_<row>_<column>-1"
                )
            return

    def outside(self, width: float, height: float) -> float:
        """Share of the tissue's bins whose centre lies outside an image of that size."""
        n = out = 0
        for y, x, tissue in self._numbers([*_COLUMNS[4:], "in_tissue"]):
            there = tissue > 0
            n += int(there.sum())
            out += int((there & ((x < 0) | (y < 0) | (x >= width) | (y >= height))).sum())
        return out / max(n, 1)


# --- counts


@dataclass
class Matrix:
    """A feature-barcode matrix of Space Ranger (HDF5): a column a bin or cell, read in blocks of columns.

    Parameters
    ----------
    path
        The file.
    name
        What to call it in messages.

    Raises
    ------
    CellquiltError
        ``visium-hd-counts``.
    """

    path: Path
    name: str

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise CellquiltError(
                "visium-hd-counts",
                f"{self.name} does not exist",
                "complete the folder, or choose visium_hd_counts=raw or filtered",
            )
        with self._opened() as group:
            self.n_genes, self.n_rows = (int(size) for size in group["shape"][:])
            self.n_entries = int(group["data"].shape[0])
            parts = {name: group[name].shape for name in ("barcodes", "data", "indices", "indptr", "features/name")}
            expected = {"barcodes": (self.n_rows,), "indptr": (self.n_rows + 1,), "features/name": (self.n_genes,)}
            wrong = next((name for name, shape in expected.items() if parts[name] != shape), None)
            if wrong is not None or parts["data"] != parts["indices"] or self.n_rows > _MOST_ROWS:
                raise self._bad(f"of {self.n_genes} features and {self.n_rows} barcodes has parts of lengths {parts}")

    def _bad(self, what: object) -> CellquiltError:
        return CellquiltError("visium-hd-counts", f"{self.name} cannot be read as Space Ranger's matrix: {what}", _COPY)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """The group; whatever h5py raises on damaged files is an error of ours."""
        try:
            import h5py
        except ImportError as error:
            raise CellquiltError(
                "package-missing", f"{self.name} needs the package h5py", "install cellquilt[sdata]"
            ) from error
        try:
            with h5py.File(self.path) as file:
                yield file["matrix"]
        except CellquiltError:
            raise
        except Exception as error:
            raise self._bad(f"{type(error).__name__}: {error}") from error

    def genes(self) -> list[str]:
        """Names of the features, made distinct as anndata does."""
        import pandas as pd
        from anndata.utils import make_index_unique

        with self._opened() as group:
            names = [_text(value) for value in group["features/name"][:].tolist()]
        return [str(name) for name in make_index_unique(pd.Index(names, dtype=object))]

    def barcodes(self) -> Iterator[NDArray[np.bytes_]]:
        """Names of the columns, many at a time."""
        with self._opened() as group:
            for start in range(0, self.n_rows, _CHUNK_BARCODES):
                part = group["barcodes"][start : start + _CHUNK_BARCODES]
                yield part if part.dtype.kind == "S" else np.asarray([_text(name) for name in part.tolist()], dtype="S")

    def blocks(self, memory_mb: int) -> Iterator["csr_matrix"]:
        """The counts with a row a barcode, some rows at a time: (m, n_genes) int32."""
        from scipy.sparse import csr_matrix

        entries = max(memory_mb * 1_000_000 // (8 * _BYTES_AN_ENTRY), 1000)
        with self._opened() as group:
            indptr = np.asarray(group["indptr"][:], dtype=np.int64)
            if indptr[0] != 0 or indptr[-1] != group["data"].shape[0] or (np.diff(indptr) < 0).any():
                raise self._bad("its indptr does not fit its data")
            start = 0
            while start < self.n_rows:
                stop = int(np.searchsorted(indptr, indptr[start] + entries, side="right")) - 1
                stop = min(max(stop, start + 1), self.n_rows)
                part = slice(int(indptr[start]), int(indptr[stop]))
                values, genes = group["data"][part], group["indices"][part]
                if values.dtype.kind not in "iu" or values.min(initial=0) < 0:
                    raise self._bad("its values are no counts")
                if genes.min(initial=0) < 0 or genes.max(initial=-1) >= self.n_genes:
                    raise self._bad(f"an index of it is beyond its {self.n_genes} features")
                offsets = indptr[start : stop + 1] - indptr[start]
                yield csr_matrix((values.astype(np.int32), genes, offsets), shape=(stop - start, self.n_genes))
                start = stop


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _Binned:
    """A matrix of bins and where each of them lies."""

    def __init__(
        self, matrix: Matrix, bin_um: int, shape: tuple[int, int], transforms: dict[str, Affine], memory_mb: int
    ) -> None:
        self._matrix, self._bin_um, self._shape = matrix, bin_um, shape
        self._transforms, self._memory = transforms, memory_mb

    def _places(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Row and column of each bin."""
        matrix, shape = self._matrix, self._shape
        rows, columns = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for names in matrix.barcodes():
            length = names.dtype.itemsize
            places = bin_places(np.ascontiguousarray(names).view(np.uint8).reshape(len(names), length), self._bin_um)
            if places is None or places[0].max(initial=0) >= shape[0] or places[1].max(initial=0) >= shape[1]:
                raise CellquiltError(
                    "visium-hd-counts",
                    f"{matrix.name} has bins that are not on the grid of {shape[0]} × {shape[1]} bins of "
                    f"{self._bin_um} µm; the first of the block is {_text(names[0])}",
                    f"give matrix and {POSITIONS} of one folder",
                )
            rows.append(places[0])
            columns.append(places[1])
        row, column = np.concatenate(rows), np.concatenate(columns)
        if np.unique(row.astype(np.int64) * shape[1] + column).size < row.size:
            raise CellquiltError("visium-hd-counts", f"{matrix.name} has two columns of one bin", _COPY)
        return row, column

    def write(self, store: Store, _: str) -> int:
        """Write the table and its labels."""
        row, column = self._places()
        genes, blocks = self._matrix.genes(), self._matrix.blocks(self._memory)
        write_bins(store, row, column, genes, blocks, self._transforms, self._shape)
        return row.size

    def transcripts(self) -> PointsSource:
        """Each count as a transcript in the centre of its bin, for methods that take nothing else."""
        to_um = self._transforms[MICRONS]
        to_main = self._transforms[GLOBAL] @ np.linalg.inv(to_um)
        return PointsSource({MICRONS: identity(), GLOBAL: to_main}, self._batches, lambda: self._matrix.n_entries)

    def _batches(self) -> Iterator[pa.Table]:
        row, column = self._places()
        xy = apply(self._transforms[MICRONS], np.column_stack([column, row]) + 0.5)
        genes = pa.array(self._matrix.genes(), pa.string())
        first = done = 0
        for block in self._matrix.blocks(self._memory):
            bins = np.repeat(np.arange(first, first + block.shape[0]), np.diff(block.indptr))
            until = np.cumsum(block.data, dtype=np.int64)
            # An entry is never cut: at most so many transcripts and one entry's.
            cuts = np.searchsorted(until, np.arange(0, until[-1] if until.size else 0, _BATCH_ROWS), side="right")
            for a, b in pairwise([*np.unique(cuts).tolist(), until.size]):
                counts = block.data[a:b]
                n = int(counts.sum())
                of = np.repeat(bins[a:b], counts)
                code = np.repeat(block.indices[a:b], counts).astype(np.int32)
                yield pa.table(
                    {
                        "x": xy[of, 0],
                        "y": xy[of, 1],
                        "gene": pa.DictionaryArray.from_arrays(pa.array(code), genes),
                        "transcript_id": np.arange(done, done + n, dtype=np.uint64),
                        "is_control": np.zeros(n, dtype=bool),
                        "passes_qv": np.ones(n, dtype=bool),
                        "bin_id": of + 1,
                    }
                )
                done += n
            first += block.shape[0]
        if not done:
            raise CellquiltError("visium-hd-counts", f"{self._matrix.name} has no counts", _COPY)


# --- the machine's cells


def _add_cells(request: Request, slide: Slide, transforms: dict[str, Affine], memory_mb: int) -> None:
    """Space Ranger's cells and nuclei with their counts, where it segmented."""
    folder, source = request.path / SEGMENTED, request.source
    cells = _VendorCells(folder, source, transforms)
    for element, file in _OUTLINES.items():
        if (folder / file).is_file():
            slide.shapes[element] = lambda element=element: cells.outlines(element)  # type: ignore[misc]
            slide.inputs.append(folder / file)
    if CELLS in slide.shapes and (folder / _CELL_COUNTS).is_file():
        matrix = Matrix(folder / _CELL_COUNTS, f"{source}/{SEGMENTED}/{_CELL_COUNTS}")
        cells.matrix = matrix
        slide.tables[TABLE] = lambda store, name: cells.write_table(store, name, memory_mb)
        slide.inputs.append(matrix.path)


class _VendorCells:
    """Space Ranger's cells: outlines in the order of its matrix, so that both are one table."""

    def __init__(self, folder: Path, source: str, transforms: dict[str, Affine]) -> None:
        self._folder, self._source, self._transforms = folder, source, transforms
        self.matrix: Matrix | None = None
        self._written: tuple[ShapesTable, Pairing] | None = None

    def outlines(self, element: str) -> ShapesTable:
        file = _OUTLINES[element]
        name = f"{self._source}/{SEGMENTED}/{file}"
        try:
            table = read_prior_cells(self._folder / file, self._transforms)
            numbers = table.columns["entity_id"].astype(np.int64)
        except (CellquiltError, ValueError) as error:
            what = "its cell_id are no whole numbers"
            if isinstance(error, CellquiltError):
                what = error.message.replace(str(self._folder / file), file)
            raise CellquiltError(
                "visium-hd-cells", f"{name}: {what}", f"{_COPY}, or leave {SEGMENTED} out of the folder"
            ) from error
        ids = np.char.add(np.char.add("cellid_", np.char.zfill(numbers.astype(str), 9)), "-1")
        table = ShapesTable(
            ids, table.geometry, {"entity_id": ids}, table.transforms, {**table.metadata, "source": name}
        )
        if element == CELLS and self.matrix is not None:
            rows = np.concatenate([np.zeros(0, "S1"), *self.matrix.barcodes()]).astype(str)
            pairing = pair(ids, rows, self.matrix.name)
            table = table.take(pairing.order)
            self._written = (table, pairing)
        return table

    def write_table(self, store: Store, name: str, memory_mb: int) -> int:
        assert self._written is not None
        assert self.matrix is not None
        cells, pairing = self._written
        blocks = self.matrix.blocks(memory_mb)
        return write_vendor_table(store, name, CELLS, cells, pairing, blocks, self.matrix.genes())
