"""Graphs of cells in AnnData tables: `cellquilt.spatial_neighbors`, and slides within a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.geometry.neighbours import MODES, SpatialGraph, neighbour_graph, neighbours_in_grid
from cellquilt.geometry.polygons import offsets_of, ranges

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

#: Where a table keeps its graph, and what is known of it.
DISTANCES, CONNECTIVITIES, ABOUT = "spatial_distances", "spatial_connectivities", "spatial_neighbors"
#: Median distances (µm) of neighbouring cells outside this mean that the coordinates are in another unit.
_USUAL_UM = (2.0, 100.0)
#: The same of spots and bins.
_USUAL_GRID_UM = (1.5, 300.0)
#: Cells with fewer neighbours on average are a radius that is too small.
_FEW_NEIGHBOURS = 3.5


def spatial_neighbors(
    adata: "AnnData | Sequence[AnnData]",
    radius: float | None = 80.0,
    slide_key: str | None = None,
    *,
    mode: str = "auto",
    n_neighbours: int | None = None,
    scale_to_um: float = 1.0,
) -> None:
    """Make the graph of neighbouring cells, each slide for itself.

    Parameters
    ----------
    adata
        One or several tables with ``obsm["spatial"]``, (n_cells, 2). They get ``obsp["spatial_distances"]`` in µm,
        ``obsp["spatial_connectivities"]`` and ``uns["spatial_neighbors"]``.
    radius
        Longest edge in µm; None keeps all. Not asked in a grid, whose pitch says who is near.
    slide_key
        Column of `obs` that names the slides; None: each table is one.
    mode
        ``delaunay``, ``knn``, or ``grid`` for spots and bins; ``auto`` looks at the coordinates: ``grid`` where they
        lie on one of squares or triangles, turned or not, else ``delaunay``.
    n_neighbours
        For ``knn``, default 6, and ``grid``, by default 8 in a grid of squares and 6 in others.
    scale_to_um
        Length in µm of a unit of the coordinates.

    Raises
    ------
    CellquiltError
        ``coordinates-missing``, ``coordinates-invalid``, ``coordinates-not-um``, ``slide-key-unknown``,
        ``graph-mode-unknown``, ``radius-invalid``.
    """
    if mode not in MODES:
        raise CellquiltError("graph-mode-unknown", f'unknown mode "{mode}"', f"one of {', '.join(MODES)}")
    for what, value in (("radius", radius), ("scale_to_um", scale_to_um)):
        if value is not None and not value > 0:
            raise CellquiltError("radius-invalid", f"{what} is {value}; a length above 0 was expected")
    for table in tables_of(adata):
        xy = coordinates_of(table) * scale_to_um
        graphs, modes = [], set()
        for slide in slides_of(table, slide_key):
            places, used = xy[slide.rows], mode
            if mode == "auto":
                in_grid = neighbours_in_grid(places)
                used = "grid" if in_grid else "delaunay"
                if in_grid:
                    kind = "squares" if in_grid == 8 else "triangles"
                    LOG.info("%s: the coordinates lie on a grid of %s: neighbours are those in it", slide.name, kind)
            graph = neighbour_graph(places, mode=used, radius_um=radius, n_neighbours=n_neighbours)
            _check_graph(slide.name, graph, used, radius, found=mode == "auto")
            graphs.append((slide.rows, graph))
            modes.add(used)
        together = _together(graphs, table.n_obs)
        for key, matrix in matrices_of(together).items():
            table.obsp[key] = matrix
        used = modes.pop() if len(modes) == 1 else mode
        about = {"mode": used, "radius_um": radius, "n_neighbours": n_neighbours, "slide_key": slide_key}
        table.uns[ABOUT] = {key: value for key, value in about.items() if value is not None}


def matrices_of(graph: SpatialGraph) -> "dict[str, csr_matrix]":
    """Distances in µm and connectivities of a graph, by their keys in `obsp`."""
    connected = graph.to_csr()
    connected.data = np.ones_like(connected.data)
    return {DISTANCES: graph.to_csr(), CONNECTIVITIES: connected}


def tables_of(adata: "AnnData | Sequence[AnnData]") -> "list[AnnData]":
    """One or several tables as a list."""
    return list(adata) if isinstance(adata, list | tuple) else [adata]  # type: ignore[list-item]


@dataclass(frozen=True)
class SlideRows:
    """A slide's cells in a table: its name and (n,) int64 rows, ascending."""

    name: str
    rows: NDArray[np.int64]


