"""Prior cells: which cell a transcript is thought to be in before a transcript-based method starts.

They come from outlines (of an image-based method or of the machine), from a column of the transcripts, or from a label
image. Whatever they come from, prior cells are numbered from 1 on, the same way in every patch; 0 is none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cellquilt.core.assignment import has_assignment
from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.images import open_image
from cellquilt.core.labels import Labels
from cellquilt.core.points import floats, points_columns, points_transforms
from cellquilt.core.shapes import ShapesTable, read_shapes
from cellquilt.core.store import Store
from cellquilt.core.transforms import GLOBAL, Affine
from cellquilt.geometry.locate import PolygonIndex
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.spacing import median_spacing

#: What in a column means "in no cell", besides null and NaN; empty text does in any case.
UNASSIGNED = ("UNASSIGNED", "-1", "0", "")
#: Where the machine's own assignment is kept by the readers.
VENDOR_COLUMN = "vendor_cell_id"
#: Columns by which machines say that a transcript lies in a nucleus, and what they say then (None: not 0 or false).
_NUCLEUS_COLUMNS = (("overlaps_nucleus", None), ("vendor_in_nucleus", None), ("CellComp", "Nuclear"))
CELLS, NUCLEI, GIVEN = "cell_boundaries", "nucleus_boundaries", "prior_cells"
_TILE_PX = 2048
#: Centres of prior cells are summed in whole numbers of this part of a micron: exact, whatever the order.
_PER_UM = 1 << 14


class Prior(Protocol):
    """A source of prior cells.

    Attributes
    ----------
    kind
        ``shapes``, ``column``, ``labels`` or ``none``.
    name
        The element, column or file.
    columns
        Columns of the transcripts that it asks for, besides x and y.
    """

    kind: str
    name: str
    columns: tuple[str, ...]

    @property
    def n_cells(self) -> int:
        """How many prior cells there are; known when all batches were scanned."""
        ...

    def scan(self, batch: pa.Table) -> None:
        """See a batch of the transcripts to segment; all batches come by before the first is assigned."""
        ...

    def assign(self, batch: pa.Table) -> NDArray[np.int32]:
        """(n,) int32 prior cell of each transcript of a batch, 0 for none."""
        ...


@dataclass
class NoPrior:
    """No prior cells."""

    kind: str = "none"
    name: str = ""
    columns: tuple[str, ...] = ()
    n_cells: int = 0

    def scan(self, batch: pa.Table) -> None:
        """Nothing to see."""

    def assign(self, batch: pa.Table) -> NDArray[np.int32]:
        """All 0."""
        return np.zeros(batch.num_rows, dtype=np.int32)


class ShapesPrior:
    """The outline that a transcript lies in; of several the one whose centroid is nearest.

    Parameters
    ----------
    name
        The element's name.
    shapes
        The outlines. Those of one cell in several planes have a column ``entity_id`` in common, and ``z_plane``.
    to_shapes
        (3, 3) map from the transcripts' x, y to the outlines' coordinates.
    threads
        Threads that locate transcripts.
    """

    kind = "shapes"

    def __init__(self, name: str, shapes: ShapesTable, to_shapes: Affine, threads: int = 1) -> None:
        self.name, self._to_shapes, self._threads = name, to_shapes, threads
        planes = shapes.columns.get("z_plane")
        self.columns: tuple[str, ...] = ("z_plane",) if planes is not None else ()
        self._index = PolygonIndex(Rings.from_shapely(shapes.geometry), z_plane=planes)
        owner = np.arange(len(shapes))
        if planes is not None:
            entities = np.asarray(shapes.columns.get("entity_id", shapes.ids)).astype(str)
            _, first, inverse = np.unique(entities, return_index=True, return_inverse=True)
            owner = np.argsort(np.argsort(first))[inverse]  # cells by their first outline
        self._number = np.append(owner + 1, 0).astype(np.int32)  # the last is that of -1
        self.n_cells = int(self._number.max())

    def scan(self, batch: pa.Table) -> None:
        """Nothing to see: the cells are known."""

    def assign(self, batch: pa.Table) -> NDArray[np.int32]:
        """Number of the cell's row in the element, counted from 1."""
        plane = floats(batch, "z_plane").astype(np.int64) if self.columns else None
        x, y = floats(batch, "x"), floats(batch, "y")
        found = self._index.locate_columns(x, y, plane, matrix=self._to_shapes, threads=self._threads)
        return self._number[found]


