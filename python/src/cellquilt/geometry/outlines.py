"""The outlines of a shapes element, read in parts: for more cells than memory holds at once."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.shapes import GeoParquetFile, ShapesFile
from cellquilt.core.transforms import Affine, apply
from cellquilt.geometry.packed import Traits
from cellquilt.geometry.polygons import Rings, offsets_of
from cellquilt.geometry.wkb import rings_from_wkb


def rings_of(file: GeoParquetFile, wkb: pa.Array) -> Rings:
    """Some outlines of a file.

    Raises
    ------
    CellquiltError
        ``geoparquet-unreadable`` if they are no polygons.
    """
    try:
        return rings_from_wkb(wkb)
    except (shapely.errors.ShapelyError, TypeError) as error:
        raise CellquiltError("geoparquet-unreadable", f"{file.path} holds no polygons (WKB): {error}") from error


class Outlines:
    """Polygons that stay on disk until they are asked for.

    Parameters
    ----------
    element
        The shapes element's folder.
    kept
        (n rows of the file,) bool, the polygons to see. Default: all.

    Attributes
    ----------
    ids
        (n,) str.
    transforms
        Coordinate system → (3, 3) map from the outlines' own coordinates.
    """

    def __init__(self, element: Path, kept: NDArray[np.bool_] | None = None) -> None:
        self.element = element
        self._file = ShapesFile(element)
        self.transforms = self._file.transforms
        self.kept = np.ones(len(self._file), dtype=bool) if kept is None else kept
        self.ids = self._file.ids()
        if kept is not None:
            self.ids = self.ids[kept]

    def __len__(self) -> int:
        return self.ids.size

    def take(self, kept: NDArray[np.bool_]) -> "Outlines":
        """Only some of the polygons, (n,) bool."""
        rows = self.kept.copy()
        rows[rows] = kept
        return Outlines(self.element, rows)

    def parts(self, wanted: NDArray[np.bool_] | None = None) -> Iterator[tuple[NDArray[np.int64], Rings]]:
        """The polygons, a few MB at a time.

        Parameters
        ----------
        wanted
            (n,) bool, the polygons to give. Default: all.

        Yields
        ------
        positions : numpy.ndarray
            (m,) int64, ascending.
        rings : Rings
            Their m outlines.

        Raises
        ------
        CellquiltError
            ``geoparquet-unreadable``.
        """
        rows = self.kept
        if wanted is not None:
            rows = rows.copy()
            rows[rows] = wanted
        position = np.cumsum(self.kept) - 1
        start = 0
        for wkb in self._file.wkb():
            here = np.flatnonzero(rows[start : start + len(wkb)])
            if here.size:
                rings = rings_of(self._file, wkb)
                yield position[start + here], rings if here.size == len(rings) else rings.take(here)
            start += len(wkb)

    @cached_property
    def traits(self) -> Traits:
        """Of all polygons, from one pass over the file."""
        return Traits.join([Traits.of(rings) for _, rings in self.parts()])

    def rings(self, wanted: NDArray[np.bool_] | None = None, *, matrix: Affine | None = None) -> Rings:
        """Many polygons as arrays; takes 16 bytes a vertex and little more.

        Parameters
        ----------
        wanted
            (n,) bool, the polygons to give. Default: all.
        matrix
            (3, 3) map of the coordinates. Default: their own.
        """
        rings_of_each = np.zeros(len(self) if wanted is None else int(wanted.sum()), np.int64)
        n_rings = n_vertices = 0
        if "traits" in self.__dict__:  # else another pass over the file would cost more than growing
            every = slice(None) if wanted is None else wanted
            n_rings, n_vertices = (int(n[every].sum()) for n in (self.traits.n_rings, self.traits.n_vertices))
        coords, ring_offsets = np.empty((n_vertices, 2)), np.zeros(n_rings + 1, np.int64)
        exterior = np.zeros(n_rings, bool)
        done = ring = vertex = 0
        for _, part in self.parts(wanted):
            n, n_vertices = part.exterior.size, len(part.coords)
            # The system lets large arrays grow without a copy.
            if vertex + n_vertices > len(coords):
                coords.resize((max(vertex + n_vertices, len(coords) * 5 // 4), 2), refcheck=False)
            if ring + n > exterior.size:
                longer = max(ring + n, exterior.size * 5 // 4)
                ring_offsets.resize(longer + 1, refcheck=False)
                exterior.resize(longer, refcheck=False)
            coords[vertex : vertex + n_vertices] = part.coords if matrix is None else apply(matrix, part.coords)
            ring_offsets[ring + 1 : ring + n + 1] = part.ring_offsets[1:] + vertex
            exterior[ring : ring + n] = part.exterior
            rings_of_each[done : done + len(part)] = np.diff(part.polygon_offsets)
            done, ring, vertex = done + len(part), ring + n, vertex + n_vertices
        coords.resize((vertex, 2), refcheck=False)
        ring_offsets.resize(ring + 1, refcheck=False)
        exterior.resize(ring, refcheck=False)
        return Rings(coords, ring_offsets, offsets_of(rings_of_each), exterior)
