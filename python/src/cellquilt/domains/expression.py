"""A cell table as the model takes it: which genes, which slide, what was measured, and the numbers brought to scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG

if TYPE_CHECKING:
    from anndata import AnnData

#: What may stand in X: whole numbers of molecules, or logarithms of them scaled to one total a cell.
KINDS = ("counts", "log1p")
#: Genes that a panel must share with the vocabulary.
MIN_GENES = 20
#: Panels with more genes keep the variable ones: so many, or half of them.
_PANEL_WITHOUT_CHOICE, _ENOUGH_VARIABLE = 100, 500
_EPS = 1e-8
_CELLS_AT_ONCE = 50_000


class Vocabulary:
    """Genes that a model knows, by number. Case does not matter.

    Parameters
    ----------
    names
        The genes, in the order of their numbers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [name.lower() for name in names]
        self._number = {name: number for number, name in enumerate(self.names)}
        if len(self._number) != len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise CellquiltError("genes-twice", f'the vocabulary has "{twice}" twice', "give each gene one name")

    def __len__(self) -> int:
        return len(self.names)

    def numbers(self, genes: Sequence[str]) -> NDArray[np.int64]:
        """(n,) int64 number of each gene, -1 for those that are not known."""
        return np.fromiter((self._number.get(gene.lower(), -1) for gene in genes), np.int64, len(genes))


def kind_of(adata: "AnnData") -> str:
    """What X holds, by its values: ``counts`` or ``log1p``.

    Raises
    ------
    CellquiltError
        ``expression-not-finite``, ``expression-negative``, ``expression-unknown``.
    """
    values = _values(adata.X)
    name = _name(adata)
    if not np.isfinite(values).all():
        raise CellquiltError("expression-not-finite", f"{name}: X has values that are no numbers", "replace them by 0")
    if values.size and values.min() < 0:
        raise CellquiltError(
            "expression-negative",
            f"{name}: X has {values.min():g}; scaled values cannot be compared between slides",
            "give counts, or their logarithms",
        )
    if (values == np.floor(values)).all():
        return "counts"
    if values.max() < 20:
        return "log1p"
    raise CellquiltError(
        "expression-unknown",
        f"{name}: X has values up to {values.max():g}, and not whole ones: neither counts nor logarithms",
        "give counts, or log1p of counts that were scaled to one total",
    )


def _values(matrix: Any) -> NDArray[np.floating]:
    return matrix.data if hasattr(matrix, "indptr") else np.asarray(matrix).ravel()


def _name(adata: "AnnData") -> str:
    return f"table of {adata.n_obs} cells"


def log_normalized(adata: "AnnData", kind: str | None = None) -> "AnnData":
    """A copy whose X is log1p of counts scaled to their median total; as it is, if it is that already.

    Parameters
    ----------
    adata
        Cells × genes; not changed.
    kind
        One of `KINDS`; None asks `kind_of`.
    """
    import scanpy as sc

    found = kind or kind_of(adata)
    LOG.info("%s: X is taken for %s", _name(adata), found)
    out = adata.copy()
    if found == "counts":
        counts: Any = out.X
        out.X = counts.astype(np.float32)
        if counts.shape[0] and np.asarray(counts.sum(axis=1)).max() > 0:
            sc.pp.normalize_total(out)
        sc.pp.log1p(out)
    return out


def variable_genes(tables: Sequence["AnnData"]) -> list[NDArray[np.bool_]]:
    """Which genes of each table are used: all of small panels, the variable ones of large ones.

    Tables of one panel have one choice, made of all of their cells; others each their own.

    Parameters
    ----------
    tables
        Logarithms. A column ``highly_variable`` of `var`, where there is one, is the choice.
    """
    import anndata

    panels = [sorted(name.lower() for name in table.var_names) for table in tables]
    if len(tables) > 1 and all(panel == panels[0] for panel in panels[1:]):
        together = anndata.concat(list(tables)) if len(panels[0]) > _PANEL_WITHOUT_CHOICE else tables[0]
        chosen = set(together.var_names[_variable(together)].str.lower())
        return [table.var_names.str.lower().isin(chosen) for table in tables]
    return [_variable(table) for table in tables]


