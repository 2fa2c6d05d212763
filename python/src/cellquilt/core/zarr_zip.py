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
_BLOSC: dict[str, Any] = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}


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
            packed = blosc.compress(data, b"lz4", _BLOSC["clevel"], _BLOSC["shuffle"], 0)
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


class ZarrZipFile:
    """A store to read: without the machinery that zarr has for others, which takes a millisecond for each array.

    Parameters
    ----------
    path
        The file; of format 2.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._names = set(self._zip.namelist())

    def __enter__(self) -> "ZarrZipFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def attributes(self, path: str = "") -> dict[str, Any]:
        """Of a group or an array."""
        name = f"{path}/.zattrs".lstrip("/")
        return json.loads(self._zip.read(name)) if name in self._names else {}

    def header(self, path: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of an array.

        Raises
        ------
        KeyError
            If there is none.
        """
        about = json.loads(self._zip.read(f"{path}/.zarray"))
        return tuple(about["shape"]), np.dtype(about["dtype"])

    def array(self, path: str) -> NDArray:
        """A whole array."""
        import numcodecs

        about = json.loads(self._zip.read(f"{path}/.zarray"))
        shape, chunks, dtype = tuple(about["shape"]), about["chunks"], np.dtype(about["dtype"])
        codec = numcodecs.get_codec(about["compressor"]) if about["compressor"] else None
        out = np.full(shape, about["fill_value"], dtype)
        separator = about.get("dimension_separator", ".")
        for place in np.ndindex(*(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))):
            name = f"{path}/{separator.join(map(str, place))}"
            if name not in self._names:
                continue
            data = self._zip.read(name)
            values = np.frombuffer(codec.decode(data) if codec is not None else data, dtype).reshape(chunks)
            sides = zip(place, chunks, shape, strict=True)
            window = tuple(slice(k * chunk, min((k + 1) * chunk, size)) for k, chunk, size in sides)
            out[window] = values[tuple(slice(part.stop - part.start) for part in window)]
        return out
