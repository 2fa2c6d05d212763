"""One cell where several patches saw it: choose a copy, do not merge copies.

Neighbouring patches overlap, so a cell near their border is found more than once, and not always the same way. Two
cells of *different* patches compete if they share at least `threshold` of the smaller one's area, or if they are known
to be one: a method that grows cells from prior ones says which. Cells of one patch never compete. Of competitors the
first in a total order is kept:

1. one that does not touch its patch's inner border before one that is cut there;
2. the one that lies deeper in its patch;
3. the larger one, then by its bounds, then by its coordinates.

Non-maximum suppression in that order: a cell is dropped only because of a *kept* cell that it competes with, never
through a chain of others. So where one patch saw two cells and the next a single blob over both, either the two or the
blob survive, whichever comes first, and never neither.

Only where every copy is cut - the cell is larger than the overlap of the patches - is the union taken: of all copies
that hang together, if there is one from each patch at most. If there are two of the same patch, they are two cells,
and the order decides there too.

Fragments: a patch may show something at its border that is no cell, such as the end of a nucleus whose other part it
does not see, split off and called a cell. If another patch has the whole cell, the fragment competes with it and goes.
But the other patch may have found nothing there, or given the pixels to cells that share too little with the fragment
to compete. Then nothing contradicts the fragment but that patch's silence - and this counts, if the patch's window
holds the fragment *whole*: that patch had all of its pixels and what lies around them before it, the fragment's own
patch had not. So what is cut in every copy is dropped if the window of a patch that has no part in it holds all copies
together, and none of them touches an inner border of that window. A cell larger than the overlap is safe: where a
second patch sees it, that copy is cut too, hence one of the copies, and no window holds them all. Patches that failed
or were never segmented have not looked, and must not be among the windows; without windows the rule is off.

Nothing here depends on the order of cells or the numbering of patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numba
import numpy as np
import shapely
from numpy.typing import NDArray

from cellquilt.geometry.packed import HeldPolygons, PackedPolygons, Polygons, polygons_of
from cellquilt.geometry.polygonize import simple_cells
from cellquilt.resolve.overlaps import overlapping_pairs, split_polygons
from cellquilt.resolve.pairs import box_pairs, neighbours_of, shared_areas

RULES = ("choose", "union")


@dataclass(frozen=True)
class Windows:
    """What the patches saw.

    Attributes
    ----------
    patch
        (m,) the patches that were segmented, those without cells included.
    bounds
        (m, 4) float64: min x, min y, max x, max y of their windows, infinite where the side is one of the image's.
    """

    patch: NDArray[np.integer]
    bounds: NDArray[np.float64]

    @classmethod
    def of(cls, patches: Sequence[Mapping[str, Any]], shape: tuple[int, int]) -> "Windows":
        """From the patches' records.

        Parameters
        ----------
        patches
            With ``index``, ``y0``, ``y1``, ``x0``, ``x1`` in pixels, and ``error`` for those that failed: left out.
        shape
            (height, width) of the image in pixels.
        """
        looked = [patch for patch in patches if patch.get("error") is None]
        sides = np.array([[patch[key] for key in ("x0", "y0", "x1", "y1")] for patch in looked], dtype=np.float64)
        sides = sides.reshape(-1, 4)
        low, high = sides[:, :2], sides[:, 2:]
        bounds = np.hstack([np.where(low <= 0, -np.inf, low), np.where(high >= shape[::-1], np.inf, high)])
        return cls(np.array([patch["index"] for patch in looked], dtype=np.int64), bounds)


@dataclass(frozen=True)
class Resolution[Geometry: (NDArray[np.object_], PackedPolygons)]:
    """What `resolve_cells` decided.

    Attributes
    ----------
    geometry
        (n,) the cells, in raster order of their centroids; packed if the input was.
    source
        (n,) int64, the position in the input of each cell; of a merged one, of its first copy in the total order.
    merged
        (n,) bool, the union of several copies.
    cut
        (n,) bool, no copy of the cell was whole; merged ones included.
    member
        (n_input,) int64, the cell that each copy is, or is merged into; -1 for those that are dropped.
    pairs
        (n_conflicts, 2) int64, positions in the input of the copies that competed.
    n_conflicts
        How many pairs of copies competed.
    overlap_ratios
        (n_pairs,) float32, overlap / smaller area of all pairs across patches that share area, ascending. Patches that
        agree give values near 0 (neighbours) and 1 (copies).
    conflict_rate
        Share of those pairs with a ratio in between, 0.1 to 0.9: where patches disagree. 0 if there are no pairs.
    n_cut
        How many of the cells are cut.
    n_merged
        How many of the cells are merged.
    n_fragments
        How many cells were dropped because every copy was cut and another patch, whose window holds all of it, has no
        such cell; copies that hang together count as one.
    n_vanished
        How many kept cells had no square left after the split of overlaps, and so are not among the cells.
    """

    geometry: Geometry
    source: NDArray[np.int64]
    merged: NDArray[np.bool_]
    cut: NDArray[np.bool_]
    member: NDArray[np.int64]
    pairs: NDArray[np.int64]
    n_conflicts: int
    overlap_ratios: NDArray[np.float32]
    conflict_rate: float
    n_cut: int
    n_merged: int
    n_fragments: int
    n_vanished: int

    def facts(self) -> dict[str, Any]:
        """Its numbers for the record, with the histogram of the ratios in 20 bins from 0 to 1."""
        histogram, _ = np.histogram(self.overlap_ratios, bins=20, range=(0.0, 1.0))
        return {
            "n_conflicts": self.n_conflicts,
            "conflict_rate": self.conflict_rate,
            "n_cut": self.n_cut,
            "n_merged": self.n_merged,
            "n_fragments": self.n_fragments,
            "n_vanished": self.n_vanished,
            "overlap_ratio_histogram": histogram.tolist(),
        }


def resolve_cells[Geometry: (NDArray[np.object_], PackedPolygons)](
    geometry: Geometry,
    patch: NDArray[np.integer],
    cut: NDArray[np.bool_],
    depth: NDArray[np.floating],
    *,
    threshold: float = 0.5,
    rule: str = "choose",
    split: bool | None = None,
    step: float = 1.0,
    windows: Windows | None = None,
    identity: NDArray[np.integer] | None = None,
) -> Resolution[Geometry]:
    """Reduce the cells of all patches to one each.

    Parameters
    ----------
    geometry
        (n,) valid Polygons and MultiPolygons, all in one coordinate system.
    patch
        (n,) the patch that each cell comes from.
    cut
        (n,) bool, the cell touches a side of its patch that is not a side of the image.
    depth
        (n,) distance to the nearest inner border of its patch; infinite if there is none.
    threshold
        Overlap / smaller area from which two cells are taken for copies of one, in (0, 1].
    rule
        ``choose`` as described above, or ``union``: merge competitors pair by pair as Sopa does, filling holes and
        keeping the largest part, but in a fixed order (by geometry), so that the result is reproducible.
    split
        Make the result exclusive by `overlaps.split_overlaps`. Default: for ``choose``, not for ``union``.
    step
        Resolution of that split for polygons off the pixel lattice.
    windows
        What each patch saw, to drop fragments. None keeps them, and so does the rule ``union``.
    identity
        (n,) which cell each copy is known to be, 0 where nothing is known, or where a patch has several of its number.
        Copies of one cell compete whatever area they share, those of different cells never: their overlap is split.
        None: nothing is known. ``union`` does not heed it.

    Returns
    -------
    Resolution
    """
    polygons = polygons_of(geometry)
    n = len(polygons)
    patch, cut, depth = np.asarray(patch), np.asarray(cut, dtype=bool), np.asarray(depth, dtype=np.float64)
    identity = np.zeros(n, dtype=np.int64) if identity is None else np.asarray(identity, dtype=np.int64)
    for name, column in (("patch", patch), ("cut", cut), ("depth", depth), ("identity", identity)):
        if column.shape != (n,):
            raise ValueError(f"{n} cells but {name} of shape {column.shape}")
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}, expected one of {', '.join(RULES)}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    if np.isnan(depth).any():
        raise ValueError("depth has NaN")
    if windows is None:
        windows = Windows(patch[:0], np.empty((0, 4)))
    code = np.unique(np.concatenate([patch, windows.patch]), return_inverse=True)[1].astype(np.int64)
    patch, windows = code[:n], Windows(code[n:], np.asarray(windows.bounds, dtype=np.float64).reshape(-1, 4))

    traits = polygons.traits
    bounds, areas = traits.bounds, traits.measures[:, 0]
    a, b = box_pairs(bounds, patch)
    known = np.zeros(a.size, dtype=bool)
    identity = np.where(np.isfinite(bounds).all(axis=1), identity, 0)
    if rule == "choose" and identity.any():
        identity = _unambiguous(identity, patch)
        a, b, known = _with_known(a, b, n, *_copies_of_one(identity, patch))
    near, position = np.unique(np.concatenate([a, b]), return_inverse=True)
    # The pairs lie in the order of patches here, so that those of one block lie in one place.
    shared = shared_areas(polygons, a, b)
    a, b = position.reshape(2, -1).astype(np.int64)
    rank = _total_order(polygons.take(near), bounds[near], areas[near], patch[near], cut[near], depth[near])
    # From here on the cells near others of another patch are numbered by their rank: number 0 wins against all.
    near = near[np.argsort(rank)]
    a, b = np.sort(np.stack([rank[a], rank[b]]), axis=0)
    place = np.lexsort((b, a))
    a, b, shared, known = a[place], b[place], shared[place], known[place]
    smaller = np.minimum(areas[near[a]], areas[near[b]])
    real = shared > 1e-9 * smaller
    told = real | known
    a, b, ratio, real, known = a[told], b[told], np.minimum(shared[told] / smaller[told], 1.0), real[told], known[told]
    compete = (ratio >= threshold) | known
    if rule == "choose":
        of_a, of_b = identity[near[a]], identity[near[b]]
        compete &= known | (of_a == 0) | (of_b == 0)

    far = np.ones(n, dtype=bool)
    far[near] = False
    n_fragments = 0
    if rule == "choose":
        alone = np.flatnonzero(far & cut & np.isfinite(bounds).all(axis=1))
        fragment = _fragments(np.arange(alone.size), bounds[alone], patch[alone], windows)
        far[alone[fragment]] = False
        kept, group, n_near = _choose(a[compete], b[compete], bounds[near], patch[near], cut[near], windows)
        n_fragments = int(fragment.sum()) + n_near
        unions, sources, merged = _unite(polygons.take(near), kept, group)
    else:
        unions, sources, merged, group = _merge_pairs(polygons.take(near), a, b, ratio, threshold)
    first_copy = np.where(far, np.arange(n), -1)
    first_copy[near[group >= 0]] = near[group[group >= 0]]
    source = np.concatenate([np.flatnonzero(far), near[sources]])
    merged = np.concatenate([np.zeros(int(far.sum()), dtype=bool), merged])
    cells = polygons.take(source)
    if merged.any():
        cells = cells.replaced([(np.flatnonzero(merged), unions)])
    order = raster_order(cells)
    cells, source, merged = cells.take(order), source[order], merged[order]
    if split if split is not None else rule == "choose":
        cells = split_polygons(cells, step=step, pairs=overlapping_pairs(cells))
    left = cells.traits.n_parts > 0
    still_cut = cut[source] & left
    place = np.full(n + 1, -1, dtype=np.int64)
    place[source[left]] = np.arange(int(left.sum()))
    cells = cells.take(np.flatnonzero(left))
    return Resolution(
        geometry=cast(Geometry, cells.objects() if isinstance(cells, HeldPolygons) else cells),
        source=source[left],
        merged=merged[left],
        cut=still_cut[left],
        member=place[first_copy],
        pairs=np.column_stack([near[a[compete]], near[b[compete]]]),
        n_conflicts=int(compete.sum()),
        overlap_ratios=np.sort(ratio[real]).astype(np.float32),
        conflict_rate=float(((ratio > 0.1) & (ratio < 0.9))[real].mean()) if real.any() else 0.0,
        n_cut=int(still_cut.sum()),
        n_merged=int((merged & left).sum()),
        n_fragments=n_fragments,
        n_vanished=int((~left).sum()),
    )


def _unambiguous(identity, patch):
    """The identities, 0 instead of one that a patch has twice."""
    order = np.lexsort((patch, identity))
    number, of = identity[order], patch[order]
    twice = (number[1:] == number[:-1]) & (of[1:] == of[:-1])
    return np.where(np.isin(identity, number[1:][twice]), 0, identity)


def _copies_of_one(identity, patch):
    """Pairs (a < b) of positions with one identity in different patches."""
    named = np.flatnonzero(identity)
    order = named[np.lexsort((patch[named], identity[named]))]
    number = identity[order]
    first, second = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for k in range(1, order.size):  # as many rounds as patches have one cell
        same = number[k:] == number[:-k]
        if not same.any():
            break
        first.append(order[:-k][same])
        second.append(order[k:][same])
    a, b = np.concatenate(first), np.concatenate(second)
    return np.minimum(a, b), np.maximum(a, b)


def _with_known(a, b, n, first, second):
    """All pairs, ordered by a, then b, and which of them are among the second ones."""
    known = np.unique(first * n + second)
    pairs = np.union1d(a * n + b, known)
    return *np.divmod(pairs, n), np.isin(pairs, known)


def raster_order(geometry: NDArray[np.object_] | Polygons) -> NDArray[np.int64]:
    """Positions that sort polygons by their centroid's y, then x, then by area, bounds and coordinates.

    The order of the result does not depend on the order of the input; only equal polygons stay as they come. Missing
    and empty ones are last.
    """
    polygons = polygons_of(geometry)
    traits = polygons.traits
    bounds, measures = traits.bounds, traits.measures
    # Rounded, so that the last digits of a sum do not decide between cells side by side.
    keys = [np.round(measures[:, 2], 6), np.round(measures[:, 1], 6)]
    return _order_by(polygons, bounds, measures[:, 0], keys)[0]


def _order_by(polygons, bounds, areas, keys):
    """Order by the keys, then larger area, bounds and coordinates; and a dense rank that equal polygons share."""
    n = len(polygons)
    order = np.lexsort(keys[::-1])
    run = _runs(order, keys)
    # The further keys only where the first ones leave ties, which is rare: sorting by all of them is slow.
    tied = _tied(run)
    if tied.size:
        columns = [-areas, *bounds.T]
        again = np.lexsort((*[column[order[tied]] for column in columns[::-1]], run[tied]))
        order[tied] = order[tied][again]
        run = _runs(order, [*keys, *columns])
        tied = _tied(run)
    dense = run
    if tied.size:
        # All else is equal: compare the coordinates themselves, from a fixed first vertex on.
        equal = polygons.objects(order[tied])
        text = shapely.to_wkb(shapely.normalize(equal))
        text[shapely.is_missing(equal)] = b""
        code = np.unique(text, return_inverse=True)[1]
        again = np.lexsort((order[tied], code, run[tied]))
        order[tied] = order[tied][again]
        codes = np.zeros(n, dtype=np.int64)
        codes[tied] = code[again]
        dense = np.concatenate([[0], np.cumsum((np.diff(run) != 0) | (np.diff(codes) != 0))])
    rank = np.empty(n, dtype=np.int64)
    rank[order] = dense
    return order, rank


def _runs(order, columns):
    """(n,) int64: which run of equal keys each place of the order belongs to."""
    new = np.zeros(order.size, dtype=np.int64)
    for column in columns:
        ordered = column[order]
        new[1:] |= (ordered[1:] != ordered[:-1]) & ~(np.isnan(ordered[1:]) & np.isnan(ordered[:-1]))
    return np.cumsum(new)


def _tied(run):
    """Places whose run has more than one member."""
    same = run[1:] == run[:-1]
    tied = np.zeros(run.size, dtype=bool)
    tied[1:] |= same
    tied[:-1] |= same
    return np.flatnonzero(tied)


def _total_order(polygons, bounds, areas, patch, cut, depth):
    """(n,) int64: each cell's place in the total order, 0 first."""
    n = len(polygons)
    _, rank = _order_by(polygons, bounds, areas, [cut.astype(np.float64), -depth])
    patch_rank = np.zeros(n, dtype=np.int64)
    if n and np.bincount(rank).max() > 1:
        # Equal cells of different patches: the patches' numbers must not decide, their contents may. Patches with the
        # same cells throughout are interchangeable.
        by_patch = np.lexsort((rank, patch))
        patches, starts = np.unique(patch[by_patch], return_index=True)
        contents = [part.astype(">i8").tobytes() for part in np.split(rank[by_patch], starts[1:])]
        code = {content: k for k, content in enumerate(sorted(set(contents)))}
        patch_rank = np.array([code[content] for content in contents])[np.searchsorted(patches, patch)]
    out = np.empty(n, dtype=np.int64)
    out[np.lexsort((patch, patch_rank, rank))] = np.arange(n)
    return out