def _variable(table: Any) -> NDArray[np.bool_]:
    import scanpy as sc

    if "highly_variable" in table.var:
        return np.asarray(table.var["highly_variable"], dtype=bool)
    if table.n_vars <= _PANEL_WITHOUT_CHOICE:
        return np.ones(table.n_vars, dtype=bool)
    found = np.asarray(sc.pp.highly_variable_genes(table, inplace=False)["highly_variable"], dtype=bool)
    half = table.n_vars // 2
    if found.sum() < min(_ENOUGH_VARIABLE, half):
        chosen = sc.pp.highly_variable_genes(table, n_top_genes=half, inplace=False)
        found = np.asarray(chosen["highly_variable"], dtype=bool)
    return found


@dataclass(frozen=True)
class Expression:
    """Expression of one slide's cells in the genes that the model uses, scaled when it is asked for.

    Attributes
    ----------
    matrix
        (n_cells, n_genes) logarithms, CSR or dense.
    genes
        (n_genes,) int64 numbers in the vocabulary.
    mean, std
        (n_genes,) float32: what is taken off, and what the rest is divided by.
    """

    matrix: Any
    genes: NDArray[np.int64]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def __len__(self) -> int:
        return int(self.matrix.shape[0])

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """(stop - start, n_genes) scaled expression of consecutive cells."""
        part = self.matrix[start:stop]
        dense = part.toarray() if hasattr(part, "toarray") else np.asarray(part)
        return (dense.astype(np.float32) - self.mean) / (self.std + np.float32(_EPS))


def slide_expression(table: Any, used: NDArray[np.bool_], vocabulary: Vocabulary) -> Expression:
    """One slide's expression, each gene with mean 0 and deviation 1 on the slide, as published models expect it.

    Parameters
    ----------
    table
        Logarithms, of one slide.
    used
        (n_genes,) bool; genes that the vocabulary lacks are left out as well.
    vocabulary
        The model's genes.

    Raises
    ------
    CellquiltError
        ``genes-twice``, ``genes-unknown``.
    """
    name = _name(table)
    lower = table.var_names.str.lower()
    if lower.has_duplicates:
        raise CellquiltError(
            "genes-twice", f'{name}: gene "{lower[lower.duplicated()][0]}" is there twice', "make the names unique"
        )
    numbers = vocabulary.numbers(list(table.var_names))
    kept = used & (numbers >= 0)
    if kept.sum() < MIN_GENES:
        shown = ", ".join(table.var_names[:3])
        raise CellquiltError(
            "genes-unknown",
            f"{name}: the model knows {kept.sum()} of the {int(used.sum())} genes used ({shown}, …), {MIN_GENES} are "
            "needed",
            "use gene symbols of the species that the model was trained on",
        )
    matrix = table.X[:, kept]
    mean, std = _mean_std(matrix)
    return Expression(matrix, numbers[kept], mean, std)


def _mean_std(matrix: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(n_genes,) mean and deviation, a block of cells at a time, in double precision."""
    n, n_genes = matrix.shape
    total, square = np.zeros(n_genes), np.zeros(n_genes)
    for start in range(0, n, _CELLS_AT_ONCE):
        part = matrix[start : start + _CELLS_AT_ONCE]
        part = part.astype(np.float64) if hasattr(part, "toarray") else np.asarray(part, dtype=np.float64)
        total += np.asarray(part.sum(axis=0)).ravel()
        squares = part.multiply(part) if hasattr(part, "multiply") else part * part
        square += np.asarray(squares.sum(axis=0)).ravel()
    mean = total / max(n, 1)
    variance = np.maximum(square / max(n, 1) - mean**2, 0)
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)
