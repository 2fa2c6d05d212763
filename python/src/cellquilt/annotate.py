"""Types of cells, on SpatialData objects and tables in memory; see docs/cell_types.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData


def markers(
    data: "SpatialData | AnnData",
    markers: "Mapping[str, Any] | str | Path",
    *,
    min_score: float | None = None,
    min_margin: float | None = None,
    kind: str | None = None,
) -> None:
    """Name cells by markers of cell types: ``obs["cell_type"]`` and ``obs["cell_type_score"]``.

    Parameters
    ----------
    data
        A slide, or its table; the table gets the columns.
    markers
        Cell type → markers that its cells have, or ``{"positive": […], "negative": […]}``; or a CSV or JSON file.
    min_score
        Cells whose best type scores less, from 0 to 1, are ``unknown`` (default 0.5).
    min_margin
        So are those whose two best types score so alike (default 0.1).
    kind
        What X holds: ``counts``, ``log1p`` or ``protein``. Default: by the values.

    Raises
    ------
    CellquiltError
        ``annotate-markers``, ``annotate-marker-unknown`` with the nearest name, ``genes-missing``.
    """
    from cellquilt.celltypes.phenotypes import phenotype, read_signatures
    from cellquilt.notebook import table_of

    types = read_signatures(markers) if isinstance(markers, str | Path) else markers
    values = _values({"min_score": min_score, "min_margin": min_margin})
    _add(data, phenotype(table_of(data), types, kind=kind, **values), values)


def transfer(
    data: "SpatialData | AnnData",
    reference: "AnnData | str | Path",
    label: str,
    *,
    min_confidence: float | None = None,
    min_genes: int | None = None,
    n_neighbors: int | None = None,
    n_pcs: int | None = None,
    scaling: str | None = None,
    seed: int | None = None,
    kind: str | None = None,
) -> None:
    """Name cells as a reference's that they resemble: ``obs["cell_type"]`` and ``obs["cell_type_confidence"]``.

    Parameters
    ----------
    data
        A slide, or its table; the table gets the columns.
    reference
        Cells of known types, or their ``.h5ad`` file.
    label
        Column of the reference's `obs` with the types.
    min_confidence
        Cells of which a smaller share of neighbours agrees are ``unknown`` (default 0.5).
    min_genes
        Genes that both must have (default 20).
    n_neighbors, n_pcs
        Cells of the reference that vote (default 15), and its principal components (at most; default 50).
    scaling
        ``reference`` (default): genes of both are scaled by the reference's cells; ``each``: each by its own.
    seed
        Of the components.
    kind
        What X holds: ``counts``, ``log1p`` or ``protein``. Default: by the values.

    Raises
    ------
    CellquiltError
        ``annotate-reference``, ``annotate-label``, ``annotate-genes``, ``genes-missing``.
    """
    from cellquilt.celltypes.transfer import read_reference, transfer_labels
    from cellquilt.notebook import table_of

    known = read_reference(reference) if isinstance(reference, str | Path) else reference
    values = _values({
        "min_confidence": min_confidence, "min_genes": min_genes, "n_neighbors": n_neighbors, "n_pcs": n_pcs,
        "scaling": scaling, "seed": seed,
    })  # fmt: skip
    _add(data, transfer_labels(table_of(data), known, label, kind=kind, **values), {**values, "label": label})


def _values(given: dict[str, Any]) -> dict[str, Any]:
    """Keywords with the values of the table of settings where the caller said nothing."""
    from cellquilt.core.settings import Settings
    from cellquilt.notebook import keyword_settings

    values = Settings(keyword_settings("annotate", given))
    return {name: values[f"annotate_{name}"] for name in given}


def _add(data: "SpatialData | AnnData", found: "pd.DataFrame", values: dict[str, Any]) -> None:
    from cellquilt.aggregation.columns import CellColumns
    from cellquilt.core.record import versions
    from cellquilt.notebook import add_columns

    parameters = {f"annotate_{name}": value for name, value in values.items()}
    add_columns(data, CellColumns("", "annotate", found, parameters=parameters, versions=versions()))
