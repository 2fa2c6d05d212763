"""Points in polygons: every point in at most one, by the same rule as rasterising."""

import numpy as np
import pytest
import shapely
from cellquilt.geometry.locate import PolygonIndex, points_in_polygons
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.rasterize import polygons_to_labels
from hypothesis import given, settings
from hypothesis import strategies as st


def blobs(seed: int, n: int, size: float, radius: float, vertices: int = 17) -> np.ndarray:
    """Star-shaped polygons anywhere in a square, some with a hole."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    reach = radius * rng.uniform(0.4, 1.0, (n, vertices))
    centre = rng.uniform(0, size, (n, 1, 2))
    outer = centre + np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=-1)
    shells = shapely.polygons(outer)
    holes = shapely.polygons(centre + (outer - centre) * 0.3)
    holed = rng.random(n) < 0.3
    return np.where(holed, shapely.difference(shells, holes), shells)


def brute_force(polygons: np.ndarray, xy: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Shapely's answer for points in general position."""
    inside = shapely.contains_xy(polygons[:, None], xy[None, :, 0], xy[None, :, 1])
    if allowed is not None:
        inside &= allowed
    centre = shapely.get_coordinates(shapely.centroid(polygons))
    distance = ((xy[None] - centre[:, None]) ** 2).sum(axis=-1)
    distance[~inside] = np.inf
    return np.where(inside.any(axis=0), distance.argmin(axis=0), -1)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.sampled_from([3.0, 20.0, 150.0]),
    st.sampled_from([-1e5, 0.0, 7.3]),
)
@settings(max_examples=40, deadline=None)
def test_equals_shapely_on_overlapping_polygons_with_holes(seed, n, radius, shift):
    polygons = shapely.transform(blobs(seed, n, 100.0, radius), lambda xy: xy + shift)
    xy = np.random.default_rng(seed + 1).uniform(-20, 120, (500, 2)) + shift
    np.testing.assert_array_equal(points_in_polygons(xy, Rings.from_shapely(polygons)), brute_force(polygons, xy))


def test_pixel_centres_are_located_where_rasterising_paints_them():
    # Vertices on half-integers, so that many pixel centres lie exactly on edges and vertices.
    rng = np.random.default_rng(3)
    corners = rng.integers(-4, 130, (60, 3, 2)) / 2
    polygons = shapely.polygons(corners[shapely.area(shapely.polygons(corners)) > 0])
    rows, columns = np.mgrid[0:64, 0:64]
    centres = np.column_stack([columns.ravel() + 0.5, rows.ravel() + 0.5])
    for polygon in polygons:
        rings = Rings.from_shapely(np.array([polygon]))
        painted = polygons_to_labels(rings, np.array([1]), (0, 64, 0, 64)).ravel() - 1
        np.testing.assert_array_equal(points_in_polygons(centres, rings), painted)


def test_a_point_on_a_shared_edge_belongs_to_exactly_one_polygon():
    # A square cut into 4 x 4 slanted pieces that share edges and corners.
    rng = np.random.default_rng(1)
    nodes = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), axis=-1) * 10
    nodes[1:-1, 1:-1] += rng.uniform(-3, 3, (3, 3, 2))
    quads = [
        shapely.Polygon([nodes[j, i], nodes[j, i + 1], nodes[j + 1, i + 1], nodes[j + 1, i]])
        for j in range(4)
        for i in range(4)
    ]
    rings = Rings.from_shapely(np.array(quads, dtype=object))
    share = rng.random((4000, 1))
    a, b = nodes[1:-1, :-1].reshape(-1, 2), nodes[1:-1, 1:].reshape(-1, 2)
    pick = rng.integers(0, len(a), 4000)
    on_edges = np.concatenate([a[pick] + share * (b[pick] - a[pick]), nodes[1:-1, 1:-1].reshape(-1, 2)])
    found = sum((points_in_polygons(on_edges, rings.take(np.array([q]))) == 0).astype(int) for q in range(16))
    np.testing.assert_array_equal(found, np.ones(len(on_edges)))


def test_half_open_square():
    square = Rings.from_shapely(np.array([shapely.box(0, 0, 2, 2)]))
    xy = [[0, 0], [2, 0], [0, 2], [2, 2], [1, 0], [0, 1], [2, 1], [1, 2], [np.nan, 1], [1, np.inf]]
    assert points_in_polygons(xy, square).tolist() == [0, -1, -1, -1, 0, 0, -1, -1, -1, -1]


