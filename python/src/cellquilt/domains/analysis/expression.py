"""Expression of a slide's cells, as the analysis takes it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.domains.expression import kind_of

if TYPE_CHECKING:
    from cellquilt.spatial.slides import Slide


@dataclass(frozen=True)
class Measured:
    """What was measured in a slide's cells that have a domain.

    Attributes
    ----------
    matrix
        (n_cells, n_genes) CSR float64.
    kind
        See `cellquilt.domains.expression.KINDS`.
    genes
        Names of the columns.
    codes
        (n_cells,) int64 numbers of the cells' domains.
    """

    matrix: Any
    kind: str
    genes: list[str]
    codes: NDArray[np.int64]

    def logarithms(self) -> Any:
        """(n_cells, n_genes) CSR: log1p of counts scaled to their median total, logarithms as they are.

        Of intensities arcsinh of them over the marker's median on the slide.
        """
        if self.kind == "counts":
            return scaled_logs(self.matrix)
        return self._bent() if self.kind == "protein" else self.matrix.copy()

    def logarithms_to(self, columns: NDArray[np.int64], total: float) -> Any:
        """The same of some columns, counts (and what logarithms are of) scaled to one total of these."""
        if self.kind == "protein":
            return self._bent()[:, columns]
        return scaled_logs(self.linear()[:, columns], total)

    def linear(self) -> Any:
        """(n_cells, n_genes) CSR: counts or intensities, or what logarithms are of."""
        out = self.matrix.copy()
        if self.kind == "log1p":
            np.expm1(out.data, out=out.data)
        return out

    def sums(self, n_domains: int) -> NDArray[np.float64]:
        """(n_domains, n_genes) sums of `linear` over the cells of each domain."""
        return (membership(self.codes, n_domains) @ self.linear()).toarray()

    def _bent(self) -> Any:
        from scipy.sparse import csr_matrix

        values = self.matrix.toarray()
        return csr_matrix(np.arcsinh(values / np.maximum(np.median(values, axis=0), 1e-6)))


def measured(slide: "Slide", layer: str | None, kind: str | None) -> Measured:
    """What was measured in a slide's cells that have a domain.

    Parameters
    ----------
    slide
        The slide.
    layer
        Layer to take instead of X.
    kind
        What it holds; None: by its values.

    Raises
    ------
    CellquiltError
        ``layer-unknown``, ``genes-missing``, ``genes-twice``, and what `kind_of` raises.
    """
    import anndata
    from scipy.sparse import csr_matrix

    table = slide.table
    if layer is not None and layer not in table.layers:
        known = ", ".join(map(str, table.layers)) or "none"
        raise CellquiltError("layer-unknown", f'{slide.name}: there is no layer "{layer}"', f"layers: {known}")
    values: Any = table.X if layer is None else table.layers[layer]
    if values is None or not table.n_vars:
        raise CellquiltError("genes-missing", f"{slide.name}: the table has no genes", "give expression in X")
    if not table.var_names.is_unique:
        twice = table.var_names[table.var_names.duplicated()][0]
        raise CellquiltError("genes-twice", f'{slide.name}: gene "{twice}" is there twice', "make the names unique")
    kept = slide.codes >= 0
    part = values[slide.rows[kept]]
    found = kind_of(anndata.AnnData(part), kind)
    return Measured(csr_matrix(part, dtype=np.float64), found, list(map(str, table.var_names)), slide.codes[kept])


def scaled_logs(values: Any, total: float | None = None) -> Any:
    """log1p of the rows of a CSR matrix, scaled to one total; default: the median of those that are not empty."""
    sums = np.asarray(values.sum(axis=1)).ravel()
    some = sums > 0
    target = total if total is not None else float(np.median(sums[some])) if some.any() else 1.0
    out = values.copy()
    out.data *= np.repeat(np.divide(target, sums, out=np.zeros_like(sums), where=some), np.diff(out.indptr))
    np.log1p(out.data, out=out.data)
    return out


def membership(codes: NDArray[np.int64], n: int) -> Any:
    """(n, n_cells) CSR float64 with a 1 where a cell is in a domain."""
    from scipy.sparse import csr_matrix

    return csr_matrix((np.ones(codes.size), (codes, np.arange(codes.size))), shape=(n, codes.size))
