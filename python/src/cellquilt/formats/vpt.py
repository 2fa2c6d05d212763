"""Cells as Vizgen's post-processing tool (VPT) writes and reads them: Parquet with a row a cell and plane, in µm."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellquilt.core.parquet import ParquetWriter, arrow_array
from cellquilt.core.points import iter_points, points_columns
from cellquilt.core.transforms import MICRONS
from cellquilt.core.vizgen import CELLS_SCHEMA
from cellquilt.formats.cells import POINTS, SlideCells, mapped
from cellquilt.geometry.outlines import Outlines
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.wkb import wkb_of_rings

CELL_FILE, NUCLEUS_FILE = "cell_boundaries.parquet", "nucleus_boundaries.parquet"
_CELLS_PER_GROUP = 2048


def write_vpt(cells: SlideCells, folder: Path, *, memory_mb: int = 1500) -> None:
    """Write ``cell_boundaries.parquet`` and, where there are nuclei, ``nucleus_boundaries.parquet``.

    Parameters
    ----------
    cells
        The slide's cells. EntityID is a cell's number, Name its id; nuclei have EntityIDs above those of all cells,
        and the cell's as ParentID. Every outline stands once for each plane that the transcripts have.
    folder
        Folder to write to.
    memory_mb
        Bound of the transcripts that are read at a time, to know their planes.
    """
    from cellquilt.core.points import batch_rows

    planes = np.arange(_last_plane(cells, batch_rows(memory_mb)) + 1)
    step = float(cells.store.parameter("convert", "z_step_um") or 1.5)
    levels = step * (planes + 1.0)
    everyone = np.arange(len(cells))
    with _Writer(folder / CELL_FILE, "cell", planes, levels) as writer:
        writer.write_all(cells, cells.outlines, everyone, cells.numbers, None)
    if cells.nuclei is not None:
        above = int(cells.numbers.max()) + 1
        with _Writer(folder / NUCLEUS_FILE, "nucleus", planes, levels) as writer:
            numbers = above + np.arange(len(cells.nuclei))
            writer.write_all(cells, cells.nuclei, cells.cell_of_nucleus, numbers, cells.numbers)


def _last_plane(cells: SlideCells, rows: int) -> int:
    """The last plane that transcripts lie in; 0 where they tell none."""
    if not cells.store.has("points", POINTS):
        return 0
    element = cells.store.element("points", POINTS)
    if "z_plane" not in points_columns(element):
        return 0
    last = 0
    for batch in iter_points(element, ["z_plane"], rows):
        plane = batch.column("z_plane").drop_null().to_numpy()
        last = max(last, int(plane.max(initial=0)))
    return last


class _Writer:
    """One file: rows of whole cells, ascending by EntityID, as VPT looks them up."""

    def __init__(self, path: Path, kind: str, planes: NDArray[np.int64], levels: NDArray) -> None:
        column = {"encoding": "WKB", "crs": None, "geometry_types": ["MultiPolygon"]}
        geo = {"version": "1.1.0", "primary_column": "Geometry", "columns": {"Geometry": column}}
        schema = CELLS_SCHEMA.with_metadata({b"geo": json.dumps(geo).encode()})
        self._kind, self._planes, self._levels, self._schema = kind, planes, levels, schema
        self._writer = ParquetWriter(path, schema, compression="zstd")
        self._n_rows = 0

    def write_all(
        self,
        cells: SlideCells,
        outlines: Outlines,
        cell: NDArray[np.int64],
        numbers: NDArray[np.int64],
        parents: NDArray[np.int64] | None,
    ) -> None:
        """Write outlines, those without a cell or without a ring left out.

        Parameters
        ----------
        cells
            The slide's cells.
        outlines
            (m,) what to write.
        cell
            (m,) row of each one's cell, -1 for none.
        numbers
            (m,) EntityID of each.
        parents
            (n cells,) EntityID of the cells, if these are the outlines' parents.
        """
        matrix = cells.map_of(MICRONS, outlines)
        for rows, rings in outlines.parts():
            kept = np.flatnonzero((rings.n_parts() > 0) & (cell[rows] >= 0))
            for start in range(0, kept.size, _CELLS_PER_GROUP):
                here = kept[start : start + _CELLS_PER_GROUP]
                owner = cell[rows[here]]
                parent = None if parents is None else parents[owner]
                names = cells.ids.take(arrow_array(owner))
                self._write(numbers[rows[here]], names, parent, mapped(rings.take(here), matrix))

    def _write(self, numbers: NDArray[np.int64], names: pa.Array, parent: NDArray | None, rings: Rings) -> None:
        n_planes = self._planes.size
        each = arrow_array(np.repeat(np.arange(numbers.size), n_planes))
        n = len(each)
        nothing = pa.nulls(n, pa.int64())
        columns = [
            arrow_array(self._n_rows + np.arange(n)),
            arrow_array(np.repeat(numbers, n_planes)),
            arrow_array(np.tile(self._planes, numbers.size)),
            wkb_of_rings(rings, multi=True).cast(pa.binary()).take(each),
            pa.repeat(pa.scalar(self._kind, pa.string()), n),
            arrow_array(np.tile(self._levels, numbers.size)),
            names.take(each),
            nothing if parent is None else arrow_array(np.repeat(parent, n_planes)),
            pa.repeat(pa.scalar(None if parent is None else "cell", pa.string()), n),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=n)
        self._n_rows += n

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._writer.close()
        else:
            self._writer.abandon()
