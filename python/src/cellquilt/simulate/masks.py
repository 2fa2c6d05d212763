"""Truth on the pixel lattice: which pixel belongs to which cell and nucleus.

A pixel belongs to the cell into whose free outline its centre lies deepest, in µm (an additively weighted Voronoi
diagram of star-shaped cells): neighbours that press against each other share a border, and nothing is counted twice.
"""

import math
from dataclasses import dataclass

import numba
import numpy as np

from cellquilt.geometry.polygonize import root_of
from cellquilt.simulate.cells import ANGLES, IN_PLANE, NO_NUCLEUS, Cells

MIN_AREA_UM2 = 12.0  # about 4 µm across; what neighbours squeeze below this is no cell
FAR = np.float32(1e9)


@dataclass(frozen=True)
class Masks:
    """Labels of a window.

    Attributes
    ----------
    cells, nuclei
        (h, w) int32, 1 + index into the window's `Cells`, 0 elsewhere.
    winner
        (h, w) int32, 1 + index of the cell whose outline the pixel lies deepest in or nearest to, before anything was
        cut off.
    depth, second
        (h, w) float32 µm: how far outside the winning outline the pixel lies (negative inside), and the same of the
        runner-up.
    nucleus
        (n,) int8 state of the cells' nuclei; `NO_NUCLEUS` where nothing is left of the cell.
    """

    cells: np.ndarray
    nuclei: np.ndarray
    winner: np.ndarray
    depth: np.ndarray
    second: np.ndarray
    nucleus: np.ndarray

    def crop(self, margin: int) -> "Masks":
        """The same without a margin of so many pixels on every side."""
        height, width = self.cells.shape
        inner = (slice(margin, height - margin), slice(margin, width - margin))
        return Masks(
            self.cells[inner],
            self.nuclei[inner],
            self.winner[inner],
            self.depth[inner],
            self.second[inner],
            self.nucleus,
        )


def draw(cells: Cells, window: tuple[int, int, int, int], canvas: tuple[int, int], pixel_size_um: float) -> Masks:
    """Rasterise cells and nuclei of a window.

    Parameters
    ----------
    cells
        All cells that may reach into the window, and their competitors.
    window
        (y0, y1, x0, x1) in pixels; may reach over the canvas.
    canvas
        (height, width) in pixels; nothing is labelled outside.
    pixel_size_um
        µm a pixel.

    Notes
    -----
    Every label is one 4-connected part: a cell cut in two by a neighbour keeps its largest part.
    """
    y0, y1, x0, x1 = window
    depth = np.full((y1 - y0, x1 - x0), FAR, np.float32)
    second = np.full((y1 - y0, x1 - x0), FAR, np.float32)
    labels = np.zeros((y1 - y0, x1 - x0), np.int32)
    _paint(cells.xy, cells.outline, y0, x0, pixel_size_um, depth, second, labels)
    winner = labels.copy()
    labels[depth >= 0] = 0
    # What its neighbours left of a squeezed cell may be too small to count as one: it and its nucleus are gone.
    least = int(MIN_AREA_UM2 / pixel_size_um**2)
    gone = np.bincount(labels.ravel(), minlength=len(cells) + 1)[1:] < least
    labels[np.concatenate([[False], gone])[labels]] = 0
    # Cut at the canvas before the parts are counted: a cell may fall apart at its edge.
    labels[: max(0, -y0)] = 0
    labels[:, : max(0, -x0)] = 0
    labels[max(0, canvas[0] - y0) :] = 0
    labels[:, max(0, canvas[1] - x0) :] = 0
    keep_largest_part(labels, len(cells), 1)
    nuclei = np.zeros_like(labels)
    nucleus = np.where(gone, NO_NUCLEUS, cells.nucleus).astype(np.int8)
    _paint_nuclei(nucleus, cells.nucleus_xy, cells.nucleus_outline, y0, x0, pixel_size_um, labels, nuclei)
    keep_largest_part(nuclei, len(cells), 1)
    return Masks(labels, nuclei, winner, depth, second, nucleus)


@numba.njit(cache=True, nogil=True)
def radius_at(outline, dx, dy):
    """Radius of an outline ((ANGLES,) float32) towards (dx, dy), linear between its points."""
    turn = math.atan2(dy, dx) * (ANGLES / (2.0 * math.pi))
    if turn < 0:
        turn += ANGLES
    k = int(turn)
    part = turn - k
    k = k % ANGLES
    return outline[k] * (1.0 - part) + outline[(k + 1) % ANGLES] * part


