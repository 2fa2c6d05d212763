"""Writing a simulated slide as Space Ranger's output of a Visium HD slide, with the truth beside it.

Layouts are those of Space Ranger 4 ("Space Ranger Outputs for Visium HD", 10x Genomics). What it says is the truth:
its bins count the true transcripts (but no controls, which the chemistry does not have) on a grid that is turned
against the image, its cells and nuclei are the true ones, and a cell's counts are those of the bins of 2 µm whose
centre lies in it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from cellquilt.core.log import progress
from cellquilt.core.parquet import write_parquet
from cellquilt.core.transforms import Affine, apply, scale
from cellquilt.geometry.geojson import geometry_json, join_json, joined
from cellquilt.geometry.locate import PolygonIndex
from cellquilt.geometry.polygons import Rings
from cellquilt.simulate.bins import BinCounts, count_in_bins
from cellquilt.simulate.image import CAMERA
from cellquilt.simulate.slide import Slide
from cellquilt.simulate.writer import TIFF_TILE, Spool, TruthWriter, What, tile_outlines

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

ANGLE_DEG = 1.5  # a reader that takes the grid for straight must fail
SIZES_UM = (2, 8, 16)
_HIRES_PX, _LOWRES_PX = 6000, 600  # longer side of Space Ranger's small images
#: Optical density that hematoxylin and eosin give to red, green and blue, after Ruifrok and Johnston (2001).
_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
_DEPTH = (1.1, 0.45)  # of a bright nucleus and of bright cytoplasm
_SOFTWARE = "spaceranger-4.0.1"


def write_visium_hd(slide: Slide, folder: Path, name: str, what: What, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write a slide as Space Ranger's folder ``outs``, with ``microscope_image`` and ``truth/`` in it.

    ``binned_outputs/square_002um``, ``_008um`` and ``_016um`` with raw and filtered matrices, positions and scales;
    ``segmented_outputs`` with cells, nuclei and the cells' counts; ``barcode_mappings.parquet``; ``feature_slice.h5``
    with its metadata, but without the pictures of features; H&E from the simulated stains, in 8 bits, tiled.

    Returns
    -------
    dict
        The slide's `simulation.json`.

    Notes
    -----
    The memory grows with the cells, the bins and the entries of the matrix, not with the pixels or the transcripts.
    """
    folder.mkdir(parents=True)
    truth = TruthWriter(folder / "truth", slide, True)
    spools = [
        Spool(folder / f".{colour}.spool", slide.canvas, np.dtype(np.uint8)) for colour in ("r", "g", "b") if what.image
    ]
    outlines: list[tuple[NDArray[np.int64], NDArray, NDArray]] = []
    for window in progress(slide.windows(what.tile_px), f"simulate {name}"):
        tile = slide.tile(window)
        cells = tile_outlines(tile.masks.cells, tile)
        truth.write(tile, cells, slide.transcripts(tile))
        nuclei = tile_outlines(tile.masks.nuclei, tile)
        outlines.append((tile.cells.ids[tile.owned.index], cells, nuclei))
        if spools:
            for spool, colour in zip(spools, stained(slide.image(tile)), strict=True):
                spool.write(window, colour)
    document = truth.close({**more, "angle_deg": ANGLE_DEG, "bin_um": SIZES_UM[0]})
    binned = count_in_bins(folder / "truth", bin_um=SIZES_UM[0], angle_deg=ANGLE_DEG)
    binned = _on_whole_cells(binned)
    scales = {
        "regist_target_img_scalef": 1.0,
        "tissue_hires_scalef": min(_HIRES_PX / max(slide.canvas), 1.0),
        "tissue_lowres_scalef": min(_LOWRES_PX / max(slide.canvas), 1.0),
        "fiducial_diameter_fullres": 1000.0,
        "microns_per_pixel": slide.parameters.pixel_size_um,
    }
    if spools:
        _write_images(folder, name, spools, what.compression, scales)
    to_px = scale(1 / slide.parameters.pixel_size_um) @ binned.to_um
    for size in SIZES_UM:
        _write_bins(folder / "binned_outputs" / f"square_{size:03d}um", binned, size, to_px, scales)
    _write_feature_slice(folder / f"{name}_feature_slice.h5", name, to_px)
    _write_cells(folder, binned, to_px, outlines, scales)
    return document


