"""Tables: SpatialData tables (AnnData on Zarr) whose counts are written in blocks of rows, never whole."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellquilt.core import zarr_json

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

_ENTRIES_PER_CHUNK = 1 << 20


def write_table(
    table: Path,
    obs: "pd.DataFrame",
    genes: Sequence[str],
    blocks: Iterable["csr_matrix"],
    annotation: Mapping[str, str],
) -> None:
    """Write a table of counts.

    Parameters
    ----------
    table
        Folder to make, for example ``store/tables/bins``.
    obs
        A row each; the column that ``annotation["region_key"]`` names is in it.
    genes
        Names of the columns of the counts, distinct.
    blocks
        The counts, some rows at a time: (m, n_genes) integers each, as many rows in all as `obs` has.
    annotation
        ``region``, ``region_key`` and ``instance_key``: the element that the table annotates, and how.
    """
    import pandas as pd
    import zarr
    from anndata import AnnData
    from anndata.io import write_elem
    from scipy.sparse import csr_matrix

    # spatialdata wants the region's name in at least one row: a table without rows cannot annotate.
    adata = AnnData(
        X=csr_matrix((len(obs), len(genes)), dtype=np.int32),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(list(genes), dtype=object)),
        uns={"spatialdata_attrs": dict(annotation)} if len(obs) else {},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_elem(zarr.open_group(str(table), mode="w"), "/", adata)  # no consolidated metadata: counts follow
    zarr_json.update_attributes(
        table, {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2", **annotation}
    )
    rows = _write_counts(table, blocks, len(genes))
    if rows != len(obs):
        raise ValueError(f"{len(obs)} rows, but counts of {rows}")


def one_category(value: str, n: int) -> "pd.Categorical":
    """(n,) the same text."""
    import pandas as pd

    return pd.Categorical.from_codes(np.zeros(n, np.int8), categories=pd.Index([value], dtype=object))


def _write_counts(table: Path, blocks: Iterable["csr_matrix"], n_genes: int) -> int:
    """Replace the counts of a table; the number of rows written."""
    import zarr

    matrix: Any = zarr.open_group(str(table / "X"), mode="a")
    parts = {
        name: matrix.create_array(name, shape=(0,), chunks=(_ENTRIES_PER_CHUNK,), dtype=np.dtype(kind), overwrite=True)
        for name, kind in (("data", np.int32), ("indices", np.int32), ("indptr", np.int64))
    }
    parts["indptr"].append(np.zeros(1, dtype=np.int64))
    n_rows = n_entries = 0
    for block in blocks:
        block = block.tocsr()
        block.sort_indices()
        parts["data"].append(block.data.astype(np.int32))
        parts["indices"].append(block.indices.astype(np.int32))
        parts["indptr"].append(block.indptr[1:].astype(np.int64) + n_entries)
        n_rows, n_entries = n_rows + block.shape[0], n_entries + block.nnz
    matrix.attrs["shape"] = [n_rows, n_genes]
    return n_rows
