"""The tables of a Xenium bundle, for programs that read bundles and know nothing of the viewer's files.

``transcripts.parquet``, ``cells.parquet``, ``cell_boundaries.parquet``, ``nucleus_boundaries.parquet`` and
``cell_feature_matrix.h5``, as version 3 of the machine's software has them. Outlines are those that the viewer shows.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cellquilt.core.parquet import ParquetWriter, arrow_array, write_parquet
from cellquilt.core.points import batch_rows, bools, floats, iter_points, points_columns, points_transforms
from cellquilt.core.points import xy as coordinates
from cellquilt.core.transforms import apply
from cellquilt.core.xenium import SUMMARY, UNASSIGNED
from cellquilt.explorer.cells import cell_summary, polygons
from cellquilt.explorer.slide import ViewedSlide
from cellquilt.explorer.table import write_h5
from cellquilt.explorer.transcripts import gene_column
from cellquilt.formats.cells import CELLS, NUCLEI
from cellquilt.geometry.outlines import Outlines

TRANSCRIPTS_TABLE, CELLS_TABLE, MATRIX_H5 = "transcripts.parquet", "cells.parquet", "cell_feature_matrix.h5"
OUTLINES = {CELLS: "cell_boundaries.parquet", NUCLEI: "nucleus_boundaries.parquet"}
FILES = (TRANSCRIPTS_TABLE, CELLS_TABLE, MATRIX_H5, *OUTLINES.values())
_TRANSCRIPTS = pa.schema(
    [
        ("transcript_id", pa.uint64()), ("cell_id", pa.string()), ("overlaps_nucleus", pa.uint8()),
        ("feature_name", pa.string()), ("x_location", pa.float32()), ("y_location", pa.float32()),
        ("z_location", pa.float32()), ("qv", pa.float32()), ("is_gene", pa.bool_()),
    ]
)  # fmt: skip


def write_bundle(slide: ViewedSlide, folder: Path, *, max_vertices: int, memory_mb: int = 1500) -> None:
    """Write the tables that the slide has something for."""
    if slide.points is not None:
        _write_transcripts(slide, folder / TRANSCRIPTS_TABLE, memory_mb)
    if slide.cells is None:
        return
    _write_outlines(slide, slide.cells.outlines, CELLS, np.arange(len(slide.cells)), folder, max_vertices)
    if slide.cells.nuclei is not None:
        _write_outlines(slide, slide.cells.nuclei, NUCLEI, slide.cells.cell_of_nucleus, folder, max_vertices)
    totals = np.zeros(len(slide.cells), np.int64)
    if slide.table is not None:
        totals = write_h5(slide, folder / MATRIX_H5, memory_mb=memory_mb)
    summary = dict(zip(SUMMARY, cell_summary(slide).T, strict=True))
    columns = {
        "cell_id": pa.array(slide.names.tolist(), pa.string()),
        "x_centroid": arrow_array(summary["cell_centroid_x"]),
        "y_centroid": arrow_array(summary["cell_centroid_y"]),
        "transcript_counts": arrow_array(totals),
        "total_counts": arrow_array(totals),
        "cell_area": arrow_array(summary["cell_area"]),
        "nucleus_area": arrow_array(summary["nucleus_area"]),
        "nucleus_count": arrow_array(summary["nucleus_count"].astype(np.int32)),
    }
    write_parquet(folder / CELLS_TABLE, pa.table(columns))


def _write_transcripts(slide: ViewedSlide, path: Path, memory_mb: int) -> None:
    assert slide.points is not None
    there, gene = points_columns(slide.points), gene_column(slide)
    own = ("z", "qv", "transcript_id", "cell_id", "in_nucleus", "is_control")
    columns = ["x", "y", gene, *(name for name in own if name in there)]
    matrix = slide.map_of(points_transforms(slide.points), "transcripts")
    names = pa.array([*slide.names.tolist(), UNASSIGNED], pa.string())
    first = 0
    writer = ParquetWriter(path, _TRANSCRIPTS, compression="zstd", compression_level=1)
    try:
        for batch in iter_points(slide.points, columns, batch_rows(memory_mb)):
            n = batch.num_rows
            place = apply(matrix, coordinates(batch)).astype(np.float32)
            row = np.full(n, -1, np.int64)
            if "cell_id" in columns and slide.cells is not None:
                row = slide.cells.rows_of(batch.column("cell_id").combine_chunks())
            ids = np.arange(first, first + n, dtype=np.uint64)
            if "transcript_id" in columns and pa.types.is_integer(batch.schema.field("transcript_id").type):
                ids = batch.column("transcript_id").to_numpy().astype(np.uint64)
            nucleus = bools(batch, "in_nucleus") if "in_nucleus" in columns else np.zeros(n, bool)
            control = bools(batch, "is_control") if "is_control" in columns else np.zeros(n, bool)
            arrays = [
                arrow_array(ids),
                names.take(arrow_array(np.where(row < 0, len(names) - 1, row))),
                arrow_array(nucleus.astype(np.uint8)),
                pc.fill_null(batch.column(gene).cast(pa.string()), ""),
                arrow_array(place[:, 0]),
                arrow_array(place[:, 1]),
                arrow_array((floats(batch, "z") if "z" in columns else np.zeros(n)).astype(np.float32)),
                arrow_array((floats(batch, "qv") if "qv" in columns else np.full(n, 40.0)).astype(np.float32)),
                arrow_array(~control),
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=_TRANSCRIPTS))
            first += n
        writer.close()
    except BaseException:
        writer.abandon()
        raise


def _write_outlines(
    slide: ViewedSlide, outlines: Outlines, name: str, cell: NDArray[np.int64], folder: Path, max_vertices: int
) -> None:
    vertices, n = polygons(outlines, slide.map_of(outlines.transforms, name), max_vertices)
    shown = np.flatnonzero((n > 0) & (cell >= 0))
    number = np.repeat(np.arange(len(shown)), n[shown])
    used = np.arange(max_vertices)[None, :] < n[shown][:, None]
    places = vertices[shown][used].astype(np.float32)
    names = pa.array(slide.names[cell[shown]].tolist(), pa.string())
    columns = {
        "cell_id": names.take(arrow_array(number)),
        "vertex_x": arrow_array(places[:, 0]),
        "vertex_y": arrow_array(places[:, 1]),
        "label_id": arrow_array((number + 1).astype(np.int32)),
    }
    write_parquet(folder / OUTLINES[name], pa.table(columns))