def _choose(a, b, bounds, patch, cut, windows):
    """Which cells are kept, and for cut ones which kept cell they are united with. Cells are numbered by rank.

    Returns
    -------
    kept
        (n,) bool.
    group
        (n,) int64, the kept cell that a cell is united with (itself, if kept alone); -1 if dropped.
    n_fragments
        How many components of cut copies were dropped.
    """
    n = len(bounds)
    offsets, partners = neighbours_of(n, a, b)
    kept = np.zeros(n, dtype=np.bool_)
    dropped = np.zeros(n, dtype=np.bool_)
    _suppress(~cut, offsets, partners, kept, dropped)
    # What is left is cut, and so is every copy of it that is left.
    alive = cut & ~dropped
    component = _components(alive, offsets, partners)
    left = np.flatnonzero(alive)
    fragment = _fragments(component[left], bounds[left], patch[left], windows)
    n_fragments = np.unique(component[left[fragment]]).size
    alive[left[fragment]] = False
    left = left[~fragment]
    pairs = np.unique(np.column_stack([component[left], patch[left]]), axis=0, return_counts=True)
    contested = np.zeros(n + 1, dtype=bool)
    contested[pairs[0][pairs[1] > 1, 0]] = True  # two cells of one patch hang together through another's
    united = alive & ~contested[component]
    group = np.full(n, -1, dtype=np.int64)
    group[united] = component[united]
    kept[united & (component == np.arange(n))] = True
    _suppress(alive & contested[component], offsets, partners, kept, dropped)
    alone = kept & (group < 0)
    group[alone] = np.flatnonzero(alone)
    return kept, group, n_fragments


