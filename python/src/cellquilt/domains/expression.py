"""What was measured in cells, as a model takes it: which genes, which kind of numbers, and their scale."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from cellquilt.core.errors import CellquiltError

if TYPE_CHECKING:
    from anndata import AnnData

#: What may stand in X: whole numbers of molecules, logarithms of them scaled to one total a cell, or intensities.
KINDS = ("counts", "log1p", "protein")
#: Genes that a panel must share with the vocabulary.
MIN_GENES = 20
#: Intensities are of few markers, and few of them are 0.
_MOST_MARKERS, _USUAL_INTENSITY = 200, 20.0
_EPS = np.float32(1e-8)
CELLS_AT_ONCE = 8192


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


def kind_of(adata: "AnnData", given: str | None = None) -> str:
    """What X holds, by its values, or as it is said.

    Parameters
    ----------
    adata
        Cells × genes or markers.
    given
        One of `KINDS`, if it is known; values that it cannot have are refused.

    Raises
    ------
    CellquiltError
        ``expression-not-finite``, ``expression-negative``, ``expression-unknown``, ``expression-mixed``.
    """
    if given is not None and given not in KINDS:
        raise CellquiltError("expression-unknown", f'unknown kind "{given}"', f"one of {', '.join(KINDS)}")
    values = _values(adata.X)
    name = f"table of {adata.n_obs} cells"
    if not np.isfinite(values).all():
        raise CellquiltError("expression-not-finite", f"{name}: X has values that are no numbers", "replace them by 0")
    if values.size and values.min() < 0:
        raise CellquiltError(
            "expression-negative",
            f"{name}: X has {values.min():g}; scaled values cannot be compared between slides",
            "give counts, their logarithms, or intensities",
        )
    if given is not None:
        return given
    whole = values == np.floor(values)
    intensities = adata.n_vars <= _MOST_MARKERS and values.sum() > _USUAL_INTENSITY * adata.n_obs * adata.n_vars
    if intensities:
        return "protein"
    if whole.all():
        return "counts"
    if values.max() < 20:
        _check_one_kind(adata, whole, name)
        return "log1p"
    raise CellquiltError(
        "expression-unknown",
        f"{name}: X has values up to {values.max():g}, and not whole ones: neither counts nor logarithms",
        "give counts, or log1p of counts that were scaled to one total; or say kind",
    )


def _check_one_kind(adata: "AnnData", whole: NDArray[np.bool_], name: str) -> None:
    """Cells with whole numbers above 1 only, among others with logarithms, are a table put together of two kinds."""
    values = _values(adata.X)
    row = (
        csr_matrix(adata.X).tocoo().row
        if hasattr(adata.X, "indptr")
        else np.repeat(np.arange(adata.n_obs), adata.n_vars)
    )
    positive = values > 0
    n = np.bincount(row[positive], minlength=adata.n_obs)
    n_whole = np.bincount(row[positive & whole], minlength=adata.n_obs)
    most = np.zeros(adata.n_obs)
    np.maximum.at(most, row, values)
    counts = (n >= 5) & (n_whole == n) & (most > 1)
    if counts.any():
        first = int(np.flatnonzero(counts)[0])
        raise CellquiltError(
            "expression-mixed",
            f"{name}: {int(counts.sum())} cells ({adata.obs_names[first]} the first) have counts, others logarithms",
            "give counts for all cells",
        )


def _values(matrix: Any) -> NDArray[np.floating]:
    return matrix.data if hasattr(matrix, "indptr") else np.asarray(matrix).ravel()


def panel_of(genes: Sequence[str], vocabulary: Vocabulary, used: NDArray[np.bool_] | None, name: str) -> "Panel":
    """The columns of a table that a model uses.

    Parameters
    ----------
    genes
        Names of the columns.
    vocabulary
        The model's genes.
    used
        (n_genes,) bool: which columns may be used; None: all.
    name
        Of the slide, for messages.

    Raises
    ------
    CellquiltError
        ``genes-twice``, ``genes-unknown``.
    """
    lower = [gene.lower() for gene in genes]
    if len(set(lower)) < len(lower):
        seen: set[str] = set()
        twice = next(gene for gene in lower if gene in seen or seen.add(gene))  # type: ignore[func-returns-value]
        raise CellquiltError("genes-twice", f'{name}: gene "{twice}" is there twice', "make the names unique")
    may = np.ones(len(genes), dtype=bool) if used is None else used
    numbers = vocabulary.numbers(genes)
    columns = np.flatnonzero(may & (numbers >= 0))
    if columns.size < min(MIN_GENES, len(vocabulary)):
        raise CellquiltError(
            "genes-unknown",
            f"{name}: the model knows {columns.size} of the {int(may.sum())} genes used ({', '.join(genes[:3])}, …), "
            f"{min(MIN_GENES, len(vocabulary))} are needed",
            "use gene symbols of the species that the model was trained on, or train a model on these slides",
        )
    return Panel(columns, numbers[columns])


@dataclass(frozen=True)
class Panel:
    """Columns of a table, and their numbers in a vocabulary: each (n_genes,) int64."""

    columns: NDArray[np.int64]
    numbers: NDArray[np.int64]


@dataclass(frozen=True)
class Expression:
    """Expression of a slide's cells in the genes that a model uses, brought to scale when it is asked for.

    ``(f(x s_cell / d_gene) - mean_gene) / std_gene``, where f is log1p of counts, arcsinh of intensities and x itself
    of logarithms.

    Attributes
    ----------
    matrix
        (n_cells, n_columns) as it was measured, CSR or dense.
    panel
        Which columns, and which genes they are.
    kind
        See `KINDS`.
    scale
        (n_cells,) float32 s.
    divisor, mean, std
        (n_genes,) float32.
    """

    matrix: Any
    panel: Panel
    kind: str
    scale: NDArray[np.float32]
    divisor: NDArray[np.float32]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def __len__(self) -> int:
        return int(self.matrix.shape[0])

    @property
    def genes(self) -> NDArray[np.int64]:
        """(n_genes,) int64 numbers in the vocabulary."""
        return self.panel.numbers

    def transformed(self, rows: "slice | NDArray[np.int64]") -> Any:
        """(n_rows, n_genes) float32 f(x s / d) of some cells, CSR or dense as the matrix is."""
        part = self.matrix[rows]
        part = part[:, self.panel.columns] if self.panel.columns.size < part.shape[1] else part.copy()
        scale = self.scale[rows]
        if hasattr(part, "indptr"):
            part = part.astype(np.float32)
            row = np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))
            part.data = _bent(part.data * (scale[row] / self.divisor[part.indices]), self.kind)
            return part
        return _bent(np.asarray(part, dtype=np.float32) * scale[:, None] / self.divisor, self.kind)

    def rows(self, rows: "slice | NDArray[np.int64]") -> NDArray[np.float32]:
        """(n_rows, n_genes) float32 dense, of mean 0 and deviation 1 where mean and std are those of these cells."""
        part = self.transformed(rows)
        dense = part.toarray() if hasattr(part, "toarray") else part
        return (dense - self.mean) / (self.std + _EPS)

    def blocks(self) -> Iterator[slice]:
        """All cells, some at a time."""
        for start in range(0, len(self), CELLS_AT_ONCE):
            yield slice(start, min(start + CELLS_AT_ONCE, len(self)))

    def project(self, weights: NDArray[np.floating]) -> NDArray[np.float32]:
        """(n_cells, size) float32 scaled expression times weights (n_genes, size): zeros cost nothing."""
        scaled = (weights / (self.std + _EPS)[:, None]).astype(np.float64)
        shift = self.mean.astype(np.float64) @ scaled
        out = np.empty((len(self), weights.shape[1]), dtype=np.float32)
        for block in self.blocks():
            out[block] = self.transformed(block).astype(np.float64) @ scaled - shift
        return out


def _bent(x: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    return np.log1p(x) if kind == "counts" else np.arcsinh(x) if kind == "protein" else x


def scaled_to(total: NDArray[np.floating], target: float) -> NDArray[np.float32]:
    """(n_cells,) what brings cells of so many molecules to the target; 1 for cells without any."""
    some = total > 0
    return np.where(some, target / np.where(some, total, 1), 1.0).astype(np.float32)


def totals(matrix: Any, panel: Panel, divisor: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
    """(n_cells,) sum over the panel's columns of x / d."""
    weight = np.zeros(matrix.shape[1])
    weight[panel.columns] = 1.0 if divisor is None else 1.0 / divisor
    return np.asarray(matrix @ weight, dtype=np.float64).ravel()


