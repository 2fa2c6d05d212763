"""The layout of Xenium bundles and Xenium Explorer folders: what the reader, the simulator and the writer share."""

import numpy as np
from numpy.typing import NDArray

EXPERIMENT = "experiment.xenium"
IMAGE = "morphology.ome.tif"
CELLS, TRANSCRIPTS = "cells.zarr.zip", "transcripts.zarr.zip"
MATRIX, ANALYSIS = "cell_feature_matrix.zarr.zip", "analysis.zarr.zip"
#: The name of "no cell" in the machine's tables.
UNASSIGNED = "UNASSIGNED"
#: Quality value from which the machine's own tables count.
MIN_QV = 20.0
#: Columns of `cell_summary`; the last one since version 2 of the machine's software.
SUMMARY = (
    *("cell_centroid_x", "cell_centroid_y", "cell_area"),
    *("nucleus_centroid_x", "nucleus_centroid_y", "nucleus_area", "z_level", "nucleus_count"),
)


def xenium_ids(numbers: NDArray[np.integer], suffix: int = 1) -> NDArray[np.str_]:
    """Names of cells as the machine writes them: eight letters for the number in base 16, a dash, the data set.

    Examples
    --------
    >>> xenium_ids(np.array([0, 22]))
    array(['aaaaaaaa-1', 'aaaaaabg-1'], dtype='<U10')
    """
    shifts = np.arange(28, -1, -4, dtype=np.uint32)
    letters = (np.asarray(numbers).astype(np.uint32)[:, None] >> shifts & 15).astype(np.uint8) + ord("a")
    return np.char.add(letters.view("S8").ravel().astype("U8"), f"-{suffix}")


def xenium_numbers(ids: NDArray[np.str_]) -> NDArray[np.int64]:
    """(n,) the numbers that names of cells stand for, whatever their data set; -1 for what is no such name.

    Examples
    --------
    >>> xenium_numbers(np.array(["aaaaaaaa-1", "aaaaaabg-1", "cell 7"])).tolist()
    [0, 22, -1]
    """
    ids = np.asarray(ids, dtype=str)
    out = np.full(ids.size, -1, dtype=np.int64)
    text = np.char.encode(ids, "ascii", "replace") if ids.size else np.zeros(0, "S1")
    size = np.char.str_len(text)
    octets = np.zeros((ids.size, max(text.dtype.itemsize, 10)), np.uint8)
    octets[:, : text.dtype.itemsize] = text.view(np.uint8).reshape(ids.size, -1)
    digits = octets[:, :8].astype(np.int64) - ord("a")
    named = ((digits >= 0) & (digits < 16)).all(axis=1)
    tail = (octets[:, 8] == ord("-")) & (size >= 10) & (size <= 12)
    named &= (size == 8) | tail
    out[named] = (digits[named] << np.arange(28, -1, -4)).sum(axis=1)
    return out
