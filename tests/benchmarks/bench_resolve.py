"""Resolve cells at patch borders: ours and Sopa's on the same polygons.

Cells are near-circles of 24 to 60 vertices on a jittered grid; those in the overlap of neighbouring patches are there
twice, the second copy shifted and scaled a little (5 % of the polygons are second copies). Needs numpy and shapely
only, so that the peer can run it in its own environment:

    python tests/benchmarks/bench_resolve.py --cells 10000,100000,1000000
    python tests/benchmarks/bench_resolve.py --cells 10000,100000 --peer      # where sopa is installed

One JSON line a size: seconds of CPU and wall for the resolution alone (polygons made, code compiled), peak memory of
the process, cells in and out.
"""

import argparse
import json
import resource
import sys
import time

import numpy as np
import shapely

SPACING = 24.0  # px between cells
PATCH = 2048.0
OVERLAP = 51.2  # px; makes about 5 % second copies in a plane of many patches


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


def ours(geometry, patch, cut, depth, rule):
    from cellquilt.resolve.choose import resolve_cells

    result = resolve_cells(geometry, patch, cut, depth, rule=rule)
    return len(result.geometry), {
        "n_merged": result.n_merged,
        "n_cut": result.n_cut,
        "n_conflicts": result.n_conflicts,
        "conflict_rate": round(result.conflict_rate, 4),
    }


def peer(geometry, patch, cut, depth, rule):
    import geopandas as gpd
    from sopa.segmentation import solve_conflicts

    return len(solve_conflicts(gpd.GeoDataFrame(geometry=geometry), patch_indices=patch)), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="10000,100000", help="sizes, separated by commas")
    parser.add_argument("--lattice", action="store_true", help="cells along pixel edges (needs cellquilt)")
    parser.add_argument("--rule", default="choose", choices=("choose", "union"))
    parser.add_argument("--peer", action="store_true", help="run sopa's solve_conflicts instead")
    options = parser.parse_args()
    run = peer if options.peer else ours
    run(*make_cells(3000, lattice=options.lattice), options.rule)  # compile and import before the clock starts
    for size in options.cells.split(","):
        cells = make_cells(int(size), lattice=options.lattice)
        wall, cpu = time.perf_counter(), time.process_time()
        n_out, details = run(*cells, options.rule)
        line = {
            "benchmark": "resolve",
            "tool": "sopa" if options.peer else f"cellquilt {options.rule}",
            "lattice": options.lattice,
            "cells_in": len(cells[0]),
            "cells_out": n_out,
            "cpu_s": round(time.process_time() - cpu, 3),
            "wall_s": round(time.perf_counter() - wall, 3),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            **details,
        }
        print(json.dumps(line))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
