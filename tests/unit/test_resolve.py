"""Choosing between copies of cells, splitting overlaps, growing nuclei: the issue's cases and the laws they obey."""

import subprocess
import sys

import numpy as np
import pytest
import shapely
from cellquilt.core.log import LOG
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import count_shapes, write_geoparquet
from cellquilt.core.store import Store, new_store
from cellquilt.geometry.polygonize import labels_to_polygons
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.rasterize import polygons_to_labels
from cellquilt.readers import convert_slide
from cellquilt.resolve.choose import Windows, raster_order, resolve_cells
from cellquilt.resolve.nuclei import expand_nuclei
from cellquilt.resolve.overlaps import overlapping_pairs, split_overlaps
from cellquilt.resolve.pairs import box_pairs, overlap_areas
from cellquilt.resolve.stage import resolve_slide
from hypothesis import given, settings
from hypothesis import strategies as st

box = shapely.box


def resolve(rows, **options):
    """Rows of (polygon, patch, cut, depth)."""
    geometry = np.array([row[0] for row in rows], dtype=object)
    patch, cut, depth = (np.array([row[k] for row in rows]) for k in (1, 2, 3))
    return resolve_cells(geometry, patch, cut, depth, **options)


def blob(rng, centre, radius, n=10):
    angles = np.sort(rng.uniform(0, 2 * np.pi, n))
    r = rng.uniform(0.5, 1, n) * radius
    return shapely.Polygon(np.c_[centre[0] + r * np.cos(angles), centre[1] + r * np.sin(angles)]).buffer(0)


def crowd(rng, n, lattice):
    """Cells of up to four patches, crowded, some cut, some exact copies, some equally deep."""
    rows = []
    for _ in range(n):
        x, y = rng.integers(0, 14, 2)
        cell = box(x, y, x + rng.integers(2, 8), y + rng.integers(2, 8))
        if not lattice:
            cell = blob(rng, (x, y), 4)
        rows.append((cell, int(rng.integers(0, 4)), bool(rng.random() < 0.4), float(rng.integers(0, 3))))
        if rng.random() < 0.4:
            rows.append((cell, int(rng.integers(0, 4)), *rows[-1][2:]))
    return rows


def wkb(geometry):
    return shapely.to_wkb(shapely.normalize(geometry)).tolist()


# --- the cases of the issue -------------------------------------------------------------------------------------


def test_two_real_cells_against_one_mask_of_the_next_patch():
    two = [(box(0, 0, 10, 10), 0, False, 30.0), (box(10, 0, 20, 10), 0, False, 20.0)]
    blob_cell = box(0, 0, 20, 10)
    # The two lie deeper: both are kept, the blob goes.
    result = resolve([*two, (blob_cell, 1, False, 10.0)])
    assert wkb(result.geometry) == wkb([two[0][0], two[1][0]])
    assert result.source.tolist() == [0, 1]
    # The blob lies deepest: it alone is kept.
    result = resolve([*two, (blob_cell, 1, False, 40.0)])
    assert wkb(result.geometry) == wkb([blob_cell])
    # In between: it loses against the first of the two, and then cannot take the second with it.
    result = resolve([*two, (blob_cell, 1, False, 25.0)])
    assert result.source.tolist() == [0, 1]
    assert result.n_conflicts == 2
    assert not result.merged.any()


def test_one_against_three_is_never_lost():
    three = [box(0, 0, 8, 8), box(8, 0, 16, 8), box(16, 0, 24, 8)]
    for depth, expected in ((5.0, 3), (50.0, 1)):
        result = resolve([(box(0, 0, 24, 8), 7, False, depth), *[(c, 3, False, 10.0 + i) for i, c in enumerate(three)]])
        assert len(result.geometry) == expected
        assert shapely.union_all(result.geometry).area == 24 * 8


def test_a_chain_of_four_is_not_one_cell():
    # Each shares 60 % with the next, none with the one after: a union of all would make one cell 28 long.
    chain = [(box(4 * i, 0, 4 * i + 10, 10), i, False, 10.0 - i) for i in range(4)]
    result = resolve(chain, split=False)
    assert result.source.tolist() == [0, 2]  # 1 goes with 0, 3 goes with 2
    assert not result.merged.any()
    result = resolve(chain)
    assert shapely.area(shapely.intersection(*result.geometry)) == 0
    assert shapely.area(result.geometry).tolist() == [90, 90]  # the 2 × 10 they share is halved


def test_small_inside_large():
    large, small = box(0, 0, 20, 20), box(8, 8, 12, 12)
    assert resolve([(large, 0, False, 9.0), (small, 1, False, 5.0)]).source.tolist() == [0]
    assert resolve([(large, 0, True, 9.0), (small, 1, False, 5.0)]).source.tolist() == [1]
    # In one patch they never compete: the large one gets a hole, and nothing is counted twice.
    result = resolve([(large, 0, False, 9.0), (small, 0, False, 5.0)])
    assert sorted(shapely.area(result.geometry)) == [16, 384]
    assert overlapping_pairs(result.geometry)[0].size == 0


