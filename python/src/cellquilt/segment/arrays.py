"""Segmentation of arrays in memory: a slide that is an array, and masks without a store."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellquilt.core.errors import CellquiltError
from cellquilt.patches.bundle import PatchPixels
from cellquilt.patches.grid import Lattice, Patch, make_grid
from cellquilt.patches.normalize import Normalization, estimate_normalization
from cellquilt.segment import cellpose


class ArrayImage:
    """An array that reads like a stored image.

    Parameters
    ----------
    pixels
        (C, h, w).
    channels
        Names; default numbers.
    pixel_size_um
        Size of a pixel in µm.
    """

    def __init__(
        self, pixels: np.ndarray, channels: Sequence[str] | None = None, pixel_size_um: float | None = None
    ) -> None:
        self.pixels = pixels
        self.shape = pixels.shape
        self.dtype = pixels.dtype
        self.channels = [str(name) for name in (channels or range(len(pixels)))]
        self.pixel_size_um = pixel_size_um
        self.chunk_px = 2048
        self.n_levels = 1
        self.transforms: dict[str, np.ndarray] = {"global": np.eye(3)}
        if pixel_size_um:
            self.transforms["microns"] = np.diag([pixel_size_um, pixel_size_um, 1.0])

    def level_shape(self, level: int) -> tuple[int, ...]:
        """(C, h, w) of a level; there is only one."""
        return self.shape

    def read(
        self, y0: int, y1: int, x0: int, x1: int, *, channels: Sequence[int | str] | None = None, level: int = 0
    ) -> np.ndarray:
        """(c, h, w) part of some channels."""
        picked = range(len(self.channels)) if channels is None else [self._number(item) for item in channels]
        return self.pixels[list(picked), y0:y1, x0:x1]

    def _number(self, channel: int | str) -> int:
        return channel if isinstance(channel, int) else self.channels.index(channel)

    def windows(self, size_px: int, level: int = 0) -> Iterator[tuple[int, int, int, int]]:
        """(y0, y1, x0, x1) in raster order."""
        height, width = self.shape[1:]
        for y in range(0, height, size_px):
            for x in range(0, width, size_px):
                yield y, min(y + size_px, height), x, min(x + size_px, width)


@dataclass(frozen=True)
class MemoryBundle:
    """One patch in memory that reads like a bundle."""

    pixels: np.ndarray
    shape: tuple[int, int]
    patches: list[Patch]
    lattice: Lattice
    normalization: Normalization

    def __len__(self) -> int:
        return len(self.patches)

    def __iter__(self) -> Iterator[PatchPixels]:
        for patch in self.patches:
            yield PatchPixels(patch, self.pixels)


def nuclei_labels(image: np.ndarray, diameter: float | None = None, **settings: Any) -> np.ndarray:
    """See `cellquilt.segment.nuclei_labels`."""
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[0] > min(array.shape[1:]) or not array.size or array.dtype.kind not in "buif":
        raise CellquiltError(
            "image-shape",
            f"cannot segment an array of shape {np.shape(image)} and type {np.asarray(image).dtype}",
            "give one plane (h, w), or channels first (c, h, w)",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CellquiltError("image-not-finite", "the image has NaN or infinite values", "replace them, e.g. by 0")
    slide: Any = ArrayImage(array[:1].astype(np.float32) if array.dtype == bool else array[:1])
    known = {"flow_threshold", "cellprob_threshold", "batch_size", "gpu", "model"}
    values: dict[str, Any] = {f"cellpose_{name}": value for name, value in settings.items() if name in known}
    unknown = set(settings) - known - {"threads"}
    if unknown:
        raise TypeError(f"nuclei_labels() got unexpected arguments {', '.join(sorted(unknown))}")
    values["threads"] = settings.get("threads")
    normalization = estimate_normalization(slide, slide.channels, mode="global")
    plan = cellpose.plan(slide, {**values, "cellpose_diameter_px": diameter or cellpose.NUCLEI_DIAMETER_PX})
    model = values.get("cellpose_model", cellpose.SHIPPED)
    segmenter = cellpose.CellposeSegmenter({**plan.settings, "model": model})
    model_diameter = plan.settings["model_diameter_px"]

    def segment(pixels: np.ndarray, diameter_px: float) -> np.ndarray:
        lattice = Lattice(tile=plan.lattice.tile, rescale=model_diameter / diameter_px)
        grid = make_grid(pixels.shape[1:], width_px=0, lattice=lattice)
        bundle: Any = MemoryBundle(pixels, grid.shape, list(grid.patches), lattice, normalization)
        (result,) = segmenter.segment(bundle)
        if result.error is not None:
            raise result.error
        assert result.labels is not None
        return result.labels

    return in_raster_order(segment(slide.pixels, diameter or _diameter(slide, normalization, segment)))


def _diameter(
    slide: ArrayImage, normalization: Normalization, segment: Callable[[np.ndarray, float], np.ndarray]
) -> float:
    """Measured on the image first, then on what the model finds in a part of it."""
    from cellquilt.segment.cpnet import estimate_diameter_px
    from cellquilt.segment.diameter import radii_of, typical_diameter

    height, width = slide.shape[1:]
    part = normalization.apply(slide.pixels[:, :1536, :1536], 0, 0)[0]
    start = typical_diameter(radii_of(part)) or cellpose.NUCLEI_DIAMETER_PX
    side = int(max(256, 25 * start))
    y, x = max(0, (height - side) // 2), max(0, (width - side) // 2)
    middle = slide.pixels[:, y : y + side, x : x + side]
    return estimate_diameter_px(lambda plane, assumed: segment(plane[None], assumed), middle[0], start_px=(start,))


def in_raster_order(labels: np.ndarray) -> np.ndarray:
    """Renumber labels 1, 2, … by their first pixel in reading order.

    Parameters
    ----------
    labels
        (h, w) int32, 0 = background.
    """
    values, first = np.unique(labels, return_index=True)
    first[values == 0] = -1
    rank = np.empty(len(values), dtype=np.int32)
    rank[np.argsort(first, kind="stable")] = np.arange(len(values)) + (0 if (values == 0).any() else 1)
    return rank[np.searchsorted(values, labels)].astype(np.int32)
