"""The machine's own counts of its own cells: the table ``vendor_table``, which annotates ``vendor_cells``."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.log import LOG
from cellquilt.core.shapes import ShapesTable
from cellquilt.core.store import Store
from cellquilt.core.tables import one_category, write_table

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

TABLE = "vendor_table"
_REGION, _INSTANCE = "region", "cell_id"


@dataclass(frozen=True)
class Pairing:
    """Which row of the machine's table is which outline.

    Attributes
    ----------
    order
        (n_cells,) position of the outlines: those with a row in the order of rows, then the others.
    kept
        (n_rows,) bool, the row has an outline.
    """

    order: NDArray[np.int64]
    kept: NDArray[np.bool_]


def pair(cells: NDArray[np.str_], rows: NDArray[np.str_], name: str) -> Pairing:
    """Match the machine's table with its outlines; a row without outline, or there before, is left out with a warning.

    Parameters
    ----------
    cells
        (n_cells,) ids of the outlines, distinct.
    rows
        (n_rows,) ids of the table's rows.
    name
        What to call the table in messages.
    """
    by_name = np.argsort(cells, kind="stable")
    place = np.minimum(np.searchsorted(cells[by_name], rows), max(len(cells) - 1, 0))
    kept = cells[by_name][place] == rows if len(cells) else np.zeros(len(rows), dtype=bool)
    found = by_name[place] if len(cells) else place
    _, first = np.unique(rows, return_index=True)
    again = np.ones(len(rows), dtype=bool)
    again[first] = False
    kept &= ~again
    if not kept.all():
        LOG.warning("%s: %d of %d cells have no outline of their own and are left out", name, (~kept).sum(), len(rows))
    counted = np.zeros(len(cells), dtype=bool)
    counted[found[kept]] = True
    return Pairing(np.concatenate([found[kept], np.flatnonzero(~counted)]), kept)


def write_vendor_table(
    store: Store,
    name: str,
    region: str,
    cells: ShapesTable,
    pairing: Pairing,
    blocks: Iterable["csr_matrix"],
    genes: list[str],
    columns: Mapping[str, NDArray] | None = None,
) -> int:
    """Write the table.

    Parameters
    ----------
    store
        A store that is being made.
    name, region
        The table's name and that of the shapes.
    cells
        The outlines, in the order of `pairing`.
    pairing
        What `pair` found.
    blocks
        The machine's counts, some of its rows at a time.
    genes
        Names of its columns, distinct.
    columns
        More columns of the table: name → (n_rows,) array, by the machine's rows.

    Returns
    -------
    int
        Rows: one an outline. Those without counts of the machine have none, and ``counted`` is false.
    """
    import pandas as pd
    from scipy.sparse import csr_matrix

    n, n_counted = len(cells), int(pairing.kept.sum())

    def kept_blocks() -> Iterator["csr_matrix"]:
        start = 0
        for block in blocks:
            yield block[pairing.kept[start : start + block.shape[0]]]
            start += block.shape[0]
        yield csr_matrix((n - n_counted, len(genes)), dtype=np.int32)

    index = pd.Index(cells.ids.astype(object), dtype=object)
    obs = pd.DataFrame(
        {_INSTANCE: index, _REGION: one_category(region, n), "counted": np.arange(n) < n_counted}, index=index
    )
    for column, values in (columns or {}).items():
        found = values[pairing.kept]
        obs[column] = (
            found if len(found) == n else np.concatenate([found.astype(np.float64), np.full(n - len(found), np.nan)])
        )
    annotation = {"region": region, "region_key": _REGION, "instance_key": _INSTANCE}
    write_table(store.new_element("tables", name), obs, genes, kept_blocks(), annotation)
    return n
