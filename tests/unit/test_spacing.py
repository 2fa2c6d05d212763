"""Distances to the nearest other point, against a loop over all pairs."""

import numpy as np
import pytest
import shapely
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.spacing import median_spacing, nearest_distances, outline_distances
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = {
    "even": lambda rng, n: rng.uniform(0, 100, (n, 2)),
    "one row": lambda rng, n: np.column_stack([rng.uniform(0, 100, n), np.full(n, 7.0)]),
    "one column": lambda rng, n: np.column_stack([np.full(n, -3e5), rng.uniform(0, 100, n)]),
    "aslant": lambda rng, n: np.column_stack([np.arange(n) * 1.0, np.arange(n) * 2.0]),
    "two far apart": lambda rng, n: np.where(np.arange(n)[:, None] % 2, 1e5, 0.0) + rng.normal(0, 2, (n, 2)),
    "one far away": lambda rng, n: np.where(np.arange(n)[:, None] == 0, 5e5, rng.normal(0, 2, (n, 2))),
    "on a grid": lambda rng, n: rng.integers(0, 9, (n, 2)).astype(float),
    "one place": lambda rng, n: np.full((n, 2), 3e5),
}


@given(st.sampled_from(sorted(KINDS)), st.integers(2, 200), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=80)
def test_against_all_pairs(kind, n, seed):
    xy = KINDS[kind](np.random.default_rng(seed), n)
    distances = np.hypot(*(xy[:, None] - xy).T)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_allclose(nearest_distances(xy), distances.min(axis=0), rtol=1e-12, atol=0)


def test_few_points_have_no_median():
    assert nearest_distances([[1.0, 2.0]]).tolist() == [np.inf]
    assert nearest_distances(np.empty((0, 2))).size == 0
    assert median_spacing([[0, 0], [3, 4]]) is None
    assert median_spacing([[0, 0], [3, 4], [3, 5]]) == pytest.approx(1.0)


def test_distances_to_outlines_are_those_of_shapely():
    rng = np.random.default_rng(0)
    ring = shapely.box(0, 0, 10, 10).difference(shapely.box(2, 3, 5, 6))
    two = shapely.union(shapely.box(0, 0, 2, 2), shapely.box(5, 5, 9, 9))
    shapes = np.array([ring, shapely.Point(20, 5).buffer(4), two])
    polygon, xy = rng.integers(0, 3, 500), rng.uniform(-10, 30, (500, 2))
    found = outline_distances(Rings.from_shapely(shapes), polygon, *np.ascontiguousarray(xy.T))
    wanted = shapely.distance(shapely.boundary(shapes[polygon]), shapely.points(xy))
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    nothing = Rings.from_shapely([shapely.Polygon()])
    assert outline_distances(nothing, np.zeros(1, np.int64), np.zeros(1), np.zeros(1)).tolist() == [np.inf]
