"""The expected diameter of nuclei, estimated once per slide, never per patch.

Radius of the largest disk inside each bright blob (maximum of the distance to the background) in a seeded sample of
windows at full resolution. Touching nuclei have a maximum each, so they need not be separated first.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cellquilt.patches.normalize import Normalization, estimate_normalization

if TYPE_CHECKING:
    from cellquilt.core.images import Image

DEFAULT_UM = 9.0  # a nucleus in a tissue section, where there is nothing to measure
RANGE_UM = (3.0, 30.0)
_WINDOW_UM = 150.0
_WINDOWS = 24
_LEAST_COUNT = 4
_ROUNDNESS = 1.1  # equivalent diameter of a nucleus / diameter of the largest disk in it


def expected_diameter(
    image: "Image", channel: str, *, regions: np.ndarray | None = None, seed: int = 0
) -> tuple[float, int]:
    """As `estimate_diameter`, whatever the normalisation of the segmentation."""
    normalization = estimate_normalization(image, [channel], mode="field", regions=regions, seed=seed)
    return estimate_diameter(image, channel, normalization, regions=regions, seed=seed)


def estimate_diameter(
    image: "Image",
    channel: str,
    normalization: Normalization,
    *,
    regions: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[float, int]:
    """Estimate the diameter of the nuclei of a slide.

    Parameters
    ----------
    image
        The slide.
    channel
        The nuclear stain.
    normalization
        Of the slide, for that channel first.
    regions
        (n,) tissue polygons in global pixels.
    seed
        Seed of the sample.

    Returns
    -------
    diameter_px : float
        In slide pixels, within 3-30 µm.
    count : int
        Nuclei it was measured on; 0 means that there were too few and the usual 9 µm was taken.
    """
    pixel = image.pixel_size_um or 1.0
    radii = [
        radii_of(normalization.apply(image.read(y0, y1, x0, x1, channels=[channel]), y0, x0)[0], RANGE_UM[0] / pixel)
        for y0, y1, x0, x1 in _windows(image, pixel, regions, seed)
    ]
    diameter = typical_diameter(np.concatenate(radii) if radii else np.empty(0))
    if diameter is None:
        return DEFAULT_UM / pixel, 0
    return float(np.clip(diameter, RANGE_UM[0] / pixel, RANGE_UM[1] / pixel)), sum(map(len, radii))


def _windows(
    image: "Image", pixel: float, regions: np.ndarray | None, seed: int
) -> Iterator[tuple[int, int, int, int]]:
    height, width = int(image.shape[1]), int(image.shape[2])
    side = int(min(np.clip(_WINDOW_UM / pixel, 128, 1536), height, width))
    ys, xs = (np.arange(0, length - side + 1, side) for length in (height, width))
    corners = np.stack(np.meshgrid(ys, xs, indexing="ij"), axis=-1).reshape(-1, 2)
    if regions is not None and len(regions):
        import shapely

        boxes = shapely.box(corners[:, 1], corners[:, 0], corners[:, 1] + side, corners[:, 0] + side)
        corners = corners[
            np.unique(shapely.STRtree(boxes).query(np.asarray(regions, dtype=object), predicate="intersects")[1])
        ]
    chosen = np.sort(np.random.default_rng([seed, 2]).permutation(len(corners))[:_WINDOWS])
    for y, x in corners[chosen]:
        yield int(y), int(y) + side, int(x), int(x) + side


def radii_of(plane: np.ndarray, least_diameter: float = 4.0) -> np.ndarray:
    """Radii of the largest disks inside the bright blobs of a normalised image.

    Parameters
    ----------
    plane
        (h, w) float32, 0 = background, about 1 = bright.
    least_diameter
        Smaller blobs are noise; in pixels.

    Returns
    -------
    numpy.ndarray
        (n,) float64 in pixels, of blobs that the image's border does not cut.
    """
    from scipy import ndimage

    shrink = max(1, int(least_diameter / 6))
    height, width = (n // shrink * shrink for n in plane.shape)
    small = plane[:height, :width].reshape(height // shrink, shrink, width // shrink, shrink).mean(axis=(1, 3))
    small = ndimage.gaussian_filter(np.clip(small, 0, 1.5), max(1.0, least_diameter / shrink / 6))
    low, high = np.quantile(small, (0.05, 0.98))
    mask = small > max((low + high) / 2.5, 0.15)
    if not mask.any() or mask.all():
        return np.empty(0)
    distance = ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1]
    least = max(least_diameter / 2 / shrink, 1.5)
    smooth = ndimage.gaussian_filter(distance, max(1.0, least / 3))
    peaks = (smooth >= ndimage.maximum_filter(smooth, size=2 * int(np.ceil(least)) + 1)) & (distance >= least)
    y, x = np.nonzero(peaks)
    radius = distance[y, x]
    inside = np.minimum(np.minimum(y, small.shape[0] - 1 - y), np.minimum(x, small.shape[1] - 1 - x)) > radius
    return (radius[inside] - 0.5) * shrink


def typical_diameter(radii: np.ndarray) -> float | None:
    """The median diameter, each blob weighted by its radius (crumbs count little); None for too few blobs."""
    if len(radii) < _LEAST_COUNT:
        return None
    order = np.argsort(radii, kind="stable")
    weight = np.cumsum(radii[order])
    middle = float(radii[order][np.searchsorted(weight, weight[-1] / 2)])
    return 2 * middle * _ROUNDNESS