class ColumnPrior:
    """A column of strings or whole numbers; cells are numbered in the order of their names or numbers.

    Parameters
    ----------
    name
        The column.
    unassigned
        Values that mean "in no cell", besides null and empty text.
    """

    kind = "column"

    def __init__(self, name: str, unassigned: Sequence[str] | None = None) -> None:
        self.name = name
        self.columns: tuple[str, ...] = (name,)
        self._none = UNASSIGNED if unassigned is None else (*unassigned, "")
        self._values: pa.Array | None = None

    @property
    def n_cells(self) -> int:
        """Different values that mean a cell."""
        return 0 if self._values is None else len(self._values)

    def scan(self, batch: pa.Table) -> None:
        """Note the cells that occur.

        Raises
        ------
        CellquiltError
            ``prior-column-type`` or ``prior-id-negative``.
        """
        found = pc.unique(self._cells(batch))
        both = found if self._values is None else pc.unique(pa.chunked_array([self._values, found]))
        both = both.combine_chunks() if isinstance(both, pa.ChunkedArray) else both
        both = both.drop_null()
        self._values = both.take(pc.sort_indices(both))
        if pa.types.is_integer(both.type) and len(both) and self._values[0].as_py() < 0:
            raise CellquiltError(
                "prior-id-negative",
                f"column {self.name} has the cell {self._values[0].as_py()}",
                "if it means that a transcript is in no cell, add it to prior_unassigned",
            )

    def assign(self, batch: pa.Table) -> NDArray[np.int32]:
        """Place of the transcript's cell among all cells, sorted, counted from 1."""
        if self._values is None:
            raise ValueError("scan the transcripts before they are assigned")
        place = pc.index_in(self._cells(batch), value_set=self._values)
        return (pc.fill_null(place, -1).to_numpy().astype(np.int64) + 1).astype(np.int32)

    def _cells(self, batch: pa.Table) -> pa.ChunkedArray:
        """The column as text or int64, null where a transcript is in no cell."""
        column = batch.column(self.name)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_dictionary(column.type):
            column = column.cast(kind)
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            column = column.cast(pa.string())
            none = pa.array(self._none, pa.string())
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
            try:
                column = pc.if_else(pc.is_finite(column), column, None) if pa.types.is_floating(kind) else column
                column = column.cast(pa.int64())
            except pa.ArrowInvalid as error:
                raise self._wrong_type(f"{kind}: {error}") from None
            none = pa.array(_whole_numbers(self._none), pa.int64())
        elif pa.types.is_null(kind):
            column, none = column.cast(pa.string()), pa.array([], pa.string())
        else:
            raise self._wrong_type(str(kind))
        return pc.if_else(pc.is_in(column, value_set=none), pa.scalar(None, column.type), column)

    def _wrong_type(self, what: str) -> CellquiltError:
        return CellquiltError(
            "prior-column-type",
            f"column {self.name} cannot hold prior cells, it is of type {what}",
            "name a column of text or whole numbers",
        )


def _whole_numbers(texts: Sequence[str]) -> list[int]:
    return [int(text) for text in texts if text.lstrip("+-").isdigit()]


