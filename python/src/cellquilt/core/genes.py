"""Names of genes as they come, batch by batch."""

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError


class GeneNames:
    """Gene names in order of appearance, and which of them occur as something else than a control."""

    def __init__(self) -> None:
        self._code: dict[str, int] = {}
        self._seen = np.zeros(0, dtype=bool)

    def encode(self, column: pa.ChunkedArray, is_control: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(n,) int64 code of each row's gene; -1 for a control without a name.

        Raises
        ------
        CellquiltError
            ``gene-missing`` if a row that is no control has no gene.
        """
        column = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        array = column.combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # what older pyarrow makes of a table without rows
            array = array.chunk(0) if array.num_chunks else pa.array([], pa.string()).dictionary_encode()
        names = array.dictionary.to_pylist()
        # A null may hide in the dictionary as well as in the indices.
        local = [-1 if name is None else self._code.setdefault(name, len(self._code)) for name in names]
        indices = array.indices
        if indices.null_count:
            indices = indices.fill_null(len(names))
        codes = np.array([*local, -1], dtype=np.int64)[indices.to_numpy(zero_copy_only=False)]
        if self._seen.size < len(self._code):
            self._seen = np.append(self._seen, np.zeros(len(self._code) - self._seen.size, dtype=bool))
        n_missing = _mark_seen(codes, is_control, self._seen)
        if n_missing:
            raise CellquiltError(
                "gene-missing",
                f"{n_missing} transcripts have no gene and are no controls",
                "drop them or mark them as controls when converting",
            )
        return codes

    def names(self) -> list[str]:
        """All names, controls' too, by their codes."""
        return list(self._code)

    def sorted_columns(self) -> tuple[list[str], NDArray[np.int32]]:
        """Names that occur as something else than a control, sorted, and the place of each code among them (or -1)."""
        names = sorted(name for name, code in self._code.items() if self._seen[code])
        column = np.full(max(len(self._code), 1), -1, dtype=np.int32)
        for position, name in enumerate(names):
            column[self._code[name]] = position
        return names, column


@numba.njit(cache=True, nogil=True)
def _mark_seen(codes, is_control, seen):
    missing = 0
    for i in range(codes.size):
        if not is_control[i]:
            if codes[i] < 0:
                missing += 1
            else:
                seen[codes[i]] = True
    return missing
