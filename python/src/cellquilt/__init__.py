"""cellquilt: raw spatial-omics output to segmented cells, tables and domains.

The public names load what they need when they are used, so that ``import cellquilt`` costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name → module that has it.
_PUBLIC = {
    "CellquiltError": "cellquilt.core.errors",
    "Settings": "cellquilt.core.settings",
    "aggregate": "cellquilt.steps",
    "cluster": "cellquilt.steps",
    "compare": "cellquilt.steps",
    "estimate": "cellquilt.costs",
    "make_image_patches": "cellquilt.steps",
    "make_transcript_patches": "cellquilt.steps",
    "split_regions": "cellquilt.steps",
    "spatial_neighbors": "cellquilt.spatial.tables",
}
_MODULES = ("annotate", "domains", "export", "io", "segmentation", "simulate", "spatial")

__all__ = [
    "CellquiltError",
    "Settings",
    "__version__",
    "aggregate",
    "annotate",
    "cluster",
    "compare",
    "domains",
    "estimate",
    "export",
    "io",
    "make_image_patches",
    "make_transcript_patches",
    "segmentation",
    "simulate",
    "spatial",
    "spatial_neighbors",
    "split_regions",
]

if TYPE_CHECKING:
    from cellquilt import annotate, domains, export, io, segmentation, spatial
    from cellquilt.core.errors import CellquiltError
    from cellquilt.core.settings import Settings
    from cellquilt.costs import estimate
    from cellquilt.simulate import simulate
    from cellquilt.spatial.tables import spatial_neighbors
    from cellquilt.steps import (
        aggregate,
        cluster,
        compare,
        make_image_patches,
        make_transcript_patches,
        split_regions,
    )


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"cellquilt.{name}")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'cellquilt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