def slides_of(table: "AnnData", slide_key: str | None) -> Iterator[SlideRows]:
    """The slides of a table, in the order of their names; one that has no name if there is no key."""
    if slide_key is None:
        yield SlideRows("table", np.arange(table.n_obs))
        return
    if slide_key not in table.obs:
        known = ", ".join(map(str, table.obs.columns)) or "none"
        raise CellquiltError("slide-key-unknown", f'obs has no column "{slide_key}"', f"columns: {known}")
    names = table.obs[slide_key].astype(str).to_numpy()
    for name in sorted(np.unique(names).tolist()):
        yield SlideRows(name, np.flatnonzero(names == name))


def graph_of(table: "AnnData", rows: NDArray[np.int64]) -> SpatialGraph:
    """The graph of one slide of a table.

    Raises
    ------
    CellquiltError
        ``graph-missing``.
    """
    if DISTANCES not in table.obsp:
        raise CellquiltError(
            "graph-missing", f'obsp has no "{DISTANCES}"', "run cellquilt.spatial_neighbors on the table first"
        )
    matrix: Any = table.obsp[DISTANCES]
    return SpatialGraph.from_csr(matrix if rows.size == table.n_obs else matrix[rows][:, rows])


def coordinates_of(table: "AnnData") -> NDArray[np.float64]:
    """(n_cells, 2) centres of a table's cells, in its own unit.

    Raises
    ------
    CellquiltError
        ``coordinates-missing``, ``coordinates-invalid``.
    """
    if "spatial" not in table.obsm:
        raise CellquiltError(
            "coordinates-missing", 'obsm has no "spatial"', "give the cells' centres there, (n_cells, 2) in µm"
        )
    xy: NDArray[np.float64] = np.asarray(table.obsm["spatial"], dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise CellquiltError("coordinates-invalid", f'obsm["spatial"] is {xy.shape}', "give x and y of each cell")
    bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if bad.size:
        raise CellquiltError(
            "coordinates-invalid",
            f"cell {table.obs_names[bad[0]]} lies at {xy[bad[0]].tolist()}",
            "leave out cells without coordinates",
        )
    return xy


def _check_graph(name: str, graph: SpatialGraph, mode: str, radius: float | None, *, found: bool) -> None:
    """Refuse coordinates that cannot be µm, point out a radius that is too small; any grid may be asked for."""
    usual = _USUAL_UM if mode != "grid" else _USUAL_GRID_UM if found else (0.0, np.inf)
    median = float(np.median(graph.distance_um)) if graph.distance_um.size else np.inf
    few = f"{name}: a cell has {graph.degree.mean() if len(graph) else 0:.1f} neighbours on average"
    if len(graph) > 2 and not usual[0] <= median <= usual[1]:
        said = "there are no neighbours" if np.isinf(median) else f"half of the neighbours are {median:.3g} µm apart"
        raise CellquiltError(
            "coordinates-not-um",
            f"{name}: {said} (radius {radius} µm)",
            "are the coordinates in µm? Give scale_to_um, such as 0.2125 for pixels of a Xenium",
        )
    if len(graph) > 2 and graph.degree.mean() < _FEW_NEIGHBOURS and mode == "delaunay":
        LOG.warning("%s; a larger radius may be better", few)


def _together(graphs: list[tuple[NDArray[np.int64], SpatialGraph]], n: int) -> SpatialGraph:
    """The graphs of slides as one of the whole table."""
    if len(graphs) == 1:
        return graphs[0][1]
    degree = np.zeros(n, dtype=np.int64)
    for rows, graph in graphs:
        degree[rows] = graph.degree
    indptr = offsets_of(degree)
    indices, distance = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    for rows, graph in graphs:
        # Rows ascend, and so do the neighbours of a row in the table.
        place = ranges(indptr[rows], indptr[rows + 1])
        indices[place], distance[place] = rows[graph.indices], graph.distance_um
    return SpatialGraph(indptr, indices, distance)