def stained(stains: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """H&E as a camera in transmitted light sees it, from nuclear and cytoplasm stains in fluorescence.

    Parameters
    ----------
    stains
        (2, h, w): DAPI and Cellbound.

    Returns
    -------
    numpy.ndarray
        (3, h, w) red, green and blue, white where there is no dye (Beer and Lambert).
    """
    density = np.zeros((3, *stains.shape[1:]))
    for plane, (offset, background, signal, _, _), colour, depth in zip(
        stains, CAMERA.values(), _STAINS, _DEPTH, strict=True
    ):
        amount = np.clip((plane - (offset + background)) / signal, 0, 1.5)
        density += depth * colour[:, None, None] * amount
    return np.rint(245 * 10.0**-density).astype(np.uint8)


def _on_whole_cells(binned: BinCounts) -> BinCounts:
    """The same on a grid whose sides are multiples of the widest bins."""
    step = SIZES_UM[-1] // SIZES_UM[0]
    rows, columns = (-(-side // step) * step for side in binned.shape)
    return BinCounts(binned.row, binned.column, binned.counts, binned.genes, binned.to_um, (rows, columns))


# --- images


def _write_images(
    folder: Path, name: str, spools: list[Spool], compression: str | None, scales: Mapping[str, float]
) -> None:
    import tifffile
    from PIL import Image

    height, width = spools[0].shape
    place = folder / "microscope_image"
    place.mkdir()

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for parts in zip(*(spool.tiles() for spool in spools), strict=True):
            yield np.stack(parts, axis=-1)

    with tifffile.TiffWriter(place / f"{name}_tissue_image.tif", bigtiff=True) as tiff:
        tiff.write(
            tiles(), shape=(height, width, 3), dtype=np.uint8, tile=(TIFF_TILE, TIFF_TILE), compression=compression,
            photometric="rgb", metadata=None, software="cellquilt",
        )  # fmt: skip
    spatial = folder / "spatial"
    spatial.mkdir()
    for kind in ("hires", "lowres"):
        factor = scales[f"tissue_{kind}_scalef"]
        small = _shrunk(spools, factor)
        Image.fromarray(small).save(spatial / f"tissue_{kind}_image.png")
    for spool in spools:
        spool.remove()


def _shrunk(spools: list[Spool], factor: float) -> NDArray[np.uint8]:
    """(h, w, 3) the pixels nearest to the places that the small image has, tile by tile."""
    height, width = spools[0].shape
    ys, xs = (np.floor((np.arange(max(int(side * factor), 1)) + 0.5) / factor).astype(int) for side in (height, width))
    ys, xs = np.minimum(ys, height - 1), np.minimum(xs, width - 1)
    small = np.empty((len(ys), len(xs), 3), np.uint8)
    for row in range(spools[0].rows):
        y = np.flatnonzero(ys // TIFF_TILE == row)
        for column in range(spools[0].columns):
            x = np.flatnonzero(xs // TIFF_TILE == column)
            for colour, spool in enumerate(spools):
                tile = spool.tile(row, column)
                small[np.ix_(y, x, [colour])] = tile[np.ix_(ys[y] % TIFF_TILE, xs[x] % TIFF_TILE)][..., None]
    return small


# --- bins


def _barcodes(row: NDArray[np.integer], column: NDArray[np.integer], size: int) -> NDArray[np.bytes_]:
    """Names of bins, such as ``s_002um_00012_00345-1``."""
    rows, columns = (np.char.zfill(places.astype("S5"), 5) for places in (row, column))
    return np.char.add(np.char.add(np.char.add(f"s_{size:03d}um_".encode(), rows), b"_"), np.char.add(columns, b"-1"))


def _write_bins(folder: Path, binned: BinCounts, size: int, to_px: Affine, scales: Mapping[str, float]) -> None:
    from scipy.sparse import csr_matrix

    step = size // SIZES_UM[0]
    shape = binned.shape[0] // step, binned.shape[1] // step
    place = (binned.row // step) * shape[1] + binned.column // step
    there, coarse = np.unique(place, return_inverse=True)
    add = csr_matrix((np.ones(len(coarse), np.int32), (coarse, np.arange(len(coarse)))), (len(there), len(coarse)))
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    row, column = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
    xy = apply(to_px, (np.column_stack([column, row]) + 0.5) * step)
    in_tissue = np.zeros(len(row), np.int64)
    in_tissue[there] = 1
    write_parquet(
        spatial / "tissue_positions.parquet",
        pa.table(
            {
                "barcode": pa.array(_barcodes(row, column, size).astype(str).tolist(), pa.string()),
                "in_tissue": in_tissue,
                "array_row": row,
                "array_col": column,
                "pxl_row_in_fullres": xy[:, 1],
                "pxl_col_in_fullres": xy[:, 0],
            }
        ),
    )
    width = size / scales["microns_per_pixel"]
    document = {"spot_diameter_fullres": width, "bin_size_um": float(size), **scales}
    (spatial / "scalefactors_json.json").write_text(json.dumps(document) + "\n")
    counts = (add @ binned.counts).tocsr()
    write_matrix(
        folder / "filtered_feature_bc_matrix.h5", _barcodes(row[there], column[there], size), counts, binned.genes
    )
    everywhere = csr_matrix((len(row), len(binned.genes)), dtype=np.int32)
    everywhere.indptr = np.concatenate(
        [[0], np.cumsum(np.bincount(np.repeat(there, np.diff(counts.indptr)), minlength=len(row)))]
    )
    everywhere.indices, everywhere.data = counts.indices, counts.data
    write_matrix(folder / "raw_feature_bc_matrix.h5", _barcodes(row, column, size), everywhere, binned.genes)


def write_matrix(path: Path, barcodes: NDArray[np.bytes_], counts: "csr_matrix", genes: list[str]) -> None:
    """Write Space Ranger's feature-barcode matrix.

    Parameters
    ----------
    path
        The HDF5 file.
    barcodes
        (n,) names of the rows of `counts`.
    counts
        (n, n_genes); the file has a column a barcode.
    genes
        Names of the features.
    """
    import h5py

    counts.sort_indices()
    features = {
        "id": [f"SIM{k:011d}" for k in range(len(genes))],
        "name": genes,
        "feature_type": ["Gene Expression"] * len(genes),
        "genome": ["simulated"] * len(genes),
        "_all_tag_keys": ["genome"],
    }
    with h5py.File(path, "w") as file:
        file.attrs["chemistry_description"] = "Visium HD"
        file.attrs["filetype"] = "matrix"
        file.attrs["software_version"] = _SOFTWARE
        file.attrs["version"] = 2
        group = file.create_group("matrix")
        more = {"compression": "gzip", "compression_opts": 1, "track_times": False}
        group.create_dataset("barcodes", data=barcodes, **(more if barcodes.size else {}))
        for name, values in (("data", counts.data.astype(np.int32)), ("indices", counts.indices.astype(np.int64))):
            group.create_dataset(name, data=values, **(more if values.size else {}))
        group.create_dataset("indptr", data=counts.indptr.astype(np.int64), track_times=False)
        group.create_dataset("shape", data=np.array([len(genes), counts.shape[0]], np.int32), track_times=False)
        for name, texts in features.items():
            group.create_dataset(
                f"features/{name}", data=np.char.encode(np.asarray(texts, dtype=str)), track_times=False
            )


def _write_feature_slice(path: Path, name: str, to_px: Affine) -> None:
    """``feature_slice.h5``: what it says of the slide and where its bins lie; without its pictures."""
    import h5py

    layout = {
        "slide_name": "simulated", "slide_uid": name, "file_format": "1.0",
        "transform": np.eye(3).ravel().tolist(),
    }  # fmt: skip
    inverse = np.linalg.inv(to_px)
    matrices = {
        "cytassist_colrow_to_spot_colrow": inverse, "spot_colrow_to_cytassist_colrow": to_px,
        "microscope_colrow_to_spot_colrow": inverse, "spot_colrow_to_microscope_colrow": to_px,
    }  # fmt: skip
    metadata = {
        "sample_id": name,
        "hd_layout_json": json.dumps(layout),
        "transform_matrices": {key: matrix.ravel().tolist() for key, matrix in matrices.items()},
    }
    with h5py.File(path, "w") as file:
        file.attrs["metadata_json"] = json.dumps(metadata, sort_keys=True)
        file.attrs["filetype"] = "feature_slice"


# --- cells


def _write_cells(
    folder: Path,
    binned: BinCounts,
    to_px: Affine,
    outlines: list[tuple[NDArray[np.int64], NDArray, NDArray]],
    scales: Mapping[str, float],
) -> None:
    from scipy.sparse import csr_matrix

    ids = np.concatenate([part[0] for part in outlines])
    order = np.argsort(ids)
    cells, nuclei = (_one_ring(np.concatenate([part[k] for part in outlines])[order]) for k in (1, 2))
    # As Space Ranger, by number: the simulated ones reach over nine digits.
    number = np.arange(1, len(ids) + 1)
    place = folder / "segmented_outputs"
    (place / "spatial").mkdir(parents=True)
    (place / "spatial" / "scalefactors_json.json").write_text(json.dumps(dict(scales)) + "\n")
    there = np.array([outline is not None for outline in nuclei], dtype=bool)
    _write_geojson(place / "cell_segmentations.geojson", number, cells)
    _write_geojson(place / "nucleus_segmentations.geojson", number[there], nuclei[there])
    centres = apply(to_px, np.column_stack([binned.column, binned.row]) + 0.5)
    cell = PolygonIndex(Rings.from_shapely(cells)).locate(centres)
    nucleus = PolygonIndex(Rings.from_shapely(nuclei[there])).locate(centres)
    inside = np.flatnonzero(cell >= 0)
    add = csr_matrix((np.ones(len(inside), np.int32), (cell[inside], inside)), (len(ids), len(cell)))
    counts = (add @ binned.counts).tocsr()
    counted = np.flatnonzero(np.diff(counts.indptr))
    names = np.char.add(np.char.add(b"cellid_", np.char.zfill(number.astype("S9"), 9)), b"-1")
    write_matrix(place / "filtered_feature_cell_matrix.h5", names[counted], counts[counted], binned.genes)
    texts = pa.array([*names.astype(str).tolist(), None], pa.string()).take(
        pa.array(np.where(cell >= 0, cell, len(ids)))
    )
    mapping = {
        f"square_{size:03d}um": pa.array(
            _barcodes(binned.row // (size // 2), binned.column // (size // 2), size).astype(str).tolist(), pa.string()
        )
        for size in SIZES_UM
    }
    in_nucleus = np.flatnonzero(there)[nucleus] == cell if there.any() else np.zeros(len(cell), bool)
    write_parquet(
        folder / "barcode_mappings.parquet",
        pa.table({**mapping, "cell_id": texts, "in_nucleus": (nucleus >= 0) & in_nucleus, "in_cell": cell >= 0}),
    )
    truth = folder / "truth"
    known = pq.read_table(truth / "cells.parquet", columns=["cell_id"]).column("cell_id").to_numpy()
    write_parquet(
        truth / "vendor_ids.parquet",
        pa.table(
            {"cell_id": known, "vendor_id": pa.array(names[np.searchsorted(ids[order], known)].astype(str).tolist())}
        ),
    )


def _one_ring(outlines: NDArray) -> NDArray:
    """Outlines as Space Ranger's have them, of one ring each: the largest part, holes filled; None stays."""
    there = np.flatnonzero([outline is not None for outline in outlines])
    parts, owner = shapely.get_parts(outlines[there], return_index=True)
    order = np.lexsort((-shapely.area(parts), owner))
    largest = parts[order[np.unique(owner[order], return_index=True)[1]]] if len(parts) else parts
    found = np.full(len(outlines), None, dtype=object)
    found[there] = shapely.polygons(shapely.get_exterior_ring(largest)) if len(parts) else parts
    return found


def _write_geojson(path: Path, number: NDArray[np.integer], outlines: NDArray) -> None:
    """Outlines in pixels of the full resolution."""
    ids = pa.array(number, pa.int64()).cast(pa.string())
    features = joined(
        '{"type":"Feature","geometry":', geometry_json(Rings.from_shapely(outlines)), ',"properties":{"cell_id":', ids,
        ',"classification":{"name":"Cell"}}}',
    )  # fmt: skip
    text = join_json(features) if len(features) else ""
    path.write_text('{"type":"FeatureCollection","features":[' + text + "]}\n")
