"""An image aligned with a slide, read in windows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean, did_you_mean_file
from cellquilt.core.images import Image
from cellquilt.core.transforms import MICRONS, Affine, apply
from cellquilt.readers.base import ImageSource


class SlideImage:
    """An image aligned with a slide.

    Parameters
    ----------
    image
        (channels, height, width) array of numpy, dask or zarr; a SpatialData image element; or the folder of one.
        Integers are brought to 0 to 1 by the largest of their type, floats are taken as they are.
    pixel_size_um
        Width of a pixel, for an image whose first pixel's corner is the origin of the cells' coordinates.
    um_to_px
        Instead, a (3, 3) or (2, 3) map from cells' x, y in µm to the image's x (columns), y (rows) in pixels; pixel
        (i, j) covers [i, i + 1) × [j, j + 1).
    coordinate_system
        Of an element, where neither is given: the system of the cells' coordinates; its map is used.
    channels
        Positions of the channels to use; all by default.

    Attributes
    ----------
    shape
        (channels, height, width), channels being those that are used.
    um_to_px
        (3, 3) float64.

    Raises
    ------
    CellquiltError
        ``image-invalid``, ``image-alignment``, ``image-unreadable``.
    """

    def __init__(
        self,
        image: Any,
        *,
        pixel_size_um: float | None = None,
        um_to_px: ArrayLike | None = None,
        coordinate_system: str = MICRONS,
        channels: Sequence[int] | None = None,
    ) -> None:
        if isinstance(image, str | Path) and not Path(image).is_dir():
            hint = did_you_mean_file(Path(image)) or "name the folder of an image element, such as slide.zarr/images/he"
            raise CellquiltError("image-unreadable", f"there is no folder {image}", hint)
        element: Any = Image(image) if isinstance(image, str | Path) else image
        maps: dict[str, Affine] | None = None
        self._element = element if isinstance(element, Image) else None
        if isinstance(element, Image):
            maps = element.transforms
        elif type(element).__module__.startswith("xarray."):
            element, maps = _of_xarray(element)
        self._array = element
        shape, dtype = _checked(element)
        self._dtype = np.dtype(dtype)
        self._channels = _channels(channels, shape[0])
        self.shape = (len(self._channels), shape[1], shape[2])
        self.um_to_px = _alignment(maps, pixel_size_um, um_to_px, coordinate_system)

    @classmethod
    def of_source(cls, source: ImageSource, channels: Sequence[int] | None = None) -> "SlideImage":
        """An image that a reader opened; its windows are read when they are asked for."""
        return cls(_Windows(source), um_to_px=np.linalg.inv(source.transforms[MICRONS]), channels=channels)

    @property
    def item_size(self) -> int:
        """Bytes of a pixel of one channel."""
        return self._dtype.itemsize

    @property
    def unit(self) -> float:
        """What pixels are multiplied by."""
        return 1 / float(np.iinfo(self._dtype).max) if self._dtype.kind == "u" else 1.0

    def level(self, most: int) -> int:
        """The coarsest pyramid level whose pixels are at most `most` of the image wide."""
        level, element = 0, self._element
        if element is None:
            return 0
        _, height, width = self.shape
        while 2 ** (level + 1) <= most and level + 1 < element.n_levels:
            step = 2 ** (level + 1)
            if element.level_shape(level + 1)[1:] != (-(-height // step), -(-width // step)):
                break  # made by another rule: its pixels lie elsewhere
            level += 1
        return level

    def read(self, y0: int, y1: int, x0: int, x1: int, level: int = 0) -> NDArray[Any]:
        """(channels, y1 - y0, x1 - x0) pixels of a window inside the image."""
        if self._element is not None:
            return self._element.read(y0, y1, x0, x1, channels=self._channels, level=level)
        window = np.asarray(self._array[:, y0:y1, x0:x1])
        return window if len(self._channels) == len(window) else window[self._channels]

    def inside(self, xy_um: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(n,) which places the image shows."""
        xy = apply(self.um_to_px, xy_um)
        return ((xy >= 0) & (xy < [self.shape[2], self.shape[1]])).all(axis=1)