def _fragments(component, bounds, patch, windows):
    """(n,) bool: which cells belong to a component that lies inside the window of a patch that has no part in it.

    Parameters
    ----------
    component
        (n,) int64, of cut cells that hang together.
    bounds, patch
        (n, 4) and (n,) of these cells.
    windows
        Of all patches, with the same codes as `patch`.
    """
    if not component.size or not windows.patch.size:
        return np.zeros(component.size, dtype=bool)
    ids, index = np.unique(component, return_inverse=True)
    together = np.empty((ids.size, 4))
    for side, outermost in enumerate((np.minimum, np.minimum, np.maximum, np.maximum)):
        together[:, side] = -np.inf if outermost is np.maximum else np.inf
        outermost.at(together[:, side], index, bounds[:, side])
    # An index of the windows: the sides that are the image's end where the last cell ends.
    low, high = together[:, :2].min(axis=0), together[:, 2:].max(axis=0)
    boxes = np.clip(windows.bounds, [*low, *low], [*high, *high])
    middle = shapely.points((together[:, :2] + together[:, 2:]) / 2)
    which, window = shapely.STRtree(shapely.box(*boxes.T)).query(middle)
    cell, seen = together[which], windows.bounds[window]
    whole = (seen[:, :2] < cell[:, :2]).all(axis=1) & (cell[:, 2:] < seen[:, 2:]).all(axis=1)
    which, window = which[whole], windows.patch[window[whole]]
    n_patches = 1 + max(int(patch.max()), int(windows.patch.max()))
    own = np.isin(which * n_patches + window, index * n_patches + patch)
    dropped = np.zeros(ids.size, dtype=bool)
    dropped[which[~own]] = True
    return dropped[index]


