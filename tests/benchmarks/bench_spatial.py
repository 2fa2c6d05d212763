"""Spatial statistics: ours beside squidpy 1.8.3 (``squidpy-…``) and sopa 2.2.11 (``sopa-…``) on the same slides.

A slide has eight cell types and three domains on a plane of 100 µm² a cell. Give ``--peer`` the Python of an
environment that has the package of the cases' name. squidpy's z is from permutations, ours is exact without; the cases
``…-permuted`` give both as many permutations. squidpy looks at all pairs of cells, so its co-occurrence is measured up
to 30,000 cells; sopa's shapes of niches are for one domain after another as ours.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import OURS, Case, Comparison

_WARM = {"cells": 2000}
_QUICK = {"cells": 5000}
_RADIUS_UM = 80.0
_EDGES_UM = tuple(float(k) for k in range(0, 101, 10))


def _case(package: str, statistic: str, cells: int, **rest: Any) -> Case:
    size = f"{cells // 1_000_000}m" if cells >= 1_000_000 else f"{cells // 1000}k"
    sizes = {"statistic": statistic, "cells": cells, "permutations": rest.pop("permutations", 0)}
    return Case(f"{package}-{statistic}-{size}", sizes, _QUICK, _WARM, **rest)


CASES = (
    _case("sopa", "graph", 100_000, target=10.0),
    _case("sopa", "graph", 1_000_000, target=10.0),
    _case("sopa", "hops", 100_000, target=10.0),
    _case("sopa", "hops", 1_000_000, target=10.0),
    _case("sopa", "niches", 100_000),
    _case("sopa", "niches", 1_000_000),
    _case("squidpy", "enrichment", 100_000, target=10.0),
    _case("squidpy", "enrichment", 1_000_000, target=10.0),
    _case("squidpy", "enrichment-permuted", 100_000, permutations=1000),
    _case("squidpy", "enrichment-permuted", 1_000_000, permutations=1000),
    _case("squidpy", "co_occurrence", 30_000, target=10.0),
    _case("squidpy", "co_occurrence", 1_000_000, peer=False),
)


def make_input(sizes: dict[str, Any], folder: Path) -> None:
    """Places, types and domains as plain arrays."""
    rng = np.random.default_rng(0)
    n = sizes["cells"]
    side = 10 * np.sqrt(n)
    xy = rng.random((n, 2)) * side
    domain = (xy[:, 0] // (side / 8)).astype(int) % 2
    domain[np.linalg.norm(xy - side / 2, axis=1) < side / 5] = 2
    share = np.random.default_rng(1).dirichlet(np.full(8, 0.7), 3)
    kind = (rng.random(n)[:, None] > share[domain].cumsum(axis=1)).sum(axis=1).clip(0, 7)
    np.savez(folder / "slide.npz", xy=xy, domain=domain, kind=kind)


def prepare(sizes: dict[str, Any], folder: Path, tool: str) -> None:
    """Nothing: both take tables in memory."""


def _table(folder: Path) -> Any:
    import anndata
    import pandas as pd

    with np.load(folder / "slide.npz") as arrays:
        obs = pd.DataFrame(
            {
                "cell_type": pd.Categorical(np.char.add("t", arrays["kind"].astype(str))),
                "domain": pd.Categorical(np.char.add("d", arrays["domain"].astype(str))),
                "slide": pd.Categorical(["s"] * arrays["kind"].size),
            }
        )
        obs.index = obs.index.astype(str)
        return anndata.AnnData(obs=obs, obsm={"spatial": arrays["xy"]})


def load(sizes: dict[str, Any], folder: Path, tool: str) -> Callable[[], Any]:
    """The statistic, on a table that has its graph; for ``graph`` the graph itself."""
    statistic, n = sizes["statistic"].removesuffix("-permuted"), sizes["permutations"]
    table = _table(folder)
    return _ours(table, statistic, n) if tool == OURS else _peers(table, statistic, n)


def _ours(table: Any, statistic: str, n_permutations: int) -> Callable[[], Any]:
    import cellquilt as cq

    if statistic == "graph":
        return lambda: cq.spatial_neighbors(table, _RADIUS_UM) or table.obsp["spatial_distances"]
    cq.spatial_neighbors(table, _RADIUS_UM)
    if statistic == "hops":
        return lambda: cq.spatial.group_distances(table, unit="hops", n_permutations=n_permutations).mean
    if statistic == "niches":
        return lambda: cq.spatial.niche_geometry(table).by_domain()["area_um2"].to_numpy()
    if statistic == "enrichment":
        return lambda: cq.spatial.neighbourhood_enrichment(table, n_permutations=n_permutations).z
    return lambda: cq.spatial.co_occurrence(table, edges_um=_EDGES_UM, n_permutations=n_permutations).ratio_within


def _peers(table: Any, statistic: str, n_permutations: int) -> Callable[[], Any]:
    if statistic in ("graph", "hops", "niches"):
        import sopa

        if statistic == "graph":
            return lambda: sopa.spatial.spatial_neighbors(table, (0, _RADIUS_UM)) or table.obsp["spatial_distances"]
        sopa.spatial.spatial_neighbors(table, (0, _RADIUS_UM))
        if statistic == "hops":
            return lambda: sopa.spatial.mean_distance(table, "cell_type", "cell_type").to_numpy()
        return lambda: _areas(sopa.spatial.vectorize_niches(table, "domain"))
    import squidpy

    squidpy.gr.spatial_neighbors(table, coord_type="generic", delaunay=True, radius=(0, _RADIUS_UM))
    if statistic == "enrichment":
        perms = {"n_perms": n_permutations or 1000, "show_progress_bar": False, "copy": True, "seed": 0}
        return lambda: np.asarray(squidpy.gr.nhood_enrichment(table, "cell_type", **perms)[0])
    edges = np.array(_EDGES_UM)
    return lambda: squidpy.gr.co_occurrence(table, "cell_type", interval=edges, copy=True)[0].transpose(2, 0, 1)


def _areas(niches: Any) -> np.ndarray:
    area = niches.geometry.area
    return np.array([area[niches["domain"] == f"d{k}"].sum() for k in range(3)])


def finish(result: Any, sizes: dict[str, Any], folder: Path, tool: str) -> dict[str, Any]:
    """Keep the numbers; of a graph how many edges and how long they are."""
    if sizes["statistic"] == "graph":
        result = np.array([result.nnz, result.data.sum()])
    np.save(folder / f"{tool}.npy", np.asarray(result, dtype=float))
    return {}


def compare(sizes: dict[str, Any], folder: Path) -> Comparison:
    """Equal where the definition is the same; how far apart elsewhere."""
    from harness import PEER

    ours, peers = (np.load(folder / f"{tool}.npy") for tool in (OURS, PEER))
    statistic = sizes["statistic"].removesuffix("-permuted")
    if statistic == "hops":  # of a group to itself sopa has 0, ours is the nearest other cell
        other = ~np.eye(len(ours), dtype=bool)
        ours, peers = ours[other], peers[other]
    apart = np.abs(ours - peers)
    if statistic == "enrichment":
        share = float((apart / np.maximum(np.abs(peers), 5)).max())
        return Comparison(share < 0.15, f"z differ by {100 * share:.1f} % at most: the peer's are from permutations")
    if statistic == "niches":
        share = float((apart / peers).max())
        return Comparison(None, f"areas differ by {100 * share:.1f} % at most: outlines are drawn in other ways")
    worst = float((apart / np.maximum(np.abs(peers), 1e-9)).max())
    # squidpy keeps places in 32 bits: pairs that are just as far as a limit fall on either side.
    return Comparison(worst < (1e-3 if statistic == "co_occurrence" else 1e-4), f"differ by {worst:.1e} at most")
