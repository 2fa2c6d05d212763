"""What was measured in the cells of a slide, on scales that cells can be told apart by."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.domains.expression import kind_of, log_normalized

if TYPE_CHECKING:
    from anndata import AnnData

PROTEIN = "protein"
#: Percentiles of a marker's intensities: of the background, and of cells that have it; a few cells may be brighter.
_BACKGROUND, _BRIGHT = 10.0, 99.5
_DARK = 5.0
#: Brightest over background, at most: where hardly anything is measured in most cells, noise is no signal.
_MOST_CONTRAST = 50.0
#: Least range of arcsinh of intensities over background, so that a marker that no cell has stays near 0.
_LEAST_RANGE = 1.5
#: Of the logarithms of a gene's counts that are not 0, the percentile that counts as fully on; and the least of it.
_ON, _LEAST_ON = 95.0, 0.5


@dataclass(frozen=True)
class Measured:
    """Cells that pass QC, with what was measured in them.

    Attributes
    ----------
    raw
        Cells × genes or channels, as measured.
    kind
        What that is: ``counts``, ``log1p`` or ``protein``.
    passes
        (n,) bool: which cells of the table these are.
    cells
        (n,) names of all cells of the table.
    """

    raw: "AnnData"
    kind: str
    passes: NDArray[np.bool_]
    cells: NDArray[np.object_]

    def scaled(self) -> "AnnData":
        """A copy with logarithms of counts over their total, or intensities on a scale from 0 to 1."""
        if self.kind != PROTEIN:
            return log_normalized(self.raw, self.kind)
        found = self.raw.copy()
        found.X = scaled_intensities(_dense(found.X))
        return found


def measured(table: "AnnData", kind: str | None = None, *, name: str = "table") -> Measured:
    """The cells of a table that pass QC: counts of genes, or of a table without genes the channels' mean intensities.

    Parameters
    ----------
    table
        Cells with X or ``obsm["intensities"]``; those whose ``obs["passes_qc"]`` is false are left out.
    kind
        ``counts``, ``log1p`` or ``protein``; None: by the values.
    name
        Of the slide, for messages.

    Raises
    ------
    CellquiltError
        ``genes-missing``, ``genes-twice``, ``cells-twice``, and what `kind_of` refuses.
    """
    import anndata
    import pandas as pd

    passes = np.ones(table.n_obs, dtype=bool)
    if "passes_qc" in table.obs:
        passes = table.obs["passes_qc"].to_numpy().astype(bool)
    if not table.obs_names.is_unique:
        twice = table.obs_names[table.obs_names.duplicated()][0]
        raise CellquiltError("cells-twice", f'{name}: cell "{twice}" is there twice', "make obs_names unique")
    values: Any
    if table.n_vars and table.X is not None:
        values, names = table.X, table.var_names
    else:
        channels: Any = table.obsm.get("intensities")
        if channels is None or not channels.shape[1]:
            raise CellquiltError(
                "genes-missing", f"{name}: there are no genes and no intensities of channels",
                "give counts in X, or aggregate with average_intensities",
            )  # fmt: skip
        values, names, kind = np.asarray(channels, dtype=np.float32), pd.Index(channels.columns), PROTEIN
    names = names.astype(str)
    if not names.is_unique:
        raise CellquiltError(
            "genes-twice", f'{name}: "{names[names.duplicated()][0]}" is there twice', "make the names unique"
        )
    raw = anndata.AnnData(values[passes], pd.DataFrame(index=table.obs_names[passes]), pd.DataFrame(index=names))
    try:
        found = kind_of(raw, kind)
    except CellquiltError as error:  # it does not know the slide's name
        said = error.message.removeprefix(f"table of {raw.n_obs} cells: ")
        raise CellquiltError(error.code, f"{name}: {said}", error.hint) from None
    return Measured(raw, found, passes, table.obs_names.to_numpy())


def scaled_intensities(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Intensities on a scale that no few bright cells and no camera's gain change.

    Parameters
    ----------
    values
        (n, m) intensities of markers, not negative.

    Returns
    -------
    numpy.ndarray
        (n, m) float32 from 0, the background, to 1, bright: arcsinh over the background, between percentiles.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return values.astype(np.float32)
    background, bright = np.percentile(values, [_BACKGROUND, _BRIGHT], axis=0)
    unit = np.maximum(np.maximum(background, bright / _MOST_CONTRAST), np.finfo(np.float32).tiny)
    bent = np.arcsinh(values / unit)
    low, high = np.percentile(bent, [_DARK, _BRIGHT], axis=0)
    return np.clip((bent - low) / np.maximum(high - low, _LEAST_RANGE), 0, 1).astype(np.float32)


def scaled_logs(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n, m) float32 from 0 to 1, of logarithms of counts: over those of cells that clearly have the gene."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return values.astype(np.float32)
    some = np.where(values > 0, values, np.nan)
    some[0, np.isnan(some).all(axis=0)] = 0  # of genes that no cell has
    on = np.nanpercentile(some, _ON, axis=0)
    return np.clip(values / np.maximum(on, _LEAST_ON), 0, 1).astype(np.float32)


def marker_levels(cells: Measured, columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n, m) float32 from 0 to 1: how much the cells have of some genes or channels."""
    if cells.kind == PROTEIN:
        return scaled_intensities(_dense(cells.raw.X[:, columns]))  # type: ignore[index]
    logs: Any = log_normalized(cells.raw, cells.kind).X
    return scaled_logs(_dense(logs[:, columns]))


def _dense(matrix: Any) -> NDArray[np.floating]:
    return matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)