def test_a_cell_cut_in_every_copy_is_united():
    # A cell of 40 x 40 around the corner of four patches that overlap by 20: every copy is cut.
    copies = [box(0, 0, 30, 30), box(10, 0, 40, 30), box(0, 10, 30, 40), box(10, 10, 40, 40)]
    for n in (2, 3, 4):
        rows = [(c, i, True, 0.0) for i, c in enumerate(copies[:n])]
        result = resolve(rows)
        assert len(result.geometry) == 1
        assert result.geometry[0].equals(shapely.union_all(copies[:n]))
        assert result.merged.tolist() == [True]
        assert (result.n_cut, result.n_merged) == (1, 1)
    assert len(shapely.get_coordinates(result.geometry[0])) == 5  # no vertex in line is left of the seams
    # One whole copy is enough to make the cut ones go.
    result = resolve([(box(0, 0, 40, 40), 9, False, 3.0), *rows])
    assert wkb(result.geometry) == wkb([box(0, 0, 40, 40)])
    assert (result.n_cut, result.n_merged, result.merged.tolist()) == (0, 0, [False])


def test_cut_cells_of_one_patch_are_never_united():
    rows = [(box(0, 0, 10, 10), 0, True, 0.0), (box(10, 0, 20, 10), 0, True, 0.0), (box(0, 0, 20, 9), 1, True, 0.0)]
    result = resolve(rows)
    assert not result.merged.any()
    assert result.source.tolist() in ([0, 1], [2])


def test_a_chain_of_cut_copies_along_a_row():
    rows = [(box(10 * i, 0, 10 * i + 20, 10), i, True, 0.0) for i in range(4)]
    result = resolve(rows)
    assert wkb(result.geometry) == wkb([box(0, 0, 50, 10)])
    assert result.n_merged == 1


def test_neighbours_below_the_threshold_stay_two_and_share_nothing():
    a, b = box(0, 0, 10, 10), box(6, 0, 16, 10)  # 40 %
    result = resolve([(a, 0, False, 5.0), (b, 1, False, 5.0)])
    assert wkb(result.geometry) == wkb([box(0, 0, 8, 10), box(8, 0, 16, 10)])
    assert result.overlap_ratios.tolist() == pytest.approx([0.4])
    assert result.conflict_rate == 1.0
    assert result.n_conflicts == 0
    assert len(resolve([(a, 0, False, 5.0), (b, 1, False, 5.0)], threshold=0.4).geometry) == 1


# --- fragments: what a patch cut and another one saw whole ------------------------------------------------------

# Patches 0 and 1 side by side, the image 100 wide and 60 high: 0 sees x 0 to 60, 1 sees x 40 to 100.
PAIR = [{"index": 0, "y0": 0, "y1": 60, "x0": 0, "x1": 60}, {"index": 1, "y0": 0, "y1": 60, "x0": 40, "x1": 100}]


def test_copies_known_to_be_one_cell_compete_whatever_they_share():
    """Two patches grew the same prior cell into different places: it is one cell, the deeper one."""
    rows = [
        (box(0, 0, 10, 10), 0, False, 5.0),
        (box(9, 0, 19, 10), 1, False, 7.0),  # shares a tenth
        (box(30, 0, 40, 10), 0, False, 9.0),
        (box(60, 0, 70, 10), 1, False, 2.0),  # shares nothing, not even a box
        (box(80, 0, 90, 10), 0, False, 1.0),
        (box(86, 0, 96, 10), 1, False, 2.0),  # a neighbour, of another number
    ]
    assert len(resolve(rows).source) == 6
    known = resolve(rows, identity=np.array([4, 4, 7, 7, 1, 2]))
    assert known.source.tolist() == [1, 2, 4, 5]
    assert known.member.tolist() == [-1, 0, 1, -1, 2, 3]
    assert known.n_conflicts == 2
    assert known.overlap_ratios.tolist() == pytest.approx([0.1, 0.4])  # what shares nothing tells nothing
    assert resolve(rows, identity=np.array([4, 4, 7, 7, 1, 2]), rule="union").n_conflicts == 0


def test_a_number_that_a_patch_has_twice_says_nothing():
    rows = [
        (box(0, 0, 10, 10), 0, False, 5.0),
        (box(30, 0, 40, 10), 0, False, 5.0),
        (box(9, 0, 19, 10), 1, False, 7.0),
    ]
    assert len(resolve(rows, identity=np.array([3, 3, 3])).source) == 3
    assert len(resolve(rows, identity=np.array([3, 0, 3])).source) == 2
    assert len(resolve(rows, identity=np.zeros(3, dtype=int)).source) == 3