@numba.njit(cache=True, nogil=True)
def _suppress(subset, offsets, partners, kept, dropped):
    """Non-maximum suppression of a subset, in order of number; what it keeps also drops cells outside the subset."""
    for i in range(subset.size):
        if not subset[i] or dropped[i]:
            continue
        kept[i] = True
        for k in range(offsets[i], offsets[i + 1]):
            if not kept[partners[k]]:
                dropped[partners[k]] = True


@numba.njit(cache=True, nogil=True)
def _components(alive, offsets, partners):
    """The first cell of each connected component of living cells."""
    n = alive.size
    out = np.full(n, n, dtype=np.int64)
    stack = np.empty(n + 1, dtype=np.int64)
    for i in range(n):
        if not alive[i] or out[i] < n:
            continue
        out[i] = i
        stack[0] = i
        depth = 1
        while depth > 0:
            depth -= 1
            c = stack[depth]
            for k in range(offsets[c], offsets[c + 1]):
                p = partners[k]
                if alive[p] and out[p] == n:
                    out[p] = i
                    stack[depth] = p
                    depth += 1
    return out


def _unite(polygons, kept, group):
    """The kept cells, and the unions that take the place of those with a group."""
    winners = np.flatnonzero(kept)
    place = np.full(len(polygons) + 1, -1, dtype=np.int64)
    place[winners] = np.arange(winners.size)
    others = np.flatnonzero((group >= 0) & (group != np.arange(len(polygons))))
    others = others[np.argsort(group[others], kind="stable")]
    owners, owner = np.unique(place[group[others]], return_inverse=True)
    merged = np.zeros(winners.size, dtype=bool)
    merged[owners] = True
    unions, parts = polygons.objects(winners[owners]), polygons.objects(others)
    while owner.size:  # one round for each further copy: at most as many as patches meet in a place
        first = np.ones(owner.size, dtype=bool)
        first[1:] = owner[1:] != owner[:-1]
        unions[owner[first]] = shapely.union(unions[owner[first]], parts[first])
        owner, parts = owner[~first], parts[~first]
    # No vertices in line, and a start that does not depend on how the union was made.
    return shapely.normalize(shapely.simplify(unions, 0)), winners, merged


