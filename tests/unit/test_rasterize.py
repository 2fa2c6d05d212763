"""Pixel centres decide, and polygons that share an edge share no pixel."""

import numpy as np
import pytest
import shapely
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.rasterize import polygons_to_labels
from hypothesis import given, settings
from hypothesis import strategies as st


def paint(geometry, window, **options):
    rings = Rings.from_shapely(np.array(geometry, dtype=object))
    return polygons_to_labels(rings, np.arange(1, len(rings) + 1), window, **options)


def blob(rng, centre, radius):
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    r = rng.uniform(0.4, 1, 12) * radius
    return shapely.Polygon(np.c_[centre[0] + r * np.cos(angles), centre[1] + r * np.sin(angles)]).buffer(0)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_pixel_is_inside_if_its_centre_is(seed):
    rng = np.random.default_rng(seed)
    cell = blob(rng, rng.uniform(0, 20, 2), 9).difference(blob(rng, rng.uniform(0, 20, 2), 4))
    got = paint([cell], (-3, 25, -4, 24))
    x, y = np.meshgrid(np.arange(-4, 24) + 0.5, np.arange(-3, 25) + 0.5)
    np.testing.assert_array_equal(got != 0, shapely.contains_xy(cell, x, y))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), half=st.booleans())
def test_a_mosaic_covers_every_pixel_once(seed, half):
    """Triangles with vertices also at pixel centres: each centre belongs to exactly one of them."""
    rng = np.random.default_rng(seed)
    inner = rng.integers(1, 40, (15, 2)) / 2 if half else rng.uniform(0.5, 19.5, (15, 2))
    corners = np.array([[0, 0], [20, 0], [0, 20], [20, 20]])
    triangles = shapely.delaunay_triangles(shapely.MultiPoint(np.vstack([corners, inner]))).geoms
    # Rings run either way round, as they do in real data.
    mosaic = [t.reverse() if i % 2 else t for i, t in enumerate(triangles)]
    count = sum((paint([t], (0, 20, 0, 20)) != 0).astype(int) for t in mosaic)
    np.testing.assert_array_equal(count, np.ones((20, 20), int))


def test_windows_agree_with_the_whole():
    rng = np.random.default_rng(5)
    cells = [blob(rng, rng.uniform(0, 60, 2), 8) for _ in range(25)]
    whole = paint(cells, (0, 64, 0, 64))
    assert (whole != 0).sum() > 500
    for y in range(0, 64, 16):
        for x in range(0, 64, 16):
            np.testing.assert_array_equal(paint(cells, (y, y + 16, x, x + 16)), whole[y : y + 16, x : x + 16])


def test_the_first_keeps_an_overlap_unless_told_otherwise():
    cells = [shapely.box(0, 0, 4, 4), shapely.box(2, 0, 6, 4)]
    assert paint(cells, (0, 1, 0, 6)).tolist() == [[1, 1, 1, 1, 2, 2]]
    assert paint(cells, (0, 1, 0, 6), overwrite=True).tolist() == [[1, 1, 2, 2, 2, 2]]
    assert paint(cells, (0, 1, 0, 6), subset=np.array([1])).tolist() == [[0, 0, 2, 2, 2, 2]]


def test_missing_polygons_paint_nothing():
    assert paint([None, shapely.Polygon(), shapely.box(0, 0, 1, 1)], (0, 1, 0, 2)).tolist() == [[3, 0]]


def test_wrong_sizes_are_refused():
    rings = Rings.from_shapely([shapely.box(0, 0, 1, 1)])
    with pytest.raises(ValueError, match="1 polygons but values"):
        polygons_to_labels(rings, np.array([1, 2]), (0, 1, 0, 1))
    with pytest.raises(ValueError, match="has no size"):
        polygons_to_labels(rings, np.array([1]), (2, 1, 0, 1))