def test_copies_known_to_be_different_cells_do_not_compete():
    """The deepest cell covers most of its neighbour's copy in the other patch; the neighbour's own copy here is cut."""
    rows = [
        (box(0, 0, 10, 10), 0, False, 9.0),
        (box(4, 0, 24, 10), 1, False, 8.0),
        (box(12, 0, 20, 10), 0, True, 0.0),
    ]
    windows = Windows(np.array([0, 1]), np.array([[-50.0, -50, 20, 50], [-10, -50, 90, 50]]))
    told = {"identity": np.array([1, 2, 2]), "windows": windows}
    found = resolve(rows, **told)
    assert found.source.tolist() == [0, 1]
    assert shapely.area(found.geometry).sum() == 240
    assert resolve(rows, windows=windows).source.tolist() == [0]  # nothing is known: one cell
    order = [2, 0, 1]
    again = resolve([rows[k] for k in order], identity=told["identity"][order], windows=windows)
    assert [order[k] for k in again.source] == [0, 1]


def test_three_patches_know_one_cell():
    rows = [(box(20 * k, 0, 20 * k + 10, 10), k, False, float(k == 1)) for k in range(3)]
    assert resolve(rows, identity=np.array([5, 5, 5])).source.tolist() == [1]


def seen(patches, shape=(60, 100)):
    return Windows.of([{"error": None, **patch} for patch in patches], shape)


def test_a_cut_cell_that_another_patch_saw_whole_and_did_not_find_is_dropped():
    fragment = (box(52, 20, 60, 30), 0, True, 0.0)
    other = (box(10, 10, 20, 20), 0, False, 10.0)
    result = resolve([fragment, other], windows=seen(PAIR))
    assert (result.source.tolist(), result.n_fragments, result.n_cut) == ([1], 1, 0)
    # The image's own sides cut nothing: there the other patch saw no less.
    edge = (box(52, 0, 60, 10), 0, True, 0.0)
    assert resolve([edge], windows=seen(PAIR)).n_fragments == 1
    # Its pixels belong to a cell of the other patch that is too large a part outside to compete.
    across = (box(56, 20, 70, 30), 1, False, 16.0)
    result = resolve([fragment, across], windows=seen(PAIR), threshold=0.6)
    assert wkb(result.geometry) == wkb([across[0]])
    assert (result.n_fragments, result.n_conflicts) == (1, 0)
    # Without windows, or by Sopa's rule, it stays.
    for options in ({}, {"windows": seen(PAIR), "rule": "union"}):
        result = resolve([fragment, other], **options)
        assert (len(result.geometry), result.n_fragments, result.n_cut) == (2, 0, 1)


@pytest.mark.parametrize(
    ("cell", "patches"),
    [
        (box(40, 20, 60, 30), PAIR),  # reaches to the inner border of the other window too
        (box(30, 20, 60, 30), PAIR),  # larger than the overlap
        (box(52, 20, 60, 30), PAIR[:1]),  # the other patch was left out as empty
        (box(52, 20, 60, 30), [PAIR[0], {**PAIR[1], "error": {"code": "patch-failed"}}]),
        (box(52, 20, 60, 30), [{**PAIR[0], "x1": 80}]),  # cut by a speck that is gone; its own window is no witness
        (box(52, 20, 60, 30), []),
    ],
)
def test_a_cut_cell_that_no_other_patch_saw_whole_is_kept(cell, patches):
    result = resolve([(cell, 0, True, 0.0)], windows=seen(patches))
    assert wkb(result.geometry) == wkb([cell])
    assert (result.n_fragments, result.n_cut, result.cut.tolist()) == (0, 1, [True])


def test_a_whole_cell_is_never_a_fragment():
    assert resolve([(box(45, 20, 55, 30), 0, False, 5.0)], windows=seen(PAIR)).n_fragments == 0