def mean_std(expression: Expression) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(n_genes,) mean and deviation of f(x s / d), a block of cells at a time, in double precision."""
    n, n_genes = len(expression), expression.genes.size
    total, square = np.zeros(n_genes), np.zeros(n_genes)
    for block in expression.blocks():
        part = expression.transformed(block).astype(np.float64)
        total += np.asarray(part.sum(axis=0)).ravel()
        squares = part.multiply(part) if hasattr(part, "multiply") else part * part
        square += np.asarray(squares.sum(axis=0)).ravel()
    mean = total / max(n, 1)
    variance = np.maximum(square / max(n, 1) - mean**2, 0)
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def log_normalized(adata: "AnnData", kind: str | None = None) -> "AnnData":
    """A copy whose X is log1p of counts scaled to their median total, or arcsinh of intensities over their medians.

    Logarithms stay as they are.

    Parameters
    ----------
    adata
        Cells × genes; not changed.
    kind
        One of `KINDS`; None asks `kind_of`.
    """
    import scanpy as sc

    found = kind_of(adata, kind)
    out = adata.copy()
    if found == "counts":
        counts: Any = out.X
        out.X = counts.astype(np.float32)
        if counts.shape[0] and np.asarray(counts.sum(axis=1)).max() > 0:
            sc.pp.normalize_total(out)
        sc.pp.log1p(out)
    elif found == "protein":
        values: Any = out.X.toarray() if hasattr(out.X, "toarray") else np.asarray(out.X)  # type: ignore[union-attr]
        out.X = np.arcsinh(values / np.maximum(np.median(values, axis=0), 1e-6)).astype(np.float32)
    return out
