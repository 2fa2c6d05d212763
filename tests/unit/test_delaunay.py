"""The triangulation: Qhull's edges, empty circles, and no answer where points are too regular for one."""

import numpy as np
import pytest
from cellquilt.geometry.delaunay import triangulate
from cellquilt.geometry.neighbours import neighbour_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import Delaunay


def edges_of(triangles: np.ndarray) -> np.ndarray:
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [0, 2]]])
    return np.unique(np.sort(edges, axis=1), axis=0)


def by_qhull(xy: np.ndarray) -> np.ndarray:
    return edges_of(Delaunay(xy - xy.mean(axis=0)).simplices)


SHAPES = {
    "even": lambda rng, n: rng.uniform(0, 1000, (n, 2)),
    "clustered": lambda rng, n: rng.normal(0, 1, (n, 2)) ** 3 * 100,
    "thin": lambda rng, n: np.column_stack([rng.uniform(0, 1000, n), rng.uniform(0, 1, n)]),
    "ring": lambda rng, n: (
        (500 + rng.normal(0, 1, n))[:, None] * np.stack([np.cos(t := rng.uniform(0, 6.2831, n)), np.sin(t)], axis=1)
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@given(st.integers(0, 2**32 - 1), st.integers(3, 300))
@settings(max_examples=40, deadline=None)
def test_the_edges_are_qhulls(shape, seed, n):
    xy = SHAPES[shape](np.random.default_rng(seed), n)
    found = triangulate(xy)
    assert found is not None
    found = np.sort(found, axis=1)
    assert np.unique(found, axis=0).shape == found.shape  # each once
    assert np.array_equal(np.unique(found, axis=0), by_qhull(xy))


def test_large_coordinates_and_any_order():
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 5000, (20_000, 2))
    edges = by_qhull(xy)
    for moved in (xy, xy + 2**20, -xy[::-1]):
        found = np.sort(triangulate(moved), axis=1)
        found = np.sort(len(xy) - 1 - found, axis=1) if moved[0, 0] == -xy[-1, 0] else found
        assert np.array_equal(np.unique(found, axis=0), edges)


@pytest.mark.parametrize("kind", ["grid", "line", "circle"])
def test_regular_points_are_left_to_qhull(kind):
    t = np.arange(40.0)
    xy = {
        "grid": np.stack(np.meshgrid(t[:9], t[:7]), axis=-1).reshape(-1, 2) * 20,
        "line": np.column_stack([t, 2 * t]),
        "circle": np.array([[5, 0], [0, 5], [-5, 0], [0, -5], [3, 4], [-3, 4], [3, -4], [-3, -4.0]]),
    }[kind]
    assert triangulate(xy) is None
    graph = neighbour_graph(xy, mode="delaunay")
    assert graph.degree.min() >= 1
    if kind == "grid":
        assert np.array_equal(edges_of(Delaunay(xy).simplices), _edges(graph))


def _edges(graph) -> np.ndarray:
    row = np.repeat(np.arange(len(graph)), graph.degree)
    both = np.column_stack([row, graph.indices])
    return both[both[:, 0] < both[:, 1]]


def test_the_graph_is_symmetric_sorted_and_without_doubles():
    rng = np.random.default_rng(1)
    xy = rng.uniform(0, 300, (500, 2))
    xy[100:110] = xy[:10]  # cells in one place
    for given_ in ({"mode": "delaunay"}, {"mode": "knn", "n_neighbours": 7}):
        graph = neighbour_graph(xy, radius_um=60, **given_)
        matrix = graph.to_csr()
        assert (matrix != matrix.T).nnz == 0
        for i in range(len(graph)):
            row = graph.indices[graph.indptr[i] : graph.indptr[i + 1]]
            assert (np.diff(row) > 0).all()
            assert i not in row
