"""Channel intensities: equal to brute force on any polygon, window and chunk grid."""

import numpy as np
import pytest
import shapely
from cellquilt.aggregation.channels import measure_channels
from cellquilt.core.images import Image, ImageWriter
from cellquilt.geometry.intensities import Intensities, accumulate_channels
from cellquilt.geometry.polygons import Rings
from hypothesis import given, settings
from hypothesis import strategies as st


def blobs(rng: np.random.Generator, n: int, size: float, radius: float) -> np.ndarray:
    """Overlapping outlines with holes, also beyond the image's edges."""
    centre = rng.uniform(-5, size + 5, (n, 1, 2))
    angle = np.linspace(0, 2 * np.pi, 13, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * rng.uniform(0.3, 1, (n, 13, 1)) * radius
    shells = shapely.polygons(centre + ring)
    return np.where(rng.random(n) < 0.3, shapely.difference(shells, shapely.polygons(centre + ring * 0.4)), shells)


def brute_force(pixels: np.ndarray, polygons: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean, min, max and number of the pixels whose centres shapely finds inside."""
    rows, columns = np.mgrid[0 : pixels.shape[1], 0 : pixels.shape[2]]
    out = np.full((3, len(polygons), pixels.shape[0]), np.nan)
    n = np.zeros(len(polygons), dtype=int)
    for p, polygon in enumerate(polygons):
        inside = shapely.contains_xy(polygon, columns + 0.5, rows + 0.5)
        n[p] = inside.sum()
        if n[p]:
            values = pixels[:, inside].astype(np.float64)
            out[:, p] = values.sum(axis=1) / n[p], values.min(axis=1), values.max(axis=1)
    return (*out, n)


def image_of(path, pixels: np.ndarray, chunk_px: int) -> Image:
    channels = [f"c{i}" for i in range(pixels.shape[0])]
    with ImageWriter(path, pixels.shape, pixels.dtype, channels, {"global": np.eye(3)}, chunk_px=chunk_px) as writer:
        writer.write(pixels, 0, 0)
    return Image(path)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.uint8, np.uint16, np.uint32, np.float32]),
    st.sampled_from([5, 16, 33, 90]),
    st.sampled_from([3.0, 12.0, 60.0]),
)
@settings(max_examples=30, deadline=None)
def test_windows_add_up_to_brute_force(seed, dtype, window, radius):
    rng = np.random.default_rng(seed)
    pixels = (rng.random((3, 61, 83)) * (250 if dtype == np.uint8 else 65000)).astype(dtype)
    polygons = blobs(rng, 12, 80, radius)
    rings = Rings.from_shapely(polygons)
    got = Intensities(12, 3, dtype)
    for y in range(0, 61, window):
        for x in range(0, 83, window):
            accumulate_channels(pixels[:, y : y + window, x : x + window], (y, x), rings, None, got)
    mean, low, high, n = brute_force(pixels, polygons)
    np.testing.assert_array_equal(got.n_pixels, n)
    np.testing.assert_array_equal(got.min(), low)
    np.testing.assert_array_equal(got.max(), high)
    if dtype == np.float32:
        np.testing.assert_allclose(got.mean(), mean, rtol=1e-12)
    else:
        np.testing.assert_array_equal(got.mean(), mean)


def test_stored_image_with_small_chunks_any_window_and_threads(tmp_path):
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 65536, (2, 150, 201), dtype=np.uint16)
    pixels[:, 32:64, 64:96] = 0  # a chunk without a file
    polygons = blobs(rng, 700, 180, 14)
    image = image_of(tmp_path / "image", pixels, 32)
    mean, low, high, n = brute_force(pixels, polygons)
    rings = Rings.from_shapely(polygons)
    for window, threads in ((None, 1), (32, 2), (64, 1), (47, 1)):
        table = measure_channels(image, rings, window_px=window, threads=threads)
        assert table.channels == ["c0", "c1"]
        np.testing.assert_array_equal(table.n_pixels, n)
        np.testing.assert_array_equal(table.mean, mean)
        np.testing.assert_array_equal(table.min, low)
        np.testing.assert_array_equal(table.max, high)
    # Outlines in microns, with the map to pixels.
    scaled = Rings.from_shapely(shapely.transform(polygons, lambda xy: (xy - 8.0) / 4.0))
    moved = measure_channels(image, scaled, to_pixels=np.array([[4.0, 0, 8], [0, 4, 8], [0, 0, 1]]))
    np.testing.assert_allclose(moved.mean, mean, rtol=0.02)
    assert (moved.n_pixels == n).mean() > 0.99


def test_cells_without_a_pixel_centre_are_nan_and_sums_do_not_overflow(tmp_path):
    pixels = np.full((1, 700, 700), 65535, dtype=np.uint16)
    polygons = np.array(
        [shapely.box(0, 0, 700, 700), shapely.box(3.1, 3.1, 3.4, 3.4), shapely.box(900, 0, 950, 9), shapely.Polygon()]
    )
    table = measure_channels(image_of(tmp_path / "image", pixels, 256), Rings.from_shapely(polygons))
    assert table.n_pixels.tolist() == [490_000, 0, 0, 0]
    assert table.mean[0, 0] == table.min[0, 0] == table.max[0, 0] == 65535
    assert np.isnan(np.concatenate([table.mean[1:], table.min[1:], table.max[1:]])).all()


def test_touching_squares_share_no_pixel():
    pixels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    boxes = np.array([shapely.box(0, 0, 3.5, 8), shapely.box(3.5, 0, 8, 8)])  # the edge runs through pixel centres
    got = Intensities(2, 1, np.dtype(np.uint8))
    got.add(pixels, 0, 0, Rings.from_shapely(boxes))
    assert got.n_pixels.tolist() == [24, 40]
    assert got.sums.sum() == pixels.sum()


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="complex"):
        Intensities(1, 1, np.dtype(complex))
    rings = Rings.from_shapely(np.array([shapely.box(0, 0, 1, 1)]))
    with pytest.raises(ValueError, match="expected 2 channels"):
        Intensities(1, 2, np.dtype(np.uint8)).add(np.zeros((1, 4, 4), np.uint8), 0, 0, rings)
