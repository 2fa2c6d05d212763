"""Writing a simulated slide as files that a machine could have written, and its truth beside them.

Tiles are made once, in raster order. Image tiles go to a raw spool file in the order in which the TIFF wants them, so
that a mosaic of any size is written by tifffile's tile iterator from a few MB of memory; tables go to Parquet row
group by row group.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import shapely

from cellquilt.core.log import progress
from cellquilt.core.parquet import ParquetWriter
from cellquilt.core.vizgen import CELLS_SCHEMA
from cellquilt.geometry.polygonize import labels_to_polygons
from cellquilt.simulate.cells import TYPE_NAMES
from cellquilt.simulate.image import CHANNELS
from cellquilt.simulate.slide import Slide, Tile, Window
from cellquilt.simulate.transcripts import ORIGINS, Transcripts

TIFF_TILE = 256
_BIG = 3 * 2**30  # bytes of pixels from which on a TIFF gets 64-bit offsets


class Spool:
    """A plane of pixels on disk as full TIFF tiles in raster order.

    Parameters
    ----------
    path
        File to write.
    shape
        (height, width) of the plane.
    dtype
        Type of a pixel.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self.columns = -(-shape[1] // TIFF_TILE)
        self.rows = -(-shape[0] // TIFF_TILE)
        self._tile_bytes = TIFF_TILE * TIFF_TILE * dtype.itemsize
        self._file = path.open("w+b")
        self._file.truncate(self.rows * self.columns * self._tile_bytes)

    def write(self, window: Window, pixels: np.ndarray) -> None:
        """Store a window whose corner is a multiple of the TIFF tile."""
        y0, y1, x0, x1 = window
        for y in range(y0, y1, TIFF_TILE):
            for x in range(x0, x1, TIFF_TILE):
                part = pixels[y - y0 : y - y0 + TIFF_TILE, x - x0 : x - x0 + TIFF_TILE]
                full = np.zeros((TIFF_TILE, TIFF_TILE), self.dtype)
                full[: part.shape[0], : part.shape[1]] = part
                self._file.seek(((y // TIFF_TILE) * self.columns + x // TIFF_TILE) * self._tile_bytes)
                self._file.write(full.data)

    def tiles(self) -> Iterator[np.ndarray]:
        """All tiles in raster order."""
        self._file.seek(0)
        for _ in range(self.rows * self.columns):
            yield np.frombuffer(self._file.read(self._tile_bytes), self.dtype).reshape(TIFF_TILE, TIFF_TILE)

    def tile(self, row: int, column: int) -> np.ndarray:
        """One tile."""
        self._file.seek((row * self.columns + column) * self._tile_bytes)
        return np.frombuffer(self._file.read(self._tile_bytes), self.dtype).reshape(TIFF_TILE, TIFF_TILE)

    def remove(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def write_tiff(
    path: Path,
    planes: list[Spool],
    *,
    compression: str | None,
    ome: Mapping[str, Any] | None = None,
) -> None:
    """Write planes as one tiled TIFF.

    Parameters
    ----------
    path
        File to write.
    planes
        One spool a channel; emptied as they are written.
    compression
        tifffile's name of a compression, or None.
    ome
        OME metadata; None writes a plain TIFF of one plane.
    """
    import tifffile

    height, width = planes[0].shape
    dtype = planes[0].dtype

    def tiles() -> Iterator[np.ndarray]:
        for plane in planes:
            yield from plane.tiles()
            plane.remove()  # at once: a spool is as large as its plane

    shape = (len(planes), height, width) if ome is not None else (height, width)
    big = len(planes) * height * width * dtype.itemsize > _BIG
    with tifffile.TiffWriter(path, bigtiff=big, ome=ome is not None) as tiff:
        tiff.write(
            tiles(), shape=shape, dtype=dtype, tile=(TIFF_TILE, TIFF_TILE), compression=compression,
            photometric="minisblack", metadata=dict(ome) if ome is not None else None, software="cellquilt",
        )  # fmt: skip
    for plane in planes:
        plane.remove()


def ome_metadata(name: str, pixel_size_um: float, channels: list[str]) -> dict[str, Any]:
    """What tifffile turns into the OME-XML. The UUID is made from the name: the same slide, the same bytes."""
    import uuid

    return {
        "axes": "CYX",
        "Name": name,
        "UUID": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'cellquilt-simulation/{name}')}",
        "PhysicalSizeX": pixel_size_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": pixel_size_um,
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": channels},
    }


class TableStream:
    """A Parquet file written batch by batch; with a geometry column it is GeoParquet.

    Parameters
    ----------
    path
        File to write.
    schema
        Columns; a binary column called `geometry` (or `Geometry`) holds WKB.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        shapes = [name for name in schema.names if name.lower() == "geometry"]
        if shapes:
            column = {"encoding": "WKB", "crs": None, "geometry_types": ["Polygon", "MultiPolygon"]}
            geo = {"version": "1.1.0", "primary_column": shapes[0], "columns": {shapes[0]: column}}
            schema = schema.with_metadata({b"geo": json.dumps(geo).encode()})
        self.schema = schema
        self.n_rows = 0
        self._writer = ParquetWriter(path, schema, compression="zstd", compression_level=1)

    def write(self, columns: Mapping[str, Any]) -> None:
        """Append rows."""
        table = pa.table({name: columns[name] for name in self.schema.names}, schema=self.schema)
        self.n_rows += table.num_rows
        if table.num_rows:
            self._writer.write_table(table)

    def __enter__(self) -> "TableStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


_GENE = pa.dictionary(pa.int32(), pa.string())
_TRANSCRIPTS = pa.schema([("x", pa.float64()), ("y", pa.float64()), ("z", pa.float32()), ("gene", _GENE)])
_TRUTH = pa.schema(
    [
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("z", pa.float32()),
        ("gene", _GENE),
        ("cell_id", pa.int64()),
        ("in_nucleus", pa.bool_()),
        ("origin", pa.dictionary(pa.int8(), pa.string())),
    ]
)
_CELLS = pa.schema(
    [
        ("cell_id", pa.int64()),
        ("geometry", pa.binary()),
        ("area_um2", pa.float64()),
        ("x_um", pa.float64()),
        ("y_um", pa.float64()),
        ("cell_type", pa.string()),
        ("domain", pa.string()),
        ("has_nucleus", pa.bool_()),
        ("necrotic", pa.bool_()),
        ("cut_by_edge", pa.bool_()),
        ("n_transcripts", pa.int64()),
    ]
)
_NUCLEI = pa.schema(
    [("cell_id", pa.int64()), ("geometry", pa.binary()), ("area_um2", pa.float64()), ("cut_by_edge", pa.bool_())]
)


def _gene_column(slide: Slide, codes: np.ndarray) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(slide.expression.genes))


def tile_outlines(labels: np.ndarray, tile: Tile) -> np.ndarray:
    """Polygons in canvas pixels of the tile's own cells, in their order; None where a label has no pixel."""
    rank = np.zeros(len(tile.cells) + 1, np.int32)
    rank[tile.owned.index + 1] = np.arange(1, len(tile.owned.index) + 1)
    y0, x0 = tile.origin
    ids, polygons = labels_to_polygons(rank[labels], (x0, y0))
    geometry = np.full(len(tile.owned.index), None, dtype=object)
    geometry[ids - 1] = polygons
    return geometry


def _cut_by_edge(geometry: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Which outlines lie at the canvas's edge: (n,) bool."""
    bounds = shapely.bounds(geometry).reshape(-1, 4)
    return (bounds[:, :2] <= 0).any(axis=1) | (bounds[:, 2] >= canvas[1]) | (bounds[:, 3] >= canvas[0])


class TruthWriter:
    """`truth/` of a slide: cells, nuclei, the true cell of every transcript, the parameters.

    Parameters
    ----------
    folder
        Folder to write, made here.
    slide
        The slide.
    with_transcripts
        Whether there are any.
    """

    def __init__(self, folder: Path, slide: Slide, with_transcripts: bool) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.slide = slide
        self._cells = TableStream(folder / "cells.parquet", _CELLS)
        self._nuclei = TableStream(folder / "nuclei.parquet", _NUCLEI)
        self._transcripts = TableStream(folder / "transcripts_truth.parquet", _TRUTH) if with_transcripts else None

    def write(self, tile: Tile, cell_outlines: np.ndarray, transcripts: Transcripts | None) -> None:
        """Append a tile."""
        index, cells = tile.owned.index, tile.cells
        ids = cells.ids[index]
        counts = np.zeros(len(ids), np.int64)
        if transcripts is not None and self._transcripts is not None:
            order = np.argsort(ids)
            from_cell = transcripts.cell[transcripts.cell > 0]
            counts[order] = np.bincount(np.searchsorted(ids[order], from_cell), minlength=len(ids))
            names = pa.array(list(ORIGINS))
            self._transcripts.write(
                {
                    **_position_columns(self.slide, transcripts),
                    "cell_id": transcripts.cell,
                    "in_nucleus": transcripts.in_nucleus,
                    "origin": pa.DictionaryArray.from_arrays(pa.array(transcripts.origin, pa.int8()), names),
                }
            )
        has_nucleus = tile.owned.nucleus_area_um2 > 0
        self._cells.write(
            {
                "cell_id": ids,
                "geometry": shapely.to_wkb(cell_outlines),
                "area_um2": tile.owned.area_um2,
                "x_um": cells.xy[index, 0],
                "y_um": cells.xy[index, 1],
                "cell_type": np.asarray(TYPE_NAMES, dtype=object)[cells.kind[index]],
                "domain": np.asarray([f"domain_{d}" for d in range(8)], dtype=object)[cells.domain[index]],
                "has_nucleus": has_nucleus,
                "necrotic": cells.necrotic[index],
                "cut_by_edge": _cut_by_edge(cell_outlines, self.slide.canvas),
                "n_transcripts": counts,
            }
        )
        nuclei = tile_outlines(tile.masks.nuclei, tile)[has_nucleus]
        self._nuclei.write(
            {
                "cell_id": ids[has_nucleus],
                "geometry": shapely.to_wkb(nuclei),
                "area_um2": tile.owned.nucleus_area_um2[has_nucleus],
                "cut_by_edge": _cut_by_edge(nuclei, self.slide.canvas),
            }
        )

    def close(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Finish the files and write `simulation.json`.

        Returns
        -------
        dict
            What was written to it.
        """
        slide = self.slide
        n_controls = slide.expression.n_controls
        n_transcripts = 0
        self._cells.__exit__(None, None, None)
        self._nuclei.__exit__(None, None, None)
        if self._transcripts is not None:
            self._transcripts.__exit__(None, None, None)
            n_transcripts = self._transcripts.n_rows
        document = {
            "parameters": dataclasses.asdict(slide.parameters),
            "slide": slide.number,
            "n_cells": self._cells.n_rows,
            "n_nuclei": self._nuclei.n_rows,
            "n_transcripts": n_transcripts,
            "genes": slide.expression.genes[:-n_controls],
            "controls": slide.expression.genes[-n_controls:],
            "cell_types": TYPE_NAMES,
            "n_planes": len(slide.calibration.z_profile),
            "z_step_um": slide.calibration.z_step_um,
            **more,
        }
        (self.folder / "simulation.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        return document


def _position_columns(slide: Slide, transcripts: Transcripts) -> dict[str, Any]:
    return {
        "x": transcripts.xy[:, 0],
        "y": transcripts.xy[:, 1],
        "z": (transcripts.plane * slide.calibration.z_step_um).astype(np.float32),
        "gene": _gene_column(slide, transcripts.gene),
    }


@dataclasses.dataclass(frozen=True)
class What:
    """What to write of a slide; see `simulate`."""

    image: bool = True
    transcripts: bool = True
    labels: bool = False
    tile_px: int = 2048
    compression: str | None = None
    planes: tuple[int, ...] = tuple(range(7))
    channels: tuple[str, ...] = CHANNELS
    xenium_version: int = 3
    proteins: tuple[str, ...] = ()


def write_ome_tif(slide: Slide, folder: Path, name: str, what: What, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write a slide as ``image.ome.tif``, ``transcripts.parquet`` and ``truth/``.

    Returns
    -------
    dict
        The slide's `simulation.json`.
    """
    folder.mkdir(parents=True)
    truth = TruthWriter(folder / "truth", slide, what.transcripts)
    channels = what.channels if what.image else ()
    spools = [Spool(folder / f".{channel}.spool", slide.canvas, np.dtype(np.uint16)) for channel in channels]
    label_spools = [
        Spool(folder / f".{kind}.spool", slide.canvas, np.dtype(np.uint32))
        for kind in (("cells", "nuclei") if what.labels else ())
    ]
    table = TableStream(folder / "transcripts.parquet", _TRANSCRIPTS) if what.transcripts else None
    for window in progress(slide.windows(what.tile_px), f"simulate {name}"):
        tile = slide.tile(window)
        transcripts = slide.transcripts(tile) if table is not None else None
        truth.write(tile, tile_outlines(tile.masks.cells, tile), transcripts)
        if table is not None and transcripts is not None:
            table.write(_position_columns(slide, transcripts))
        if spools:
            for spool, pixels in zip(spools, slide.image(tile, tuple(channels)), strict=True):
                spool.write(window, pixels)
        for spool, labels in zip(label_spools, (tile.masks.cells, tile.masks.nuclei), strict=False):
            numbers = np.concatenate([[0], tile.cells.ids]).astype(np.uint32)
            spool.write(window, numbers[tile.crop(labels)])
    if table is not None:
        table.__exit__(None, None, None)
    if spools:
        metadata = ome_metadata(name, slide.parameters.pixel_size_um, list(channels))
        write_tiff(folder / "image.ome.tif", spools, compression=what.compression, ome=metadata)
    for kind, spool in zip(("cells", "nuclei"), label_spools, strict=False):
        write_tiff(folder / "truth" / f"{kind}_labels.tif", [spool], compression="zlib")
    return truth.close(more)


def write_merscope(slide: Slide, folder: Path, name: str, what: What, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write a slide as a MERSCOPE region folder, with ``truth/`` beside the machine's files.

    Mosaics of every stain and plane, the transform from µm to mosaic pixels (with an offset, as the machine writes it),
    ``detected_transcripts.csv`` with the machine's columns, and ``cell_boundaries.parquet`` with the true cells, the
    same in every plane: what a perfect vendor segmentation would be.

    Returns
    -------
    dict
        The slide's `simulation.json`.
    """
    import pyarrow.csv

    pixel = slide.parameters.pixel_size_um
    # The machine's origin is not the mosaic's: a reader that ignores the transform must fail.
    offset_um = np.array([1234.5, -67.25])
    images = folder / "images"
    images.mkdir(parents=True)
    truth = TruthWriter(folder / "truth", slide, what.transcripts)
    wanted = [(channel, plane) for plane in what.planes for channel in what.channels] if what.image else []
    spools = {key: Spool(images / f".{key[0]}_{key[1]}.spool", slide.canvas, np.dtype(np.uint16)) for key in wanted}
    matrix = np.array([[1 / pixel, 0, -offset_um[0] / pixel], [0, 1 / pixel, -offset_um[1] / pixel], [0, 0, 1]])
    np.savetxt(images / "micron_to_mosaic_pixel_transform.csv", matrix, fmt="%.18e")
    boundaries = TableStream(folder / "cell_boundaries.parquet", CELLS_SCHEMA)
    columns = ["", "barcode_id", "global_x", "global_y", "global_z", "x", "y", "fov", "gene", "transcript_id"]
    kinds = [pa.int64(), pa.int32(), *[pa.float64()] * 5, pa.int32(), pa.string(), pa.string()]
    schema = pa.schema(list(zip(columns, kinds, strict=True)))
    fovs_across = int(np.ceil(slide.canvas[1] * pixel / slide.parameters.fov_um))
    row = 0
    table = None
    if what.transcripts:
        options = pyarrow.csv.WriteOptions(quoting_style="needed")
        table = pyarrow.csv.CSVWriter(str(folder / "detected_transcripts.csv"), schema, write_options=options)
    barcodes = np.asarray(slide.expression.genes, dtype=object)
    for window in progress(slide.windows(what.tile_px), f"simulate {name}"):
        tile = slide.tile(window)
        transcripts = slide.transcripts(tile) if table is not None else None
        outlines = tile_outlines(tile.masks.cells, tile)
        truth.write(tile, outlines, transcripts)
        if table is not None and transcripts is not None:
            xy = transcripts.xy + offset_um
            fov = np.floor(transcripts.xy / slide.parameters.fov_um)
            local = transcripts.xy - fov * slide.parameters.fov_um
            arrays = [
                np.arange(row, row + len(transcripts)),
                transcripts.gene.astype(np.int32),
                *(xy[:, 0], xy[:, 1], transcripts.plane.astype(np.float64), local[:, 0] / pixel, local[:, 1] / pixel),
                (fov[:, 1] * fovs_across + fov[:, 0]).astype(np.int32),
                barcodes[transcripts.gene],
                np.asarray([f"SIM{k:011d}" for k in range(len(barcodes))], dtype=object)[transcripts.gene],
            ]
            table.write_table(pa.table([pa.array(a, k) for a, k in zip(arrays, kinds, strict=True)], schema=schema))
            row += len(transcripts)
        _write_boundaries(slide, boundaries, tile, outlines, offset_um)
        for plane in what.planes if what.image else ():
            for channel, pixels in zip(what.channels, slide.image(tile, what.channels, plane), strict=True):
                spools[channel, plane].write(window, pixels)
    boundaries.__exit__(None, None, None)
    if table is not None:
        table.close()
    for (channel, plane), spool in spools.items():
        write_tiff(images / f"mosaic_{channel}_z{plane}.tif", [spool], compression=what.compression)
    return truth.close({**more, "offset_um": offset_um.tolist()})


def _write_boundaries(slide: Slide, stream: TableStream, tile: Tile, outlines: np.ndarray, offset: np.ndarray) -> None:
    pixel = slide.parameters.pixel_size_um
    microns = shapely.transform(outlines, lambda xy: xy * pixel + offset)
    multi = np.asarray(shapely.multipolygons(microns, indices=np.arange(len(microns))) if len(microns) else microns)
    planes = len(slide.calibration.z_profile)
    ids = np.repeat(tile.cells.ids[tile.owned.index], planes)
    z = np.tile(np.arange(planes), len(multi))
    stream.write(
        {
            "ID": np.arange(stream.n_rows, stream.n_rows + len(ids)),
            "EntityID": ids,
            "ZIndex": z,
            "Geometry": np.repeat(shapely.to_wkb(multi), planes),
            "Type": np.full(len(ids), "cell", dtype=object),
            "ZLevel": slide.calibration.z_step_um * (z + 1.0),
            **{name: pa.nulls(len(ids), CELLS_SCHEMA.field(name).type) for name in ("Name", "ParentID", "ParentType")},
        }
    )