def _merge_pairs(polygons, a, b, ratio, threshold):
    """Sopa's rule: pair by pair, replace both by the largest part of their union if they share enough *now*.

    One merge decides the next, so this is a loop; but only over pairs that merge or touch something merged.
    """
    n = len(polygons)
    current = np.arange(n)  # the pool's cell that stands for each input cell
    members = [[i] for i in range(n)]
    pool = list(polygons.objects())
    changed = np.zeros(n, dtype=bool)
    for i, j, share in zip(a.tolist(), b.tolist(), ratio.tolist(), strict=True):
        p, q = int(current[i]), int(current[j])
        if p == q:
            continue
        if changed[i] or changed[j]:
            shared = shapely.area(shapely.intersection(pool[p], pool[q]))
            merge = shared >= threshold * min(shapely.area(pool[p]), shapely.area(pool[q]))
        else:
            merge = share >= threshold
        if merge:
            union = shapely.make_valid(shapely.union(pool[p], pool[q]))
            parts = shapely.get_parts(union)
            parts = parts[np.isin(shapely.get_type_id(parts), (3, 6))]
            pool.append(simple_cells(np.array([shapely.union_all(parts)], dtype=object))[0])
            members.append(members[p] + members[q])
            current[members[-1]] = len(pool) - 1
            changed[members[-1]] = True
    final, first, group = np.unique(current, return_index=True, return_inverse=True)  # `first` is the best ranked copy
    merged = changed[first]
    unions = np.empty(int(merged.sum()), dtype=object)
    unions[:] = [pool[k] for k in final[merged].tolist()]
    return shapely.normalize(shapely.simplify(unions, 0)), first, merged, first[group]
