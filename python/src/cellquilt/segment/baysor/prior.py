"""Prior cells as Baysor sees them: groups of molecules with the same number."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import shapely


def prior_centres(table: pa.Table, record: Mapping[str, Any], least: int) -> np.ndarray:
    """Centres of the prior cells of a patch.

    Parameters
    ----------
    table
        The patch's transcripts; see `patches.transcripts`.
    record
        The patch's record.
    least
        Fewest transcripts of a prior cell.

    Returns
    -------
    numpy.ndarray
        (n, 2) float64 in µm: means of the transcripts; only those in the patch's core, so that each prior cell of a
        slide counts in one patch.
    """
    prior = table.column("prior_cell").to_numpy()
    inside = np.flatnonzero(prior > 0)
    _, cell, sizes = np.unique(prior[inside], return_inverse=True, return_counts=True)
    sums = [np.bincount(cell, table.column(name).to_numpy()[inside], len(sizes)) for name in ("x_um", "y_um")]
    centres = np.column_stack(sums)[sizes >= least] / sizes[sizes >= least, None]
    x0, y0, x1, y1 = record["core"]
    return centres[((centres >= (x0, y0)) & (centres < (x1, y1))).all(axis=1)]


def scale_of_centres(centres: np.ndarray) -> float | None:
    """Half the median distance of neighbouring prior cells: how Baysor takes the radius of a cell from a prior.

    Parameters
    ----------
    centres
        (n, 2) float64 in µm.

    Returns
    -------
    float or None
        In µm; None for fewer than three centres.
    """
    if len(centres) < 3:
        return None
    points = np.asarray(shapely.points(centres), dtype=object)
    tree = shapely.STRtree(points)
    _, distances = tree.query_nearest(points, exclusive=True, return_distance=True, all_matches=False)
    return float(np.median(distances)) / 2


def main_prior(labels: np.ndarray, prior: np.ndarray, n_cells: int) -> np.ndarray:
    """The prior cell that most molecules of each cell come from.

    Parameters
    ----------
    labels
        (n,) int32: the cell of every molecule, 0 for none.
    prior
        (n,) int32: its prior cell, 0 for none.
    n_cells
        Cells are numbered 1 to `n_cells`.

    Returns
    -------
    numpy.ndarray
        (n_cells,) int32; 0 where no molecule has a prior cell, the smallest number of several with as many.
    """
    both = (labels > 0) & (prior > 0)
    pairs, counts = np.unique(np.column_stack([labels[both], prior[both]]), axis=0, return_counts=True)
    # The last one written counts: most molecules, then the smallest number.
    order = np.lexsort((-pairs[:, 1], counts))
    out = np.zeros(n_cells, dtype=np.int32)
    out[pairs[order, 0] - 1] = pairs[order, 1]
    return out
