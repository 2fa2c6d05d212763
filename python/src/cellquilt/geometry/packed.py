"""More polygons than memory holds as objects.

A polygon as an object of shapely takes 16 bytes a vertex and some hundred more, and every step makes a further copy.
Outlines on the pixel lattice are a few corners after each other: packed as compressed differences they take 30 to 50
bytes a polygon, about what is known of each (bounds, area, centre) takes beside it. So a slide's polygons are packed
once, and every step unpacks those of the place that it works on.

`PackedPolygons` and `HeldPolygons` (an array of shapely's objects) are used alike; `polygons_of` wraps what it gets.
Neither changes: `take` and `replaced` give new ones, which share what they can.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from cellquilt.core.transforms import Affine, apply
from cellquilt.geometry.polygons import Rings, offsets_of
from cellquilt.geometry.wkb import wkb_of_rings

Index = NDArray[np.integer]
#: Positions, and the polygons that are there from now on.
Part = tuple[Index, "Rings | NDArray[np.object_]"]

_BLOCK = 256  # polygons that are unpacked together
_MEASURED = 8192  # polygons that are flattened at once
_WRITTEN = 2048  # polygons that are made WKB of at once
_CODEC = pa.Codec("zstd", compression_level=1)


@dataclass(frozen=True)
class Traits:
    """What is known of polygons without holding them.

    Attributes
    ----------
    bounds
        (n, 4) float64, as `Rings.bounds`.
    measures
        (n, 3) float64: area and centroid, as `Rings.measures`.
    n_parts
        (n,) int32, 0 for an empty polygon.
    n_rings, n_vertices
        (n,) int32.
    on_lattice
        (n,) bool, all coordinates are whole numbers.
    """

    bounds: NDArray[np.float64]
    measures: NDArray[np.float64]
    n_parts: NDArray[np.int32]
    n_rings: NDArray[np.int32]
    n_vertices: NDArray[np.int32]
    on_lattice: NDArray[np.bool_]

    @classmethod
    def of(cls, rings: Rings) -> "Traits":
        """Measured."""
        n_parts, n_rings = rings.n_parts().astype(np.int32), np.diff(rings.polygon_offsets).astype(np.int32)
        n_vertices = np.diff(rings.ring_offsets[rings.polygon_offsets]).astype(np.int32)
        return cls(rings.bounds(), rings.measures(), n_parts, n_rings, n_vertices, rings.on_lattice())

    @property
    def areas(self) -> NDArray[np.float64]:
        """(n,) as `Rings.areas`."""
        return self.measures[:, 0]

    @property
    def centroids(self) -> NDArray[np.float64]:
        """(n, 2) as `Rings.centroids`."""
        return self.measures[:, 1:]

    @classmethod
    def join(cls, parts: "list[Traits]") -> "Traits":
        """One after the other."""
        parts = parts or [cls.of(Rings.from_shapely([]))]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def take(self, index: Index) -> "Traits":
        """Of some of the polygons."""
        return Traits(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def put(self, index: Index, others: "Traits") -> None:
        """Replace those of some polygons; only of traits that nothing else uses."""
        for name in self.__dataclass_fields__:
            getattr(self, name)[index] = getattr(others, name)


class HeldPolygons:
    """An array of shapely's polygons.

    Parameters
    ----------
    geometry
        (n,) Polygons and MultiPolygons.
    """

    def __init__(self, geometry: NDArray[np.object_], traits: Traits | None = None) -> None:
        self._geometry = geometry
        self._traits = traits

    def __len__(self) -> int:
        return len(self._geometry)

    @property
    def traits(self) -> Traits:
        """Of all polygons."""
        if self._traits is None:
            blocks = range(0, len(self), _MEASURED)
            self._traits = Traits.join(
                [Traits.of(Rings.from_shapely(self._geometry[k : k + _MEASURED])) for k in blocks]
            )
        return self._traits

    def rings(self, index: Index) -> Rings:
        """Those at the given positions, as arrays."""
        return Rings.from_shapely(self._geometry[index])

    def objects(self, index: Index | None = None) -> NDArray[np.object_]:
        """Those at the given positions, or all, as shapely's objects."""
        return self._geometry if index is None else self._geometry[index]

    def take(self, index: Index) -> "HeldPolygons":
        """Those at the given positions, in that order."""
        return HeldPolygons(self._geometry[index], None if self._traits is None else self._traits.take(index))

    def replaced(self, parts: Iterable[Part]) -> "HeldPolygons":
        """The same with others in some positions; each is in one part at most."""
        geometry = self._geometry.copy()
        traits = self._traits and self._traits.take(np.arange(len(self)))
        for index, part in parts:
            if traits is not None:
                traits.put(index, Traits.of(_as_rings(part)))
            geometry[index] = part.to_shapely() if isinstance(part, Rings) else part
        return HeldPolygons(geometry, traits)

    def blank(self) -> "HeldPolygons":
        """As many empty ones."""
        return HeldPolygons(np.full(len(self), shapely.Polygon(), dtype=object))


def _as_rings(part: Rings | NDArray[np.object_]) -> Rings:
    return part if isinstance(part, Rings) else Rings.from_shapely(part)


