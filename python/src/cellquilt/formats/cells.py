"""What the files of other programs are made from: the cells of a published store, some thousand at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.parquet import arrow_array
from cellquilt.core.store import Store
from cellquilt.core.transforms import Affine, apply
from cellquilt.geometry.geojson import join_json
from cellquilt.geometry.outlines import Outlines
from cellquilt.geometry.packed import PackedPolygons
from cellquilt.geometry.polygons import Rings

CELLS, NUCLEI, POINTS, TABLE = "cell_boundaries", "nucleus_boundaries", "transcripts", "table"


@dataclass
class SlideCells:
    """The cells of a store, and what belongs to them.

    Attributes
    ----------
    store
        The store.
    outlines
        The cells' outlines.
    """

    store: Store
    outlines: Outlines = field(init=False)

    def __post_init__(self) -> None:
        hint = "segment the slide first"
        if not self.store.has("shapes", CELLS):
            raise CellquiltError("export-no-cells", f"{self.store.path} has no shapes {CELLS}", hint)
        self.outlines = Outlines(self.store.element("shapes", CELLS))
        if len(self.outlines) == 0:
            raise CellquiltError("export-no-cells", f"{self.store.path} has no cell in {CELLS}", hint)

    def __len__(self) -> int:
        return len(self.outlines)

    @cached_property
    def ids(self) -> pa.Array:
        """(n,) string, the cells' ids."""
        return pa.array(self.outlines.ids.tolist(), pa.string())

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """(n,) int64, a number for each cell, ascending: that at the end of its id, else its row, counted from 1."""
        found = pc.struct_field(pc.extract_regex(self.ids, r"-(?P<number>\d{1,9})$"), "number")
        if found.null_count == 0:
            numbers = found.cast(pa.int64()).to_numpy()
            if (np.diff(numbers) > 0).all():
                return numbers
        return np.arange(1, len(self) + 1)

    @cached_property
    def nuclei(self) -> Outlines | None:
        """The nuclei's outlines; None where there are none."""
        there = self.store.has("shapes", NUCLEI)
        return Outlines(self.store.element("shapes", NUCLEI)) if there else None

    @cached_property
    def cell_of_nucleus(self) -> NDArray[np.int64]:
        """(n nuclei,) int64 row of the cell that has a nucleus' id, -1 for none."""
        if self.nuclei is None:
            return np.zeros(0, dtype=np.int64)
        rows = self.rows_of(pa.array(self.nuclei.ids.tolist(), pa.string()))
        lost = int((rows < 0).sum())
        if lost:
            LOG.warning("%s: %d nuclei have no cell of their id and are left out", self.store.name, lost)
        return rows

    def rows_of(self, ids: pa.Array) -> NDArray[np.int64]:
        """(m,) int64 row of the cell of each id, -1 for none; ids may be null, or a dictionary."""
        if pa.types.is_dictionary(ids.type):
            known = self.rows_of(ids.dictionary)
            codes = ids.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
            return np.append(known, -1)[codes]
        found = pc.index_in(ids.cast(pa.string()), value_set=self.ids, skip_nulls=True)
        return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    @cached_property
    def packed_nuclei(self) -> PackedPolygons:
        """The nuclei, in memory, in their own coordinates."""
        assert self.nuclei is not None
        return PackedPolygons.of(rings for _, rings in self.nuclei.parts())

    @cached_property
    def nucleus_of_cell(self) -> NDArray[np.int64]:
        """(n,) int64 row of each cell's first nucleus that has an outline, -1 for none."""
        out = np.full(len(self), -1, dtype=np.int64)
        if self.nuclei is not None:
            whole = np.flatnonzero((self.cell_of_nucleus >= 0) & (self.nuclei.traits.n_parts > 0))[::-1]
            out[self.cell_of_nucleus[whole]] = whole
        return out

    def map_of(self, system: str, outlines: Outlines | None = None) -> Affine:
        """(3, 3) map from the cells' own coordinates, or another element's, to a coordinate system.

        Raises
        ------
        CellquiltError
            ``export-no-system``.
        """
        outlines = self.outlines if outlines is None else outlines
        if system not in outlines.transforms:
            raise CellquiltError(
                "export-no-system",
                f"{outlines.element.name} has no map to {system}; it has {', '.join(sorted(outlines.transforms))}",
                "give pixel_size_um when reading the slide" if system == "microns" else "read the slide with its image",
            )
        return outlines.transforms[system]

    def parts(self, matrix: Affine) -> Iterator[tuple[NDArray[np.int64], Rings]]:
        """The cells' outlines in another coordinate system, a few MB at a time: rows, and their outlines."""
        for rows, rings in self.outlines.parts():
            yield rows, mapped(rings, matrix)

    def nuclei_of(self, rows: NDArray[np.int64], matrix: Affine) -> tuple[NDArray[np.bool_], Rings]:
        """Which of some cells have a nucleus, (m,) bool, and the outlines of these nuclei."""
        nucleus = self.nucleus_of_cell[rows]
        there = nucleus >= 0
        if not there.any():
            return there, Rings.from_shapely([])
        return there, mapped(self.packed_nuclei.rings(nucleus[there]), matrix)

    @property
    def points(self) -> Path:
        """The transcripts.

        Raises
        ------
        CellquiltError
            ``export-no-transcripts``, ``export-not-counted``.
        """
        from cellquilt.core.points import points_columns

        if not self.store.has("points", POINTS):
            raise CellquiltError(
                "export-no-transcripts",
                f"{self.store.path} has no transcripts",
                "export outlines alone with vpt or qupath",
            )
        element = self.store.element("points", POINTS)
        if "cell_id" not in points_columns(element):
            raise CellquiltError(
                "export-not-counted", f"the transcripts of {self.store.path} have no cell_id", "run `aggregate` first"
            )
        return element


def mapped(rings: Rings, matrix: Affine) -> Rings:
    """Polygons in another coordinate system."""
    return Rings(apply(matrix, rings.coords), rings.ring_offsets, rings.polygon_offsets, rings.exterior)


class FeatureWriter:
    """Write a GeoJSON collection, some objects at a time.

    Parameters
    ----------
    path
        File to write.
    kind, members
        Its type, and what it calls its objects: ``FeatureCollection`` and ``features``, for example.
    """

    def __init__(self, path: Path, kind: str = "FeatureCollection", members: str = "features") -> None:
        self._file: TextIO = path.open("w", encoding="utf-8", newline="\n")
        self._file.write(f'{{"type":"{kind}","{members}":[\n')
        self._first = True

    def write(self, objects: pa.Array) -> None:
        """Append objects, (n,) string of JSON."""
        if len(objects):
            self._file.write("" if self._first else ",\n")
            self._file.write(join_json(objects))
            self._first = False

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self._file.write("\n]}\n")
        self._file.close()


def texts(values: NDArray) -> pa.Array:
    """(n,) string, numbers as JSON writes them."""
    return arrow_array(np.ascontiguousarray(values)).cast(pa.string())