class _Windows:
    """An opened image as an array of which windows are read."""

    def __init__(self, source: ImageSource) -> None:
        self._source, self.shape, self.dtype = source, source.shape, source.dtype

    def __getitem__(self, window: tuple[slice, slice, slice]) -> NDArray[Any]:
        _, y, x = window
        bounds = y.start, y.stop, x.start, x.stop
        return np.stack([self._source.read(channel, *bounds) for channel in range(self.shape[0])])


def _of_xarray(element: Any) -> tuple[Any, dict[str, Affine]]:
    """The pixels of an element in memory, of the full level, and its maps to coordinate systems."""
    if hasattr(element, "children"):
        if "scale0" not in element.children:
            raise CellquiltError("image-invalid", "the element has no scale0", "give a SpatialData image element")
        element = next(iter(element["scale0"].data_vars.values()))
    if set(element.dims) != {"c", "y", "x"}:
        raise CellquiltError(
            "image-invalid", f"the element has axes {', '.join(map(str, element.dims))}", "an image has c, y and x"
        )
    known = element.attrs.get("transform", {})
    maps = {name: np.asarray(map_.to_affine_matrix(("x", "y"), ("x", "y"))) for name, map_ in known.items()}
    return element.transpose("c", "y", "x").data, maps


def _checked(array: Any) -> tuple[tuple[int, int, int], Any]:
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if shape is None or dtype is None:
        raise CellquiltError(
            "image-invalid", f"{type(array).__name__} is no image", "give an array, a SpatialData element or its folder"
        )
    if len(shape) != 3 or min(shape) < 1 or (shape[2] <= 4 < shape[0]):
        raise CellquiltError(
            "image-invalid", f"the image is {tuple(shape)}", "(channels, height, width) was expected; move the axes"
        )
    kind = np.dtype(dtype).kind
    if kind not in "uf":
        raise CellquiltError(
            "image-invalid", f"pixels are {np.dtype(dtype)}", "give uint8, uint16, or floats from 0 to 1"
        )
    return (int(shape[0]), int(shape[1]), int(shape[2])), dtype


def _channels(wanted: Sequence[int] | None, there: int) -> list[int]:
    chosen = list(range(there)) if wanted is None else list(wanted)
    wrong = [channel for channel in chosen if not 0 <= channel < there]
    if wrong or not chosen:
        what = f"no channel {wrong[0]}" if wrong else "no channels chosen"
        raise CellquiltError("image-invalid", f"the image has {what}", f"channels: 0 to {there - 1}")
    return chosen


def _alignment(
    maps: dict[str, Affine] | None, pixel_size_um: float | None, um_to_px: ArrayLike | None, system: str
) -> Affine:
    if pixel_size_um is not None and um_to_px is not None:
        raise CellquiltError("image-alignment", "both pixel_size_um and um_to_px are given", "give one of them")
    if pixel_size_um is not None:
        if not 0 < pixel_size_um < np.inf:
            raise CellquiltError("image-alignment", f"pixel_size_um is {pixel_size_um}", "a length in µm above 0")
        return np.diag([1 / pixel_size_um, 1 / pixel_size_um, 1.0])
    if um_to_px is None:
        if maps is None:
            raise CellquiltError(
                "image-alignment", "nothing says how the image lies", "give pixel_size_um, or um_to_px for a map"
            )
        if system not in maps:
            hint = did_you_mean(system, maps) if maps else "it has none"
            raise CellquiltError(
                "image-alignment",
                f'the image has no coordinate system "{system}"',
                f"{hint}; or give pixel_size_um or um_to_px",
            )
        return np.linalg.inv(_square(maps[system]))
    return _square(um_to_px)


def _square(given: ArrayLike) -> Affine:
    matrix = np.eye(3)
    part = np.asarray(given, dtype=np.float64)
    if part.shape not in ((2, 3), (3, 3)):
        raise CellquiltError("image-alignment", f"the map is {part.shape}", "give (3, 3) or (2, 3)")
    matrix[:2] = part[:2]
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise CellquiltError("image-alignment", f"the map {matrix.tolist()} cannot be inverted", "check um_to_px")
    return matrix
