"""Parquet files on a disk that may get full."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

#: Encodings of Parquet for numbers that rise by little, and for coordinates. Machines round these to some decimals,
#: which zstd finds again in whole numbers of eight bytes only: 3.3 to 4.7 bytes each, 6.1 with their bytes split up.
RISING, SCATTERED = "DELTA_BINARY_PACKED", "PLAIN"


class ParquetWriter(pq.ParquetWriter):
    """pyarrow's writer, which after an error would fail once more, with a traceback, when it is thrown away."""

    def abandon(self) -> None:
        """Close the file after an error, as far as that still can be."""
        with suppress(OSError, pa.ArrowException):
            self.close()
        self.is_open = False

    def __del__(self) -> None:
        if getattr(self, "is_open", False):
            self.abandon()


def encoding_of(schema: pa.Schema, by_name: Mapping[str, str]) -> dict[str, Any]:
    """Options of a `ParquetWriter` for columns that a dictionary does not suit.

    Parquet tries one for every column. For coordinates and numbers of rows, which hardly ever repeat, looking for
    repetitions takes longer than writing them.

    Parameters
    ----------
    schema
        The columns. Those that are no numbers are left alone.
    by_name
        Column → Parquet's name of an encoding.
    """
    numeric = {field.name for field in schema if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)}
    own = {name: encoding for name, encoding in by_name.items() if name in numeric}
    return {"use_dictionary": [name for name in schema.names if name not in own], "column_encoding": own}


def arrow_array(values: np.ndarray) -> pa.Array:
    """A NumPy array as an Arrow one, without pandas where it holds numbers, bools or bytes.

    ``pyarrow.array`` asks whether what it gets is of pandas, and imports pandas to know: half a second of a task of
    which many thousand are started.

    Parameters
    ----------
    values
        (n,) numbers or bools (shared, not copied, where contiguous), bytes objects, or strings.
    """
    values = np.ascontiguousarray(values)
    if values.dtype.kind == "b":
        bits = np.packbits(values, bitorder="little")
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])
    if values.dtype.kind in "iuf":
        kind = pa.from_numpy_dtype(values.dtype)
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
    if len(values) and isinstance(values[0], bytes):
        joined = b"".join(values)
        ends = np.cumsum(np.fromiter(map(len, values), np.int64, len(values)))
        if len(joined) < 2**31:
            offsets = np.concatenate([[0], ends]).astype(np.int32)
            return pa.Array.from_buffers(pa.binary(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(joined)])
    return pa.array(values.tolist(), pa.string() if values.dtype.kind == "U" else None)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write one table, compressed with zstd."""
    writer = ParquetWriter(path, table.schema, compression="zstd")
    try:
        writer.write_table(table)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
