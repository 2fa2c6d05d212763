"""A simulated slide as a Visium HD slide has it: its transcripts in square bins, of which the cells are known."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellquilt.core.bins import write_bins
from cellquilt.core.store import new_store
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, apply, scale

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_BATCH_ROWS = 1_000_000
_ROWS = 1 << 18  # bins that are written together


def bin_transcripts(
    slide: Path, output: Path, *, bin_um: float = 2.0, angle_deg: float = 0.0, overwrite: bool = False
) -> Path:
    """Count the transcripts of a simulated slide in bins: the elements ``bins`` and ``bins_grid``.

    Parameters
    ----------
    slide
        The slide's folder, with its ``truth``.
    output
        Delta store to make; `cellquilt.core.store.add_delta` adds it to the store of the slide.
    bin_um
        Width of a bin in µm.
    angle_deg
        By how much the grid is turned against the image, clockwise as the image is seen.
    overwrite
        Replace `output`.

    Returns
    -------
    pathlib.Path
        The store. Its bins are those with a transcript; controls, which the chemistry does not have, are left out.

    Notes
    -----
    The memory grows with the number of different pairs of bin and gene.
    """
    binned = count_in_bins(slide / "truth", bin_um=bin_um, angle_deg=angle_deg)
    pixel = float(json.loads((slide / "truth" / "simulation.json").read_text())["parameters"]["pixel_size_um"])

    def blocks() -> Iterator["csr_matrix"]:
        for start in range(0, binned.row.size, _ROWS):
            yield binned.counts[start : start + _ROWS]

    transforms = {MICRONS: binned.to_um, GLOBAL: scale(1 / pixel) @ binned.to_um}
    with new_store(output, sample=slide.name, overwrite=overwrite) as store:
        write_bins(store, binned.row, binned.column, binned.genes, blocks(), transforms, binned.shape)
    return output


@dataclass(frozen=True)
class BinCounts:
    """Transcripts of a slide in the bins of a grid.

    Attributes
    ----------
    row, column
        (n,) int64 place of each bin that has a transcript, in raster order.
    counts
        (n, n_genes) int32.
    genes
        Names of its columns.
    to_um
        (3, 3) map from the grid to µm.
    shape
        (rows, columns) of the grid.
    """

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    counts: "csr_matrix"
    genes: list[str]
    to_um: Affine
    shape: tuple[int, int]


def count_in_bins(truth: Path, *, bin_um: float = 2.0, angle_deg: float = 0.0) -> BinCounts:
    """Count the true transcripts of a simulated slide in bins; see `bin_transcripts`.

    Parameters
    ----------
    truth
        The slide's ``truth`` folder.
    bin_um, angle_deg
        The grid.
    """
    from scipy.sparse import csr_matrix

    known = json.loads((truth / "simulation.json").read_text())
    parameters, genes = known["parameters"], known["genes"]
    size_um = np.array([parameters["width_px"], parameters["height_px"]]) * float(parameters["pixel_size_um"])
    to_um, shape = _grid(size_um, bin_um, np.deg2rad(angle_deg))
    places, codes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for xy, gene in _transcripts(truth / "transcripts_truth.parquet", genes):
        column, row = np.floor(apply(np.linalg.inv(to_um), xy)).astype(np.int64).T
        places.append(row * shape[1] + column)
        codes.append(gene)
    place, code = np.concatenate(places), np.concatenate(codes)
    there, bin_of = np.unique(place, return_inverse=True)
    counts = csr_matrix((np.ones(code.size, np.int32), (bin_of, code)), shape=(there.size, len(genes)))
    row, column = np.divmod(there, shape[1])
    return BinCounts(row, column, counts, genes, to_um, shape)


def _grid(size_um: NDArray[np.float64], bin_um: float, angle: float) -> tuple[Affine, tuple[int, int]]:
    """The map from a grid to µm, and the grid's size, so that it covers the slide whichever way it is turned."""
    matrix = np.eye(3)
    matrix[:2, :2] = bin_um * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = apply(np.linalg.inv(matrix), np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * size_um)
    low = np.floor(corners.min(axis=0)) - 1
    matrix[:2, 2] = matrix[:2, :2] @ low
    columns, rows = (np.ceil(corners.max(axis=0)) + 1 - low).astype(int)
    return matrix, (int(rows), int(columns))


def _transcripts(path: Path, genes: list[str]) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Positions in µm and gene of all transcripts but controls, in batches."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=["x", "y", "gene"]):
            names = batch.column("gene").dictionary_decode()
            code = pc.index_in(names, value_set=pa.array(genes, names.type))
            gene = pc.fill_null(code, -1).to_numpy(zero_copy_only=False)
            kept = gene >= 0
            xy = np.column_stack([batch.column("x").to_numpy(), batch.column("y").to_numpy()])
            yield xy[kept], gene[kept].astype(np.int64)