def test_a_cell_larger_than_the_overlap_is_united_though_its_parts_lie_in_the_other_window():
    # 40 x 40 around the corner of four patches, each copy cut: a part of it is whole in no other patch's result.
    sides = {0: (0, 70), 1: (50, 120)}
    patches = [
        {"index": 2 * i + j, "y0": sides[i][0], "y1": sides[i][1], "x0": sides[j][0], "x1": sides[j][1]}
        for i in (0, 1)
        for j in (0, 1)
    ]
    cell = box(40, 40, 80, 80)
    windows = [box(p["x0"], p["y0"], p["x1"], p["y1"]) for p in patches]
    rows = [(cell.intersection(window), p["index"], True, 0.0) for window, p in zip(windows, patches, strict=True)]
    result = resolve(rows, windows=seen(patches, (120, 120)))
    assert wkb(result.geometry) == wkb([cell])
    assert (result.n_merged, result.n_fragments) == (1, 0)
    # Small enough for the overlap, it is cut by two patches at the same side, and the two below hold it whole.
    low = box(52, 62, 60, 70)
    rows = [(low, 0, True, 0.0), (low, 1, True, 0.0)]
    result = resolve(rows, windows=seen(patches, (120, 120)))
    assert (len(result.geometry), result.n_fragments, result.n_conflicts) == (0, 1, 1)
    # One of them cut a longer cell there: what hangs together is not whole anywhere.
    rows[1] = (box(52, 45, 60, 70), 1, True, 0.0)
    assert resolve(rows, windows=seen(patches, (120, 120))).n_fragments == 0


def test_cut_rivals_of_one_patch_go_together_or_stay_together():
    # Two cells of patch 0 against a blob of patch 2, all cut at the same line; patch 1 holds all of it.
    patches = [*PAIR, {"index": 2, "y0": 0, "y1": 60, "x0": 0, "x1": 60}]
    rows = [(box(50, 20, 60, 30), 0, True, 0.0), (box(50, 30, 60, 40), 0, True, 0.0), (box(50, 20, 60, 40), 2, True, 0)]
    assert len(resolve(rows, windows=seen(patches[::2])).geometry) in (1, 2)
    result = resolve(rows, windows=seen(patches))
    assert (len(result.geometry), result.n_fragments) == (0, 1)


def strip(rng, n):
    """Cells of four patches in a row, each seen by its patches as they lie in their windows, some of them missed."""
    windows = [(0, 40), (20, 60), (40, 80), (60, 100)]
    patches = [{"index": k, "y0": 0, "y1": 30, "x0": a, "x1": b} for k, (a, b) in enumerate(windows)]
    rows = []
    for _ in range(n):
        x, y = int(rng.integers(0, 95)), int(rng.integers(0, 24))
        cell = box(x, y, min(x + int(rng.integers(2, 30)), 100), y + int(rng.integers(2, 7)))
        for k, (a, b) in enumerate(windows):
            part = cell.intersection(box(a, 0, b, 30))
            if part.area == 0 or rng.random() < 0.4:
                continue
            low, _, high, _ = part.bounds
            depth = min(low - a if a else np.inf, b - high if b < 100 else np.inf)
            rows.append((part, k, depth <= 0, depth))
    failed = int(rng.integers(0, 8))
    patches = [{**p, "error": {"code": "patch-failed"} if p["index"] == failed else None} for p in patches]
    return [row for row in rows if row[1] != failed], patches


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 8))
def test_fragments_do_not_depend_on_the_order_of_cells_and_patches(seed, n):
    rng = np.random.default_rng(seed)
    rows, patches = strip(rng, n)
    if not rows:
        return
    first = resolve(rows, windows=seen(patches, (30, 100)), split=False)
    numbers = rng.permutation(4) + 10
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    shuffled = [(cell, numbers[patch], cut, depth) for cell, patch, cut, depth in shuffled]
    renumbered = [{**patches[i], "index": int(numbers[i])} for i in rng.permutation(4)]
    second = resolve(shuffled, windows=seen(renumbered, (30, 100)), split=False)
    assert shapely.to_wkb(first.geometry).tolist() == shapely.to_wkb(second.geometry).tolist()
    assert (first.n_fragments, first.n_cut, first.n_merged) == (second.n_fragments, second.n_cut, second.n_merged)

    # The law itself: against the same without the rule, just those cells go that a patch with no part in them holds.
    without = resolve(rows, split=False)
    looked = [p for p in patches if p["error"] is None]
    gone = 0
    for cell, source, cut in zip(without.geometry, without.source, without.cut, strict=True):
        low, _, high, _ = cell.bounds
        whole = any(
            (p["x0"] == 0 or p["x0"] < low) and (p["x1"] == 100 or high < p["x1"]) and p["index"] != rows[source][1]
            for p in looked
        )
        there = any(cell.equals(other) for other in first.geometry)
        assert there or (cut and whole)
        gone += not there
    assert (gone > 0) == (first.n_fragments > 0)


