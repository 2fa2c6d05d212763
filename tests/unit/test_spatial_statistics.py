"""Statistics of places and groups against brute force, exact moments, squidpy's numbers and what must not matter."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import shapely
from cellquilt.geometry.delaunay import triangles_of
from cellquilt.geometry.neighbours import SpatialGraph, neighbour_graph
from cellquilt.spatial.cooccurrence import co_occurrence_of
from cellquilt.spatial.distances import distances_of, distances_to_pattern, nearest_hops, nearest_um
from cellquilt.spatial.enrichment import enrichment_of, join_count_moments
from cellquilt.spatial.network import network_of
from cellquilt.spatial.niches import niches_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import dijkstra

RECORDED = Path(__file__).parents[1] / "data/squidpy_1.8.3"
GROUPS = ["a", "b", "c"]


def scene(seed: int, n: int = 120, k: int = 3, side: float = 100.0):
    """Random places, groups (some cells without) and the graph of neighbours."""
    rng = np.random.default_rng(seed)
    xy = rng.random((n, 2)) * side
    codes = rng.integers(-1, k, n)
    return xy, codes, neighbour_graph(xy, radius_um=side / 4)


def squidpy_scene():
    spec = importlib.util.spec_from_file_location("record_squidpy", RECORDED / "record.py")
    source = (RECORDED / "record.py").read_text(encoding="utf-8")
    # The scene alone: squidpy need not be here.
    wanted = "\n".join(line for line in source.splitlines() if line not in ("import anndata", "import squidpy"))
    assert spec is not None
    names: dict = {"__name__": "record_squidpy"}
    exec(compile(wanted, str(RECORDED / "record.py"), "exec"), names)
    return names


def square_grid(side: int) -> SpatialGraph:
    """Cells on a square grid, eight neighbours each."""
    number = np.arange(side * side).reshape(side, side)
    pairs = (number[:, :-1], number[:, 1:]), (number[:-1], number[1:])
    pairs += (number[:-1, :-1], number[1:, 1:]), (number[:-1, 1:], number[1:, :-1])
    a, b = (np.concatenate([pair[k].ravel() for pair in pairs]) for k in (0, 1))
    xy = np.column_stack(np.unravel_index(number.ravel(), number.shape)).astype(float)
    return SpatialGraph.of_edges(a, b, xy)


# --- enrichment


@pytest.mark.parametrize("seed", [0, 1])
def test_edges_are_those_of_brute_force(seed):
    _xy, codes, graph = scene(seed)
    found = enrichment_of(graph, codes, GROUPS, n_permutations=0)
    matrix = graph.to_csr().toarray() > 0
    for i, j in itertools.product(range(3), repeat=2):
        both = matrix[np.ix_(codes == i, codes == j)].sum()
        assert found.edges[i, j] == (both // 2 if i == j else both)
    assert np.isnan(found.p).all()
    assert found.sizes.tolist() == [(codes == k).sum() for k in range(3)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 3), min_size=5, max_size=7))
def test_moments_are_exact(seed, labels):
    """Against all ways to deal the groups."""
    n = len(labels)
    rng = np.random.default_rng(seed)
    pairs = [pair for pair in itertools.combinations(range(n), 2) if rng.random() < 0.5]
    degree = np.bincount(np.array(pairs, dtype=int).ravel(), minlength=n)
    sizes = np.bincount(labels, minlength=4)
    mean, variance = join_count_moments(len(pairs), int((degree * (degree - 1) // 2).sum()), sizes)
    counts = []
    for order in set(itertools.permutations(labels)):
        own = np.zeros((4, 4))
        for a, b in pairs:
            own[order[a], order[b]] += 1
            if order[a] != order[b]:
                own[order[b], order[a]] += 1
        counts.append(own)
    np.testing.assert_allclose(mean, np.mean(counts, axis=0), atol=1e-9)
    np.testing.assert_allclose(variance, np.var(counts, axis=0), atol=1e-9)


def test_permutations_agree_with_the_exact_moments():
    """p of two groups that gather is as small as can be; of groups dealt at random it is uniform."""
    rng = np.random.default_rng(3)
    xy = rng.random((200, 2)) * 200
    graph = neighbour_graph(xy)
    apart = (xy[:, 0] > 100).astype(int)
    found = enrichment_of(graph, apart, ["left", "right"], n_permutations=199)
    assert found.p.max() == 1 / 200
    assert found.z[0, 1] < -8
    assert found.z[0, 0] > 8
    p = [
        enrichment_of(graph, rng.permutation(apart), ["left", "right"], n_permutations=99, seed=s).p[0, 1]
        for s in range(200)
    ]
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.09
    assert 0.4 < np.mean(p) < 0.62


def test_equal_to_squidpy_as_recorded():
    names, known = squidpy_scene(), json.loads((RECORDED / "recorded.json").read_text())
    assert_like_squidpy(names, known)


@pytest.mark.skipif(not os.environ.get("SQUIDPY_PYTHON"), reason="SQUIDPY_PYTHON names no Python with squidpy")
def test_equal_to_squidpy_now(tmp_path):
    output = tmp_path / "now.json"
    subprocess.run([os.environ["SQUIDPY_PYTHON"], RECORDED / "record.py", output], check=True, cwd=tmp_path)
    assert_like_squidpy(squidpy_scene(), json.loads(output.read_text()))


def assert_like_squidpy(names, known):
    xy, codes = names["slide"]()
    graph = SpatialGraph.from_csr(names["graph"](xy))
    groups = ["0", "1", "2", "3"]
    found = enrichment_of(graph, codes, groups, n_permutations=0)
    counts = found.edges + np.diag(np.diag(found.edges))  # squidpy counts an edge within a group from either end
    assert counts.tolist() == known["counts"]
    # Its z is from permutations: mean and deviation of 4000 are off by a few percent of a deviation.
    z = np.array(known["z"])
    np.testing.assert_allclose(found.z, z, rtol=0.06, atol=0.08)
    together = co_occurrence_of(xy, codes, groups, known["edges_um"], n_permutations=0)
    np.testing.assert_allclose(together.ratio_within.transpose(1, 2, 0), known["co_occurrence"], atol=2e-6)


# --- co-occurrence


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(0.0, 7.0, 30.0), (5.0, 6.0), (0.0, 400.0), (0.0, 1.0, 2.0, 3.0)]))
def test_pairs_are_those_of_brute_force(seed, edges):
    rng = np.random.default_rng(seed)
    # Whole numbers: cells in one place, and distances that are just a limit.
    xy, codes = rng.integers(0, 40, (60, 2)).astype(float), rng.integers(-1, 3, 60)
    found = co_occurrence_of(xy, codes, GROUPS, edges, n_permutations=0)
    far = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(far, np.nan)
    for r, (low, high) in enumerate(itertools.pairwise(edges)):
        ring = (far <= high) & ((far > low) | ((low == 0) & (far == 0)))
        for i, j in itertools.product(range(3), repeat=2):
            both = ring[np.ix_(codes == i, codes == j)].sum()
            assert found.pairs[r, i, j] == (both // 2 if i == j else both)


def test_the_moments_of_pairs_are_those_of_permutations():
    xy, codes, _ = scene(5, n=150)
    found = co_occurrence_of(xy, codes, GROUPS, (0, 10, 30), n_permutations=0)
    known = codes >= 0
    rng = np.random.default_rng(0)
    many = []
    for _ in range(400):
        mixed = codes.copy()
        mixed[known] = rng.permutation(codes[known])
        many.append(co_occurrence_of(xy, mixed, GROUPS, (0, 10, 30), n_permutations=0).pairs)
    error = found.deviation / math.sqrt(400)
    assert (np.abs(np.mean(many, axis=0) - found.expected) < 5 * error).all()
    np.testing.assert_allclose(np.std(many, axis=0), found.deviation, rtol=0.2)


def test_groups_that_exclude_each_other_nearby():
    """Two stripes: apart nearby, together far away."""
    rng = np.random.default_rng(2)
    xy = rng.random((600, 2)) * 100
    codes = (xy[:, 0] > 50).astype(int)
    found = co_occurrence_of(xy, codes, ["l", "r"], (0, 10, 20, 60), n_permutations=99)
    assert (np.diff(found.ratio[:, 0, 1]) > 0).all()
    assert found.ratio[0, 0, 1] < 0.25
    assert found.p[0, 0, 1] == 0.01


# --- distances


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distances_are_those_of_brute_force(seed):
    xy, codes, graph = scene(seed, n=90)
    steps = graph.to_csr()
    steps.data[:] = 1
    hops, far = dijkstra(steps), np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(hops, np.inf)
    np.fill_diagonal(far, np.inf)
    found_hops, found_um = nearest_hops(graph, codes, 3), nearest_um(xy, codes, 3)
    for group in range(3):
        np.testing.assert_array_equal(found_hops[:, group], hops[:, codes == group].min(axis=1))
        np.testing.assert_allclose(found_um[:, group], far[:, codes == group].min(axis=1))
    for places, each in ((graph, found_hops), (xy, found_um)):
        found = distances_of(places, codes, GROUPS, n_permutations=0)
        for i, j in itertools.product(range(3), repeat=2):
            own = each[codes == i, j]
            own = own[np.isfinite(own)]
            assert found.mean[i, j] == pytest.approx(own.mean())
            assert found.median[i, j] == pytest.approx(np.median(own))


def test_a_rare_group_is_far_by_chance_alone():
    """One cell in 10,000: 44 steps on an endless square grid; a sum that is cut at 30 steps says 5.6."""
    p = 1e-4

    def endless(cut: int) -> float:
        d = np.arange(1, cut, dtype=float)
        return float((d * ((1 - p) ** (4 * d * (d - 1)) - (1 - p) ** (4 * d * (d + 1)))).sum())

    side = 300
    graph = square_grid(side)
    rng = np.random.default_rng(0)
    codes = np.zeros(side * side, dtype=int)
    codes[rng.choice(codes.size, round(p * codes.size), replace=False)] = 1
    found = distances_of(graph, codes, ["usual", "rare"], n_permutations=30)
    expected = found.expected[0, 1]
    assert endless(10_000) == pytest.approx(44.3, abs=0.1)
    assert endless(30) == pytest.approx(5.6, abs=0.1)
    # The grid ends: cells near its border have fewer places to look at, and are a little farther.
    assert endless(10_000) * 0.95 < expected < endless(10_000) * 1.35
    assert abs(found.z[0, 1]) < 3
    assert found.p[0, 1] > 0.05


def test_the_null_of_distances_in_um_is_right():
    """Expected means against brute force over other permutations, and p that is uniform."""
    xy, codes, _ = scene(7, n=80)
    found = distances_of(xy, codes, GROUPS, n_permutations=300, seed=1)
    rng = np.random.default_rng(9)
    many = []
    for _ in range(200):
        mixed = codes.copy()
        mixed[codes >= 0] = rng.permutation(codes[codes >= 0])
        many.append(distances_of(xy, mixed, GROUPS, n_permutations=0).mean)
    error = np.std(many, axis=0) * math.sqrt(1 / 200 + 1 / 300)
    assert (np.abs(np.mean(many, axis=0) - found.expected) < 4.5 * error).all()
    p = []
    for seed in range(150):
        mixed = codes.copy()
        mixed[codes >= 0] = rng.permutation(codes[codes >= 0])
        p.append(distances_of(xy, mixed, GROUPS, n_permutations=39, seed=seed).p[0, 1])
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.1


def test_large_groups_enter_the_test_by_a_choice(monkeypatch):
    """The same choice under chance: means are of all cells, and the test keeps its level."""
    from cellquilt.spatial import distances

    monkeypatch.setattr(distances, "_SOURCES", 10)
    xy, codes, _ = scene(3, n=100)
    few = distances_of(xy, codes, GROUPS, n_permutations=50)
    monkeypatch.setattr(distances, "_SOURCES", 2000)
    every = distances_of(xy, codes, GROUPS, n_permutations=50)
    np.testing.assert_array_equal(few.mean, every.mean)
    np.testing.assert_allclose(few.expected, every.expected, rtol=0.15)
    assert (few.deviation > every.deviation).all()


def test_a_pattern_stays_where_it_is():
    """Cells near a stripe are near; mean and deviation under chance are exact."""
    rng = np.random.default_rng(1)
    far = np.abs(rng.random((400, 1)) * 100)
    codes = np.where(far[:, 0] < 20, 0, rng.integers(0, 2, 400))
    found = distances_to_pattern(far, "um", codes, ["near", "any"], ["stripe"], np.array([1]), n_permutations=500)
    many = [far[rng.permutation(400)[: (codes == 0).sum()]].mean() for _ in range(2000)]
    assert found.expected[0, 0] == pytest.approx(far.mean())
    assert found.deviation[0, 0] == pytest.approx(np.std(many), rel=0.06)
    assert found.p[0, 0] == 1 / 501
    assert found.z[0, 0] < -3


def test_cells_without_a_way_are_counted_not_cut():
    """Two islands: what is on the other one is unreachable, and in no mean."""
    xy = np.concatenate([np.random.default_rng(0).random((30, 2)) * 50, [[1000.0, 0], [1010, 0], [1000, 10]]])
    codes = np.zeros(33, dtype=int)
    codes[[0, 1]], codes[30:] = 1, 2
    graph = neighbour_graph(xy, radius_um=60)
    found = distances_of(graph, codes, ["plain", "near", "island"], n_permutations=0)
    assert found.unreachable.tolist() == [[0, 0, 28], [0, 0, 2], [3, 3, 0]]
    assert np.isnan(found.mean[0, 2])
    assert np.isfinite(found.mean[0, 1])


def test_a_group_of_one_cell_has_no_other_of_its_own():
    xy, codes, graph = scene(4)
    codes = np.where(codes == 2, 1, codes)
    codes[0] = 2
    for places in (xy, graph):
        found = distances_of(places, codes, GROUPS, n_permutations=5)
        assert np.isnan(found.mean[2, 2])
        assert np.isnan(found.p[2, 2])
        assert np.isfinite(found.p[:2]).all()
        assert np.isfinite(found.p[2, :2]).all()


# --- what must not matter


def test_threads_change_no_byte():
    xy, codes, graph = scene(6, n=400)
    found = [
        (
            enrichment_of(graph, codes, GROUPS, n_permutations=37, seed=3, threads=t).p,
            co_occurrence_of(xy, codes, GROUPS, (0, 10, 20), n_permutations=19, seed=3, threads=t).p,
            distances_of(xy, codes, GROUPS, n_permutations=19, seed=3, threads=t).p,
            distances_of(graph, codes, GROUPS, n_permutations=19, seed=3, threads=t).p,
        )
        for t in (1, 2, 5)
    ]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one.tobytes() == two.tobytes()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 6.0), st.floats(-1e4, 1e4))
def test_turning_moving_and_the_order_of_cells_change_nothing(seed, angle, shift):
    xy, codes, graph = scene(seed, n=80)
    order = np.random.default_rng(seed).permutation(80)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = (xy @ turn.T + shift)[order]
    other = neighbour_graph(moved, radius_um=25.0)
    if other.indices.size != graph.indices.size:  # an edge that is just as long as the radius
        return
    a = enrichment_of(graph, codes, GROUPS, n_permutations=0)
    b = enrichment_of(other, codes[order], GROUPS, n_permutations=0)
    np.testing.assert_array_equal(a.edges, b.edges)
    np.testing.assert_allclose(
        distances_of(xy, codes, GROUPS, n_permutations=0).mean,
        distances_of(moved, codes[order], GROUPS, n_permutations=0).mean,
    )
    one = niches_of(xy, graph, codes, GROUPS, min_cells=3)
    two = niches_of(moved, other, codes[order], GROUPS, min_cells=3)
    assert sorted(one.n_cells.tolist()) == sorted(two.n_cells.tolist())
    np.testing.assert_allclose(np.sort(one.area_um2), np.sort(two.area_um2), rtol=1e-3)


# --- niches


def niche_scene(n: int = 12_000):
    rng = np.random.default_rng(0)
    xy = rng.random((n, 2)) * 1000
    codes = np.zeros(n, dtype=int)
    codes[np.linalg.norm(xy - 300, axis=1) < 150] = 1
    codes[np.linalg.norm(xy - 300, axis=1) < 60] = 0
    codes[np.linalg.norm(xy - 700, axis=1) < 100] = 1
    return xy, codes, neighbour_graph(xy, radius_um=80)


def test_niches_have_the_shape_that_was_drawn():
    xy, codes, graph = niche_scene()
    found = niches_of(xy, graph, codes, ["around", "discs"])
    assert found.names == ["around:1", "around:2", "discs:1", "discs:2"]
    assert found.n_cells.sum() == len(xy)
    np.testing.assert_array_equal(codes, np.where(found.of_cell >= 2, 1, 0))
    ring, disc = found.area_um2[2:]
    assert ring == pytest.approx(math.pi * (150**2 - 60**2), rel=0.03)
    assert disc == pytest.approx(math.pi * 100**2, rel=0.03)
    assert found.length_um[3] == pytest.approx(2 * math.pi * 100, rel=0.09)
    assert found.roundness[3] > 0.84 > 0.5 > found.roundness[2]  # a ring has two borders
    # The gap between the two: their middles are 400 · √2 apart.
    assert found.nearest_um[2] == found.nearest_um[3] == pytest.approx(400 * math.sqrt(2) - 250, abs=12)
    assert shapely.is_valid(found.outlines).all()
    domains = found.by_domain()
    assert domains["n_niches"].tolist() == [2, 2]
    assert domains["share_in_niches"].tolist() == [1.0, 1.0]


def test_few_cells_make_no_niche():
    xy, codes, graph = niche_scene(2000)
    codes[:3] = 2
    found = niches_of(xy, graph, codes, ["around", "discs", "dust"], min_cells=4)
    assert 2 not in found.domain
    assert found.by_domain()["n_niches"].tolist()[2] == 0
    assert (found.of_cell[codes == 2] == -1).all()


def test_a_row_of_cells_is_a_niche_without_triangles():
    xy = np.column_stack([np.arange(20) * 10.0, np.zeros(20)])
    found = niches_of(xy, neighbour_graph(xy), np.zeros(20, dtype=int), ["line"], min_cells=5)
    assert len(found) == 1
    assert found.area_um2[0] > 0
    assert shapely.bounds(found.outlines)[0, 2] - shapely.bounds(found.outlines)[0, 0] >= 190


@pytest.mark.parametrize("regular", [False, True])
def test_triangles_cover_the_hull_once(regular):
    rng = np.random.default_rng(0)
    xy = np.argwhere(np.ones((12, 9))).astype(float) if regular else rng.random((300, 2))
    corners, twins = triangles_of(xy)
    a, b, c = (xy[corners[:, k]] for k in range(3))
    doubled = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    assert (doubled > 0).all()
    assert doubled.sum() / 2 == pytest.approx(shapely.area(shapely.convex_hull(shapely.multipoints(xy))))
    paired = np.flatnonzero(twins >= 0)
    start, end = corners.ravel(), corners[:, [1, 2, 0]].ravel()
    np.testing.assert_array_equal(start[paired], end[twins[paired]])
    np.testing.assert_array_equal(twins[twins[paired]], paired)


# --- network


def test_the_network_is_the_mean_of_steps():
    xy, types, graph = scene(8, n=150)
    niches = (xy[:, 0] > 50).astype(int)
    found = network_of(graph, types, GROUPS, niches, ["left", "right"])
    steps = graph.to_csr()
    steps.data[:] = 1
    hops = dijkstra(steps)
    to_left = hops[:, niches == 0].min(axis=1)
    assert found.hops[1, 3] == pytest.approx(to_left[types == 1].mean())
    np.fill_diagonal(hops, np.inf)
    assert found.hops[0, 2] == pytest.approx(hops[np.ix_(types == 0, types == 2)].min(axis=1).mean())
    assert (found.weights == found.weights.T).all()
    assert (np.diag(found.weights) == 0).all()
    assert found.numbers[2, 1] == ((types == 2) & (niches == 1)).sum()
    share = found.composition()
    np.testing.assert_allclose(share.groupby("niche")["share"].sum(), 1)