def test_nearest_centroid_then_lower_index():
    boxes = np.array([shapely.box(0, 0, 10, 10), shapely.box(4, 0, 14, 10), shapely.box(4, 0, 14, 10)])
    found = points_in_polygons([[6.0, 5.0], [8.0, 5.0], [7.0, 5.0]], Rings.from_shapely(boxes))
    assert found.tolist() == [0, 1, 0]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_only_polygons_of_the_points_plane(seed):
    rng = np.random.default_rng(seed)
    polygons = blobs(seed, 25, 60.0, 25.0)
    planes, xy, z = rng.integers(0, 3, 25), rng.uniform(0, 60, (300, 2)), rng.integers(0, 4, 300)
    index = PolygonIndex(Rings.from_shapely(polygons), z_plane=planes)
    want = brute_force(polygons, xy, planes[:, None] == z[None])
    np.testing.assert_array_equal(index.locate(xy, z), want)
    with pytest.raises(ValueError, match="z_plane"):
        index.locate(xy)


def test_threads_matrix_and_multipolygons():
    rng = np.random.default_rng(5)
    parts = blobs(9, 60, 500.0, 30.0)
    polygons = shapely.multipolygons(parts[shapely.get_type_id(parts) == 3][:40].reshape(20, 2))
    rings = Rings.from_shapely(polygons)
    xy = rng.uniform(0, 500, (200_000, 2))
    index = PolygonIndex(rings)
    one = index.locate(xy)
    # Even-odd: where two parts of one multipolygon overlap, the point is outside.
    assert (one[:2000] >= 0).sum() > 100
    for p in range(20):
        pieces = shapely.get_parts(polygons[p])
        odd = shapely.contains_xy(pieces[:, None], xy[None, :2000, 0], xy[None, :2000, 1]).sum(axis=0) % 2 == 1
        assert odd[one[:2000] == p].all()
    np.testing.assert_array_equal(index.locate(xy, threads=3), one)
    matrix = np.array([[0.0, 2.0, 7.0], [0.5, 0.0, -3.0], [0.0, 0.0, 1.0]])
    x, y = (xy[:, 1] + 3.0) / 0.5, (xy[:, 0] - 7.0) / 2.0
    moved = index.locate_columns(x, y, matrix=matrix)
    assert (moved == one).mean() > 0.99999


def test_empty_and_broken_polygons_contain_nothing():
    nan = shapely.Polygon([(0, 0), (5, np.nan), (5, 5)])
    polygons = np.array([shapely.Polygon(), nan, shapely.box(1, 1, 2, 2), None], dtype=object)
    assert points_in_polygons([[1.5, 1.5], [4.5, 1.0]], Rings.from_shapely(polygons)).tolist() == [2, -1]
    assert points_in_polygons([[1.5, 1.5]], Rings.from_shapely(polygons[:2])).tolist() == [-1]
    assert points_in_polygons([[1.5, 1.5]], Rings.from_shapely([])).tolist() == [-1]
    assert points_in_polygons(np.empty((0, 2)), Rings.from_shapely(polygons)).shape == (0,)


def test_tiny_cells_in_a_vast_slide_and_one_polygon_over_all():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 1e6, (200, 2))
    polygons = np.append(shapely.box(*corners.T, *(corners + 3).T), shapely.box(-5, -5, 2e6, 2e6))
    inside = corners + rng.uniform(0.1, 2.9, (200, 2))
    np.testing.assert_array_equal(
        points_in_polygons(inside, Rings.from_shapely(polygons)), brute_force(polygons, inside)
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, -70_000.0, 2.0**31]))
@settings(max_examples=30, deadline=None)
def test_outlines_on_the_pixel_lattice_are_kept_small_and_change_nothing(seed, shift):
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 200, (40, 7, 2)).astype(float)
    rings = Rings.from_shapely(shapely.polygons(corners + shift))
    # One more polygon off the lattice, and all are kept as they are.
    other = np.append(shapely.polygons(corners + shift), shapely.box(shift + 300.5, 300, shift + 301, 301))
    small, large = PolygonIndex(rings), PolygonIndex(Rings.from_shapely(other))
    assert (small._coords.dtype, large._coords.dtype) == (np.int16, np.float64)
    xy = np.concatenate([rng.uniform(-5, 205, (500, 2)), rng.integers(-2, 404, (500, 2)) / 2]) + shift
    np.testing.assert_array_equal(small.locate(xy), large.locate(xy))
    wide = Rings.from_shapely(np.array([shapely.box(0, 0, 40_000, 3)]))
    assert PolygonIndex(wide).locate([[39_999.5, 1.0], [40_000.5, 1.0]]).tolist() == [0, -1]
