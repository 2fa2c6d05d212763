"""Clusters of the cells of one slide, and the genes or channels that they differ by."""

from typing import TYPE_CHECKING, Any

import numpy as np

from cellquilt.celltypes.measured import Measured, measured
from cellquilt.core.errors import CellquiltError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

#: Column of a table with its cells' clusters, and name of the table of their markers in `uns`.
CLUSTER, MARKERS = "cluster", "cluster_markers"
#: Panels of more genes are looked at by their most variable ones.
_MANY_GENES, _VARIABLE_GENES = 5000, 3000
_LEAST_CELLS = 10
#: Cells from which on scanpy looks for nearest neighbours approximately.
_MANY_CELLS = 4096


def find_clusters(
    table: "AnnData",
    *,
    resolution: float = 1.0,
    n_neighbors: int = 15,
    n_pcs: int = 50,
    n_top_genes: int | None = None,
    n_markers: int = 10,
    seed: int = 0,
    kind: str | None = None,
    name: str = "table",
) -> "tuple[pd.Categorical, pd.DataFrame]":
    """Leiden clusters by scanpy: logarithms or scaled intensities, PCA, nearest neighbours, communities.

    Parameters
    ----------
    table
        The cells of one slide; see `measured`.
    resolution
        Of the communities: more, more clusters.
    n_neighbors
        Nearest cells that a cell is joined to.
    n_pcs
        Principal components, at most one less than there are cells or genes.
    n_top_genes
        Most variable genes to look at; None: all of a panel of up to 5000 genes, else 3000.
    n_markers
        Markers of each cluster in the result.
    seed
        The same seed gives the same clusters.
    kind
        What X holds; None: by its values.
    name
        Of the slide, for messages.

    Returns
    -------
    clusters : pandas.Categorical
        (n,) ``"0"`` (the largest), ``"1"``, …; none for cells that fail QC.
    markers : pandas.DataFrame
        A row a marker: ``cluster``, ``gene``, ``rank`` (1 tells the cluster apart best), ``effect`` (difference of
        means over the standard deviation), ``difference``, ``auc``, ``mean``, ``share_in``, ``share_out``.

    Raises
    ------
    CellquiltError
        ``too-few-cells``, and what `measured` refuses.
    """
    import pandas as pd

    cells = measured(table, kind, name=name)
    if cells.raw.n_obs < _LEAST_CELLS or cells.raw.n_vars < 2:
        raise CellquiltError(
            "too-few-cells",
            f"{name}: {cells.raw.n_obs} cells with {cells.raw.n_vars} genes or channels pass QC; "
            f"clusters need {_LEAST_CELLS} and 2",
            "leave the slide out, or look at min_transcripts and the like",
        )
    found = _leiden(cells, resolution, n_neighbors, n_pcs, n_top_genes, seed)
    codes = np.full(len(cells.cells), -1, dtype=np.int64)
    codes[cells.passes] = found
    names = [str(number) for number in range(int(found.max()) + 1)]
    clusters = pd.Categorical.from_codes(codes, names)
    return clusters, _markers(cells, pd.Categorical.from_codes(found, names), n_markers)


def _leiden(
    cells: Measured, resolution: float, n_neighbors: int, n_pcs: int, n_top_genes: int | None, seed: int
) -> Any:
    import warnings

    import scanpy as sc

    seen = cells.scaled()
    wanted = n_top_genes or (_VARIABLE_GENES if seen.n_vars > _MANY_GENES else seen.n_vars)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about each other
        if wanted < seen.n_vars:
            sc.pp.highly_variable_genes(seen, n_top_genes=wanted)
            seen = seen[:, seen.var["highly_variable"].to_numpy()].copy()
        size = min(n_pcs, seen.n_vars - 1, seen.n_obs - 1)
        sc.pp.pca(seen, n_comps=size, random_state=seed)
        wanted = min(n_neighbors, seen.n_obs - 1)
        search = _approximate_search(wanted, seed) if seen.n_obs >= _MANY_CELLS else None
        sc.pp.neighbors(seen, n_neighbors=wanted, random_state=seed, transformer=search)
        sc.tl.leiden(
            seen, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed,
            key_added=CLUSTER,
        )  # fmt: skip
    codes = seen.obs[CLUSTER].cat.codes.to_numpy().astype(np.int64)
    # igraph numbers communities as it comes upon them.
    by_size = np.argsort(-np.bincount(codes), kind="stable")
    return np.argsort(by_size, kind="stable")[codes]


def _approximate_search(n_neighbors: int, seed: int) -> Any:
    """The search that scanpy takes for many cells. Of pynndescent from 0.7 on scanpy 1.12 cannot read the result."""
    from pynndescent import PyNNDescentTransformer
    from scipy.sparse import csr_matrix

    class Search(PyNNDescentTransformer):  # type: ignore[misc]
        def fit_transform(self, X: Any, y: Any = None, **more: Any) -> Any:
            return csr_matrix(super().fit_transform(X, y, **more))

    return Search(n_neighbors=n_neighbors, metric="euclidean", random_state=seed)


def _markers(cells: Measured, clusters: "pd.Categorical", n_markers: int) -> "pd.DataFrame":
    import anndata
    import pandas as pd

    from cellquilt.domains.analysis.genes import gene_statistics

    columns = ("rank", "effect", "difference", "auc", "mean", "share_in", "share_out")
    if len(clusters.categories) < 2:
        return pd.DataFrame({CLUSTER: pd.Series(dtype=object), "gene": pd.Series(dtype=object)} | {
            name: pd.Series(dtype=np.int64 if name == "rank" else np.float64) for name in columns
        })  # fmt: skip
    seen = anndata.AnnData(
        cells.raw.X, obs=pd.DataFrame({CLUSTER: clusters}, index=cells.raw.obs_names), var=cells.raw.var
    )
    found = gene_statistics(seen, CLUSTER, kind=cells.kind).by_domain().rename(columns={"domain": CLUSTER})
    found = found[(found["rank"] <= n_markers) & (found["effect"] > 0)]
    return found[[CLUSTER, "gene", *columns]].reset_index(drop=True)
