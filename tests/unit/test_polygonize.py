"""Labels to polygons and back is the identity, whatever the labels look like."""

import numpy as np
import pytest
import shapely
from cellquilt.geometry.polygonize import connected_parts, labels_to_polygons, labels_to_rings, simple_cells
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.rasterize import polygons_to_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

label_images = st.one_of(
    hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 3)),
    hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 1)),
    # Blocks, so that outlines have straight runs, holes and nested labels.
    hnp.arrays(
        np.int32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.sampled_from([0, 7, 7, 7, 2**31 - 1]),
    ).map(lambda a: np.kron(a, np.ones((3, 2), np.int32)).astype(np.int32)),
)


@settings(max_examples=200, deadline=None)
@given(labels=label_images, x0=st.integers(-50, 50), y0=st.integers(-50, 50))
def test_labels_to_polygons_to_labels_is_the_identity(labels, x0, y0):
    ids, geometry = labels_to_polygons(labels, (x0, y0))
    h, w = labels.shape
    assert ids.tolist() == [i for i in np.unique(labels).tolist() if i]
    assert shapely.is_valid(geometry).all()
    assert shapely.area(geometry).tolist() == [int((labels == i).sum()) for i in ids]
    back = polygons_to_labels(Rings.from_shapely(geometry), ids, (y0, y0 + h, x0, x0 + w))
    np.testing.assert_array_equal(back, labels)


@settings(max_examples=100, deadline=None)
@given(labels=label_images)
def test_outlines_turn_at_every_vertex_and_run_one_way(labels):
    _, rings = labels_to_rings(labels)
    for r in range(rings.ring_offsets.size - 1):
        ring = rings.coords[rings.ring_offsets[r] : rings.ring_offsets[r + 1]]
        steps = np.diff(ring, axis=0)
        around = np.vstack([steps, steps[:1]])
        assert (ring[0] == ring[-1]).all()
        assert ((steps != 0).sum(axis=1) == 1).all()  # along the lattice
        assert (np.cross(np.c_[around[:-1], np.zeros(len(steps))], np.c_[around[1:], np.zeros(len(steps))])[:, 2]).all()
        assert len(np.unique(ring[:-1], axis=0)) == len(ring) - 1  # no ring touches itself
        assert shapely.is_ccw(shapely.linearrings(ring)) == rings.exterior[r]


@settings(max_examples=100, deadline=None)
@given(labels=label_images)
def test_parts_are_the_4_connected_ones(labels):
    measure = pytest.importorskip("skimage.measure")
    parts, part_label = connected_parts(labels)
    inner = parts[1:-1, 1:-1]
    expected, n = measure.label(labels, background=0, connectivity=1, return_num=True)
    assert part_label.size == n
    np.testing.assert_array_equal(inner + 1, expected)  # both number in raster order
    np.testing.assert_array_equal(part_label[inner[inner >= 0]], labels[labels != 0])


def test_a_square_has_its_area_and_four_corners():
    labels = np.zeros((9, 9), np.uint16)
    labels[2:7, 1:6] = 4
    ids, geometry = labels_to_polygons(labels)
    assert ids.tolist() == [4]
    assert geometry[0].area == 25.0
    assert geometry[0].equals(shapely.box(1, 2, 6, 7))
    assert len(geometry[0].exterior.coords) == 5


def test_a_corner_touch_makes_two_parts_and_a_closed_ring_a_hole():
    touch = np.array([[1, 0], [0, 1]], np.int32)
    _, geometry = labels_to_polygons(touch)
    assert geometry[0].geom_type == "MultiPolygon"
    assert len(geometry[0].geoms) == 2
    # A ring open at one corner only: its inside meets the outside in a point, which makes a hole, not an open bay.
    ring = np.ones((3, 3), np.int32)
    ring[1, 1] = ring[0, 0] = 0
    _, geometry = labels_to_polygons(ring)
    assert geometry[0].is_valid
    assert geometry[0].area == 7
    assert len(geometry[0].interiors) == 1


def test_an_empty_image_has_no_polygons():
    for shape in ((0, 0), (0, 5), (4, 4)):
        ids, geometry = labels_to_polygons(np.zeros(shape, np.int32))
        assert ids.size == geometry.size == 0


def test_labels_that_are_no_plane_of_integers_are_refused():
    with pytest.raises(ValueError, match="float64"):
        labels_to_polygons(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="32 bits"):
        labels_to_polygons(np.full((2, 2), 2**40))
    with pytest.raises(ValueError, match="shape"):
        labels_to_polygons(np.zeros((3, 3, 3), int))


def test_simple_cells_keeps_the_largest_part_without_holes():
    ring = shapely.box(0, 0, 10, 10).difference(shapely.box(1, 1, 9, 9))  # 36
    block = shapely.box(20, 0, 27, 7)  # 49
    cells = np.array([shapely.MultiPolygon([ring, block]), ring, block, shapely.Polygon()], dtype=object)
    out = simple_cells(cells)
    assert out[0].equals(block)
    assert out[1].equals(shapely.box(0, 0, 10, 10))
    assert out[2] is block
    assert out[3].is_empty


@settings(max_examples=60, deadline=None)
@given(labels=label_images)
def test_rings_measure_as_shapely_and_come_back_unchanged(labels):
    _, geometry = labels_to_polygons(labels)
    geometry = np.append(geometry, shapely.Polygon())
    rings = Rings.from_shapely(geometry)
    np.testing.assert_allclose(rings.areas(), shapely.area(geometry))
    centroids = shapely.get_coordinates(shapely.centroid(geometry[:-1]))
    np.testing.assert_allclose(rings.centroids()[:-1], centroids)
    assert np.isnan(rings.centroids()[-1]).all()
    np.testing.assert_array_equal(rings.bounds(), shapely.bounds(geometry))
    back = rings.to_shapely()
    assert shapely.to_wkb(back).tolist() == shapely.to_wkb(geometry).tolist()
    order = np.arange(len(geometry))[::-1]
    assert shapely.to_wkb(rings.take(order).to_shapely()).tolist() == shapely.to_wkb(geometry[::-1]).tolist()


def test_rings_refuse_lines():
    with pytest.raises(TypeError, match="geometry 1 is a Point"):
        Rings.from_shapely([shapely.box(0, 0, 1, 1), shapely.Point(0, 0)])