def test_the_stage_drops_fragments_by_the_windows_of_the_patch_results(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(LOG, "propagate", True)  # once the command line has run, it does not
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 900, (60, 100)).astype(np.uint16)
    metadata = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(tmp_path / "s.ome.tif", pixels, ome=True, metadata=metadata)
    chosen = Settings(segmentation="generic")
    store = convert_slide(tmp_path / "s.ome.tif", technology="ome_tif", output=tmp_path / "s.zarr", settings=chosen)
    cells = np.array([box(52, 20, 60, 30), box(10, 10, 20, 20)], dtype=object)

    def resolved(second, name):
        columns = {"patch": np.zeros(2, np.int32), "label": np.arange(2, dtype=np.int32)}
        columns |= {"cut": np.array([True, False]), "depth_px": np.array([0, 10], np.float32)}
        patches = [{**PAIR[0], "error": None}, {**PAIR[1], "error": second}]
        write_geoparquet(tmp_path / f"{name}.parquet", cells, columns, metadata={"patches": patches})
        out = resolve_slide(store, [tmp_path / f"{name}.parquet"], settings=chosen, output=tmp_path / f"{name}.zarr")
        (record,) = [record for record in Store(out).records if record["stage"] == "resolve"]
        return record["facts"]

    with caplog.at_level("INFO", logger="cellquilt"):
        facts = resolved(None, "both")
        assert (facts["n_cells"], facts["n_fragments"], facts["n_cut"]) == (1, 1, 0)
        assert "1 cells, 1 fragments at patch borders dropped" in caplog.text
        facts = resolved({"code": "patch-failed", "message": "", "hint": ""}, "failed")
        assert (facts["n_cells"], facts["n_fragments"], facts["n_cut"]) == (2, 0, 1)


# --- laws -------------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 14),
    lattice=st.booleans(),
    rule=st.sampled_from(["choose", "union"]),
)
def test_the_order_of_cells_and_the_numbers_of_patches_do_not_matter(seed, n, lattice, rule):
    rng = np.random.default_rng(seed)
    rows = crowd(rng, n, lattice)
    first = resolve(rows, rule=rule)
    renumbered = rng.permutation(4) + 10
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    second = resolve([(cell, renumbered[patch], cut, depth) for cell, patch, cut, depth in shuffled], rule=rule)
    assert shapely.to_wkb(first.geometry).tolist() == shapely.to_wkb(second.geometry).tolist()
    assert first.merged.tolist() == second.merged.tolist()
    assert first.overlap_ratios.tolist() == second.overlap_ratios.tolist()
    assert (first.n_cut, first.n_conflicts, first.conflict_rate) == (
        second.n_cut,
        second.n_conflicts,
        second.conflict_rate,
    )


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 14), lattice=st.booleans())
def test_what_is_dropped_competed_with_something_kept(seed, n, lattice):
    rng = np.random.default_rng(seed)
    rows = crowd(rng, n, lattice)
    result = resolve(rows, split=False)
    geometry = np.array([row[0] for row in rows], dtype=object)
    patch = np.array([row[1] for row in rows])
    cut = np.array([row[2] for row in rows])
    ratio = shapely.area(shapely.intersection(geometry[:, None], geometry)) / np.minimum(
        shapely.area(geometry)[:, None], shapely.area(geometry)
    )
    compete = (ratio >= 0.5 - 1e-9) & (patch[:, None] != patch)
    if (np.abs(ratio - 0.5) < 1e-9).any():
        return  # decided by rounding here
    for i in set(range(len(rows))) - set(result.source.tolist()):
        # By a kept one directly, or as a part of a union (both of them cut).
        assert (compete[i, result.source] & ~result.merged).any() or (cut[i] and result.merged.any())
    whole = result.source[~result.merged]
    assert not compete[np.ix_(whole, whole)].any()
    for cell, source in zip(result.geometry[~result.merged], whole, strict=True):
        assert cell is geometry[source]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 14))
def test_whole_cells_equal_a_plain_suppression(seed, n):
    rng = np.random.default_rng(seed)
    cells = [blob(rng, rng.uniform(0, 14, 2), 4) for _ in range(n)]
    patch, depth = rng.integers(0, 3, n), rng.permutation(n).astype(float)
    kept: list[int] = []
    for i in np.argsort(-depth).tolist():
        rivals = [j for j in kept if patch[j] != patch[i]]
        shares = [cells[i].intersection(cells[j]).area / min(cells[i].area, cells[j].area) for j in rivals]
        if not any(share >= 0.5 for share in shares):
            kept.append(i)
    result = resolve_cells(np.array(cells, dtype=object), patch, np.zeros(n, bool), depth, split=False)
    assert sorted(result.source.tolist()) == sorted(kept)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 12), lattice=st.booleans())
def test_splitting_leaves_no_overlap_and_loses_no_ground(seed, n, lattice):
    rng = np.random.default_rng(seed)
    geometry = np.array([row[0] for row in crowd(rng, n, lattice)], dtype=object)
    out = split_overlaps(geometry)
    assert shapely.is_valid(out).all()
    # Measured by our own kernel: edges that all but coincide, as the cuts make them, trip shapely's overlay.
    i, j = np.triu_indices(len(out), 1)
    assert overlap_areas(Rings.from_shapely(out), i, j).sum() < 1e-6
    assert shapely.area(out).sum() == pytest.approx(shapely.union_all(geometry).area, abs=1e-6)
    both = Rings.from_shapely(np.concatenate([out, geometry]))
    own = np.arange(len(out))
    np.testing.assert_allclose(overlap_areas(both, own, own + len(out)), shapely.area(out), atol=1e-6)
    if lattice:
        assert (shapely.get_coordinates(out) == np.floor(shapely.get_coordinates(out))).all()


