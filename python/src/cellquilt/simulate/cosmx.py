"""Writing a simulated slide as CosMx exports it: images of fields of view that overlap, and AtomX' flat files.

What the machine says is the truth: its cells are the true ones, each of the field in which its centre lies deepest,
and a transcript's ``cell_ID`` is the true cell that it lies in. A field's files are upside down, its positions and the
global coordinates begin somewhere on the slide. In overlaps both fields show the tissue; transcripts and cells are
told by one of them.
"""

import copy
import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from cellquilt.core.log import progress
from cellquilt.core.parquet import write_parquet
from cellquilt.simulate.image import CAMERA
from cellquilt.simulate.slide import Slide, Tile
from cellquilt.simulate.transcripts import Transcripts
from cellquilt.simulate.writer import TIFF_TILE, Spool, TableStream, TruthWriter, What, tile_outlines

OVERLAP_UM = 20.0  # of neighbouring fields
ORIGIN_PX = (8210.0, -66250.0)  # global pixel of the canvas's corner: a reader that ignores the positions must fail
#: Letter of a channel, what it shows, and the simulated stain and plane that it is made of.
_STAINS: tuple[tuple[str, str, str, int | None], ...] = (
    ("B", "CD298/B2M", "Cellbound", None),
    ("G", "PanCK", "Cellbound", 1),
    ("Y", "CD45", "Cellbound", 3),
    ("R", "CD68", "Cellbound", 5),
    ("U", "DNA", "DAPI", None),
)
_FOLDERS = ("Morphology2D", "CellComposite", "CellLabels")
_ROWS = 1 << 18
_TX = pa.schema(
    [
        ("x", pa.float64()), ("y", pa.float64()), ("plane", pa.int64()), ("gene", pa.int32()), ("cell", pa.int64()),
        ("in_nucleus", pa.bool_()),
    ]
)  # fmt: skip


