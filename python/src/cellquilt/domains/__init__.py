"""Spatial domains shared by a whole cohort: graphs of cells, the model, and what is read from it.

`Model` needs torch (``cellquilt[domains]``); it is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from cellquilt.domains import analysis, metrics, plots
from cellquilt.domains.tables import spatial_neighbors

__all__ = ["Model", "analysis", "metrics", "plots", "spatial_neighbors"]

if TYPE_CHECKING:
    from cellquilt.domains.model import Model


def __getattr__(name: str) -> Any:
    if name != "Model":
        raise AttributeError(f"module 'cellquilt.domains' has no attribute {name!r}")
    try:
        from cellquilt.domains.model import Model
    except ModuleNotFoundError as error:
        from cellquilt.core.errors import CellquiltError

        raise CellquiltError(
            "package-missing", f"spatial domains need the package {error.name}", "install cellquilt[domains]"
        ) from None
    return Model
