"""Windows worth looking at in full resolution, and what lies in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely

from cellquilt.core.shapes import ShapesFile

ZOOM_UM = 110.0
_MIN_PX, _MAX_PX = 160, 900
#: Most transcripts drawn in a window; more are thinned evenly.
MAX_DOTS = 4000


@dataclass(frozen=True)
class Zoom:
    """A window of the image.

    Attributes
    ----------
    name
        ``dense``, ``typical``, ``sparse`` or ``border``.
    window
        (y0, y1, x0, x1) in pixels.
    n_cells
        Cells with their centroid inside.
    """

    name: str
    window: tuple[int, int, int, int]
    n_cells: int


def zoom_size(pixel_size_um: float, image_size: tuple[int, int]) -> int:
    """Width of a window in pixels."""
    wanted = int(np.clip(round(ZOOM_UM / pixel_size_um), _MIN_PX, _MAX_PX))
    return max(1, min(wanted, *image_size))


def choose_zooms(xy_px: np.ndarray, image_size: tuple[int, int], size: int, sides: np.ndarray) -> list[Zoom]:
    """A dense, a typical and a sparse window, and the fullest one on a patch border.

    Parameters
    ----------
    xy_px
        (n, 2) centroids of cells in pixels.
    image_size
        (height, width).
    size
        Width of a window.
    sides
        (s, 4) inner sides of patches (x0, y0, x1, y1).

    Returns
    -------
    list of Zoom
        No two of the same place; none if there are no cells. The same in every run.
    """
    height, width = image_size
    inside = (xy_px >= 0).all(axis=1) & (xy_px[:, 0] < width) & (xy_px[:, 1] < height)
    xy = xy_px[inside]
    if not len(xy):
        return []
    half = max(size // 2, 1)
    rows, columns = -(-height // half), -(-width // half)
    place = (xy[:, 1] // half).astype(np.int64) * columns + (xy[:, 0] // half).astype(np.int64)
    grid = np.bincount(place, minlength=rows * columns).reshape(rows, columns)
    # Cells in a window that starts at a half-window: four neighbouring bins.
    padded = np.pad(grid, ((0, 1), (0, 1)))
    starts = padded[:-1, :-1] + padded[1:, :-1] + padded[:-1, 1:] + padded[1:, 1:]
    starts = starts[: max(rows - 1, 1), : max(columns - 1, 1)]
    filled = np.sort(starts[starts >= min(3, int(starts.max()))])
    wanted = [("dense", filled[-1]), ("typical", filled[len(filled) // 2]), ("sparse", filled[len(filled) // 10])]
    found: list[Zoom] = []
    for name, count in wanted:
        row, column = divmod(int(np.argmax(starts == count)), starts.shape[1])
        _add(found, name, _fit(row * half, column * half, size, image_size), xy)
    if len(sides):
        y0, x0 = _best_on_border(sides, starts, half, size)
        border = _fit(y0, x0, size, image_size)
        found = [zoom for zoom in found if not _same_place(zoom.window, border)]
        _add(found, "border", border, xy)
    return found


def _fit(y0: int, x0: int, size: int, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    y0 = int(np.clip(y0, 0, max(image_size[0] - size, 0)))
    x0 = int(np.clip(x0, 0, max(image_size[1] - size, 0)))
    return y0, min(y0 + size, image_size[0]), x0, min(x0 + size, image_size[1])


def _add(found: list[Zoom], name: str, window: tuple[int, int, int, int], xy: np.ndarray) -> None:
    if not any(_same_place(zoom.window, window) for zoom in found):
        y0, y1, x0, x1 = window
        inside = (xy[:, 1] >= y0) & (xy[:, 1] < y1) & (xy[:, 0] >= x0) & (xy[:, 0] < x1)
        found.append(Zoom(name, window, int(inside.sum())))


def _same_place(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Whether two windows share more than half of their area."""
    high = max(0, min(a[1], b[1]) - max(a[0], b[0]))
    wide = max(0, min(a[3], b[3]) - max(a[2], b[2]))
    return high * wide > 0.5 * (a[1] - a[0]) * (a[3] - a[2])


def _best_on_border(sides: np.ndarray, starts: np.ndarray, half: int, size: int) -> tuple[int, int]:
    """Origin of the fullest window centred on an inner side."""
    x0, y0, x1, y1 = sides.T
    steps = np.maximum(((x1 - x0 + y1 - y0) // size).astype(int), 1)
    side = np.repeat(np.arange(len(sides)), steps)
    part = (np.concatenate([np.arange(count) for count in steps.tolist()]) + 0.5) / steps[side]
    left = x0[side] + part * (x1 - x0)[side] - size / 2
    top = y0[side] + part * (y1 - y0)[side] - size / 2
    row = np.clip(np.round(top / half), 0, starts.shape[0] - 1).astype(int)
    column = np.clip(np.round(left / half), 0, starts.shape[1] - 1).astype(int)
    best = int(np.argmax(starts[row, column]))
    return int(np.round(top[best])), int(np.round(left[best]))


def outlines(element: Path, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Outlines of the given shapes, batch by batch: only theirs are ever decoded.

    Parameters
    ----------
    element
        A shapes element.
    ids
        (n,) str of the shapes wanted.

    Yields
    ------
    numpy.ndarray
        (k,) object array of polygons.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(ids.tolist(), type=pa.string())
    file = ShapesFile(element)
    if file.index is None:  # written by other hands: the rows' order is that of the ids nowhere
        return
    for batch in file.batches([file.geometry, file.index]):
        rows = pc.is_in(batch.column(file.index).cast(pa.string()), value_set=wanted)
        chosen = batch.column(file.geometry).filter(rows)
        if len(chosen):
            yield np.asarray(shapely.from_wkb(chosen.to_numpy(zero_copy_only=False)), dtype=object)
