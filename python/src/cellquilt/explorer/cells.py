"""``cells.zarr.zip``: cells and nuclei as polygons, and what is known of each cell.

Nuclei and cells are two sets of polygons, as since version 2 of the machine's software: a cell may have no nucleus, or
several. Polygons have few corners and the area of the true outlines; areas and centroids are those of the outlines.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellquilt.core.log import LOG
from cellquilt.core.transforms import Affine, apply
from cellquilt.core.xenium import SUMMARY
from cellquilt.core.zarr_zip import ZarrZip
from cellquilt.explorer.simplify import simplified
from cellquilt.explorer.slide import ViewedSlide
from cellquilt.formats.cells import CELLS, NUCLEI, mapped
from cellquilt.geometry.outlines import Outlines

NUCLEUS_SET, CELL_SET = "0", "1"
#: Table in the folder that says which cell of the store each name in the viewer is.
NAMES = "cell_ids.csv"
_DESCRIPTIONS = (
    *("Cell centroid in X", "Cell centroid in Y", "Cell area", "Nucleus centroid in X", "Nucleus centroid in Y"),
    *("Nucleus area", "z_level", "Nucleus count"),
)


def write_cells(slide: ViewedSlide, path: Path, *, max_vertices: int) -> int:
    """Write the slide's cells.

    Parameters
    ----------
    slide
        A slide with cells.
    path
        File to write.
    max_vertices
        Most corners of a polygon, the first repeated as last.

    Returns
    -------
    int
        The number of cells.
    """
    assert slide.cells is not None
    cells = slide.cells
    summary = cell_summary(slide)
    attributes = {
        "major_version": 6,
        "minor_version": 0,
        "name": "CellSegmentationDataset",
        "number_cells": len(cells),
        "polygon_set_names": ["nucleus", "cell"],
        "polygon_set_display_names": ["Nucleus boundaries", "Cell boundaries"],
        "polygon_set_descriptions": ["Nuclei", "Cells"],
        "segmentation_methods": [_method(slide)],
        "spatial_units": "microns",
    }
    with ZarrZip(path, "blosc") as store:
        store.group("", attributes)
        store.array("cell_id", number_pairs(slide.numbers))
        names = {"column_names": list(SUMMARY), "column_descriptions": list(_DESCRIPTIONS)}
        store.array("cell_summary", summary, names)
        store.group("polygon_sets")
        if cells.nuclei is None:
            _write_set(store, NUCLEUS_SET, np.zeros(0, np.int64), np.zeros((0, max_vertices, 2)), np.zeros(0, np.int32))
        else:
            matrix = slide.map_of(cells.nuclei.transforms, NUCLEI)
            _write_set(store, NUCLEUS_SET, cells.cell_of_nucleus, *polygons(cells.nuclei, matrix, max_vertices))
        matrix = slide.map_of(cells.outlines.transforms, CELLS)
        _write_set(store, CELL_SET, np.arange(len(cells)), *polygons(cells.outlines, matrix, max_vertices))
    return len(cells)


def number_pairs(numbers: NDArray[np.integer]) -> NDArray[np.uint32]:
    """(n, 2) uint32, names of cells as the format has them: the number, and that of the data set."""
    return np.column_stack([numbers, np.ones(len(numbers))]).astype(np.uint32)


def _method(slide: ViewedSlide) -> str:
    return str(
        slide.store.attributes.get("segmentation") or slide.store.parameter("resolve", "segmentation") or "cells"
    )


def cell_summary(slide: ViewedSlide) -> NDArray[np.float64]:
    """(n, 8) float64: centroid and area of each cell and of its nuclei together (µm, µm²), plane, number of nuclei.

    Of a cell without nucleus these are NaN; of a cell without outline all but the last two.
    """
    assert slide.cells is not None
    cells = slide.cells
    matrix = slide.map_of(cells.outlines.transforms, CELLS)
    out = np.full((len(cells), len(SUMMARY)), np.nan)
    out[:, :2] = apply(matrix, cells.outlines.traits.centroids)
    out[:, 2] = cells.outlines.traits.areas * slide.length_um**2
    out[cells.outlines.traits.n_parts == 0, :3] = np.nan
    out[:, 6:] = 0
    if cells.nuclei is not None:
        matrix = slide.map_of(cells.nuclei.transforms, NUCLEI)
        there = (cells.cell_of_nucleus >= 0) & (cells.nuclei.traits.n_parts > 0)
        row = cells.cell_of_nucleus[there]
        area = cells.nuclei.traits.areas[there] * abs(float(np.linalg.det(matrix[:2, :2])))
        place = apply(matrix, cells.nuclei.traits.centroids[there])
        count, total = (np.bincount(row, values, len(cells)) for values in (None, area))
        some = count > 0
        weighted = [np.bincount(row, area * place[:, k], len(cells)) for k in (0, 1)]
        with np.errstate(invalid="ignore", divide="ignore"):
            out[:, 3:5] = np.column_stack(weighted) / total[:, None]
        out[:, 5] = np.where(some, total, np.nan)
        out[:, 7] = count
    return out


def polygons(outlines: Outlines, matrix: Affine, max_vertices: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Outlines as `simplified` makes them, after a map."""
    vertices, n = np.zeros((len(outlines), max_vertices, 2), np.float64), np.zeros(len(outlines), np.int32)
    for rows, rings in outlines.parts():
        vertices[rows], n[rows] = simplified(mapped(rings, matrix), max_vertices)
    return vertices, n


def _write_set(
    store: ZarrZip, key: str, cell: NDArray[np.int64], vertices: NDArray[np.float64], n_vertices: NDArray[np.int32]
) -> None:
    shown = (n_vertices > 0) & (cell >= 0)
    if key == CELL_SET and not shown.all():
        LOG.warning("%d cells have no outline; the viewer lists them and draws nothing", int((~shown).sum()))
    base = f"polygon_sets/{key}"
    store.group(base)
    store.array(f"{base}/cell_index", cell[shown].astype(np.uint32))
    store.array(f"{base}/method", np.zeros(int(shown.sum()), np.uint32))
    store.array(f"{base}/num_vertices", n_vertices[shown])
    store.array(f"{base}/vertices", vertices[shown].reshape(-1, 2 * vertices.shape[1]).astype(np.float32))


def write_names(slide: ViewedSlide, path: Path) -> None:
    """Write which cell of the store each name in the viewer is."""
    from pyarrow import csv

    assert slide.cells is not None
    table = pa.table({"cell_id": pa.array(slide.names.tolist(), pa.string()), "store_cell_id": slide.cells.ids})
    csv.write_csv(table, str(path), write_options=csv.WriteOptions(quoting_style="needed"))
