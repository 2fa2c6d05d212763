"""Cell types from a reference whose cells have them: nearest neighbours in the reference's principal components."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.celltypes.measured import Measured, measured
from cellquilt.celltypes.phenotypes import labelled
from cellquilt.core.errors import CellquiltError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

#: Column of a table with how sure its cells' types are.
CONFIDENCE = "cell_type_confidence"
#: By what genes are scaled: the reference for both, or each by its own cells.
SCALINGS = ("reference", "each")
_CELLS_AT_ONCE = 8192


def read_reference(path: Path | str) -> "AnnData":
    """Read a reference.

    Raises
    ------
    CellquiltError
        ``annotate-reference``.
    """
    import anndata

    path = Path(path)
    if path.suffix.lower() != ".h5ad" or not path.is_file():
        raise CellquiltError("annotate-reference", f"{path.name} is no .h5ad file", "give AnnData as .h5ad")
    try:
        return anndata.read_h5ad(path)
    except Exception as error:  # whatever h5py and anndata raise on damaged files
        raise CellquiltError(
            "annotate-reference", f"{path.name} cannot be read: {type(error).__name__}: {error}", "is the file whole?"
        ) from None


def transfer_labels(
    table: "AnnData",
    reference: "AnnData",
    label: str,
    *,
    min_confidence: float = 0.5,
    min_genes: int = 20,
    n_neighbors: int = 15,
    n_pcs: int = 50,
    scaling: str = "reference",
    seed: int = 0,
    kind: str | None = None,
    name: str = "table",
) -> "pd.DataFrame":
    """Give cells the types of a reference's cells that they resemble.

    Parameters
    ----------
    table
        The cells of one slide; see `measured`.
    reference
        Cells of known types, with counts (or their logarithms) of genes of the same names; not changed.
    label
        Column of ``reference.obs`` with the types; cells without one are left out.
    min_confidence
        Cells that are less sure are ``unknown``.
    min_genes
        Genes that both must have, at least.
    n_neighbors
        Nearest cells of the reference that vote.
    n_pcs
        Principal components of the reference, at most.
    scaling
        ``reference``: genes are centred and scaled as the reference's are. ``each``: those of the slide by its own
        cells, which takes away what differs between technologies, and much of a slide of few cell types.
    seed
        Of the components.
    kind
        What X holds; None: by its values.
    name
        Of the slide, for messages.

    Returns
    -------
    pandas.DataFrame
        A row a cell: ``cell_type`` (categorical; none for cells that fail QC) and ``cell_type_confidence`` (float32,
        the share of the voting cells that are of the type; NaN for those).

    Raises
    ------
    CellquiltError
        ``annotate-label``, ``annotate-genes``, ``annotate-reference``, and what `measured` refuses.
    """
    import scanpy as sc

    cells = measured(table, kind, name=name)
    known = _labelled_cells(reference, label)
    types, codes = np.unique(known.obs[label].astype(str).to_numpy(), return_inverse=True)
    of_reference = measured(known, None if cells.kind == "log1p" else cells.kind, name="the reference")
    codes = codes[of_reference.passes]
    genes = _shared(cells, of_reference, min_genes, name)
    mine, theirs = (_on(part, genes) for part in (cells, of_reference))
    mean, scale = _moments(theirs.X)
    theirs.X = _divided(theirs.X, scale)
    size = min(n_pcs, theirs.n_vars - 1, theirs.n_obs - 1)
    sc.pp.pca(theirs, n_comps=size, random_state=seed)
    axes: NDArray[np.float64] = np.asarray(theirs.varm["PCs"], dtype=np.float64)
    if scaling == "each":
        mean, scale = _moments(mine.X)
    votes = _votes(mine.X, (mean, scale), axes, np.asarray(theirs.obsm["X_pca"]), codes, len(types), n_neighbors)
    best = votes.max(axis=1, initial=0)
    found = np.where(best < min_confidence, len(types), votes.argmax(axis=1))
    return labelled(cells.cells, cells.passes, found, types.tolist(), CONFIDENCE, best)


def _labelled_cells(reference: "AnnData", label: str) -> "AnnData":
    if label not in reference.obs:
        hint = did_you_mean(label, list(map(str, reference.obs.columns)))
        raise CellquiltError("annotate-label", f'the reference has no column "{label}"', hint)
    known = reference[reference.obs[label].notna().to_numpy()]
    n_types = known.obs[label].nunique()
    if n_types < 2 or known.n_obs < 3:
        raise CellquiltError(
            "annotate-label", f'column "{label}" of the reference has {n_types} types in {known.n_obs} cells',
            "name the column with the cell types",
        )  # fmt: skip
    if n_types > known.n_obs // 2:
        raise CellquiltError(
            "annotate-label", f'column "{label}" of the reference is nearly different for each cell ({n_types} values)',
            "name the column with the cell types",
        )  # fmt: skip
    return known


def _shared(cells: Measured, reference: Measured, min_genes: int, name: str) -> NDArray[np.object_]:
    mine, theirs = cells.raw.var_names, reference.raw.var_names
    genes = mine[mine.isin(theirs)].to_numpy()
    if len(genes) < max(min_genes, 2):
        hint = "give both the same kind of gene names, or lower annotate_min_genes"
        if len(set(mine.str.lower()) & set(theirs.str.lower())) > len(genes):
            hint = "the names differ in upper and lower case"
        raise CellquiltError(
            "annotate-genes",
            f"{name} and the reference share {len(genes)} of {len(mine)} genes; {max(min_genes, 2)} are needed",
            f"{hint} ({name}: {', '.join(mine[:3])}, …; reference: {', '.join(theirs[:3])}, …)",
        )
    return genes


def _on(cells: Measured, genes: NDArray[np.object_]) -> "AnnData":
    """Scaled values of some genes, counts over their total of these genes alone."""
    return Measured(cells.raw[:, genes].copy(), cells.kind, cells.passes, cells.cells).scaled()


def _moments(matrix: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(g,) mean and standard deviation of columns, 1 where all cells have the same."""
    mean = np.asarray(matrix.mean(axis=0), dtype=np.float64).ravel()
    square = matrix.multiply(matrix) if hasattr(matrix, "multiply") else np.asarray(matrix, dtype=np.float64) ** 2
    spread = np.sqrt(np.maximum(np.asarray(square.mean(axis=0), dtype=np.float64).ravel() - mean**2, 0))
    return mean, np.where(spread > 1e-6, spread, 1.0)