class PriorCentres:
    """Where the transcripts of prior cells are, summed batch by batch; the same whatever the order of the transcripts.

    Parameters
    ----------
    n_cells
        How many prior cells there are. It takes 24 bytes a cell.

    Attributes
    ----------
    n_transcripts
        (n_cells,) int64 transcripts of each cell so far.
    """

    def __init__(self, n_cells: int) -> None:
        self.n_transcripts = np.zeros(n_cells, dtype=np.int64)
        self._sums = np.zeros((n_cells, 2), dtype=np.int64)

    def add(self, cell: NDArray[np.int32], x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> None:
        """Add transcripts: number of each one's cell, 0 for none, and where it is."""
        _add_places(cell, x_um, y_um, self.n_transcripts, self._sums)

    def spacing_um(self, min_transcripts: int) -> float | None:
        """Median distance in µm from the centre (mean place of its transcripts) of a prior cell to the nearest other.

        Only cells of so many transcripts count; None where they are fewer than three.
        """
        enough = self.n_transcripts >= max(min_transcripts, 1)
        return median_spacing(self._sums[enough] / (_PER_UM * self.n_transcripts[enough, None]))


@numba.njit(cache=True, nogil=True)
def _add_places(cell, x, y, n, sums):
    for i in range(cell.size):
        if cell[i] > 0:
            k = cell[i] - 1
            n[k] += 1
            sums[k, 0] += np.int64(np.rint(x[i] * _PER_UM))
            sums[k, 1] += np.int64(np.rint(y[i] * _PER_UM))


@dataclass
class _Labels:
    """A label image, read in windows."""

    shape: tuple[int, int]
    read: Callable[[int, int, int, int], np.ndarray]
    transforms: dict[str, Affine]
    tiles: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)


