"""Domains as pictures: one colour a domain, shared by all slides, and slides as small images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Chosen one after the other, each as far as can be from those before it for normal, protan and deutan sight; the first
#: 10 differ by 26 in CIELAB or more, all 20 by 16.
PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#6de7ff", "#920c00", "#9ef39e", "#246df3", "#005555", "#61f3ce", "#009eaa"),
    *("#b6863d", "#61b6ff", "#aaf36d", "#4931aa", "#86553d", "#6d3179", "#1892f3", "#49c279", "#49c2b6", "#ffdb3d"),
)
#: Of cells without a domain.
NO_DOMAIN = "#9aa3ab"
#: A cell reaches so far, in median distances to the nearest cell: neighbours touch, holes stay holes.
_REACH = 1.5


def domain_colours(domains: Sequence[str]) -> dict[str, str]:
    """A colour for each domain, in their order; after the 20th they come again."""
    return {name: PALETTE[k % len(PALETTE)] for k, name in enumerate(domains)}


@dataclass(frozen=True)
class Raster:
    """A slide's domains as an image.

    Attributes
    ----------
    codes
        (height, width) int64 domain of the cell that is nearest to the pixel's centre; -1: one without a domain, -2: no
        cell is near.
    um
        Width of a pixel in µm.
    """

    codes: NDArray[np.int64]
    um: float

    def colours(self, colours: Sequence[str]) -> NDArray[np.uint8]:
        """(height, width, 4) uint8, clear where no cell is near; `colours` are those of the domains by number."""
        table = np.array([_rgba(colour) for colour in (*colours, "#00000000", NO_DOMAIN)], dtype=np.uint8)
        return table[self.codes]


def _rgba(colour: str) -> tuple[int, int, int, int]:
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return red, green, blue, int(colour[7:9] or "ff", 16)


def domain_raster(xy_um: NDArray[np.floating], codes: NDArray[np.integer], most_px: int = 600) -> Raster:
    """Draw a slide; the time depends on the pixels more than on the cells.

    Parameters
    ----------
    xy_um
        (n, 2) centres of cells in µm, x to the right and y downwards.
    codes
        (n,) numbers of their domains, -1 for none.
    most_px
        Pixels of the longer side.
    """
    from scipy.spatial import cKDTree

    xy = np.asarray(xy_um, dtype=np.float64)
    if not len(xy):
        return Raster(np.full((1, 1), -2, dtype=np.int64), 1.0)
    tree = cKDTree(xy)
    sample = xy if len(xy) <= 20_000 else xy[:: len(xy) // 20_000]
    nearest = tree.query(sample, k=2)[0][:, 1] if len(xy) > 1 else np.ones(1)
    reach = _REACH * float(np.median(nearest)) or 1.0
    low, high = xy.min(axis=0) - reach, xy.max(axis=0) + reach
    um = float((high - low).max()) / most_px
    columns, rows = np.maximum(np.ceil((high - low) / um - 1e-9).astype(int), 1).tolist()
    y, x = np.meshgrid(low[1] + (np.arange(rows) + 0.5) * um, low[0] + (np.arange(columns) + 0.5) * um, indexing="ij")
    _, found = tree.query(np.column_stack([x.ravel(), y.ravel()]), distance_upper_bound=max(reach, 1.25 * um))
    drawn = np.append(np.asarray(codes, dtype=np.int64), -2)[found]
    return Raster(drawn.reshape(rows, columns), um)