def _divided(matrix: Any, scale: NDArray[np.float64]) -> Any:
    if hasattr(matrix, "multiply"):
        return matrix.multiply(1 / scale).tocsr()
    return np.asarray(matrix) / scale


def _votes(
    matrix: Any, moments: tuple[NDArray[np.float64], NDArray[np.float64]], axes: NDArray[np.float64],
    reference: NDArray[np.floating], codes: NDArray[np.integer], n_types: int, n_neighbors: int,
) -> NDArray[np.float32]:  # fmt: skip
    """(n, n_types) float32 share of each cell's neighbours that are of each type, some cells at a time."""
    from sklearn.neighbors import NearestNeighbors

    mean, scale = moments
    offset = (mean / scale) @ axes
    wanted = min(n_neighbors, len(reference))
    # A tree of this many dimensions saves nothing; brute force is exact, and the order of equals does not change.
    search = NearestNeighbors(n_neighbors=wanted, algorithm="brute").fit(np.asarray(reference, dtype=np.float64))
    votes = np.zeros((matrix.shape[0], n_types), dtype=np.float32)
    for first in range(0, matrix.shape[0], _CELLS_AT_ONCE):
        part = matrix[first : first + _CELLS_AT_ONCE]
        there = np.asarray(part @ (axes / scale[:, None])) - offset
        near = search.kneighbors(there, return_distance=False)
        cell = np.repeat(np.arange(len(near)), wanted)
        flat = np.bincount(cell * n_types + codes[near.ravel()], minlength=len(near) * n_types)
        votes[first : first + len(near)] = flat.reshape(len(near), n_types) / np.float32(wanted)
    return votes