def test_the_split_follows_the_line_of_equal_distance():
    a, b = shapely.Point(0, 0).buffer(10, 32), shapely.Point(16, 0).buffer(10, 32)
    out = split_overlaps(np.array([a, b], dtype=object), step=0.25)
    assert out[0].bounds[2] == pytest.approx(8, abs=0.26)
    assert out[1].bounds[0] == pytest.approx(8, abs=0.26)
    assert out[0].area == pytest.approx(out[1].area, rel=0.02)
    far = box(100, 100, 110, 110)
    assert split_overlaps(np.array([a, far], dtype=object))[1] is far


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_overlap_areas_equal_shapely(seed):
    rng = np.random.default_rng(seed)
    cells = [blob(rng, rng.uniform(0, 20, 2), 6) for _ in range(8)]
    cells += [
        cells[0].difference(cells[1].buffer(-1)),
        cells[2].union(box(30, 0, 34, 4)),
        box(0, 0, 20, 20),
        box(3, 3, 9, 9),
    ]
    cells = np.array([c.reverse() if i % 2 else c for i, c in enumerate(cells)], dtype=object)
    group = rng.integers(0, 3, len(cells))
    bounds = shapely.bounds(cells)
    a, b = box_pairs(bounds, group)
    i, j = np.triu_indices(len(cells), 1)
    meet = (np.maximum(bounds[i, :2], bounds[j, :2]) < np.minimum(bounds[i, 2:], bounds[j, 2:])).all(axis=1)
    meet &= group[i] != group[j]
    assert list(zip(a, b, strict=True)) == list(zip(i[meet], j[meet], strict=True))
    got = overlap_areas(Rings.from_shapely(cells), a, b)
    np.testing.assert_allclose(got, shapely.area(shapely.intersection(cells[a], cells[b])), atol=1e-9)


def test_boxes_of_very_different_sizes():
    rng = np.random.default_rng(1)
    low = rng.uniform(0, 1000, (400, 2))
    bounds = np.c_[low, low + 10 ** rng.uniform(-2, 3, (400, 2))]
    bounds[7] = np.nan
    i, j = np.triu_indices(400, 1)
    meet = (np.maximum(bounds[i, :2], bounds[j, :2]) < np.minimum(bounds[i, 2:], bounds[j, 2:])).all(axis=1)
    a, b = box_pairs(bounds)
    assert list(zip(a, b, strict=True)) == list(zip(i[meet], j[meet], strict=True))


# --- sopa's rule, edges of the input ----------------------------------------------------------------------------


def test_union_merges_as_sopa_does():
    rows = [(box(0, 0, 10, 10), 0, False, 1.0), (box(4, 0, 14, 10), 1, False, 9.0), (box(30, 0, 40, 10), 1, False, 9.0)]
    result = resolve(rows, rule="union")
    assert wkb(result.geometry) == wkb([box(0, 0, 14, 10), box(30, 0, 40, 10)])
    assert result.merged.tolist() == [True, False]
    # Two real cells and a blob become one: what `choose` is there to avoid.
    rows = [(box(0, 0, 10, 10), 0, False, 3.0), (box(10, 0, 20, 10), 0, False, 3.0), (box(0, 0, 20, 10), 1, False, 1.0)]
    assert wkb(resolve(rows, rule="union").geometry) == wkb([box(0, 0, 20, 10)])
    # Below the threshold both stay with their overlap.
    rows = [(box(0, 0, 10, 10), 0, False, 1.0), (box(7, 0, 17, 10), 1, False, 9.0)]
    assert shapely.area(resolve(rows, rule="union").geometry).tolist() == [100, 100]


def test_no_cells_and_one_cell():
    none = resolve_cells(np.empty(0, dtype=object), np.empty(0, int), np.empty(0, bool), np.empty(0))
    assert len(none.geometry) == none.n_conflicts == none.n_cut == 0
    assert none.conflict_rate == 0
    one = resolve([(box(0, 0, 3, 3), 0, True, 0.0)])
    assert one.source.tolist() == [0]
    assert (one.n_cut, one.n_merged) == (1, 0)