@dataclass(frozen=True)
class _Block:
    """Polygons as compressed bytes.

    Attributes
    ----------
    data
        One after the other: rings a polygon and vertices a ring (int32), whether a ring starts a part (bool), and the
        coordinates: differences from vertex to vertex, all x, then all y, compressed; or as they are (float64), as
        what has no pattern takes no less compressed.
    n_polygons, n_rings, n_vertices
        How many there are.
    kind
        Type of the coordinates in `data`.
    origin
        First vertex, where the others are differences.
    """

    data: bytes
    n_polygons: int
    n_rings: int
    n_vertices: int
    kind: np.dtype[Any]
    origin: tuple[float, float]

    @classmethod
    def of(cls, rings: Rings) -> "_Block":
        coords: NDArray[Any] = np.ascontiguousarray(rings.coords)
        steps = np.empty((2, len(coords)), dtype=np.int32)
        longest = _steps(coords, steps)
        origin = (float(coords[0, 0]), float(coords[0, 1])) if len(coords) else (0.0, 0.0)
        if longest >= 0:
            coords = steps.astype(np.int16) if longest < 2**15 else steps
        vertices = np.diff(rings.ring_offsets).astype(np.int32)
        arrays = (np.diff(rings.polygon_offsets).astype(np.int32), vertices, rings.exterior, coords)
        data = b"".join(array.tobytes() for array in arrays)
        if coords.dtype != np.float64:
            data = _CODEC.compress(data, asbytes=True)
        return cls(data, len(rings), vertices.size, len(rings.coords), coords.dtype, origin)

    def unpack(self) -> Rings:
        """The polygons."""
        n, m = self.n_polygons, self.n_rings
        size = 4 * n + 5 * m + 2 * self.n_vertices * self.kind.itemsize
        data = self.data if self.kind == np.float64 else _CODEC.decompress(self.data, size)
        rings = np.frombuffer(data, np.int32, n)
        vertices = np.frombuffer(data, np.int32, m, 4 * n)
        exterior = np.frombuffer(data, np.bool_, m, 4 * (n + m))
        kept = np.frombuffer(data, self.kind, 2 * self.n_vertices, 4 * n + 5 * m)
        if self.kind == np.float64:
            coords = kept.reshape(-1, 2)  # of the block's own bytes: read-only
        else:
            coords = np.empty((self.n_vertices, 2))
            _walk(kept.reshape(2, -1), *self.origin, coords)
        return Rings(coords, offsets_of(vertices.astype(np.int64)), offsets_of(rings.astype(np.int64)), exterior)


@dataclass
class _Pool:
    """Polygons by the number that they were given when they were added."""

    blocks: list["_Block"] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    traits: list[Traits] = field(default_factory=list)

    def add(self, rings: Rings) -> NDArray[np.int64]:
        """Pack polygons; gives their numbers."""
        first = self.starts[-1]
        for start in range(0, len(rings), _BLOCK):
            stop = min(start + _BLOCK, len(rings))
            part = rings if stop - start == len(rings) else rings.take(np.arange(start, stop))
            self.blocks.append(_Block.of(part))
            self.starts.append(first + stop)
        if len(rings):
            self.traits.append(Traits.of(rings))
        return np.arange(first, self.starts[-1])

    def all_traits(self) -> Traits:
        """Of all polygons by number."""
        if len(self.traits) != 1:
            self.traits = [Traits.join(self.traits)]
        return self.traits[0]

    def rings(self, numbers: NDArray[np.int64]) -> Rings:
        """Unpack the polygons of these numbers, in that order."""
        starts = np.asarray(self.starts)
        block = np.searchsorted(starts, numbers, side="right") - 1
        order = np.argsort(block, kind="stable")
        runs = np.split(order, np.flatnonzero(np.diff(block[order])) + 1) if order.size else []
        if len(runs) == 1 and numbers.size == starts[block[0] + 1] - starts[block[0]] and (np.diff(numbers) == 1).all():
            return self.blocks[block[0]].unpack()
        traits = self.all_traits()
        polygon_offsets = offsets_of(traits.n_rings[numbers])
        vertex_offsets = offsets_of(traits.n_vertices[numbers])
        coords = np.empty((int(vertex_offsets[-1]), 2))
        ring_offsets = np.zeros(int(polygon_offsets[-1]) + 1, dtype=np.int64)
        exterior = np.empty(ring_offsets.size - 1, dtype=np.bool_)
        for run in runs:
            k = int(block[run[0]])
            whole = self.blocks[k].unpack()
            _place(
                whole.coords, whole.ring_offsets, whole.polygon_offsets, whole.exterior, numbers[run] - starts[k], run,
                polygon_offsets, vertex_offsets, coords, ring_offsets, exterior,
            )  # fmt: skip
        return Rings(coords, ring_offsets, polygon_offsets, exterior)


