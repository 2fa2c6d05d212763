"""Any Python function as segmenter, and one simple function to start with."""

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from cellquilt.core.errors import CellquiltError
from cellquilt.patches.bundle import Bundle
from cellquilt.patches.grid import Lattice, Patch
from cellquilt.segment.engine import (
    PatchLabels,
    Plan,
    each_patch,
    is_nuclear_stain,
    length_px,
    pick_channels,
    setting,
    window_of,
)

if TYPE_CHECKING:
    from cellquilt.core.images import Image

DEFAULT_FUNCTION = "cellquilt.segment.generic:rainfall"


def plan(image: "Image", settings: Mapping[str, Any], regions: np.ndarray | None = None) -> Plan:
    """See `engine.plan`. The function is not imported here: it may live in the segmentation task's environment only."""
    name = setting(settings, "generic_function") or DEFAULT_FUNCTION
    diameter = length_px(settings, "generic_diameter", image.pixel_size_um) or 1.0
    channels = pick_channels(image, setting(settings, "generic_channels"))
    return Plan(
        "generic",
        channels,
        diameter,
        Lattice(),
        is_nuclear_stain(channels),
        {"function": name, "kwargs": _kwargs(setting(settings, "generic_kwargs"), name), "diameter_px": diameter},
    )


def _kwargs(text: str | Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    if isinstance(text, Mapping):
        return dict(text)
    try:
        kwargs = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise CellquiltError(
            "generic-kwargs", f"keyword arguments of {name} are not JSON: {error}", 'for example {"threshold": 0.3}'
        ) from error
    if not isinstance(kwargs, dict):
        raise CellquiltError("generic-kwargs", f"keyword arguments of {name} are {text}; expected a JSON object")
    return kwargs


def import_function(name: str) -> Callable[..., Any]:
    """Import ``module:function``.

    Raises
    ------
    CellquiltError
        ``generic-function``.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise CellquiltError(
            "generic-function",
            f"cannot import the segmentation function {name!r}: {error}",
            "write 'module:function', with the module on PYTHONPATH",
        ) from error
    if not callable(found):
        raise CellquiltError("generic-function", f"{name!r} is not a function but {type(found).__name__}")
    return found


def load(bundle: Bundle) -> "GenericSegmenter":
    """See `engine.load`."""
    return GenericSegmenter(bundle)


class GenericSegmenter:
    """Runs a user's function on every patch and checks what it gives back."""

    def __init__(self, bundle: Bundle) -> None:
        engine = bundle.engine
        self.name: str = engine["function"]
        function = import_function(self.name)
        kwargs = dict(engine["kwargs"])
        # Functions that ask for them are told the expected size and the scale.
        offered = {"diameter_px": engine["diameter_px"], "pixel_size_um": bundle.attributes["pixel_size_um"]}
        accepted = _parameters(function)
        kwargs = {**{key: value for key, value in offered.items() if key in accepted}, **kwargs}
        self._function = functools.partial(function, **kwargs)
        self.facts = {"function": self.name, "kwargs": kwargs}

    def segment(self, bundle: Bundle) -> Iterator[PatchLabels]:
        """See `engine.Segmenter`."""
        return each_patch(bundle, self._one)

    def _one(self, patch: Patch, pixels: np.ndarray) -> np.ndarray:
        try:
            labels = self._function(pixels)
        except Exception as error:
            raise CellquiltError(
                "segmenter-failed", f"{self.name} failed on patch {patch.index}: {type(error).__name__}: {error}"
            ) from error
        return window_of(patch, as_labels(labels, pixels.shape[1:], self.name))


def _parameters(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def as_labels(labels: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Check what a segmenter returned.

    Returns
    -------
    numpy.ndarray
        (h, w) int32, 0 = background; renumbered if the labels do not fit.

    Raises
    ------
    CellquiltError
        ``segmenter-output`` for a wrong shape, type or negative labels.
    """
    array = np.asarray(labels)
    if array.shape != tuple(shape):
        raise CellquiltError(
            "segmenter-output",
            f"{name} returned labels of shape {array.shape}, expected {tuple(shape)}",
            "return one (Y, X) label image of the size of its input",
        )
    if array.dtype == bool or not np.issubdtype(array.dtype, np.integer):
        raise CellquiltError(
            "segmenter-output",
            f"{name} returned {array.dtype} labels, expected integers",
            "number the cells 1, 2, …; 0 is background",
        )
    if array.size and array.min() < 0:
        raise CellquiltError("segmenter-output", f"{name} returned negative labels", "0 is background")
    if array.size and array.max() > np.iinfo(np.int32).max:
        array = np.unique(array, return_inverse=True)[1].reshape(array.shape) + (0 if (array == 0).any() else 1)
    return np.ascontiguousarray(array, dtype=np.int32)


def rainfall(
    image: np.ndarray, diameter_px: float = 17.0, threshold: float = 0.25, min_area_px: float | None = None
) -> np.ndarray:
    """Split bright blobs at their valleys: a drop on each pixel runs uphill to the maximum it belongs to.

    Rainfall watershed on the Gaussian-smoothed first channel. A label depends on its own surroundings only, and ties
    are broken by relative position, so the result does not depend on where the image was cut. Meant for tests, demos
    and well separated nuclei, not as a substitute for a trained model.

    Parameters
    ----------
    image
        (C, h, w) normalised intensities; 0 is background, about 1 bright signal.
    diameter_px
        Expected diameter.
    threshold
        Intensity from which a pixel belongs to a cell.
    min_area_px
        Smaller labels are dropped; default a tenth of a disk of the expected diameter.

    Returns
    -------
    numpy.ndarray
        (h, w) int32.
    """
    plane = np.ascontiguousarray(image[0], dtype=np.float32)
    fine = _blur(plane, max(0.5, diameter_px / 16))
    smooth = _blur(plane, max(0.7, diameter_px / 6))
    least = np.pi / 4 * diameter_px**2 / 10 if min_area_px is None else min_area_px
    return _rainfall(smooth, fine > threshold, max(1, round(diameter_px * 0.3)), least)


def _blur(plane: np.ndarray, sigma: float) -> np.ndarray:
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return _convolve(plane, (kernel / kernel.sum()).astype(np.float32))


@numba.njit(cache=True, nogil=True)
def _convolve(plane, kernel):  # type: ignore[no-untyped-def]
    """Separable convolution, the edge repeated; the order of additions does not depend on the position."""
    height, width = plane.shape
    radius = len(kernel) // 2
    half = np.empty_like(plane)
    for i in range(height):
        for j in range(width):
            total = np.float32(0)
            for k in range(-radius, radius + 1):
                total += kernel[k + radius] * plane[i, min(max(j + k, 0), width - 1)]
            half[i, j] = total
    out = np.zeros_like(plane)
    for i in range(height):
        for k in range(-radius, radius + 1):
            row = min(max(i + k, 0), height - 1)
            for j in range(width):
                out[i, j] += kernel[k + radius] * half[row, j]
    return out


@numba.njit(cache=True, nogil=True)
def _uphill(value, mask, i, j, radius):  # type: ignore[no-untyped-def]
    """The highest pixel of the mask within a disk; of equals the first in reading order."""
    height, width = value.shape
    best_i, best_j, best = i, j, value[i, j]
    for y in range(max(i - radius, 0), min(i + radius + 1, height)):
        for x in range(max(j - radius, 0), min(j + radius + 1, width)):
            near = (y - i) ** 2 + (x - j) ** 2 <= radius * radius + 1
            first = y < best_i or (y == best_i and x < best_j)
            if near and mask[y, x] and (value[y, x] > best or (value[y, x] == best and first)):
                best_i, best_j, best = y, x, value[y, x]
    return best_i, best_j


@numba.njit(cache=True, nogil=True)
def _rainfall(value, mask, radius, least):  # type: ignore[no-untyped-def]
    height, width = value.shape
    root = np.full(height * width, -1, np.int64)
    for i in range(height):
        for j in range(width):
            if mask[i, j]:
                y, x = _uphill(value, mask, i, j, 1)
                root[i * width + j] = y * width + x
    # A weak maximum close to a higher one is texture of the same cell.
    for at in range(height * width):
        if root[at] == at:
            y, x = _uphill(value, mask, at // width, at % width, radius)
            root[at] = y * width + x
    for at in range(height * width):
        if root[at] >= 0:
            top = at
            while root[top] != top:
                top = root[top]
            here = at
            while root[here] != top:
                here, root[here] = root[here], top
    size = np.zeros(height * width, np.int32)
    for at in range(height * width):
        if root[at] >= 0:
            size[root[at]] += 1
    number = np.zeros(height * width, np.int32)
    labels = np.zeros((height, width), np.int32)
    count = 0
    for i in range(height):
        for j in range(width):
            top = root[i * width + j]
            if top >= 0 and size[top] >= least:
                if number[top] == 0:
                    count += 1
                    number[top] = count
                labels[i, j] = number[top]
    return labels
