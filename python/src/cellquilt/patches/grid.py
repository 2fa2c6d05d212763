"""The grid of patches: tight, without slivers, with a halo, on the engine's tile lattice.

A patch has three nested windows of the main image, all in whole pixels:

- its *core*: the cores of all patches tile the image, each pixel is in exactly one;
- its *window* = core + halo towards every neighbour: what is segmented; two neighbours share a strip of ``overlap``;
- its *context*: the pixels an engine must see so that the result in the window does not depend on where the patch
  ends. Without an engine lattice it is the window.

Engines like Cellpose run their network on fixed tiles that they lay over whatever image they are given, so that a
pixel sees other tiles in another patch: a seam by construction. `Lattice` therefore lays the tiles over the *slide*,
once, and the patches of the grid are unions of whole tiles.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from cellquilt.core.errors import CellquiltError

DEFAULT_WIDTH_PX = 2048
#: Default overlap in expected diameters: a halo of two on either side of the line between two cores.
DEFAULT_OVERLAP_DIAMETERS = 4.0
MIN_OVERLAP_DIAMETERS = 2.0
#: Pixels read around what interpolation needs, against rounding at the ends.
_GUARD_PX = 2


@dataclass(frozen=True)
class Axis:
    """Network tiles along one axis of a slide, as the engine itself would lay them over the whole slide.

    Attributes
    ----------
    length_px
        The slide's length in pixels.
    resized
        Its length after the engine's rescaling.
    pad
        Zeros before the first resized pixel.
    starts
        (n,) int64 first pixels of the tiles in the padded, resized frame.
    size
        Length of a tile.
    """

    length_px: int
    resized: int
    pad: int
    padded: int
    starts: np.ndarray
    size: int

    @property
    def step(self) -> float:
        """Slide pixels a resized pixel."""
        return self.length_px / self.resized

    def position(self, resized: np.ndarray | float) -> Any:
        """Slide coordinate (pixel centres at integers) of the centre of resized pixels."""
        return (np.asarray(resized, dtype=np.float64) + 0.5) * self.step - 0.5

    def sources(self, start: int, stop: int) -> tuple[int, int]:
        """Slide pixels [a, b) that interpolation of the padded, resized pixels [start, stop) reads."""
        reach = max(1.0, self.step) + _GUARD_PX
        first = math.floor(self.position(start - self.pad) - reach)
        last = math.ceil(self.position(stop - 1 - self.pad) + reach)
        return max(first, 0), min(last + 1, self.length_px)

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """Padded, resized pixels [a, b) that interpolation back to the slide pixels [start, stop) reads."""
        first = math.floor((start + 0.5) / self.step - 0.5) - 1
        last = math.ceil((stop - 0.5) / self.step - 0.5) + 1
        return max(first, 0) + self.pad, min(last + 1, self.resized) + self.pad

    def tiles(self, start: int, stop: int) -> range:
        """Tiles that touch the padded, resized pixels [start, stop)."""
        hit = np.flatnonzero((self.starts < stop) & (self.starts + self.size > start))
        return range(int(hit[0]), int(hit[-1]) + 1)

    def context(self, start: int, stop: int) -> tuple[int, int]:
        """Slide pixels [a, b) under all tiles that the slide pixels [start, stop) depend on."""
        tiles = self.tiles(*self.needed(start, stop))
        return self.sources(int(self.starts[tiles[0]]), int(self.starts[tiles[-1]]) + self.size)


@dataclass(frozen=True)
class Lattice:
    """How an engine tiles and rescales.

    Attributes
    ----------
    tile
        Width of a network tile in rescaled pixels; 0: no tiles, only `multiple` counts.
    overlap
        Overlap of tiles as the engine's fraction.
    rescale
        Rescaled pixels a slide pixel (model diameter / expected diameter).
    multiple
        Patch windows start at multiples of this many slide pixels (pooling engines without tiles).
    full_tiles
        A slide smaller than a tile is padded to a whole one (transformers), not tiled by a smaller one.
    reach
        Slide pixels around a window that its result depends on (engines without tiles).
    """

    tile: int = 0
    overlap: float = 0.1
    rescale: float = 1.0
    multiple: int = 1
    full_tiles: bool = False
    reach: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a bundle."""
        return asdict(self)

    def around(self, start: int, stop: int, length_px: int) -> tuple[int, int]:
        """Slide pixels [a, b) that the window [start, stop) depends on, for an engine without tiles."""
        return max(start - self.reach, 0), min(stop + self.reach, length_px)

    def axis(self, length_px: int) -> Axis:
        """The tiles along an axis, by the rule of Cellpose's `run_net` applied to the whole slide.

        The image is padded to a multiple of 16 plus 8 zeros on both sides; ``ceil((1 + 2 overlap) length / tile)``
        tiles have evenly spaced starts. A run on the whole slide is thus what the engine itself would do.
        """
        resized = max(int(length_px * self.rescale), 1) if self.rescale != 1.0 else length_px
        if self.full_tiles and resized < self.tile:
            extra = max(0, self.tile - resized - 16)
        else:
            extra = int(16 * np.ceil(resized / 16) - resized)
        padded = resized + 16 + extra
        count = 1 if padded <= self.tile else int(np.ceil((1.0 + 2 * self.overlap) * padded / self.tile))
        size = min(self.tile, padded)
        starts = np.linspace(0, padded - size, count).astype(np.int64)
        return Axis(length_px, resized, 8 + extra // 2, padded, starts, size)


@dataclass(frozen=True)
class Span:
    """A patch along one axis: [core0, core1) within [start, stop) within [context0, context1), in pixels."""

    core0: int
    core1: int
    start: int
    stop: int
    context0: int
    context1: int


@dataclass(frozen=True)
class Patch:
    """One patch.

    Attributes
    ----------
    index
        Row-major number within the full grid; stays the same when empty patches are left out.
    y, x
        Its spans.
    """

    index: int
    y: Span
    x: Span

    @property
    def window(self) -> tuple[int, int, int, int]:
        """(y0, y1, x0, x1) of the part that is segmented."""
        return self.y.start, self.y.stop, self.x.start, self.x.stop

    @property
    def core(self) -> tuple[int, int, int, int]:
        """(y0, y1, x0, x1) of the part that belongs to this patch alone."""
        return self.y.core0, self.y.core1, self.x.core0, self.x.core1

    @property
    def context(self) -> tuple[int, int, int, int]:
        """(y0, y1, x0, x1) of the pixels that the bundle holds."""
        return self.y.context0, self.y.context1, self.x.context0, self.x.context1

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a bundle."""
        return {"index": self.index, "y": list(asdict(self.y).values()), "x": list(asdict(self.x).values())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Patch":
        """The inverse of `as_dict`."""
        return cls(int(data["index"]), Span(*data["y"]), Span(*data["x"]))

    def inner_sides(self, shape: tuple[int, int]) -> tuple[bool, bool, bool, bool]:
        """Whether the window's top, bottom, left and right side lies inside the image, that is, may cut cells."""
        return self.y.start > 0, self.y.stop < shape[0], self.x.start > 0, self.x.stop < shape[1]


@dataclass(frozen=True)
class Grid:
    """All patches of a slide.

    Attributes
    ----------
    shape
        (height, width) of the slide in pixels.
    patches
        The patches that are to be segmented, by index.
    n_rows, n_columns
        Size of the full grid, empty patches included.
    overlap_px
        Narrowest strip shared by two neighbours; 0 for one patch.
    """

    shape: tuple[int, int]
    patches: tuple[Patch, ...]
    n_rows: int
    n_columns: int
    overlap_px: int

    @cached_property
    def n_empty(self) -> int:
        """Patches left out because there is no tissue."""
        return self.n_rows * self.n_columns - len(self.patches)

    def polygons(self) -> np.ndarray:
        """(n,) object array of the windows as boxes in global pixels."""
        import shapely

        windows = np.array([patch.window for patch in self.patches], dtype=np.float64).reshape(-1, 4)
        return np.asarray(shapely.box(windows[:, 2], windows[:, 0], windows[:, 3], windows[:, 1]), dtype=object)

    def borders(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted y and x (int64 pixels) of all inner sides of patch windows: where a seam could show."""
        ys = {edge for patch in self.patches for edge in (patch.y.start, patch.y.stop)} - {0, self.shape[0]}
        xs = {edge for patch in self.patches for edge in (patch.x.start, patch.x.stop)} - {0, self.shape[1]}
        return np.array(sorted(ys), dtype=np.int64), np.array(sorted(xs), dtype=np.int64)


def check_overlap(overlap_px: float, diameter_px: float, *, pixel_size_um: float | None = None) -> None:
    """Refuse an overlap in which a cell on a border may be whole in no patch.

    Raises
    ------
    CellquiltError
        ``patch-overlap-small`` if it is less than two expected diameters.
    """
    least = MIN_OVERLAP_DIAMETERS * diameter_px
    if overlap_px + 1e-6 < least:
        um = f" ({least * pixel_size_um:.4g} µm)" if pixel_size_um else ""
        raise CellquiltError(
            "patch-overlap-small",
            f"patches overlap by {overlap_px:g} px, but cells of {diameter_px:.4g} px need at least "
            f"{math.ceil(least)} px{um}, two expected diameters",
            f"leave --patch_overlap_px out (it is then {DEFAULT_OVERLAP_DIAMETERS:g} diameters), set it to "
            f"{math.ceil(least)} or more, or correct the expected diameter",
        )


def make_grid(
    shape: tuple[int, int],
    *,
    width_px: int | None = None,
    overlap_px: int = 0,
    lattice: Lattice | None = None,
    regions: np.ndarray | None = None,
    margin_px: float = 0.0,
) -> Grid:
    """Cut a slide into patches.

    Cores have equal sizes (up to rounding, or up to one engine tile), so that there are no slivers; a slide no wider
    than a patch is one patch. The order is row by row.

    Parameters
    ----------
    shape
        (height, width) in pixels.
    width_px
        Largest width of a core (with an engine lattice: the nearest whole number of tiles). 0: never cut.
        Default `DEFAULT_WIDTH_PX`.
    overlap_px
        Least width of the strip that two neighbours share.
    lattice
        The engine's tiling.
    regions
        (n,) shapely polygons in global pixels: patches whose core has no part of them are left out. None keeps all.
    margin_px
        A core this far from all regions is still kept.

    Returns
    -------
    Grid
    """
    width = DEFAULT_WIDTH_PX if width_px is None else width_px
    lattice = lattice or Lattice()
    rows, columns = (_spans(length, width or length, overlap_px, lattice) for length in shape)
    patches = [Patch(i * len(columns) + j, y, x) for i, y in enumerate(rows) for j, x in enumerate(columns)]
    if regions is not None:
        patches = _occupied(patches, regions, margin_px)
    strips = [a.stop - b.start for spans in (rows, columns) for a, b in itertools.pairwise(spans)]
    return Grid((int(shape[0]), int(shape[1])), tuple(patches), len(rows), len(columns), min(strips) if strips else 0)


def grid_of_windows(
    shape: tuple[int, int],
    windows: Sequence[tuple[int, int, int, int]],
    *,
    halo_px: int = 0,
    lattice: Lattice | None = None,
) -> Grid:
    """Patches of chosen windows instead of a whole slide, with the context that they would have in it.

    Parameters
    ----------
    shape
        (height, width) of the slide in pixels.
    windows
        (y0, y1, x0, x1) of each patch's core.
    halo_px
        Pixels around the core that are segmented with it.
    lattice
        The engine's tiling.

    Returns
    -------
    Grid
        One row of patches, in the order given.
    """
    lattice = lattice or Lattice()

    def span(length: int, core0: int, core1: int) -> Span:
        start, stop = max(core0 - halo_px, 0), min(core1 + halo_px, length)
        context = lattice.axis(length).context if lattice.tile else partial(lattice.around, length_px=length)
        return Span(core0, core1, start, stop, *context(start, stop))

    patches = [
        Patch(index, span(shape[0], y0, y1), span(shape[1], x0, x1)) for index, (y0, y1, x0, x1) in enumerate(windows)
    ]
    return Grid((int(shape[0]), int(shape[1])), tuple(patches), 1, len(patches), 0)


def _spans(length: int, width: int, overlap: int, lattice: Lattice) -> list[Span]:
    if length <= width:
        return [Span(0, length, 0, length, 0, length)]
    return (
        _tile_spans(length, width, overlap, lattice) if lattice.tile else _plain_spans(length, width, overlap, lattice)
    )


def _plain_spans(length: int, width: int, overlap: int, lattice: Lattice) -> list[Span]:
    unit = lattice.multiple
    count = math.ceil(length / width)
    edges = [round(k * length / count / unit) * unit for k in range(count)] + [length]
    before, after = overlap - overlap // 2, overlap // 2
    spans = []
    for core0, core1 in itertools.pairwise(edges):
        if core1 <= core0:
            continue
        start = max(0, (core0 - before) // unit * unit) if core0 else 0
        stop = min(length, -(-(core1 + after) // unit) * unit) if core1 < length else length
        spans.append(Span(core0, core1, start, stop, *lattice.around(start, stop, length)))
    return spans


def _tile_spans(length: int, width: int, overlap: int, lattice: Lattice) -> list[Span]:
    """Patches as runs of whole tiles.

    Where two tiles overlap the engine blends them, so a patch that holds tiles a..b is exact from the end of tile
    a - 1 to the start of tile b + 1. That is its window; neighbours share as many tiles as the overlap needs.
    """
    axis = lattice.axis(length)
    starts, n = axis.starts, len(axis.starts)
    if n == 1:
        return [Span(0, length, 0, length, 0, length)]
    stride = float(starts[-1]) / (n - 1)
    # Window between two tiles' blending zones; a run of m tiles with one shared has the core (m - 1) * stride.
    single = stride - (axis.size - stride)
    wanted = overlap / axis.step + 2 * _GUARD_PX
    shared = 1 + max(0, math.ceil((wanted - single) / stride))
    per_patch = max(1, round(width / axis.step / stride))
    firsts = _firsts(n - shared, per_patch) if n > shared else [0, 0]
    count = len(firsts) - 1
    # A run ends `shared` tiles into the next.
    runs = [(firsts[k], min(firsts[k + 1] + shared - 1, n - 1)) for k in range(count)]
    runs[-1] = (runs[-1][0], n - 1)
    windows = []
    for first, last in runs:
        # The guard keeps interpolation back to the slide's pixels inside the exact part.
        guard = 1.5
        exact0 = 0 if first == 0 else int(starts[first - 1]) + axis.size - axis.pad
        exact1 = axis.resized if last == n - 1 else int(starts[last + 1]) - axis.pad
        start = 0 if first == 0 else math.ceil((exact0 + guard) * axis.step)
        stop = length if last == n - 1 else math.floor((exact1 - guard) * axis.step)
        context = axis.sources(int(starts[first]), int(starts[last]) + axis.size)
        windows.append((max(start, 0), min(stop, length), *context))
    edges = [0] + [(a[1] + b[0]) // 2 for a, b in itertools.pairwise(windows)] + [length]
    return [Span(edges[k], edges[k + 1], *window) for k, window in enumerate(windows)]


def _firsts(n: int, per_patch: int) -> list[int]:
    """First tiles of runs of about `per_patch` steps over `n` steps, evenly spaced, and `n` itself.

    Runs of a few steps cannot all be the same: better one of three among twos than one of one.
    """
    most = max(1.25 * per_patch, per_patch + 1) if per_patch > 1 else 1
    count = max(1, round(n / per_patch))
    if -(-n // count) > most:
        count += 1
    elif count > 1 and n // count <= per_patch / 2 and -(-n // (count - 1)) <= most:
        count -= 1
    return [(2 * k * n + count) // (2 * count) for k in range(count + 1)]


def _occupied(patches: list[Patch], regions: np.ndarray, margin_px: float) -> list[Patch]:
    import shapely

    if not len(regions):
        return []
    cores = np.array([patch.core for patch in patches], dtype=np.float64)
    boxes = shapely.box(
        cores[:, 2] - margin_px, cores[:, 0] - margin_px, cores[:, 3] + margin_px, cores[:, 1] + margin_px
    )
    hit = np.zeros(len(patches), dtype=bool)
    hit[shapely.STRtree(boxes).query(np.asarray(regions, dtype=object), predicate="intersects")[1]] = True
    return [patch for patch, keep in zip(patches, hit, strict=True) if keep]