def test_wrong_arguments_are_refused():
    row = (box(0, 0, 1, 1), 0, False, 1.0)
    for options, message in (
        ({"rule": "best"}, "unknown rule"),
        ({"threshold": 0}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve([row], **options)
    with pytest.raises(ValueError, match="patch of shape"):
        resolve_cells(np.array([row[0]]), np.array([0, 1]), np.array([False]), np.array([1.0]))
    with pytest.raises(ValueError, match="NaN"):
        resolve([(box(0, 0, 1, 1), 0, False, np.nan)])


def test_raster_order_is_by_row_then_column():
    cells = np.array([box(5, 5, 6, 6), box(9, 0, 10, 1), box(0, 5, 1, 6), box(0, 0, 2, 1)], dtype=object)
    assert raster_order(cells).tolist() == [3, 1, 2, 0]


# --- patches of a real label image ------------------------------------------------------------------------------


def mosaic(rng, side, spacing):
    """Labels of touching and separate cells with ragged outlines: a Voronoi mosaic with gaps."""
    seeds = np.array([(y, x) for y in range(4, side, spacing) for x in range(4, side, spacing)], float)
    seeds += rng.uniform(-spacing / 3, spacing / 3, seeds.shape)
    y, x = np.mgrid[:side, :side]
    d = np.hypot(y[..., None] - seeds[:, 0], x[..., None] - seeds[:, 1])
    labels = d.argmin(axis=-1) + 1
    return np.where(d.min(axis=-1) < spacing * 0.6, labels, 0).astype(np.int32)


def test_patches_of_one_label_image_give_the_label_image_back():
    side, core, halo = 120, 40, 24
    labels = mosaic(np.random.default_rng(3), side, 10)
    rows = []
    for k, (y, x) in enumerate((y, x) for y in range(0, side, core) for x in range(0, side, core)):
        y0, x0, y1, x1 = max(y - halo, 0), max(x - halo, 0), min(y + core + halo, side), min(x + core + halo, side)
        _, cells = labels_to_polygons(labels[y0:y1, x0:x1], (x0, y0))
        inner = np.array([x0 or -np.inf, y0 or -np.inf, x1 if x1 < side else np.inf, y1 if y1 < side else np.inf])
        depth = np.abs(shapely.bounds(cells) - inner).min(axis=1)
        rows += [(cell, k, d == 0, d) for cell, d in zip(cells, depth, strict=True)]
    result = resolve(rows)
    ids, expected = labels_to_polygons(labels)
    assert len(rows) > 2 * len(ids)
    assert wkb(result.geometry) == wkb(expected[raster_order(expected)])
    assert result.n_cut == result.n_merged == 0
    assert result.conflict_rate < 0.05


# --- nuclei to cells --------------------------------------------------------------------------------------------


def nuclei(rng, side=90, spacing=11):
    labels = mosaic(rng, side, spacing)
    y, x = np.mgrid[:side, :side]
    centre = np.array(
        [
            (y[labels == i].mean(), x[labels == i].mean()) if (labels == i).any() else (0, 0)
            for i in range(labels.max() + 1)
        ]
    )
    near = np.hypot(y - centre[labels, 0], x - centre[labels, 1]) < rng.uniform(1, 5, labels.max() + 1)[labels]
    return np.where(near, labels, 0).astype(np.int32)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), distance=st.sampled_from([1, 3, 4.5]), tile=st.sampled_from([13, 32, 64]))
def test_cells_hold_their_nucleus_are_exclusive_and_do_not_depend_on_tiles(seed, distance, tile):
    labels = nuclei(np.random.default_rng(seed))
    _, geometry = labels_to_polygons(labels)
    cells = expand_nuclei(geometry, distance, bounds=labels.shape)
    assert shapely.is_valid(cells).all()
    assert shapely.covers(cells, geometry).all()
    assert overlapping_pairs(cells)[0].size == 0
    assert (shapely.bounds(cells)[:, :2] >= 0).all()
    assert (shapely.bounds(cells)[:, 2:] <= 90).all()
    # A straight outline moves by the distance, a corner by no more.
    assert shapely.covers(shapely.buffer(geometry, distance + 0.5), cells).all()
    tiled = expand_nuclei(geometry, distance, bounds=labels.shape, tile_px=tile)
    assert shapely.to_wkb(tiled).tolist() == shapely.to_wkb(cells).tolist()


def test_a_lone_nucleus_grows_on_every_side_and_is_clipped_to_the_image():
    out = expand_nuclei(
        np.array([box(10, 10, 20, 20), box(0, 40, 4, 44)], dtype=object), 5, bounds=(50, 60), tile_px=16
    )
    assert out[0].bounds == (5, 5, 25, 25)
    assert out[1].bounds == (0, 35, 9, 49)
    free = expand_nuclei(np.array([box(0, 40, 4, 44)], dtype=object), 5)
    assert free[0].bounds == (-5, 35, 9, 49)


