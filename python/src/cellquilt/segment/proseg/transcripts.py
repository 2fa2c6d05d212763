"""What proseg is given: a patch's transcripts, looked at and then written as a table of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv

from cellquilt.core.errors import CellquiltError
from cellquilt.core.parquet import arrow_array
from cellquilt.patches.transcripts import TranscriptBundle
from cellquilt.segment.proseg.command import COLUMNS, INPUT, NUCLEAR, OTHER

_BATCH_ROWS = 1_000_000
#: More planes than this are as good as a continuous z: proseg knows no more layers.
_MOST_PLANES = 256
#: Side of the squares by which the area under transcripts is measured.
_SQUARE_UM = 10.0
#: Proseg takes a tilt of z out by a regression on as many random transcripts, which fails where they are a handful.
_FEWEST_IN_3D = 100
#: Proseg models so many genes by themselves and, where there are more, the others by factors. For that it looks at
#: 10,000 random squares of 20 µm, and ends with a panic if not two genes have this many transcripts a square, or if
#: hardly any gene is left for the factors.
_MODELLED_BY_THEMSELVES = 200
_FEWEST_FOR_FACTORS = 10
_SQUARES, _SQUARE_AREA_UM2, _FEWEST_IN_A_SQUARE = 10_000, 400.0, 0.05
#: The number is an expected one and the squares are random: keep well away from the edge.
_MARGIN, _FEWEST_SEEN = 2.0, 3


@dataclass(frozen=True)
class Contents:
    """What a patch holds.

    Attributes
    ----------
    n
        Transcripts.
    gene_counts
        (n_genes,) int64 transcripts of each gene that occurs, descending.
    n_planes
        Different z, counted up to 256; 1 where there are so few transcripts that z is left out.
    area_um2
        Area under transcripts, in squares of 10 µm.
    origin
        (2,) float64 µm: whole numbers that are taken off x and y, for proseg counts in 32-bit floats.
    prior_cells
        (k,) int64 numbers of the prior cells that occur.
    prior_boxes
        (k, 4) float64 µm: x0, y0, x1, y1 of their transcripts.
    nuclear
        (m,) bool by number of prior cell: some transcript of it lies in a nucleus.
    """

    n: int
    gene_counts: np.ndarray
    n_planes: int
    area_um2: float
    origin: np.ndarray
    prior_cells: np.ndarray
    prior_boxes: np.ndarray
    nuclear: np.ndarray

    @property
    def n_genes(self) -> int:
        """Genes that occur."""
        return self.gene_counts.size

    @property
    def can_be_factored(self) -> bool:
        """Whether proseg can find factors of gene expression, or else must model all genes by themselves."""
        squares = max(self.area_um2 / _SQUARE_AREA_UM2, _SQUARES)
        seen = self.gene_counts / squares >= _MARGIN * _FEWEST_IN_A_SQUARE
        return self.n_genes >= _MODELLED_BY_THEMSELVES + _FEWEST_FOR_FACTORS and int(seen.sum()) >= _FEWEST_SEEN


def look(bundle: TranscriptBundle, record: Mapping[str, Any]) -> Contents:
    """Look through the transcripts of a patch.

    Raises
    ------
    CellquiltError
        ``transcripts-not-finite`` if a coordinate is no number.
    """
    n_prior = int(bundle.prior["n_cells"])
    nuclear = np.zeros(n_prior + 1, dtype=bool)
    low, high = np.full((2, n_prior + 1), np.inf), np.full((2, n_prior + 1), -np.inf)
    gene_counts = np.zeros(len(bundle.genes), dtype=np.int64)
    planes: np.ndarray = np.empty(0)
    squares: np.ndarray = np.empty(0, np.int64)
    n = 0
    for batch in bundle.batches(record, _BATCH_ROWS):
        xyz = np.stack([batch.column(name).to_numpy() for name in ("x_um", "y_um", "z_um")])
        _refuse_not_finite(batch, xyz, bundle, record)
        prior = batch.column("prior_cell").to_numpy()
        in_nucleus = batch.column("in_nucleus").to_numpy(zero_copy_only=False)
        nuclear[prior[in_nucleus]] = True
        for axis in (0, 1):
            np.minimum.at(low[axis], prior, xyz[axis])
            np.maximum.at(high[axis], prior, xyz[axis])
        gene_counts += np.bincount(batch.column("gene").to_numpy(), minlength=gene_counts.size)
        if planes.size < _MOST_PLANES:
            planes = np.union1d(planes, xyz[2])[:_MOST_PLANES]
        column, row = np.floor(xyz[:2] / _SQUARE_UM).astype(np.int64)
        squares = np.union1d(squares, (row << 32) + column)
        n += batch.num_rows
    found = np.flatnonzero(np.isfinite(low[0]))
    found = found[found > 0]
    nuclear[0] = False
    return Contents(
        n,
        np.sort(gene_counts[gene_counts > 0])[::-1],
        planes.size if n >= _FEWEST_IN_3D else min(planes.size, 1),
        squares.size * _SQUARE_UM**2,
        np.floor([record["x0"], record["y0"]]),
        found,
        np.column_stack([*low[:, found], *high[:, found]]),
        nuclear,
    )


def _refuse_not_finite(
    batch: pa.RecordBatch, xyz: np.ndarray, bundle: TranscriptBundle, record: Mapping[str, Any]
) -> None:
    # Proseg would leave such transcripts out without a word.
    wrong = ~np.isfinite(xyz).all(axis=0)
    if wrong.any():
        which = batch.column("transcript_id")[int(wrong.argmax())].as_py()
        raise CellquiltError(
            "transcripts-not-finite",
            f"{int(wrong.sum())} transcripts have no finite position, the first is transcript_id {which}",
            "make the bundles anew with `cellquilt patchify transcripts`; after --cleanup start without -resume",
        )


def write_table(folder: Path, bundle: TranscriptBundle, record: Mapping[str, Any], contents: Contents) -> None:
    """Write proseg's table of a patch, `INPUT`, to a folder.

    Genes are written as numbers: no name can be mistaken for a control, or break a line. A prior cell without any
    transcript in a nucleus counts as nucleus itself, because proseg starts cells from nuclei only and would lose it.
    """
    schema = pa.schema(
        [(COLUMNS[0], pa.uint64()), *((name, pa.float32()) for name in COLUMNS[1:4]),
         *((name, pa.int32()) for name in COLUMNS[4:6]), (COLUMNS[6], pa.int8())]
    )  # fmt: skip
    anywhere = ~contents.nuclear
    anywhere[0] = False
    flat = contents.n_planes == 1
    with pcsv.CSVWriter(folder / INPUT, schema) as writer:
        for batch in bundle.batches(record, _BATCH_ROWS):
            prior = batch.column("prior_cell").to_numpy()
            in_nucleus = batch.column("in_nucleus").to_numpy(zero_copy_only=False)
            values = [
                batch.column("transcript_id").to_numpy(),
                (batch.column("x_um").to_numpy() - contents.origin[0]).astype(np.float32),
                (batch.column("y_um").to_numpy() - contents.origin[1]).astype(np.float32),
                np.where(flat, 0.0, batch.column("z_um").to_numpy()).astype(np.float32),
                batch.column("gene").to_numpy(),
                prior,
                np.where(in_nucleus | anywhere[prior], NUCLEAR, OTHER).astype(np.int8),
            ]
            writer.write_batch(pa.record_batch([arrow_array(column) for column in values], schema=schema))
