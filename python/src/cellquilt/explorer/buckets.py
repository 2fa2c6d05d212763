"""Rows that are sorted into a few parts which fit in memory one at a time: in memory if they all do, else on disk."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Buckets:
    """Rows by ranges of a key.

    Parameters
    ----------
    folder
        Where files may lie; they go away as the parts are read.
    name
        Start of their names.
    bounds
        (n,) ascending; part k holds the keys from ``bounds[k]`` to below ``bounds[k + 1]``.
    dtype
        Of the rows.
    """

    def __init__(self, folder: Path, name: str, bounds: NDArray, dtype: np.dtype) -> None:
        self.bounds, self.dtype = bounds, dtype
        self._held: list[NDArray] = []
        self._paths = [folder / f".{name}.{k}.rows" for k in range(len(bounds))]

    def __len__(self) -> int:
        return len(self.bounds)

    def add(self, keys: NDArray, rows: NDArray) -> None:
        """Append rows, each to the part of its key."""
        if len(self) == 1:
            self._held.append(rows)
            return
        part = np.searchsorted(self.bounds, keys, side="right") - 1
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part, minlength=len(self)))
        rows = rows[order]
        start = 0
        for path, end in zip(self._paths, ends.tolist(), strict=True):
            if end > start:
                with path.open("ab") as file:
                    rows[start:end].tofile(file)
            start = end

    def take(self, k: int) -> NDArray:
        """The rows of a part, in the order in which they came; once."""
        if len(self) == 1:
            rows = np.concatenate([np.zeros(0, self.dtype), *self._held])
            self._held.clear()
            return rows
        if not self._paths[k].exists():
            return np.zeros(0, self.dtype)
        rows = np.fromfile(self._paths[k], self.dtype)
        self._paths[k].unlink()
        return rows

    def close(self) -> None:
        """Remove files that nobody has read."""
        for path in self._paths:
            path.unlink(missing_ok=True)


def bounds_of(keys: NDArray, counts: NDArray, most: int) -> NDArray:
    """Where parts begin, so that each has at most `most` rows or one key only.

    Parameters
    ----------
    keys
        (n,) ascending.
    counts
        (n,) rows of each.
    most
        Rows of a part.
    """
    if len(keys) == 0:
        return np.zeros(1, np.asarray(keys).dtype)
    ends = np.cumsum(counts)
    starts, first = [0], 0
    while True:
        done = ends[first - 1] if first else 0
        following = max(int(np.searchsorted(ends, done + most, side="right")), first + 1)
        if following >= len(keys):
            break
        starts.append(following)
        first = following
    bounds = np.asarray(keys)[starts].copy()
    bounds[0] = 0
    return bounds
