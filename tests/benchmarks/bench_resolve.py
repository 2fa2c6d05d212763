"""Resolve cells at patch borders: ours and Sopa's on the same polygons.

Cells are near-circles of 24 to 60 vertices on a jittered grid; those in the overlap of neighbouring patches are there
twice, the second copy shifted and scaled a little (5 % of the polygons are second copies). Measured is our default
rule, which chooses one of the copies; Sopa merges them. So for the comparison ours also runs, after the clock, with the
rule ``union``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from harness import OURS, PEER, Case, Comparison

SPACING = 24.0  # px between cells
PATCH = 2048.0
OVERLAP = 51.2  # px; makes about 5 % second copies in a plane of many patches

_WARM = {"cells": 3000}
_QUICK = {"cells": 10_000}
CASES = (
    Case("resolve-10k", {"cells": 10_000, "lattice": False}, warm=_WARM),
    Case("resolve-100k", {"cells": 100_000, "lattice": False}, _QUICK, _WARM, target=20.0),
    Case("resolve-100k-lattice", {"cells": 100_000, "lattice": True}, _QUICK, _WARM),
    Case("resolve-1m", {"cells": 1_000_000, "lattice": False}, _QUICK, _WARM, target=100.0),
)


def make_cells(n: int, *, lattice: bool = False, seed: int = 0):
    """Polygons of all patches: geometry, patch, cut, depth."""
    rng = np.random.default_rng(seed)
    n_first = round(n / 1.05)
    side = int(np.ceil(np.sqrt(n_first)))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)[:n_first]
    centre = (grid + 0.5) * SPACING + rng.uniform(-2, 2, grid.shape)
    radius = rng.uniform(5.5, 9, n_first)  # cells of one patch do not overlap
    patch_xy = (centre // PATCH).astype(np.int64)
    n_x = int(patch_xy.max()) + 1
    # A second copy where the cell lies in the strip that the next patch to the right or below sees as well.
    to_border = (patch_xy + 1) * PATCH - centre
    order = np.argsort(to_border.min(axis=1), kind="stable")
    doubled = order[: n - n_first]
    axis = to_border[doubled].argmin(axis=1)
    second_xy = patch_xy[doubled].copy()
    second_xy[np.arange(doubled.size), axis] += 1
    centres = np.vstack([centre, centre[doubled] + rng.normal(0, 0.4, (doubled.size, 2))])
    radii = np.concatenate([radius, radius[doubled] * rng.uniform(0.95, 1.05, doubled.size)])
    patches = np.vstack([patch_xy, second_xy])
    patch = patches[:, 1] * (n_x + 2) + patches[:, 0]
    inner = np.minimum(centres - patches * PATCH, (patches + 1) * PATCH - centres).min(axis=1) + OVERLAP / 2
    depth = inner - radii

    k = rng.integers(24, 61, n)
    offsets = np.concatenate([[0], np.cumsum(k + 1)])
    owner = np.repeat(np.arange(n), k + 1)
    step = (np.arange(offsets[-1]) - offsets[owner]) % k[owner]
    angle = 2 * np.pi * step / k[owner]
    wobble = 1 + 0.08 * np.cos(3 * angle + rng.uniform(0, 6, n)[owner])
    xy = centres[owner] + (radii[owner] * wobble)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if lattice:
        return _on_lattice(xy, offsets), patch, depth < 0, np.maximum(depth, 0)
    geometry = shapely.polygons(shapely.linearrings(xy, indices=owner))
    return geometry, patch, depth < 0, np.maximum(depth, 0)


def _on_lattice(xy, offsets):
    """The same cells as a label image gives them, along pixel edges."""
    from cellquilt.geometry.polygonize import labels_to_polygons
    from cellquilt.geometry.polygons import Rings
    from cellquilt.geometry.rasterize import polygons_to_labels

    n = offsets.size - 1
    rings = Rings(xy, offsets, np.arange(n + 1), np.ones(n, dtype=bool))
    out = np.empty(n, dtype=object)
    # Copies overlap, so each cell is painted in a field of its own, moved there and back by whole pixels.
    width = 64
    for start in range(0, n, 20_000):
        part = np.arange(start, min(start + 20_000, n))
        shift = np.floor(rings.bounds()[part, :2]) - 1
        column, row = (part - start) % 128, (part - start) // 128
        place = np.stack([column, row], axis=1) * width
        cells = rings.take(part)
        owner = np.repeat(np.arange(part.size), np.diff(cells.ring_offsets))
        moved = Rings(
            cells.coords - shift[owner] + place[owner], cells.ring_offsets, cells.polygon_offsets, cells.exterior
        )
        labels = polygons_to_labels(moved, np.arange(1, part.size + 1), (0, int(row.max() + 1) * width, 0, 128 * width))
        ids, geometry = labels_to_polygons(labels)
        back = (shift - place)[ids - 1]
        counts = shapely.get_num_coordinates(geometry)
        coords = shapely.get_coordinates(geometry) + np.repeat(back, counts, axis=0)
        out[part[ids - 1]] = shapely.set_coordinates(geometry, coords)
    return out


def make_input(sizes: dict[str, Any], folder: Path) -> None:
    """The polygons of all patches as plain arrays, which any version of shapely reads."""
    geometry, patch, cut, depth = make_cells(sizes["cells"], lattice=sizes["lattice"])
    _, coords, offsets = shapely.to_ragged_array(geometry)
    arrays = {"coords": coords, "rings": offsets[0], "polygons": offsets[1], "patch": patch, "cut": cut, "depth": depth}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def prepare(sizes: dict[str, Any], folder: Path, tool: str) -> None:
    """Nothing: both take polygons from memory."""


def _geometry(folder: Path) -> np.ndarray:
    coords, rings, polygons = (np.load(folder / f"{name}.npy") for name in ("coords", "rings", "polygons"))
    return shapely.from_ragged_array(shapely.GeometryType.POLYGON, coords, (rings, polygons))


def _flags(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    patch, cut, depth = (np.load(folder / f"{name}.npy") for name in ("patch", "cut", "depth"))
    return patch, cut, depth


def load(sizes: dict[str, Any], folder: Path, tool: str) -> Callable[[], Any]:
    """The resolution, with the polygons in memory."""
    geometry = _geometry(folder)
    patch, cut, depth = _flags(folder)
    if tool == OURS:
        from cellquilt.resolve.choose import resolve_cells

        return lambda: resolve_cells(geometry, patch, cut, depth)
    import geopandas as gpd
    from sopa.segmentation import solve_conflicts

    cells = gpd.GeoDataFrame(geometry=geometry)
    return lambda: solve_conflicts(cells, patch_indices=patch)


def finish(result: Any, sizes: dict[str, Any], folder: Path, tool: str) -> dict[str, Any]:
    """Cells and areas; of ours also those of the other rule."""
    shapes = np.asarray(result.geometry)
    areas = np.sort(shapely.area(shapes))
    merged = areas
    if tool == OURS:
        from cellquilt.resolve.choose import resolve_cells

        merged = np.sort(shapely.area(resolve_cells(_geometry(folder), *_flags(folder), rule="union").geometry))
    np.savez(folder / f"{tool}.npz", areas=areas, merged=merged)
    return {"cells_in": sizes["cells"], "cells_out": len(areas)}


def compare(sizes: dict[str, Any], folder: Path) -> Comparison:
    """The same cells? With the rule ``union`` the same shapes?"""
    with np.load(folder / f"{OURS}.npz") as ours, np.load(folder / f"{PEER}.npz") as peer:
        n_ours, n_union, n_peer = len(ours["areas"]), len(ours["merged"]), len(peer["areas"])
        same = n_union == n_peer and np.allclose(ours["merged"], peer["areas"], rtol=1e-9)
        total = abs(ours["merged"].sum() / peer["areas"].sum() - 1)
    text = f"{n_ours} cells by choice; by union {n_union} against {n_peer}, "
    text += "all areas the same" if same else f"total area off by {total:.1e}"
    return Comparison(bool(same), text)