def write_cosmx(slide: Slide, folder: Path, name: str, what: What, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write a slide as a CosMx export, with ``truth/`` beside the machine's files.

    ``<name>_fov_positions_file.csv``, ``_tx_file.csv``, ``_exprMat_file.csv``, ``_metadata_file.csv`` and
    ``-polygons.csv``; ``Morphology2D`` with the five stains of each field, ``CellComposite`` with a picture of it, and
    ``CellLabels`` with its mask.

    Returns
    -------
    dict
        The slide's `simulation.json`.

    Notes
    -----
    The memory grows with the cells and the entries of their counts, not with the pixels or the transcripts.
    """
    folder.mkdir(parents=True)
    slide = _with_controls(slide)
    truth = TruthWriter(folder / "truth", slide, what.transcripts)
    fields = Fields.of(slide)
    stains = [stain for stain in _STAINS if what.image and stain[2] in what.channels]
    images = [Spool(folder / f".{stain[0]}.spool", slide.canvas, np.dtype(np.uint16)) for stain in stains]
    labels = Spool(folder / ".labels.spool", slide.canvas, np.dtype(np.uint32))
    spooled = folder / ".transcripts.parquet"
    transcripts_out = TableStream(spooled, _TX) if what.transcripts else None
    cells: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray]] = []
    for window in progress(slide.windows(what.tile_px), f"simulate {name}"):
        tile = slide.tile(window)
        outlines = tile_outlines(tile.masks.cells, tile)
        transcripts = slide.transcripts(tile) if transcripts_out is not None else None
        truth.write(tile, outlines, transcripts)
        cells.append((tile.cells.ids[tile.owned.index], tile.owned.area_um2, outlines))
        labels.write(window, np.concatenate([[0], tile.cells.ids]).astype(np.uint32)[tile.crop(tile.masks.cells)])
        if transcripts_out is not None and transcripts is not None:
            transcripts_out.write(_rows(slide, tile, transcripts))
        for spool, stain in zip(images, stains, strict=True):
            spool.write(window, slide.image(tile, (stain[2],), stain[3])[0])
    if transcripts_out is not None:
        transcripts_out.__exit__(None, None, None)
    table = _Cells.of(cells, fields)
    fields.write(folder / f"{name}_fov_positions_file.csv", slide.parameters.pixel_size_um)
    _write_images(folder, fields, stains, images, labels, table, what.compression)
    if what.transcripts:
        _write_transcripts(folder, name, slide, fields, table, spooled)
        spooled.unlink()
    _write_cells(folder, name, slide, fields, table)
    for spool in (*images, labels):
        spool.remove()
    table.write_names(folder / "truth")
    return truth.close({**more, "origin_px": list(ORIGIN_PX), "n_fields": len(fields.corner)})


def _with_controls(slide: Slide) -> Slide:
    """The slide with its controls called as the machine calls them: half negative probes, half unused codes."""
    panel = slide.expression
    names = [f"{'SystemControl' if k % 2 else 'Negative'}{k // 2 + 1}" for k in range(panel.n_controls)]
    renamed = copy.copy(slide)
    renamed.expression = dataclasses.replace(panel, genes=[*panel.genes[: -panel.n_controls], *names])
    return renamed


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of view of a canvas; their numbers begin with 1.

    Attributes
    ----------
    corner
        (n, 2) int64 x, y of each field's corner on the canvas, in pixels.
    shape
        (height, width) of a field.
    """

    corner: NDArray[np.int64]
    shape: tuple[int, int]

    @classmethod
    def of(cls, slide: Slide) -> "Fields":
        """Fields that cover the canvas; the last of a row and of a column overlap more."""
        pixel, (height, width) = slide.parameters.pixel_size_um, slide.canvas
        across = max(int(slide.parameters.fov_um / pixel), 64)
        shape = min(across * 2 // 3, height), min(across, width)
        overlap = int(OVERLAP_UM / pixel)
        y, x = (_starts(side, size, min(overlap, size // 3)) for side, size in zip(slide.canvas, shape, strict=True))
        rows, columns = np.meshgrid(y, x, indexing="ij")
        return cls(np.column_stack([columns.ravel(), rows.ravel()]), shape)

    def owner(self, xy: NDArray[np.float64]) -> NDArray[np.int64]:
        """(n,) index of the field in which each point (pixels) lies deepest, the first of several."""
        best, depth = np.zeros(len(xy), np.int64), np.full(len(xy), -np.inf)
        size = np.array(self.shape[::-1])
        for k, corner in enumerate(self.corner):  # a slide has hundreds of fields
            here = np.minimum(xy - corner, corner + size - xy).min(axis=1)
            better = here > depth
            best[better], depth[better] = k, here[better]
        return best

    def write(self, path: Path, pixel_um: float) -> None:
        """``fov_positions_file.csv``."""
        places = self.corner + ORIGIN_PX
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["fov", "x_global_px", "y_global_px", "x_global_mm", "y_global_mm"])
            writer.writerows(
                [k + 1, x, y, x * pixel_um / 1e3, y * pixel_um / 1e3] for k, (x, y) in enumerate(places.tolist())
            )


def _starts(side: int, size: int, overlap: int) -> NDArray[np.int64]:
    n = 1 if side <= size else -(-(side - overlap) // (size - overlap))
    return np.minimum(np.arange(n) * (size - overlap), side - size)


@dataclasses.dataclass(frozen=True)
class _Cells:
    """The cells, field by field.

    Attributes
    ----------
    ids
        (n,) their true numbers.
    field, local
        (n,) index of the field of each, and its number in it, from 1.
    area_um2, outlines
        Of each; outlines in pixels of the canvas.
    order
        (n,) order of `ids`.
    """

    ids: NDArray[np.int64]
    field: NDArray[np.int64]
    local: NDArray[np.int64]
    area_um2: NDArray[np.float64]
    outlines: NDArray
    order: NDArray[np.int64]

    @classmethod
    def of(cls, parts: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray]], fields: Fields) -> "_Cells":
        ids, area, outlines = (np.concatenate([part[k] for part in parts]) for k in range(3))
        field = fields.owner(shapely.get_coordinates(shapely.centroid(outlines)).reshape(-1, 2))
        order = np.lexsort((ids, field))
        ids, area, outlines, field = ids[order], area[order], outlines[order], field[order]
        first = np.searchsorted(field, np.arange(len(fields.corner)))
        return cls(ids, field, np.arange(len(ids)) - first[field] + 1, area, outlines, np.argsort(ids))

    def find(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """(n,) index of cells by their true numbers; -1 for 0."""
        known = self.ids[self.order]
        place = np.minimum(np.searchsorted(known, ids), max(len(known) - 1, 0))
        return np.where(ids > 0, self.order[place], -1) if len(known) else np.full(np.shape(ids), -1)

    def write_names(self, truth: Path) -> None:
        """``truth/vendor_ids.parquet``: true number and the machine's name of each cell."""
        names = [f"{cell}_{field + 1}" for cell, field in zip(self.local.tolist(), self.field.tolist(), strict=True)]
        write_parquet(truth / "vendor_ids.parquet", pa.table({"cell_id": self.ids, "vendor_id": names}))


def _rows(slide: Slide, tile: Tile, transcripts: Transcripts) -> dict[str, Any]:
    """A tile's transcripts, with the true cell that each lies in; x, y in pixels."""
    xy = transcripts.xy / slide.parameters.pixel_size_um
    height, width = tile.masks.cells.shape
    column, row = (np.floor(xy).astype(np.int64) - (tile.origin[1], tile.origin[0])).T
    inside = tile.masks.cells[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
    return {
        "x": xy[:, 0],
        "y": xy[:, 1],
        "plane": transcripts.plane.astype(np.int64),
        "gene": transcripts.gene.astype(np.int32),
        "cell": np.concatenate([[0], tile.cells.ids])[inside],
        "in_nucleus": transcripts.in_nucleus,
    }


# --- images


def _cut(spool: Spool, x0: int, y0: int, shape: tuple[int, int]) -> NDArray:
    """A window of a spool, upside down as a field's files are."""
    height, width = shape
    out = np.empty(shape, spool.dtype)
    for row in range(y0 // TIFF_TILE, -(-(y0 + height) // TIFF_TILE)):
        for column in range(x0 // TIFF_TILE, -(-(x0 + width) // TIFF_TILE)):
            top, left = row * TIFF_TILE, column * TIFF_TILE
            a, b = max(top, y0), min(top + TIFF_TILE, y0 + height)
            c, d = max(left, x0), min(left + TIFF_TILE, x0 + width)
            out[a - y0 : b - y0, c - x0 : d - x0] = spool.tile(row, column)[a - top : b - top, c - left : d - left]
    return out[::-1]


def _describe(stains: list[tuple[str, str, str, int | None]]) -> str:
    """What a field's first page says about itself."""
    reagents = [
        {"BiologicalTarget": target, "Fluorophore": {"ChannelId": letter, "Wavelength": ""}}
        for letter, target, _, _ in reversed(stains)  # not in the order of the pages
    ]
    return json.dumps(
        {
            "MorphologyKit": {"MorphologyReagents": reagents},
            "ChannelOrder": "".join(stain[0] for stain in stains),
            "Fov": "",
        }
    )


def _write_images(
    folder: Path,
    fields: Fields,
    stains: list[tuple[str, str, str, int | None]],
    images: list[Spool],
    labels: Spool,
    cells: _Cells,
    compression: str | None,
) -> None:
    import tifffile
    from PIL import Image

    morphology, composite, masks = (folder / name for name in _FOLDERS)
    masks.mkdir()
    for place in (morphology, composite) if images else ():
        place.mkdir()
    for k, (x, y) in enumerate(fields.corner.tolist()):
        numbers = _cut(labels, x, y, fields.shape)
        found, inverse = np.unique(numbers, return_inverse=True)
        index = cells.find(found)
        local = np.where((index >= 0) & (cells.field[index] == k), cells.local[index], 0) if len(cells.ids) else found
        mask = local[inverse].reshape(numbers.shape).astype(np.uint16)
        tifffile.imwrite(masks / f"CellLabels_F{k + 1:03d}.tif", mask, compression="zlib", metadata=None, software="")
        if not images:
            continue
        planes = np.stack([_cut(spool, x, y, fields.shape) for spool in images])
        tifffile.imwrite(
            morphology / f"20240101_000000_S1_C902_P99_N99_F{k + 1:05d}.TIF", planes, photometric="minisblack",
            compression=compression, metadata=None, software="", description=_describe(stains),
        )  # fmt: skip
        picture = np.zeros((*fields.shape, 3), np.uint8)
        for plane, stain in zip(planes, stains, strict=True):
            offset, background, signal, _, _ = CAMERA[stain[2]]
            grey = np.clip((plane - (offset + background)) / signal, 0, 1) * 255
            picture[..., 2 if stain[2] == "DAPI" else 1] = grey.astype(np.uint8)
        Image.fromarray(picture).save(composite / f"CellComposite_F{k + 1:03d}.jpg", quality=90)


# --- tables


def _write_csv(path: Path, schema: pa.Schema, batches: Iterator[list[Any]]) -> None:
    options = pyarrow.csv.WriteOptions(quoting_style="needed")
    with pyarrow.csv.CSVWriter(str(path), schema, write_options=options) as writer:
        for arrays in batches:
            columns = [pa.array(values, kind) for values, kind in zip(arrays, schema.types, strict=True)]
            writer.write_table(pa.table(columns, schema=schema))


def _write_transcripts(folder: Path, name: str, slide: Slide, fields: Fields, cells: _Cells, spooled: Path) -> None:
    """``tx_file.csv`` in the order of the truth, and ``exprMat_file.csv``."""
    genes = np.asarray(slide.expression.genes, dtype=object)
    counts: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def batches() -> Iterator[list[Any]]:
        for batch in pq.ParquetFile(spooled).iter_batches(batch_size=_ROWS):
            x, y, plane, gene, cell, in_nucleus = (
                batch.column(field).to_numpy(zero_copy_only=False) for field in _TX.names
            )
            index = cells.find(cell)
            field = fields.owner(np.column_stack([x, y]))
            field[index >= 0] = cells.field[index[index >= 0]]
            # Background of a field is counted as its cell 0.
            entity = np.where(index >= 0, index, len(cells.ids) + field)
            keys, n = np.unique(entity * len(genes) + gene, return_counts=True)
            counts.append((keys, n))
            local = np.where(index >= 0, cells.local[index], 0) if len(cells.ids) else np.zeros(len(x), np.int64)
            compartment = np.where(index < 0, "None", np.where(in_nucleus, "Nuclear", "Cytoplasm")).astype(object)
            corner = fields.corner[field]
            yield [
                field + 1, local, x - corner[:, 0], y - corner[:, 1], x + ORIGIN_PX[0], y + ORIGIN_PX[1], plane,
                genes[gene], compartment,
            ]  # fmt: skip

    columns = ["fov", "cell_ID", "x_local_px", "y_local_px", "x_global_px", "y_global_px", "z", "target", "CellComp"]
    kinds = [pa.int64(), pa.int64(), *[pa.float64()] * 4, pa.int64(), pa.string(), pa.string()]
    _write_csv(folder / f"{name}_tx_file.csv", pa.schema(list(zip(columns, kinds, strict=True))), batches())
    keys = np.concatenate([np.zeros(0, np.int64), *(part[0] for part in counts)])
    found, inverse = np.unique(keys, return_inverse=True)
    totals = np.bincount(inverse, np.concatenate([np.zeros(0), *(part[1] for part in counts)]), len(found)).astype(
        np.int64
    )
    _write_counts(folder / f"{name}_exprMat_file.csv", fields, cells, genes, found, totals)


def _write_counts(
    path: Path,
    fields: Fields,
    cells: _Cells,
    genes: NDArray[np.object_],
    keys: NDArray[np.int64],
    totals: NDArray[np.int64],
) -> None:
    """``exprMat_file.csv``: a row a cell, and one of each field's background, dense."""
    n = len(fields.corner)
    field = np.concatenate([cells.field, np.arange(n)])
    local = np.concatenate([cells.local, np.zeros(n, np.int64)])
    order = np.lexsort((local, field))
    row = np.empty(len(order), np.int64)
    row[order] = np.arange(len(order))
    place, gene = row[keys // len(genes)], keys % len(genes)
    by_row = np.argsort(place, kind="stable")
    place, gene, totals = place[by_row], gene[by_row], totals[by_row]
    rows = max(4_000_000 // len(genes), 1)

    def batches() -> Iterator[list[Any]]:
        for start in range(0, len(order), rows):
            stop = min(start + rows, len(order))
            a, b = np.searchsorted(place, [start, stop])
            dense = np.zeros((stop - start, len(genes)), np.int64)
            dense[place[a:b] - start, gene[a:b]] = totals[a:b]
            yield [field[order[start:stop]] + 1, local[order[start:stop]], *dense.T]

    _write_csv(path, pa.schema([(column, pa.int64()) for column in ("fov", "cell_ID", *genes)]), batches())


def _write_cells(folder: Path, name: str, slide: Slide, fields: Fields, cells: _Cells) -> None:
    """``metadata_file.csv`` and ``-polygons.csv``; holes in a cell, which the format cannot say, are filled."""
    pixel = slide.parameters.pixel_size_um
    centres = shapely.get_coordinates(shapely.centroid(cells.outlines)).reshape(-1, 2)
    bounds = shapely.bounds(cells.outlines).reshape(-1, 4)
    corner = fields.corner[cells.field]
    width, height = bounds[:, 2] - bounds[:, 0], bounds[:, 3] - bounds[:, 1]
    numbers = {
        "fov": cells.field + 1, "Area": np.rint(cells.area_um2 / pixel**2).astype(np.int64),
        "AspectRatio": width / np.maximum(height, 1), "CenterX_local_px": centres[:, 0] - corner[:, 0],
        "CenterY_local_px": centres[:, 1] - corner[:, 1], "CenterX_global_px": centres[:, 0] + ORIGIN_PX[0],
        "CenterY_global_px": centres[:, 1] + ORIGIN_PX[1], "Width": width.astype(np.int64),
        "Height": height.astype(np.int64), "cell_ID": cells.local,
    }  # fmt: skip
    table = pa.table({column: pa.array(values) for column, values in numbers.items()})
    _write_csv(folder / f"{name}_metadata_file.csv", table.schema, iter([list(numbers.values())]))
    parts, owner = shapely.get_parts(cells.outlines, return_index=True)
    by_size = np.lexsort((-shapely.area(parts), owner))
    largest = parts[by_size[np.unique(owner[by_size], return_index=True)[1]]] if len(parts) else parts
    xy, ring = shapely.get_coordinates(shapely.get_exterior_ring(largest), return_index=True)
    local = xy - corner[ring]
    vertices = {
        "fov": cells.field[ring] + 1, "cellID": cells.local[ring], "x_local_px": local[:, 0], "y_local_px": local[:, 1],
        "x_global_px": xy[:, 0] + ORIGIN_PX[0], "y_global_px": xy[:, 1] + ORIGIN_PX[1],
    }  # fmt: skip
    table = pa.table({column: pa.array(values) for column, values in vertices.items()})
    _write_csv(folder / f"{name}-polygons.csv", table.schema, iter([list(vertices.values())]))
