"""Parquet files on a disk that may get full."""

from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


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


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write one table, compressed with zstd."""
    writer = ParquetWriter(path, table.schema, compression="zstd")
    try:
        writer.write_table(table)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
