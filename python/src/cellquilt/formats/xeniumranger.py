"""Cells as ``xeniumranger import-segmentation`` takes them: which transcript is in which cell, and outlines in µm.

The importer wants the transcripts' ids as the machine gave them, every cell of the table among the outlines and every
outline's cell in the table. Versions up to 3.1 take Baysor's old collection of geometries with numbers as cells,
later ones a FeatureCollection with names; both are written.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG, progress
from cellquilt.core.parquet import arrow_array
from cellquilt.core.points import batch_rows, count_points, iter_points, points_columns
from cellquilt.core.transforms import MICRONS
from cellquilt.formats.cells import FeatureWriter, SlideCells, texts
from cellquilt.formats.qupath import write_features
from cellquilt.geometry.geojson import coordinates_json, joined
from cellquilt.geometry.polygonize import simple_rings

ASSIGNMENT, NAMES = "transcript_assignment.csv", "cells.csv"
POLYGONS, OLD_POLYGONS = "viz_polygons.geojson", "viz_polygons_3.1.geojson"
OUTLINES = "cells_and_nuclei.geojson"
#: The machine's own ids of transcripts, as the points have them.
MACHINE_ID = "vendor_transcript_id"
_TECHNOLOGY = "xenium"


def write_xeniumranger(cells: SlideCells, folder: Path, *, memory_mb: int = 1500) -> None:
    """Write the importer's input.

    ``transcript_assignment.csv`` (for ``--transcript-assignment``) with a row for every transcript;
    ``viz_polygons.geojson`` or, for versions up to 3.1, ``viz_polygons_3.1.geojson`` (``--viz-polygons``);
    ``cells_and_nuclei.geojson`` (``--cells``, ``--nuclei``), which leaves it to the importer to count transcripts;
    ``cells.csv``, which cell of ours each of the files' is. All in µm.

    Parameters
    ----------
    cells
        The slide's cells.
    folder
        Folder to write to.
    memory_mb
        A quarter of it bounds the transcripts that are read at a time.

    Raises
    ------
    CellquiltError
        ``export-not-xenium``, ``export-no-transcripts``, ``export-not-counted``, ``export-transcript-id``.
    """
    points = cells.points
    _check_machine(cells, points)
    rows, n = batch_rows(memory_mb), count_points(points)

    def batches(columns: list[str]) -> Iterator[pa.Table]:
        return progress(iter_points(points, columns, rows), "transcripts", -(-n // rows))

    held = np.zeros(len(cells), dtype=np.int64)
    for batch in batches(["cell_id"]):
        row = cells.rows_of(batch.column("cell_id").combine_chunks())
        held += np.bincount(row[row >= 0], minlength=len(cells))
    shaped = cells.outlines.traits.n_parts > 0
    used = (held > 0) & shaped
    lost = int(held[~shaped].sum())
    if lost:
        LOG.warning("%s: %d transcripts are in cells without outlines and become noise", cells.store.name, lost)
    if not used.any():
        raise CellquiltError(
            "export-no-transcripts", f"no transcript of {cells.store.path} is in a cell", "is it the right slide?"
        )
    names = joined("cell-", texts(cells.numbers))
    _write_assignment(cells, names, used, batches(["cell_id", MACHINE_ID]), folder / ASSIGNMENT)
    _write_polygons(cells, names, used, folder)
    write_features(cells, folder / OUTLINES, MICRONS, None, simple=True)
    _write_names(cells, names, used, folder / NAMES)


def _check_machine(cells: SlideCells, points: Path) -> None:
    technology = cells.store.parameter("convert", "technology")
    if technology is not None and technology != _TECHNOLOGY:
        raise CellquiltError(
            "export-not-xenium",
            f"{cells.store.path} is a slide of {technology}; xeniumranger knows Xenium slides only",
            "export it for vpt or qupath",
        )
    if MACHINE_ID not in points_columns(points):
        raise CellquiltError(
            "export-not-xenium",
            f"the transcripts of {cells.store.path} have no column {MACHINE_ID}, the machine's own ids",
            "read the slide from its Xenium bundle with `cellquilt convert`",
        )


def _write_assignment(
    cells: SlideCells, names: pa.Array, used: NDArray[np.bool_], batches: Iterator[pa.Table], path: Path
) -> None:
    from pyarrow import csv

    schema = pa.schema([("transcript_id", pa.uint64()), ("cell", pa.string()), ("is_noise", pa.bool_())])
    plain = csv.WriteOptions(include_header=False, quoting_style="none")  # Arrow would put quotes round the header
    with path.open("wb") as file, csv.CSVWriter(file, schema, write_options=plain) as writer:
        file.write(f"{','.join(schema.names)}\n".encode())
        for batch in batches:
            row = cells.rows_of(batch.column("cell_id").combine_chunks())
            noise = (row < 0) | ~used[np.maximum(row, 0)]
            try:
                ids = batch.column(MACHINE_ID).combine_chunks().cast(pa.uint64())
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise CellquiltError(
                    "export-transcript-id",
                    f"column {MACHINE_ID} of the transcripts of {cells.store.path} holds no numbers: {error}",
                    "read the slide from its Xenium bundle with `cellquilt convert`",
                ) from error
            cell = pc.if_else(arrow_array(noise), "", names.take(arrow_array(np.maximum(row, 0))))
            writer.write_table(pa.Table.from_arrays([ids, cell, arrow_array(noise)], schema=schema))


def _write_polygons(cells: SlideCells, names: pa.Array, used: NDArray[np.bool_], folder: Path) -> None:
    """The outlines of the cells with transcripts: the largest part of each, without holes."""
    with (
        FeatureWriter(folder / POLYGONS) as now,
        FeatureWriter(folder / OLD_POLYGONS, "GeometryCollection", "geometries") as old,
    ):
        for rows, rings in cells.parts(cells.map_of(MICRONS)):
            here = np.flatnonzero(used[rows])
            _, coordinates = coordinates_json(simple_rings(rings.take(here)))
            polygon = joined('"type":"Polygon","coordinates":', coordinates)
            name = names.take(arrow_array(rows[here]))
            head = joined('{"type":"Feature","id":"', name, '","geometry":{', polygon)
            now.write(joined(head, '},"properties":{"cell":"', name, '"}}'))
            old.write(joined("{", polygon, ',"cell":', texts(cells.numbers[rows[here]]), "}"))


def _write_names(cells: SlideCells, names: pa.Array, used: NDArray[np.bool_], path: Path) -> None:
    from pyarrow import csv

    table = pa.table({"cell": names, "cell_id": cells.ids, "imported": arrow_array(used)})
    csv.write_csv(table, str(path), write_options=csv.WriteOptions(quoting_style="needed"))
