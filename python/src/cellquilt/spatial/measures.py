"""Spatial statistics of a slide's cell table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.geometry.neighbours import SpatialGraph
from cellquilt.spatial.cooccurrence import RINGS_UM, CoOccurrence, co_occurrence_of
from cellquilt.spatial.distances import UNITS, Distances, distances_of, distances_to_groups
from cellquilt.spatial.enrichment import Enrichment, enrichment_of
from cellquilt.spatial.network import Network, network_of
from cellquilt.spatial.niches import MIN_CELLS, Niches, niches_of
from cellquilt.spatial.slides import CELL_TYPE, DOMAIN, codes_of
from cellquilt.spatial.tables import DISTANCES, coordinates_of, graph_of, spatial_neighbors

if TYPE_CHECKING:
    from anndata import AnnData

PERMUTATIONS = 200
#: A column with more values names no groups, but cells or measurements.
_MOST_GROUPS = 300


def neighbourhood_enrichment(
    table: "AnnData",
    key: str = CELL_TYPE,
    *,
    radius: float | None = 80.0,
    n_permutations: int = PERMUTATIONS,
    seed: int = 0,
    threads: int = 1,
) -> Enrichment:
    """Which groups of cells are neighbours more often than chance has it.

    Parameters
    ----------
    table
        A slide's cells with ``obsm["spatial"]`` in µm.
    key
        Column of `obs` with the groups; cells without one are left out.
    radius
        Longest edge in µm, where the table has no graph (`cellquilt.spatial_neighbors`).
    n_permutations
        For p-values; z is exact without.
    seed
        Of the permutations.
    threads
        Changes nothing but the time.

    Raises
    ------
    CellquiltError
        ``table-empty``, ``column-unknown``, ``groups-empty``, ``groups-too-few``, ``groups-too-many``,
        ``permutations-invalid``, and what `cellquilt.spatial_neighbors` raises.
    """
    check_permutations(n_permutations)
    codes, groups = groups_of(table, key, at_least=2)
    return enrichment_of(
        graph_or_new(table, radius), codes, groups, n_permutations=n_permutations, seed=seed, threads=threads
    )


def co_occurrence(
    table: "AnnData",
    key: str = CELL_TYPE,
    edges_um: Sequence[float] = RINGS_UM,
    *,
    n_permutations: int = PERMUTATIONS,
    seed: int = 0,
    threads: int = 1,
) -> CoOccurrence:
    """Which groups of cells lie within which distance of each other.

    Parameters
    ----------
    table, key, n_permutations, seed, threads
        As `neighbourhood_enrichment` takes them.
    edges_um
        Limits of the rings of distance in µm, ascending. Time grows with the square of the last.

    Raises
    ------
    CellquiltError
        ``rings-invalid``, and what `neighbourhood_enrichment` raises.
    """
    check_permutations(n_permutations)
    codes, groups = groups_of(table, key, at_least=2)
    xy = coordinates_of(table)
    return co_occurrence_of(xy, codes, groups, edges_um, n_permutations=n_permutations, seed=seed, threads=threads)


def group_distances(
    table: "AnnData",
    source_key: str = CELL_TYPE,
    target_key: str | None = None,
    *,
    unit: str = "um",
    radius: float | None = 80.0,
    n_permutations: int = PERMUTATIONS,
    seed: int = 0,
    threads: int = 1,
) -> Distances:
    """How far cells of each group are from the nearest of each other group.

    Parameters
    ----------
    table, radius, n_permutations, seed, threads
        As `neighbourhood_enrichment` takes them.
    source_key
        Column of `obs` with the groups.
    target_key
        Column with the groups to go to, such as domains; None: the same. Under chance, groups of one column are dealt
        to the cells at random; those of another stay where they are, and only the sources are dealt.
    unit
        ``um``: straight lines. ``hops``: steps along the graph.

    Raises
    ------
    CellquiltError
        ``unit-unknown``, and what `neighbourhood_enrichment` raises.
    """
    check_permutations(n_permutations)
    if unit not in UNITS:
        raise CellquiltError("unit-unknown", f'distances in "{unit}"', f"one of {', '.join(UNITS)}")
    codes, sources = groups_of(table, source_key)
    own = target_key is None or target_key == source_key
    others, targets = (codes, sources) if own else groups_of(table, str(target_key))
    xy = coordinates_of(table)
    places = xy if unit == "um" else graph_or_new(table, radius)
    how = {"n_permutations": n_permutations, "seed": seed, "threads": threads}
    if own:
        return distances_of(places, codes, sources, **how)
    return distances_to_groups(places, codes, sources, others, targets, **how)


def niche_geometry(
    table: "AnnData", key: str = DOMAIN, *, min_cells: int = MIN_CELLS, radius: float | None = 80.0
) -> Niches:
    """Find a slide's niches, the connected parts of its domains, and measure their shapes.

    Parameters
    ----------
    table, radius
        As `neighbourhood_enrichment` takes them.
    key
        Column of `obs` with the domains.
    min_cells
        Fewer cells make no niche.

    Raises
    ------
    CellquiltError
        What `neighbourhood_enrichment` raises.
    """
    codes, domains = groups_of(table, key)
    return niches_of(coordinates_of(table), graph_or_new(table, radius), codes, domains, min_cells=min_cells)


def niche_network(
    table: "AnnData",
    cell_type_key: str = CELL_TYPE,
    domain_key: str = DOMAIN,
    *,
    radius: float | None = 80.0,
    threads: int = 1,
) -> Network:
    """Cell types and domains as one network of mean steps along the graph.

    Parameters
    ----------
    table, radius, threads
        As `neighbourhood_enrichment` takes them.
    cell_type_key, domain_key
        Columns of `obs` with the cell types and with the domains.

    Raises
    ------
    CellquiltError
        What `neighbourhood_enrichment` raises.
    """
    types, type_names = groups_of(table, cell_type_key)
    niches, niche_names = groups_of(table, domain_key)
    return network_of(graph_or_new(table, radius), types, type_names, niches, niche_names, threads=threads)


def check_permutations(n_permutations: int) -> None:
    """Refuse a negative number of permutations."""
    if n_permutations < 0:
        raise CellquiltError("permutations-invalid", f"{n_permutations} permutations", "0 for none, or some hundreds")


def groups_of(table: "AnnData", key: str, *, at_least: int = 1) -> tuple[NDArray[np.int64], list[str]]:
    """(n,) number of each cell's group, -1 for none, and the groups' names in natural order.

    Raises
    ------
    CellquiltError
        ``table-empty``, ``column-unknown``, ``groups-empty``, ``groups-too-few``, ``groups-too-many``.
    """
    if not table.n_obs:
        raise CellquiltError("table-empty", "the table has no cells", "was anything segmented? See the slide's report")
    codes, names = codes_of(table, key, "column-unknown")
    if not names:
        raise CellquiltError("groups-empty", f'no cell has a value in obs["{key}"]', "give its cells a group first")
    if len(names) < at_least:
        raise CellquiltError(
            "groups-too-few",
            f'all cells with a value in obs["{key}"] are "{names[0]}"',
            "two groups or more are compared",
        )
    if len(names) > _MOST_GROUPS:
        raise CellquiltError(
            "groups-too-many", f'obs["{key}"] has {len(names)} values, such as "{names[0]}"',
            "name a column of groups, such as cell types or domains",
        )  # fmt: skip
    return codes, names


def graph_or_new(table: "AnnData", radius: float | None) -> SpatialGraph:
    """The table's graph, or where it has none one made of its coordinates; the table stays as it is."""
    rows = np.arange(table.n_obs)
    if DISTANCES in table.obsp:
        return graph_of(table, rows)
    import anndata

    bare = anndata.AnnData(obs=table.obs[[]], obsm={"spatial": coordinates_of(table)})  # type: ignore[dict-item]
    spatial_neighbors(bare, radius)
    return graph_of(bare, rows)
