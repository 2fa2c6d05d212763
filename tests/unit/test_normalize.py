"""Normalisation once per slide."""

import json

import numpy as np
import pytest
from cellquilt.patches.normalize import Normalization, estimate_normalization
from cellquilt.segment.arrays import ArrayImage
from hypothesis import given, settings
from hypothesis import strategies as st


def nuclei(side, *, seed=0, spacing=20, background=100.0, signal=800.0, light=None, noise=5.0):
    """Disks of 12 px on a jittered lattice, under some light."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    offset = rng.integers(-3, 4, (side // spacing + 2, side // spacing + 2, 2))
    row, column = y // spacing, x // spacing
    cy, cx = (
        row * spacing + spacing / 2 + offset[row, column, 0],
        column * spacing + spacing / 2 + offset[row, column, 1],
    )
    inside = (y - cy) ** 2 + (x - cx) ** 2 < 36
    image = background + signal * inside
    image = image * (1.0 if light is None else light)
    return np.clip(image + rng.normal(0, noise, image.shape), 0, 65535).astype(np.uint16), inside


def slide(image):
    return ArrayImage(image[None], ["DAPI"], 0.5)


def flattened(image, **kwargs):
    normalization = estimate_normalization(slide(image), ["DAPI"], **kwargs)
    return normalization.apply(image[None], 0, 0)[0], normalization


@pytest.mark.parametrize("mode", ["field", "global"])
def test_background_becomes_0_and_nuclei_1(mode):
    image, inside = nuclei(600)
    values, _ = flattened(image, mode=mode)
    assert abs(values[~inside].mean()) < 0.05
    assert abs(values[inside].mean() - 1) < 0.05


def test_a_gradient_is_flattened_by_the_field_only():
    light = np.linspace(0.2, 1, 2400)[None, :]
    image, inside = nuclei(2400, light=light)
    by_field, _ = flattened(image, mode="field")
    by_one, _ = flattened(image, mode="global")
    for values, least, most in ((by_field, 0.8, 1.2), (by_one, 0.0, 0.5)):
        dim = values[:, :300][inside[:, :300]].mean()
        bright = values[:, -300:][inside[:, -300:]].mean()
        assert least <= dim / bright <= most


def test_background_canvas_does_not_change_the_values():
    image, inside = nuclei(600)
    canvas = np.random.default_rng(1).normal(100, 5, (2000, 2000)).clip(0).astype(np.uint16)
    canvas[700:1300, 700:1300] = image
    for mode in ("field", "global"):
        here, _ = flattened(image, mode=mode)
        there, _ = flattened(canvas, mode=mode)
        assert abs(there[700:1300, 700:1300][inside].mean() / here[inside].mean() - 1) < 0.05


def test_density_does_not_change_the_values():
    dense, inside_dense = nuclei(800, spacing=16)
    sparse, inside_sparse = nuclei(800, spacing=50)
    a, _ = flattened(dense)
    b, _ = flattened(sparse)
    assert abs(b[inside_sparse].mean() / a[inside_dense].mean() - 1) < 0.1


def test_empty_fields_are_not_blown_up():
    image, _ = nuclei(2400)
    image[:, 1200:] = np.random.default_rng(2).normal(100, 5, (2400, 1200)).clip(0).astype(np.uint16)
    values, _ = flattened(image)
    assert values[:, 1500:].std() < 0.05
    empty = np.random.default_rng(3).normal(100, 5, (600, 600)).clip(0).astype(np.uint16)
    assert flattened(empty)[0].std() < 0.15
    flat = np.full((300, 300), 7, np.uint16)
    assert np.isfinite(flattened(flat)[0]).all()


@settings(max_examples=30, deadline=None)
@given(y=st.integers(0, 250), x=st.integers(0, 250), h=st.integers(1, 50), w=st.integers(1, 50))
def test_a_pixel_has_the_same_bits_in_every_part(y, x, h, w):
    rng = np.random.default_rng(4)
    low = rng.uniform(0, 100, (1, 3, 4))
    normalization = Normalization("field", low, low + rng.uniform(100, 900, low.shape), (150.3, 100.7))
    image = rng.integers(0, 2000, (1, 300, 300), dtype=np.uint16)
    whole = normalization.apply(image, 0, 0)
    part = normalization.apply(image[:, y : y + h, x : x + w], y, x)
    np.testing.assert_array_equal(part, whole[:, y : y + h, x : x + w])
    assert part.dtype == np.float32


def test_apply_interpolates_linearly():
    low = np.zeros((1, 2, 2))
    high = np.array([[[1.0, 3.0], [1.0, 3.0]]])
    values = Normalization("field", low, high, (8.0, 8.0)).apply(np.ones((1, 8, 8)), 0, 0)
    np.testing.assert_allclose(values[0, 0], 1 / (1 + 2 * (np.arange(8) + 0.5) / 8), rtol=1e-6)


def test_same_seed_same_values_and_plain_data():
    image, _ = nuclei(700)
    a = estimate_normalization(slide(image), ["DAPI"], seed=3)
    b = estimate_normalization(slide(image), ["DAPI"], seed=3)
    np.testing.assert_array_equal(a.low, b.low)
    back = Normalization.from_dict(json.loads(json.dumps(a.as_dict())))
    np.testing.assert_array_equal(back.apply(image[None], 0, 0), a.apply(image[None], 0, 0))


def test_none_leaves_intensities_as_they_are():
    image, _ = nuclei(100)
    values, _ = flattened(image, mode="none")
    np.testing.assert_array_equal(values, image.astype(np.float32))


def test_channels_have_their_own_values():
    image, _ = nuclei(400)
    both = ArrayImage(np.stack([image, image // 4]), ["DAPI", "RNA"], 0.5)
    normalization = estimate_normalization(both, ["RNA", "DAPI"])
    assert normalization.high[1].mean() > 3 * normalization.high[0].mean()


@pytest.mark.parametrize("mode", ["field", "global"])
@pytest.mark.parametrize("side", [40, 130])
def test_one_noiseless_object_is_enough(side, mode):
    image = np.zeros((side, side), dtype=np.uint16)
    image[10:25, 12:30] = 1000
    values, _ = flattened(image, mode=mode)
    assert values[image > 0].mean() > 0.5
    assert abs(values[image == 0].mean()) < 0.1
