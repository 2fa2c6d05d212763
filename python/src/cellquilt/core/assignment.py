"""The cell of every transcript, kept inside the cells' own shapes element.

A transcript-based method says itself which transcripts are a cell's; its outlines only follow. What it says lies in
the folder of the shapes element, as a file that SpatialData does not look at, so that it comes and goes with the cells:
a row for every transcript of the slide, in the order of the points. Expected counts, where a method has them, lie
beside it in long form.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.parquet import RISING, ParquetWriter, arrow_array, encoding_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_BATCH_ROWS = 1 << 18
ASSIGNMENT, EXPECTED = "assignment.parquet", "expected.parquet"
#: In no cell; and: not segmented (a control, of low quality), so that only the outlines tell.
NO_CELL, NOT_SEGMENTED = -1, -2
_SCHEMA = pa.schema([("transcript_id", pa.uint64()), ("cell", pa.int32())])
#: Columns of expected counts: row of the cell, gene, value; only what is not 0.
EXPECTED_SCHEMA = pa.schema(
    [("cell", pa.int32()), ("gene", pa.dictionary(pa.int32(), pa.string())), ("value", pa.float32())]
)


def has_assignment(element: Path) -> bool:
    """Whether a shapes element says which transcripts are in its cells."""
    return (element / ASSIGNMENT).is_file()


class AssignmentWriter:
    """Write the cells of all transcripts, batch by batch in the order of the points."""

    def __init__(self, path: Path) -> None:
        encoding = encoding_of(_SCHEMA, {"transcript_id": RISING, "cell": RISING})
        self._writer = ParquetWriter(path, _SCHEMA, compression="zstd", **encoding)

    def write(self, transcript_id: NDArray[np.uint64], cell: NDArray[np.integer]) -> None:
        """Append a batch: row of each transcript's cell, `NO_CELL` or `NOT_SEGMENTED`."""
        columns = [arrow_array(transcript_id), arrow_array(np.asarray(cell, dtype=np.int32))]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA))

    def __enter__(self) -> "AssignmentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._writer.close()
        else:
            self._writer.abandon()


class Assignment:
    """Read the cells of transcripts, in step with the points.

    Parameters
    ----------
    element
        The shapes element.
    rows
        (n_cells,) int64 new row of each cell, -1 for cells that are gone. Default: as they are.
    """

    def __init__(self, element: Path, rows: NDArray[np.int64] | None = None) -> None:
        self._path = element / ASSIGNMENT
        self._rows = rows
        self._batches = self.batches()
        self._held: tuple[NDArray[np.uint64], NDArray[np.integer]]
        self._held = (np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64))

    def batches(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.integer]]]:
        """All of it: ids of transcripts and their cells, as `next` gives them."""
        try:
            with pq.ParquetFile(self._path) as file:
                for batch in file.iter_batches(_BATCH_ROWS):
                    ids, cell = (batch.column(name).to_numpy() for name in _SCHEMA.names)
                    if self._rows is not None:
                        inside = cell >= 0
                        cell = cell.astype(np.int64)
                        cell[inside] = self._rows[cell[inside]]
                    yield ids, cell
        except (OSError, KeyError, pa.ArrowException) as error:
            raise CellquiltError(
                "assignment-unreadable", f"{self._path} cannot be read: {error}", "resolve the cells again"
            ) from error

    def next(self, transcript_id: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The cells of the next transcripts: (n,) int64 row, `NO_CELL` or `NOT_SEGMENTED`.

        Raises
        ------
        CellquiltError
            ``assignment-mismatch`` if these are not the transcripts that come next.
        """
        out = np.empty(len(transcript_id), dtype=np.int64)
        done = 0
        while done < len(out):
            if not len(self._held[0]):
                part = next(self._batches, None)
                if part is None:
                    raise self._mismatch()
                self._held = part
            ids, cells = self._held
            n = min(len(ids), len(out) - done)
            if not np.array_equal(ids[:n], transcript_id[done : done + n]):
                raise self._mismatch()
            out[done : done + n] = cells[:n]
            self._held, done = (ids[n:], cells[n:]), done + n
        return out

    def finish(self) -> None:
        """Make sure that there are no further transcripts.

        Raises
        ------
        CellquiltError
            ``assignment-mismatch`` if there are.
        """
        if len(self._held[0]) or next(self._batches, None) is not None:
            raise self._mismatch()

    def _mismatch(self) -> CellquiltError:
        return CellquiltError(
            "assignment-mismatch",
            f"{self._path} is about other transcripts than the slide's, or in another order",
            "resolve the cells again, from this slide",
        )


def expected_counts(
    element: Path, genes: list[str], n_cells: int, rows: NDArray[np.int64] | None = None
) -> "csr_matrix | None":
    """Expected counts of cells.

    Parameters
    ----------
    element
        The shapes element.
    genes
        Names of the columns, sorted.
    n_cells
        Rows of the matrix.
    rows
        (n_cells there,) int64 new row of each cell, -1 for cells that are gone. Default: as they are.

    Returns
    -------
    scipy.sparse.csr_matrix or None
        (n_cells, n_genes) float32 with sorted indices; None where the method has none.

    Raises
    ------
    CellquiltError
        ``assignment-unreadable``; ``assignment-mismatch`` if a gene is none of the slide's.
    """
    from scipy.sparse import csr_matrix

    if not (element / EXPECTED).is_file():
        return None
    empty = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    parts = [empty]
    for table in _expected(element, rows):
        gene = table.column("gene").combine_chunks()
        names = np.array(gene.dictionary.to_pylist(), dtype=object)
        unknown = sorted(set(names.tolist()) - set(genes))
        if unknown:
            raise CellquiltError(
                "assignment-mismatch",
                f"{element / EXPECTED} has expected counts of {unknown[0]}, which is no gene of the slide",
                "resolve the cells again, from this slide",
            )
        column = np.searchsorted(np.array(genes, dtype=object), names).astype(np.int32)
        parts.append(
            (table.column("cell").to_numpy(), column[gene.indices.to_numpy()], table.column("value").to_numpy())
        )
    cell, column, value = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    matrix = csr_matrix((value, (cell, column)), shape=(n_cells, len(genes)), dtype=np.float32)
    matrix.sort_indices()
    return matrix


def _expected(element: Path, rows: NDArray[np.int64] | None) -> Iterator[pa.Table]:
    """Expected counts, batch by batch, of the cells that are left."""
    path = element / EXPECTED
    try:
        with pq.ParquetFile(path, read_dictionary=["gene"]) as file:
            for batch in file.iter_batches():
                table = pa.Table.from_batches([batch]).cast(EXPECTED_SCHEMA)
                if rows is not None:
                    cell = rows[table.column("cell").to_numpy()]
                    table = table.set_column(0, "cell", arrow_array(cell.astype(np.int32))).filter(pa.array(cell >= 0))
                yield table
    except (OSError, KeyError, pa.ArrowException) as error:
        raise CellquiltError(
            "assignment-unreadable", f"{path} cannot be read: {error}", "resolve the cells again"
        ) from error


def copy_assignment(source: Path, target: Path, rows: NDArray[np.int64]) -> None:
    """Tell a shapes element with some of the cells of another what that one says of them; `rows` as in `Assignment`."""
    with AssignmentWriter(target / ASSIGNMENT) as writer:
        for ids, cell in Assignment(source, rows).batches():
            writer.write(ids, cell)
    if (source / EXPECTED).is_file():
        with ParquetWriter(target / EXPECTED, EXPECTED_SCHEMA, compression="zstd") as parquet:
            for table in _expected(source, rows):
                parquet.write_table(table)
