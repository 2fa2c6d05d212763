"""Tables of transcripts (CSV, CSV.GZ, Parquet) as a stream of checked batches."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.transforms import Affine, apply
from cellquilt.readers.tiff import sniff, unique_names

BATCH_ROWS = 1_000_000
_BLOCK_BYTES = 16 << 20
_SAMPLE_BYTES = 4 << 20

ALIASES = {
    "x": ("global_x", "x_location", "x_global", "x_um", "x", "x_micron", "x_global_px"),
    "y": ("global_y", "y_location", "y_global", "y_um", "y", "y_micron", "y_global_px"),
    "z": ("z_location", "z_um", "z", "z_micron"),
    "z_plane": ("global_z", "z_plane", "z_index"),
    "gene": ("gene", "feature_name", "target", "gene_name", "target_name", "genes", "feature", "geneid"),
    "qv": ("qv",),
}
#: Columns of ours (the last three are added by later stages): a vendor's of that name is kept as ``vendor_<name>``.
OURS = ("x", "y", "z", "z_plane", "gene", "transcript_id", "is_control", "passes_qv", "cell_id", "in_nucleus", "index")

# Names of controls, whole: the vendors number them, so that no gene (NANOG, NEGR1, BLANKET) can match.
_CONTROLS = re.compile(
    r"""(?:
    [Bb]lank-\d+ | BLANK_\d+                                       # MERSCOPE, Xenium
  | NegControlProbe_\d+(?:_\d+)? | NegControlCodeword_\d+ | antisense_\w+
  | UnassignedCodeword_\d+ | DeprecatedCodeword_\d+ | Intergenic_Region_\d+
  | NegPrb\d+ | Negative\d+ | SystemControl\d+ | FalseCode\d+     # CosMx, Molecular Cartography
    )""",
    re.VERBOSE,
)


def is_control_name(name: str) -> bool:
    """Whether a name is, as a whole, one that a machine gives to its controls.

    Examples
    --------
    >>> [is_control_name(name) for name in ("Blank-12", "Blank", "NEGR1", "NegControlProbe_00042")]
    [True, False, False, True]
    """
    return _CONTROLS.fullmatch(name) is not None


@dataclass(frozen=True)
class Columns:
    """Names in the file of the columns that mean something; None for those there are not."""

    x: str
    y: str
    gene: str
    z: str | None = None
    z_plane: str | None = None
    qv: str | None = None


class TranscriptTable:
    """A table on disk.

    Parameters
    ----------
    path
        The file; what it is, is seen from its first bytes.
    name
        What to call it in messages.
    x, y, z, gene
        Names of the columns, where they are not among those known (`ALIASES`).
    z_is_plane
        Whether the column given as `z` counts planes.
    header
        Names of the columns of a CSV without a header; columns beyond them are called ``vendor_column_<n>``.

    Attributes
    ----------
    names
        All columns of the file.
    columns
        Those that mean something.

    Raises
    ------
    CellquiltError
        ``transcripts-empty-file``, ``transcripts-unreadable``, ``transcripts-column-missing``,
        ``transcripts-column-duplicate``.
    """

    def __init__(
        self,
        path: Path,
        name: str | None = None,
        *,
        x: str | None = None,
        y: str | None = None,
        z: str | None = None,
        gene: str | None = None,
        z_is_plane: bool = False,
        header: Sequence[str] = (),
    ) -> None:
        self.path, self.name = Path(path), name or Path(path).name
        self._header = list(header)
        self._kind = sniff(self.path)
        if self._kind == "empty":
            raise CellquiltError(
                "transcripts-empty-file", f"{self.name} is an empty file", "even no rows need a header"
            )
        if self._kind not in ("unknown", "gzip", "Parquet"):
            raise self._unreadable(f"it is a {self._kind} file")
        self._delimiter = ","
        self.names = self._parquet_names() if self._kind == "Parquet" else self._csv_names()
        double = sorted({entry for entry in self.names if self.names.count(entry) > 1})
        if double:
            raise CellquiltError(
                "transcripts-column-duplicate", f'{self.name} has the column "{double[0]}" more than once', "rename one"
            )
        plane = z if z_is_plane else None
        self.columns = Columns(
            x=self._find("x", x),
            y=self._find("y", y),
            gene=self._find("gene", gene),
            z=None if z_is_plane else self._find_optional("z", z),
            z_plane=self._find_optional("z_plane", plane),
            qv=self._find_optional("qv", None),
        )

    # --- columns

    def _missing(self, wanted: str, kind: str) -> CellquiltError:
        setting = f"{kind.split('_')[0]}_column"
        hint = did_you_mean(wanted, self.names)
        if not hint.startswith("known"):
            hint += f" It has: {', '.join(self.names)}."
        return CellquiltError(
            "transcripts-column-missing",
            f'{self.name} has no column "{wanted}" for {kind}; columns: {", ".join(self.names)}',
            f"{hint} Name the right one with {setting}.",
        )

    def _find(self, kind: str, given: str | None) -> str:
        found = self._find_optional(kind, given)
        if found is None:
            raise self._missing(kind, kind)
        return found

    def _find_optional(self, kind: str, given: str | None) -> str | None:
        if given is not None:
            if given not in self.names:
                raise self._missing(given, kind)
            return given
        lower = {entry.lower(): entry for entry in reversed(self.names)}
        for alias in ALIASES[kind]:
            if alias in self.names:
                return alias
            if alias in lower:
                return lower[alias]
        return None

    # --- files

    def _unreadable(self, why: object) -> CellquiltError:
        return CellquiltError(
            "transcripts-unreadable",
            f"{self.name} cannot be read as a table of transcripts: {why}",
            "give CSV, gzipped CSV or Parquet",
        )

    def _parquet_names(self) -> list[str]:
        import pyarrow.parquet as pq

        try:
            names = pq.read_schema(self.path).names
        except (pa.ArrowInvalid, OSError) as error:
            raise self._unreadable(error) from error
        return [entry for entry in names if not entry.startswith("__index_level_")]

    def _stream(self) -> Any:
        return pa.input_stream(str(self.path), compression="gzip" if self._kind == "gzip" else None)

    def _csv_names(self) -> list[str]:
        import csv

        try:
            with self._stream() as stream:
                head = stream.read(1 << 16)
            line = head.split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")
        except (UnicodeDecodeError, OSError, pa.ArrowInvalid) as error:
            raise self._unreadable(error) from error
        if not head:
            raise CellquiltError("transcripts-empty-file", f"{self.name} is empty", "even no rows need a header")
        if b"\x00" in head:
            raise self._unreadable("it is not text")
        self._delimiter = max(",\t;", key=line.count)
        try:
            names = next(csv.reader([line], delimiter=self._delimiter))
        except csv.Error as error:
            raise self._unreadable(error) from error
        if self._header:
            return self._header + [f"vendor_column_{n + 1}" for n in range(len(self._header), len(names))]
        return [entry or "vendor_row" for entry in names]  # a pandas index has no name

    def about_rows(self) -> int:
        """How many transcripts there are, by a Parquet file's footer, or by the file's size and its first rows."""
        if self._kind == "Parquet":
            import pyarrow.parquet as pq

            try:
                return int(pq.read_metadata(self.path).num_rows)
            except (pa.ArrowInvalid, OSError) as error:
                raise self._unreadable(error) from error
        with self.path.open("rb") as file:
            head = file.read(_SAMPLE_BYTES)
        text = head
        if self._kind == "gzip":
            import zlib

            try:
                text = zlib.decompressobj(wbits=31).decompress(head)
            except zlib.error as error:
                raise self._unreadable(error) from error
        lines = max(text.count(b"\n"), 1)
        return max(round(lines * self.path.stat().st_size / max(len(head), 1)) - 1, 0)

    def _csv_batches(self) -> Iterator[pa.RecordBatch]:
        from pyarrow import csv

        types: dict[str, pa.DataType] = dict.fromkeys(self._numbers(), pa.float64())
        types[self.columns.gene] = pa.string()
        read = csv.ReadOptions(
            column_names=self.names, skip_rows=0 if self._header else 1, block_size=_BLOCK_BYTES, use_threads=False
        )
        parse = csv.ParseOptions(delimiter=self._delimiter)
        # "nan" must not become a null that looks like an empty field; both are refused below by row.
        convert = csv.ConvertOptions(column_types=types, null_values=["", "NA", "N/A", "null", "NULL"])
        row = 0
        try:
            with self._stream() as stream:
                reader = csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert)
                # A column that is empty in the first block only would get no type; text holds whatever comes later.
                empty = {field.name: pa.string() for field in reader.schema if pa.types.is_null(field.type)}
            if empty:
                convert.column_types = {**types, **empty}
            with self._stream() as stream:
                for batch in csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert):
                    row += batch.num_rows
                    yield batch
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):
                return
            raise self._bad_row(error, row) from error
        except (OSError, EOFError) as error:
            raise self._unreadable(error) from error

    def _bad_row(self, error: Exception, read: int) -> CellquiltError:
        text = str(error)
        column = re.search(r"In CSV column #(\d+)", text)
        value = re.search(r"invalid value '(.*?)'", text)
        line = re.search(r"[Rr]ow #(\d+)", text)
        # Arrow counts lines from 1 with the header; within the file if it reads in one thread.
        where = f"line {line.group(1)}" if line else f"after row {read}"
        if column and value:
            name = self.names[int(column.group(1))]
            return CellquiltError(
                "transcripts-value",
                f'{self.name}, {where}: column "{name}" has "{value.group(1)}", where the other rows have numbers',
                "correct the value",
            )
        return CellquiltError(
            "transcripts-bad-row", f"{self.name}, {where}: {text.partition(': ')[2] or text}", "correct the row"
        )

    def _parquet_batches(self) -> Iterator[pa.RecordBatch]:
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                yield from file.iter_batches(batch_size=BATCH_ROWS, columns=self.names)
        except (pa.ArrowInvalid, OSError) as error:
            raise self._unreadable(error) from error

    def _numbers(self) -> list[str]:
        chosen = (self.columns.x, self.columns.y, self.columns.z, self.columns.z_plane, self.columns.qv)
        return [name for name in chosen if name is not None]

    # --- batches

    def batches(
        self, *, to_um: Affine | None = None, z_step_um: float = 1.0, min_qv: float = 0.0
    ) -> Iterator[pa.Table]:
        """The table with our columns first and the vendor's own behind; at least one batch, maybe of no rows.

        Parameters
        ----------
        to_um
            (3, 3) map from the file's x, y to µm; None if they are µm.
        z_step_um
            Distance of planes, where the file counts planes.
        min_qv
            Rows below do not pass, where there is a column ``qv``.

        Yields
        ------
        pyarrow.Table
            x, y, z (float64, µm), z_plane (int32), gene (dictionary), transcript_id (uint64), is_control, passes_qv
            (bool), and every other column of the file. z and z_plane only where the file knows.

        Raises
        ------
        CellquiltError
            ``transcripts-nan``, ``transcripts-value``, ``transcripts-bad-row``, ``transcripts-gene-missing``,
            ``transcripts-z-plane``, ``transcripts-unreadable``; all name file, column and row.
        """
        start = 0
        source = self._parquet_batches() if self._kind == "Parquet" else self._csv_batches()
        for batch in source:
            yield self._translate(pa.Table.from_batches([batch]), start, to_um, z_step_um, min_qv)
            start += batch.num_rows
        if start == 0:
            yield self._translate(self._no_rows(), 0, to_um, z_step_um, min_qv)

    def _no_rows(self) -> pa.Table:
        if self._kind == "Parquet":
            import pyarrow.parquet as pq

            return pq.read_schema(self.path).empty_table().select(self.names)
        numbers = self._numbers()
        return pa.table({name: pa.array([], pa.float64() if name in numbers else pa.string()) for name in self.names})

    def _row(self, index: int) -> str:
        return f"{index + 1}" if self._header else f"{index + 1} below the header"

    def _floats(self, table: pa.Table, name: str, start: int) -> np.ndarray:
        column = table.column(name)
        try:
            values = column.cast(pa.float64()).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise CellquiltError(
                "transcripts-value", f'{self.name}: column "{name}" has no numbers: {error}', "name another column"
            ) from error
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            shown = column[int(bad[0])].as_py()
            raise CellquiltError(
                "transcripts-nan",
                f'{self.name}, row {self._row(start + int(bad[0]))}: column "{name}" is '
                f"{'empty' if shown is None else shown}",
                "every transcript needs coordinates; correct or remove the row",
            )
        return values

    def _translate(
        self, table: pa.Table, start: int, to_um: Affine | None, z_step_um: float, min_qv: float
    ) -> pa.Table:
        columns, n = self.columns, table.num_rows
        x, y = self._floats(table, columns.x, start), self._floats(table, columns.y, start)
        if to_um is not None:
            x, y = np.ascontiguousarray(apply(to_um, np.column_stack([x, y])).T)
        ours: dict[str, Any] = {"x": x, "y": y}
        if columns.z is not None:
            ours["z"] = self._floats(table, columns.z, start)
        if columns.z_plane is not None:
            planes = self._floats(table, columns.z_plane, start)
            odd = np.flatnonzero(planes != np.rint(planes))
            if len(odd):
                raise CellquiltError(
                    "transcripts-z-plane",
                    f'{self.name}, row {self._row(start + int(odd[0]))}: column "{columns.z_plane}" is '
                    f"{planes[odd[0]]}, where plane indices are expected",
                    "if the column is in µm, name it with z_column",
                )
            ours.setdefault("z", planes * z_step_um)
            ours["z_plane"] = planes.astype(np.int32)
        genes = self._genes(table, start)
        names = genes.dictionary.to_pylist()
        control = np.fromiter(map(is_control_name, names), dtype=bool, count=len(names))
        codes = genes.indices.to_numpy(zero_copy_only=False)
        ours["gene"] = genes
        ours["transcript_id"] = np.arange(start, start + n, dtype=np.uint64)
        ours["is_control"] = control[codes] if n else np.zeros(0, dtype=bool)
        ours["passes_qv"] = (
            np.ones(n, dtype=bool) if columns.qv is None else self._floats(table, columns.qv, start) >= min_qv
        )
        used = [columns.x, columns.y, columns.z, columns.z_plane, columns.gene]
        rest = [name for name in self.names if name not in used]
        renamed = [f"vendor_{name}" if name in OURS else name for name in rest]
        final = unique_names([*ours, *renamed])[len(ours) :]
        arrays = {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in ours.items()}
        for name, kept in zip(rest, final, strict=True):
            column = table.column(name)
            # A column of Parquet that is empty throughout has no type of its own.
            arrays[kept] = column.cast(pa.string()) if pa.types.is_null(column.type) else column
        return pa.table(arrays)

    def _genes(self, table: pa.Table, start: int) -> pa.DictionaryArray:
        column = table.column(self.columns.gene)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        try:
            column = column.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise CellquiltError(
                "transcripts-value",
                f'{self.name}: column "{self.columns.gene}" has no names of genes but {column.type}',
                "name another column with gene_column",
            ) from error
        missing = pc.or_(pc.is_null(column), pc.equal(pc.fill_null(column, ""), ""))
        first = pc.index(missing, True).as_py()
        if first >= 0:
            raise CellquiltError(
                "transcripts-gene-missing",
                f'{self.name}, row {self._row(start + first)}: column "{self.columns.gene}" is empty',
                "every transcript needs a gene; correct or remove the row",
            )
        encoded = column.combine_chunks().dictionary_encode()
        return encoded.cast(pa.dictionary(pa.int32(), pa.string()))