class LabelsPrior:
    """The label under a transcript; cells are numbered in the order of their labels. Labels below 1 are no cells.

    Parameters
    ----------
    name
        What to call the image in messages.
    labels
        The image.
    to_labels
        (3, 3) map from the transcripts' x, y to the image's pixels.
    memory_mb
        Bound for the tiles that are kept for the next batch.
    """

    kind = "labels"
    columns: tuple[str, ...] = ()

    def __init__(self, name: str, labels: _Labels, to_labels: Affine, memory_mb: int) -> None:
        self.name, self._labels, self._to_labels = name, labels, to_labels
        self._n_kept = max(memory_mb * 1_000_000 // 4 // (8 * _TILE_PX**2), 1)
        self._ids = self._all_labels()
        self.n_cells = len(self._ids)

    def scan(self, batch: pa.Table) -> None:
        """Nothing to see: the labels are known."""

    def assign(self, batch: pa.Table) -> NDArray[np.int32]:
        """Place of the label under the transcript among all labels, sorted, counted from 1."""
        a, b = self._to_labels[:2]
        x, y = floats(batch, "x"), floats(batch, "y")
        column = np.floor(a[0] * x + a[1] * y + a[2]).astype(np.int64)
        row = np.floor(b[0] * x + b[1] * y + b[2]).astype(np.int64)
        height, width = self._labels.shape
        inside = np.flatnonzero((column >= 0) & (column < width) & (row >= 0) & (row < height))
        column, row = column[inside], row[inside]
        out = np.zeros(x.size, dtype=np.int32)
        tile = (row // _TILE_PX) * (-(-width // _TILE_PX)) + column // _TILE_PX
        order = np.argsort(tile, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(tile[order])) + 1) if order.size else []:
            i, j = int(row[part[0]]) // _TILE_PX, int(column[part[0]]) // _TILE_PX
            out[inside[part]] = self._tile(i, j)[row[part] - i * _TILE_PX, column[part] - j * _TILE_PX]
        return out

    def _read(self, i: int, j: int) -> np.ndarray:
        height, width = self._labels.shape
        y0, x0 = i * _TILE_PX, j * _TILE_PX
        pixels = self._labels.read(y0, min(y0 + _TILE_PX, height), x0, min(x0 + _TILE_PX, width))
        if pixels.dtype.kind == "f" and not (np.isfinite(pixels).all() and (pixels == np.floor(pixels)).all()):
            raise CellquiltError(
                "labels-invalid", f"{self.name} has pixels that are no whole numbers", "give an image of labels"
            )
        if pixels.dtype == np.float32 and pixels.size and pixels.max() >= 1 << 24:
            raise CellquiltError(
                "labels-invalid",
                f"{self.name} has labels from 2^24 on in a type that cannot tell them apart",
                "write the labels as uint32",
            )
        return pixels

    def _all_labels(self) -> NDArray[np.int64]:
        height, width = self._labels.shape
        ids = np.zeros(0, dtype=np.int64)
        for i in range(-(-height // _TILE_PX)):
            for j in range(-(-width // _TILE_PX)):
                ids = np.union1d(ids, np.unique(self._read(i, j)).astype(np.int64))
        return ids[ids > 0]

    def _tile(self, i: int, j: int) -> NDArray[np.int32]:
        """A tile as numbers of cells; the tiles used last are kept."""
        tiles = self._labels.tiles
        found = tiles.pop((i, j), None)
        if found is None:
            pixels = self._read(i, j).astype(np.int64)
            place = np.searchsorted(self._ids, pixels)
            found = np.where(pixels > 0, place + 1, 0).astype(np.int32)
        tiles[i, j] = found
        while len(tiles) > self._n_kept:
            del tiles[next(iter(tiles))]
        return found


def find_prior(
    slide: Store,
    points: Path,
    *,
    name: str = "auto",
    unassigned: Sequence[str] | None = None,
    cells: Store | None = None,
    memory_mb: int = 1500,
    threads: int = 1,
) -> Prior:
    """The prior that a user names.

    Parameters
    ----------
    slide
        The slide.
    points
        Its transcripts.
    name
        ``none``; a shapes element; a column of the transcripts; a labels element; the path of a label image (TIFF) in
        pixels of the main image. In that order, where several have one name; ``shapes:``, ``column:`` or ``labels:``
        before it says which. ``auto`` takes the first there is of: `cell_boundaries` of an image-based method,
        `nucleus_boundaries`, the machine's own assignment, its cells.
    unassigned
        Values of a column that mean "in no cell"; default `UNASSIGNED`.
    cells
        Store that is asked for shapes before the slide is.
    memory_mb, threads
        Bounds.

    Raises
    ------
    CellquiltError
        ``prior-unknown`` with what there is; ``prior-image-missing``, ``labels-size`` and what reading the sources
        raises.
    """
    stores = [store for store in (cells, slide) if store is not None]
    columns = points_columns(points)
    to_global = points_transforms(points)[GLOBAL]

    def shapes(element: str) -> Prior | None:
        store = next((store for store in stores if store.has("shapes", element)), None)
        if store is None:
            return None
        table = read_shapes(store.element("shapes", element))
        if "z_plane" in table.columns and "z_plane" not in columns:
            raise CellquiltError(
                "z-plane-missing",
                f"{element} are outlines in planes, but the transcripts have no column z_plane",
                "name another prior",
            )
        return ShapesPrior(element, table, np.linalg.inv(table.transforms[GLOBAL]) @ to_global, threads)

    def column(wanted: str) -> Prior | None:
        # The readers put the machine's own columns of our names aside.
        found = next((own for own in (wanted, f"vendor_{wanted}") if own in columns), None)
        return ColumnPrior(found, unassigned) if found else None

    def labels(wanted: str) -> Prior | None:
        image = _labels_of(slide, wanted, memory_mb)
        if image is None:
            return None
        return LabelsPrior(wanted, image, np.linalg.inv(image.transforms[GLOBAL]) @ to_global, memory_mb)

    if name == "none":
        return NoPrior()
    if name == "auto":
        by_image = [store for store in stores if store.has("shapes", CELLS)][:1]
        if by_image and has_assignment(by_image[0].element("shapes", CELLS)):
            by_image = []  # made from these transcripts: no prior of them
        found = (shapes(CELLS) if by_image else None) or shapes(NUCLEI)
        return found or shapes(GIVEN) or column(VENDOR_COLUMN) or shapes("vendor_cells") or NoPrior()
    kind, _, rest = name.partition(":")
    sources: dict[str, Callable[[str], Prior | None]] = {"shapes": shapes, "column": column, "labels": labels}
    chosen = {kind: sources[kind]} if kind in sources and rest else sources
    wanted = rest if len(chosen) == 1 else name
    for source in chosen.values():
        prior = source(wanted)
        if prior is not None:
            return prior
    shown = sorted({element for store in stores for element in store.names("shapes")})
    there = f"shapes: {', '.join(shown) or 'none'}; columns: {', '.join(columns)}"
    if slide.names("labels"):
        there += f"; labels: {', '.join(slide.names('labels'))}"
    if wanted.lower().endswith((".tif", ".tiff")):
        raise CellquiltError("prior-image-missing", f"the label image {wanted} does not exist", "check the path")
    known = [*shown, *columns, *slide.names("labels"), "auto", "none"]
    raise CellquiltError("prior-unknown", f'{slide.name} has no prior "{wanted}"; {there}', did_you_mean(wanted, known))


def _labels_of(slide: Store, name: str, memory_mb: int) -> _Labels | None:
    if slide.has("labels", name):
        found = _labels_element(slide.element("labels", name))
    elif Path(name).is_file():
        found = _labels_file(Path(name), memory_mb)
    else:
        return None
    own_place = not np.array_equal(found.transforms[GLOBAL], np.eye(3))
    if slide.names("images") and not own_place:
        size = open_image(slide.path).shape[1:]
        if tuple(size) != found.shape:
            raise CellquiltError(
                "labels-size",
                f"label image {name} has {found.shape[0]} × {found.shape[1]} pixels (rows × columns), the slide's "
                f"image {size[0]} × {size[1]}",
                "give labels of the slide's own image",
            )
    return found


def _labels_element(element: Path) -> _Labels:
    labels = Labels(element)
    return _Labels(labels.shape, labels.read, labels.transforms)


def _labels_file(path: Path, memory_mb: int) -> _Labels:
    from cellquilt.readers.tiff import TiffImage

    image = TiffImage(path, memory_mb=memory_mb)
    channels, planes, height, width = image.shape
    if channels != 1 or planes != 1:
        raise CellquiltError(
            "labels-invalid", f"{path.name} has {channels} channels and {planes} planes", "give one plane of labels"
        )
    return _Labels((height, width), lambda y0, y1, x0, x1: image.read(0, 0, y0, y1, x0, x1), {GLOBAL: np.eye(3)})


@dataclass
class Nucleus:
    """Whether a transcript lies in a nucleus.

    Attributes
    ----------
    name
        Where it is known from, '' where it is not.
    columns
        Columns of the transcripts that are asked for.
    test
        Batch → (n,) bool.
    """

    name: str
    columns: tuple[str, ...]
    test: Callable[[pa.Table], NDArray[np.bool_]]


def find_nucleus(slide: Store, points: Path, prior: Prior, *, cells: Store | None = None, threads: int = 1) -> Nucleus:
    """How to tell the transcripts in nuclei: by outlines of nuclei, or by what the machine says.

    Where the prior is outlines, outlines of nuclei come first, else the machine's own column.
    """
    columns = points_columns(points)
    stores = [store for store in (cells, slide) if store is not None]

    def from_shapes() -> Nucleus | None:
        for element in (NUCLEI, "vendor_nuclei"):
            store = next((store for store in stores if store.has("shapes", element)), None)
            if store is None:
                continue
            table = read_shapes(store.element("shapes", element))
            if "z_plane" in table.columns and "z_plane" not in columns:
                continue
            to_shapes = np.linalg.inv(table.transforms[GLOBAL]) @ points_transforms(points)[GLOBAL]
            inside = ShapesPrior(element, table, to_shapes, threads)
            return Nucleus(element, inside.columns, partial(_inside, inside))
        return None

    def from_column() -> Nucleus | None:
        for name, value in _NUCLEUS_COLUMNS:
            if name in columns:
                return Nucleus(name, (name,), partial(_says, name, value))
        return None

    first, second = (from_shapes, from_column) if prior.kind == "shapes" else (from_column, from_shapes)
    nowhere = Nucleus("", (), lambda batch: np.zeros(batch.num_rows, dtype=bool))
    return first() or second() or nowhere


def _inside(shapes: ShapesPrior, batch: pa.Table) -> NDArray[np.bool_]:
    return shapes.assign(batch) > 0


def _says(name: str, value: str | None, batch: pa.Table) -> NDArray[np.bool_]:
    column = batch.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if value is not None:
        answer = pc.equal(column.cast(pa.string()), value)
    elif pa.types.is_boolean(column.type):
        answer = column
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        answer = pc.not_equal(column, 0)
    else:
        answer = pc.is_in(pc.utf8_lower(column.cast(pa.string())), value_set=pa.array(["true", "1", "yes"]))
    return np.asarray(pc.fill_null(answer, False).to_numpy(), dtype=bool)