class PackedPolygons:
    """Polygons, packed. A MultiPolygon of one part comes back as a Polygon, a missing one as an empty one."""

    def __init__(self, pool: _Pool | None = None, numbers: NDArray[np.int64] | None = None) -> None:
        self._pool = pool or _Pool()
        self._numbers = np.empty(0, dtype=np.int64) if numbers is None else numbers

    @classmethod
    def of(cls, parts: Iterable[Rings]) -> "PackedPolygons":
        """Pack polygons that come some thousand at a time."""
        pool = _Pool()
        for rings in parts:
            pool.add(rings)
        return cls(pool, np.arange(pool.starts[-1]))

    def __len__(self) -> int:
        return self._numbers.size

    @property
    def traits(self) -> Traits:
        """Of all polygons."""
        return self._pool.all_traits().take(self._numbers)

    def rings(self, index: Index) -> Rings:
        """Those at the given positions, as arrays."""
        return self._pool.rings(self._numbers[index])

    def objects(self, index: Index | None = None) -> NDArray[np.object_]:
        """Those at the given positions, or all, as shapely's objects."""
        return self._pool.rings(self._numbers if index is None else self._numbers[index]).to_shapely()

    def wkb(self, start: int, stop: int) -> pa.ChunkedArray:
        """(stop - start,) binary, those at these positions."""
        parts = (np.arange(k, min(k + _WRITTEN, stop)) for k in range(start, stop, _WRITTEN))
        return pa.chunked_array([wkb_of_rings(self.rings(part)) for part in parts], pa.binary())

    def extent(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(4,) bounds of all, NaN if there are none, and the numbers that shapely gives their types, ascending."""
        traits = self.traits
        low, high = traits.bounds[:, :2], traits.bounds[:, 2:]
        bounds = [np.fmin.reduce(low, axis=0, initial=np.nan), np.fmax.reduce(high, axis=0, initial=np.nan)]
        types = np.where(traits.n_parts > 1, int(shapely.GeometryType.MULTIPOLYGON), int(shapely.GeometryType.POLYGON))
        return np.concatenate(bounds), np.unique(types)

    def take(self, index: Index) -> "PackedPolygons":
        """Those at the given positions, in that order."""
        return PackedPolygons(self._pool, self._numbers[index])

    def replaced(self, parts: Iterable[Part]) -> "PackedPolygons":
        """The same with others in some positions; each is in one part at most."""
        numbers = self._numbers.copy()
        for index, part in parts:
            numbers[index] = self._pool.add(_as_rings(part))
        return PackedPolygons(self._pool, numbers)

    def mapped(self, matrix: Affine) -> "PackedPolygons":
        """Those after a (3, 3) affine map; themselves if it changes nothing."""
        if np.array_equal(matrix, np.eye(3)):
            return self
        parts = (self.rings(np.arange(k, min(k + _WRITTEN, len(self)))) for k in range(0, len(self), _WRITTEN))
        return PackedPolygons.of(
            Rings(apply(matrix, part.coords), part.ring_offsets, part.polygon_offsets, part.exterior) for part in parts
        )

    def blank(self) -> "PackedPolygons":
        """As many empty ones."""
        pool = _Pool()
        pool.add(Rings.from_shapely([shapely.Polygon()]))
        return PackedPolygons(pool, np.zeros(len(self), dtype=np.int64))


Polygons = HeldPolygons | PackedPolygons


def polygons_of(geometry: "Polygons | NDArray[np.object_]") -> Polygons:
    """What is packed, or an array of shapely's objects."""
    if isinstance(geometry, Polygons):
        return geometry
    return HeldPolygons(np.asarray(geometry, dtype=object).ravel())


@numba.njit(cache=True, nogil=True)
def _place(
    coords, ring_offsets, polygon_offsets, exterior, inside, place, to_polygons, to_vertices, to_coords, to_rings,
    to_exterior,
):  # fmt: skip
    """Copy some polygons of a block to their places among others."""
    for k in range(inside.size):
        ring, vertex = to_polygons[place[k]], to_vertices[place[k]]
        for r in range(polygon_offsets[inside[k]], polygon_offsets[inside[k] + 1]):
            for v in range(ring_offsets[r], ring_offsets[r + 1]):
                to_coords[vertex, 0] = coords[v, 0]
                to_coords[vertex, 1] = coords[v, 1]
                vertex += 1
            to_exterior[ring] = exterior[r]
            ring += 1
            to_rings[ring] = vertex


@numba.njit(cache=True, nogil=True)
def _steps(coords, out):
    """Differences from vertex to vertex (the first 0); the longest, or -1 where a coordinate is no whole number."""
    longest = 0
    for axis in range(2):
        last = 0
        for i in range(coords.shape[0]):
            value = coords[i, axis]
            if not abs(value) < 2.0**30 or (value == 0 and math.copysign(1.0, value) < 0):
                return -1
            here = int(value)
            if here != value:
                return -1
            step = here - last if i else 0
            out[axis, i] = step
            longest = max(longest, abs(step))
            last = here
    return longest


@numba.njit(cache=True, nogil=True)
def _walk(steps, x, y, out):
    """The other way round: coordinates from differences."""
    for i in range(steps.shape[1]):
        x += steps[0, i]
        y += steps[1, i]
        out[i, 0] = x
        out[i, 1] = y
