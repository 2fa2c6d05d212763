"""What the report says of clusters and cell types: a map, how many cells there are of each, what marks the clusters."""

from typing import Any

import numpy as np

from cellquilt.core.errors import CellquiltError
from cellquilt.domains.maps import NO_DOMAIN, domain_colours, domain_raster
from cellquilt.report import pictures
from cellquilt.report.cells import Cells
from cellquilt.report.view import View

#: Column of the table → title.
_COLUMNS = {"cluster": "Clusters", "cell_type": "Cell types"}
#: Categories that are no type get no colour of their own.
_NONE = "unknown"
_MARKERS = "cluster_markers"
_MOST_MARKERS = 5


def celltypes_context(view: View, cells: Cells) -> dict[str, Any]:
    """What the page's section on cell types shows.

    Parameters
    ----------
    view, cells
        The sample.

    Returns
    -------
    dict
        ``groups`` (a map and a table each, of clusters and of cell types; none: no section), ``missing`` (why there are
        none, where they were asked for).

    Raises
    ------
    CellquiltError
        ``table-unreadable``.
    """
    facts = [view.facts(stage).get(f"{stage}_missing") for stage in ("cluster", "annotate")]
    element = view.find("tables", "table")
    groups: list[dict[str, Any]] = []
    if element is not None and len(cells):
        try:
            groups = _groups(element, cells)
        except Exception as error:  # whatever zarr and anndata raise on damaged files
            raise CellquiltError(
                "table-unreadable",
                f"{element} cannot be read: {type(error).__name__}: {error}",
                "run `aggregate` again",
            ) from error
    return {"groups": groups, "missing": [fact["message"] for fact in facts if fact]}


def _groups(element: Any, cells: Cells) -> list[dict[str, Any]]:
    import zarr
    from anndata.io import read_elem

    group: Any = zarr.open_group(str(element), mode="r")
    found = []
    for column, title in _COLUMNS.items():
        if column not in group["obs"]:
            continue
        values: Any = read_elem(group["obs"][column])
        if not hasattr(values, "categories") or not len(values.categories):
            continue
        codes = np.asarray(values.codes, dtype=np.int64)
        names = list(map(str, values.categories))
        markers: Any = None
        if column == "cluster" and _MARKERS in group["uns"]:
            markers = read_elem(group["uns"][_MARKERS])
        found.append(_group(title, cells, codes, names, markers))
    return found


def _group(title: str, cells: Cells, codes: np.ndarray, names: list[str], markers: Any) -> dict[str, Any]:
    colours = {name: NO_DOMAIN if name == _NONE else colour for name, colour in domain_colours(names).items()}
    raster = domain_raster(cells.xy_um, codes)
    counts = np.bincount(codes[codes >= 0], minlength=len(names))
    by_cluster: dict[str, list[str]] = {name: [] for name in names}
    if markers is not None and len(markers):
        for name, gene in zip(markers["cluster"].astype(str), markers["gene"].astype(str), strict=True):
            by_cluster[name].append(gene)
    rows = [
        {
            "name": name,
            "colour": colours[name],
            "n": int(counts[number]),
            "share": counts[number] / max(len(cells), 1),
            "markers": ", ".join(by_cluster[name][:_MOST_MARKERS]),
        }
        for number, name in enumerate(names)
    ]
    height, width = raster.codes.shape
    return {
        "title": title,
        "uri": pictures.data_uri(raster.colours([colours[name] for name in names]), lossless=True),
        "width": width,
        "height": height,
        "rows": rows,
        "n_without": int((codes < 0).sum()),
        "has_markers": markers is not None and len(markers) > 0,
    }
