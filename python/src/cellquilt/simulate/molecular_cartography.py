"""Writing a simulated slide as a Molecular Cartography region: a table without a header, and TIFFs of the stains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from cellquilt.simulate.markers import NUCLEI, make_planes
from cellquilt.simulate.slide import Slide, Tile
from cellquilt.simulate.transcripts import Transcripts
from cellquilt.simulate.writer import What, write_tiff

_SLIDE = "32800-1377"
_SCHEMA = pa.schema(
    [("x", pa.float64()), ("y", pa.float64()), ("z", pa.int32()), ("gene", pa.string()), ("end", pa.string())]
)


def write_molecular_cartography(
    slide: Slide, folder: Path, name: str, what: What, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a slide as ``<id>_results.txt`` and ``<id>_DAPI.tiff``, with ``truth/`` beside them.

    Positions are in pixels, with their fractions, so that what lies in a cell is the same as in the truth; each line
    ends with a tab, as the machine's.

    Returns
    -------
    dict
        The slide's `simulation.json`.
    """
    region = f"A{slide.number + 1}-1"
    folder.mkdir(parents=True)
    part = folder / f"{_SLIDE}_{region}"
    genes, pixel = pa.array(slide.expression.genes), slide.parameters.pixel_size_um
    options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with pyarrow.csv.CSVWriter(f"{part}_results.txt", _SCHEMA, write_options=options) as writer:

        def rows(tile: Tile, transcripts: Transcripts) -> None:
            x, y = np.ascontiguousarray(transcripts.xy.T) / pixel
            names = pa.DictionaryArray.from_arrays(pa.array(transcripts.gene, pa.int32()), genes).cast(pa.string())
            end = pa.nulls(len(transcripts), pa.string())
            columns = [pa.array(x), pa.array(y), pa.array(transcripts.plane, pa.int32()), names, end]
            writer.write_table(pa.table(columns, schema=_SCHEMA))

        planes = make_planes(slide, folder, name, what, [NUCLEI], on_tile=rows)
    write_tiff(Path(f"{part}_{NUCLEI}.tiff"), planes.spools, compression=what.compression)
    return planes.truth.close({**more, "region": region})