@numba.njit(cache=True, nogil=True)
def _paint(xy, outline, y0, x0, pixel, depth, second, labels):
    height, width = labels.shape
    edge = 1.5  # µm outside an outline that the membrane stain still wants to know about
    for k in range(len(xy)):
        cx, cy = xy[k, 0], xy[k, 1]
        reach = outline[k].max() + edge
        ja = max(0, math.floor((cy - reach) / pixel) - y0)
        jb = min(height, math.ceil((cy + reach) / pixel) + 1 - y0)
        ia = max(0, math.floor((cx - reach) / pixel) - x0)
        ib = min(width, math.ceil((cx + reach) / pixel) + 1 - x0)
        for j in range(ja, jb):
            dy = (j + y0 + 0.5) * pixel - cy
            for i in range(ia, ib):
                dx = (i + x0 + 0.5) * pixel - cx
                distance = math.sqrt(dx * dx + dy * dy)
                if distance > reach:
                    continue
                d = np.float32(distance - radius_at(outline[k], dx, dy))
                if d < depth[j, i]:
                    second[j, i] = depth[j, i]
                    depth[j, i] = d
                    labels[j, i] = k + 1
                elif d < second[j, i]:
                    second[j, i] = d


@numba.njit(cache=True, nogil=True)
def _paint_nuclei(state, xy, outline, y0, x0, pixel, cells, nuclei):
    height, width = cells.shape
    for k in range(len(xy)):
        if state[k] != IN_PLANE:
            continue
        cx, cy = xy[k, 0], xy[k, 1]
        reach = outline[k].max()
        for j in range(
            max(0, math.floor((cy - reach) / pixel) - y0),
            min(height, math.ceil((cy + reach) / pixel) + 1 - y0),
        ):
            dy = (j + y0 + 0.5) * pixel - cy
            for i in range(
                max(0, math.floor((cx - reach) / pixel) - x0),
                min(width, math.ceil((cx + reach) / pixel) + 1 - x0),
            ):
                if cells[j, i] != k + 1:
                    continue
                dx = (i + x0 + 0.5) * pixel - cx
                if math.sqrt(dx * dx + dy * dy) < radius_at(outline[k], dx, dy):
                    nuclei[j, i] = k + 1


@numba.njit(cache=True, nogil=True)
def keep_largest_part(labels, n, least):
    """Keep of every label its largest 4-connected part (ties: the first in raster order), in place.

    Parameters
    ----------
    labels
        (h, w) int32.
    n
        Largest label.
    least
        Parts with fewer pixels are removed altogether.
    """
    height, width = labels.shape
    runs = 1  # provisional parts: one a horizontal run
    for j in range(height):
        before = 0
        for i in range(width):
            if labels[j, i] != 0 and labels[j, i] != before:
                runs += 1
            before = labels[j, i]
    parent = np.arange(runs + 1).astype(np.int32)
    size = np.zeros(runs + 1, np.int64)
    owner = np.zeros(runs + 1, np.int32)
    part_of = np.zeros(labels.shape, np.int32)
    used = 0
    for j in range(height):
        row = part_of[j]
        for i in range(width):
            value = labels[j, i]
            if value == 0:
                continue
            if i > 0 and labels[j, i - 1] == value:
                row[i] = row[i - 1]
            else:
                used += 1
                row[i] = used
                owner[used] = value
            size[row[i]] += 1
            if j > 0 and labels[j - 1, i] == value:
                a, b = root_of(parent, part_of[j - 1, i]), root_of(parent, row[i])
                if a < b:
                    parent[b] = a
                elif b < a:
                    parent[a] = b
    for k in range(1, used + 1):
        root = root_of(parent, k)
        if root != k:
            size[root] += size[k]
    best = np.zeros(n + 1, np.int32)
    for k in range(1, used + 1):
        if parent[k] == k and size[k] >= least and (best[owner[k]] == 0 or size[k] > size[best[owner[k]]]):
            best[owner[k]] = k
    for j in range(height):
        for i in range(width):
            value = labels[j, i]
            if value != 0 and root_of(parent, part_of[j, i]) != best[value]:
                labels[j, i] = 0
