"""Labels grow to their nearest pixels, exactly, and the same in a tile as in the whole."""

import numpy as np
import pytest
from cellquilt.geometry.expand import expand_labels, squared_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

sparse = hnp.arrays(
    np.int32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=16),
    elements=st.sampled_from([0] * 9 + [1, 2, 5]),
)
distances = st.sampled_from([0, 0.5, 1, 1.5, 2, 3, 4.3, 5, 50, np.inf])


def brute_force(labels, distance):
    """Every pixel against every seed; of equally near ones the leftmost, then the upper."""
    ys, xs = np.nonzero(labels)
    order = np.lexsort((ys, xs))
    ys, xs = ys[order], xs[order]
    if ys.size == 0:
        return labels.copy(), np.full(labels.shape, 2**31 - 1)
    y, x = np.mgrid[: labels.shape[0], : labels.shape[1]]
    d = (y[..., None] - ys) ** 2 + (x[..., None] - xs) ** 2
    nearest = d.argmin(axis=-1)
    d = d.min(axis=-1)
    return np.where(d <= distance**2 + 1e-9, labels[ys[nearest], xs[nearest]], 0), d


@settings(max_examples=250, deadline=None)
@given(labels=sparse, distance=distances)
def test_expansion_equals_brute_force(labels, distance):
    expected, d = brute_force(labels, distance)
    np.testing.assert_array_equal(expand_labels(labels, distance), expected)
    got = np.empty(labels.shape, np.int32)
    squared_distance(labels, got)
    np.testing.assert_array_equal(got, d)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), distance=st.sampled_from([1, 2.5, 4, 7]))
def test_a_tile_with_its_halo_equals_the_whole(seed, distance):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((48, 48)) < 0.02, rng.integers(1, 99, (48, 48)), 0).astype(np.int32)
    whole = expand_labels(labels, distance)
    halo = int(np.ceil(distance)) + 1
    for y in range(0, 48, 16):
        for x in range(0, 48, 16):
            top, left = max(y - halo, 0), max(x - halo, 0)
            tile = expand_labels(labels[top : y + 16 + halo, left : x + 16 + halo], distance)
            np.testing.assert_array_equal(tile[y - top :, x - left :][:16, :16], whole[y : y + 16, x : x + 16])


def test_a_square_grows_by_the_distance_and_stops_half_way_to_its_neighbour():
    labels = np.zeros((20, 30), np.int32)
    labels[8:12, 5:10] = 1
    labels[8:12, 14:20] = 2
    out = expand_labels(labels, 3)
    assert out[10].tolist() == [0, 0] + [1] * 10 + [2] * 11 + [0] * 7
    assert out[:, 7].tolist() == [0] * 5 + [1] * 10 + [0] * 5
    np.testing.assert_array_equal(out[labels > 0], labels[labels > 0])


def test_a_negative_distance_is_refused():
    for wrong in (-1, np.nan):
        with pytest.raises(ValueError, match="0 or more"):
            expand_labels(np.zeros((2, 2), np.int32), wrong)
