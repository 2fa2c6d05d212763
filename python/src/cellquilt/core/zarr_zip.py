"""Zipped Zarr stores of format 2, as Xenium bundles have them: written in one pass, and read again."""

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ZLIB: dict[str, Any] = {"id": "zlib", "level": 1}
_BLOSC: dict[str, Any] = {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 1, "blocksize": 0}


class ZarrZip:
    """A store to write. Entries are stored as they are, and without times: the same content, the same bytes.

    Parameters
    ----------
    path
        File to write.
    compressor
        Of the chunks: ``zlib`` or ``blosc``.
    """

    def __init__(self, path: Path, compressor: str = "zlib") -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._compressor = {"zlib": _ZLIB, "blosc": _BLOSC}[compressor]

    def __enter__(self) -> "ZarrZip":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def _put(self, name: str, content: bytes | Mapping[str, Any]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
        self._zip.writestr(zipfile.ZipInfo(name.lstrip("/"), (1980, 1, 1, 0, 0, 0)), data)

    def group(self, path: str, attributes: Mapping[str, Any] | None = None) -> None:
        """Add a group."""
        self._put(f"{path}/.zgroup", {"zarr_format": 2})
        if attributes is not None:
            self._put(f"{path}/.zattrs", attributes)

    def header(
        self,
        path: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Add what is said of an array; before its chunks or after them."""
        self._put(
            f"{path}/.zarray",
            {
                "zarr_format": 2,
                "shape": shape,
                "chunks": [max(size, 1) for size in chunks],
                "dtype": dtype.str,
                "order": "C",
                "fill_value": 0,
                "filters": None,
                "compressor": self._compressor,
            },
        )
        if attributes is not None:
            self._put(f"{path}/.zattrs", attributes)

    def chunk(self, path: str, place: tuple[int, ...], values: NDArray) -> None:
        """Add one whole chunk of an array."""
        data = np.ascontiguousarray(values)
        if self._compressor is _BLOSC:
            from numcodecs import blosc

            blosc.use_threads = False
            packed = blosc.compress(data, b"zstd", _BLOSC["clevel"], _BLOSC["shuffle"], 0)
        else:
            packed = zlib.compress(data.tobytes(), _ZLIB["level"])
        self._put(f"{path}/{'.'.join(map(str, place))}", packed)

    def array(self, path: str, values: NDArray, attributes: Mapping[str, Any] | None = None) -> None:
        """Add a small array, in one chunk."""
        self.header(path, values.shape, values.shape, values.dtype, attributes)
        if values.size:
            self.chunk(path, (0,) * values.ndim, values)


class Column:
    """An array of one dimension that is written some values at a time, in chunks of `size`."""

    def __init__(self, store: ZarrZip, path: str, dtype: np.typing.DTypeLike, size: int = 1 << 20) -> None:
        self._store, self._path, self._dtype, self._size = store, path, np.dtype(dtype), size
        self._rest = np.zeros(0, self._dtype)
        self._chunk = 0

    def write(self, values: NDArray) -> None:
        """Append values."""
        rest = np.concatenate([self._rest, np.asarray(values, dtype=self._dtype)])
        whole = len(rest) // self._size * self._size
        for start in range(0, whole, self._size):
            self._put(rest[start : start + self._size])
        self._rest = rest[whole:].copy()

    def _put(self, values: NDArray) -> None:
        self._store.chunk(self._path, (self._chunk,), values)
        self._chunk += 1

    def close(self) -> int:
        """Write what is left, and the header; the number of values."""
        n = self._chunk * self._size + len(self._rest)
        size = self._size if self._chunk else n
        if len(self._rest):
            last = np.zeros(size, self._dtype)
            last[: len(self._rest)] = self._rest
            self._put(last)
        self._store.header(self._path, (n,), (size,), self._dtype)
        return n