def test_distance_zero_gives_the_nuclei():
    geometry = np.array([box(1, 1, 4, 4), shapely.Polygon()], dtype=object)
    out = expand_nuclei(geometry, 0, bounds=(9, 9))
    assert out[0] is geometry[0]
    assert expand_nuclei(geometry, 2, bounds=(9, 9))[1].is_empty
    with pytest.raises(ValueError, match="0 or more"):
        expand_nuclei(geometry, -1)


def test_nuclei_off_the_lattice_are_contained_exactly():
    rng = np.random.default_rng(2)
    geometry = np.array([blob(rng, (x, y), 4) for y in range(6, 60, 9) for x in range(6, 60, 9)], dtype=object)
    geometry[5] = shapely.Point(*geometry[5].centroid.coords[0]).buffer(0.1)  # holds no pixel centre, perhaps
    cells = expand_nuclei(split_overlaps(geometry), 3, bounds=(66, 66), tile_px=20)
    i, j = np.triu_indices(len(cells), 1)
    assert shapely.area(shapely.intersection(cells[i], cells[j])).sum() < 1e-6
    assert (shapely.area(shapely.difference(geometry, cells)) < 1e-6).all()


def test_channels_of_pixels_belong_to_one_cell_each():
    labels = nuclei(np.random.default_rng(8))
    _, geometry = labels_to_polygons(labels)
    cells = expand_nuclei(geometry, 4, bounds=labels.shape)
    painted = polygons_to_labels(Rings.from_shapely(cells), np.arange(1, len(cells) + 1), (0, 90, 0, 90))
    assert (painted != 0).sum() == shapely.area(cells).sum()


# --- memory -----------------------------------------------------------------------------------------------------

RESOLVE_IN_CHILD = """
import sys
from pathlib import Path
import numpy as np
from cellquilt.core.record import peak_rss_mb
from cellquilt.core.settings import Settings
from cellquilt.resolve import stage
width, folder = int(sys.argv[1]), Path(sys.argv[2])
frame = {"global": np.eye(3), "microns": np.eye(3)}
stage._image_frame = lambda store: (frame, (width, width))  # a slide of that size without its pixels
results = sorted(folder.glob("*.parquet"))
stage.resolve_slide(folder / "s.zarr", results, settings=Settings(expand_um=4), output=folder / "out.zarr")
print(peak_rss_mb())
"""


def write_crowded_slide(folder, width, pitch=24, patch=1024, overlap=64):
    """Nuclei in a square grid, those between patches twice, a file for each row of patches; gives their number."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-11:12, -11:12]
    shapes = np.array([labels_to_polygons(np.int32(x**2 + y**2 < rng.uniform(40, 110)))[1][0] for _ in range(64)])
    with new_store(folder / "s.zarr", sample="s"):
        pass
    inner = range(0, width, patch)
    for row in inner:
        parts = []
        for column in inner:
            low = np.maximum(np.array([column, row]) - overlap // 2, 0)
            high = np.minimum(np.array([column, row]) + patch + overlap // 2, width)
            first, last = -(-low // pitch), (high - pitch) // pitch
            grid = np.stack(np.meshgrid(*(np.arange(first[k], last[k] + 1) for k in (0, 1))), axis=-1).reshape(-1, 2)
            polygons = shapes[(grid @ [7, 13]) % 64]
            shift = np.repeat(grid * pitch, shapely.get_num_coordinates(polygons), axis=0)
            polygons = shapely.set_coordinates(polygons.copy(), shapely.get_coordinates(polygons) + shift)
            to_border = np.where((low > 0) & (high < width), np.minimum(grid * pitch - low, high - grid * pitch), 9999)
            number = row // patch * len(inner) + column // patch
            parts.append((polygons, np.full(len(grid), number), np.arange(len(grid)), to_border.min(axis=1)))
        geometry, *columns = (np.concatenate(values) for values in zip(*parts, strict=True))
        named = dict(zip(("patch", "label", "depth_px"), columns, strict=True)) | {"cut": np.zeros(len(geometry), bool)}
        write_geoparquet(folder / f"{row:06d}.parquet", geometry, named, metadata={"patches": []})
    return (width // pitch) ** 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cells_as_objects(tmp_path):
    peaks = {}
    for width in (2048, 8192):
        folder = tmp_path / str(width)
        folder.mkdir()
        n = write_crowded_slide(folder, width)
        command = [sys.executable, "-c", RESOLVE_IN_CHILD, str(width), str(folder)]
        peaks[width] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert count_shapes(folder / "out.zarr" / "shapes" / "cell_boundaries") == n
    # 109,000 more cells with a nucleus each: 30 to 90 MB; 570 MB as objects, arrays and WKB of all.
    assert peaks[8192] - peaks[2048] < 180
