"""Bins: counts on a grid of squares, as Visium HD has them, written and read in blocks of rows, never whole.

A slide's bins are two elements: a table with a row a bin and a column a gene, and what the table annotates, which says
where each bin lies:

- a labels element of one pixel a bin (how we write it): pixel (row, column) is the square [column, column + 1) ×
  [row, row + 1) of the grid, its label is the value of the table's instance column, and the element's maps lead from
  the grid to microns and to the image, turned as it may be;
- or a shapes element, squares or circles (how spatialdata-io writes it): then the table says row and column of each
  bin, and the map from the grid is fitted to their centres.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from cellquilt.core import zarr_json
from cellquilt.core.errors import CellquiltError
from cellquilt.core.labels import Labels, write_labels
from cellquilt.core.shapes import ShapesFile
from cellquilt.core.store import Store
from cellquilt.core.tables import one_category, write_table
from cellquilt.core.transforms import Affine

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

#: The table of a slide's bins, what it annotates, and the cell of every place of the grid, which `aggregate` adds.
BINS, BINS_GRID, BINS_CELLS = "bins", "bins_grid", "bins_cells"
_INSTANCE, _REGION = "bin_id", "region"
#: How tables call a bin's row and column.
_PLACES = (("array_row", "array_col"), ("row", "col"))
_MOST_PLACES = 1 << 30  # of a grid; a slide's whole area has a hundred times fewer
_OFF_GRID = 0.5  # of a bin: how far a bin's centre may lie from where its row and column put it


@dataclass(frozen=True)
class Bins:
    """The bins of a slide. Their counts stay on disk.

    Attributes
    ----------
    table
        The table's folder.
    shape
        (rows, columns) of the grid.
    row, column
        (n,) int32 place of each bin, no two the same.
    genes
        Names of the columns of the counts, in the table's order.
    transforms
        Coordinate system → (3, 3) map from the grid: the bin in (row, column) covers [column, column + 1) ×
        [row, row + 1).
    """

    table: Path
    shape: tuple[int, int]
    row: NDArray[np.int32]
    column: NDArray[np.int32]
    genes: list[str]
    transforms: dict[str, Affine]

    def __len__(self) -> int:
        return self.row.size

    def counts(self, entries: int = 4_000_000) -> Iterator[tuple[int, "csr_matrix"]]:
        """The counts in blocks of rows.

        Parameters
        ----------
        entries
            About so many at a time: the bound of the memory it takes (16 bytes each), besides 8 bytes a bin. A row is
            never cut.

        Yields
        ------
        start : int
            First bin of the block.
        matrix : scipy.sparse.csr_matrix
            (m, n_genes) int32.

        Raises
        ------
        CellquiltError
            ``bins-not-counts`` if a value is no whole number from 0 on; ``bins-unreadable``.
        """
        from scipy.sparse import csr_matrix

        n_genes = len(self.genes)
        matrix = _matrix(self.table)
        if matrix.attrs.get("encoding-type") != "csr_matrix":
            rows = max(entries // max(n_genes, 1), 1)
            for start in range(0, len(self), rows):
                with _readable(self.table):
                    block = np.asarray(matrix[start : start + rows])
                yield start, csr_matrix(self._whole(block))
            return
        with _readable(self.table):
            indptr = np.asarray(matrix["indptr"][:], dtype=np.int64)
        start = 0
        while start < len(self):
            stop = int(np.searchsorted(indptr, indptr[start] + entries, side="right")) - 1
            stop = min(max(stop, start + 1), len(self))
            first, last = int(indptr[start]), int(indptr[stop])
            with _readable(self.table):
                values = np.asarray(matrix["data"][first:last])
                genes = np.asarray(matrix["indices"][first:last])
            offsets = indptr[start : stop + 1] - first
            yield start, csr_matrix((self._whole(values), genes, offsets), shape=(stop - start, n_genes))
            start = stop

    def _whole(self, values: NDArray) -> NDArray[np.int32]:
        whole = values.astype(np.int32)
        if values.dtype.kind != "b" and (not (whole == values).all() or (whole < 0).any()):
            wrong = values[(whole != values) | (whole < 0)].ravel()[0]
            raise CellquiltError(
                "bins-not-counts",
                f"{self.table.name} holds {wrong}, counts of transcripts were expected",
                "give the table as the machine counted it, before any normalisation",
            )
        return whole


def find_bins(slide: Store, key: str | None, *, otherwise: bool = True) -> Bins | None:
    """The bins that a slide is to be counted by.

    Parameters
    ----------
    slide
        The slide's store.
    key
        Name of the table. Default: ``bins``, where the slide has it.
    otherwise
        Whether to take that default.

    Returns
    -------
    Bins or None
        None where nothing is asked for and there are none.
    """
    if key is None and not (otherwise and slide.has("tables", BINS)):
        return None
    return read_bins(slide, key or BINS)


def bins_tables(store: Store) -> dict[str, int]:
    """Name of each table of bins, which are those that annotate labels → bytes of its counts in memory."""
    found = {}
    for name in store.names("tables"):
        table = store.element("tables", name)
        region = zarr_json.read_attributes(table).get("region")
        if isinstance(region, str) and store.has("labels", region):
            matrix = _matrix(table)
            with _readable(table):
                is_sparse = "shape" in matrix.attrs
                found[name] = 8 * int(matrix["indices"].shape[0] if is_sparse else np.prod(matrix.shape))
    return found


def read_bins(slide: Store, name: str = BINS) -> Bins:
    """The bins of a slide.

    Parameters
    ----------
    slide
        The slide's store.
    name
        Name of the table.

    Raises
    ------
    CellquiltError
        ``element-missing``; ``bins-unreadable``; ``bins-not-by-rows`` if the counts are stored gene by gene;
        ``bins-no-grid`` if nothing says where the bins lie; ``bins-place`` if a bin has no place of its own.
    """
    table = slide.element("tables", name)
    try:
        annotation = zarr_json.read_attributes(table)
    except (OSError, ValueError) as error:
        raise CellquiltError("bins-unreadable", f"{table} cannot be read: {error}", "make the store anew") from error
    region, key = annotation.get("region"), annotation.get("instance_key")
    region = region[0] if isinstance(region, list) and len(region) == 1 else region
    kind = next((kind for kind in ("labels", "shapes") if isinstance(region, str) and slide.has(kind, region)), None)
    if kind is None or not isinstance(key, str):
        raise CellquiltError(
            "bins-no-grid",
            f"table {name} annotates no labels and no shapes of the slide, so that nothing says where its bins lie",
            "set its region and instance_key to the element with the bins (spatialdata's TableModel does)",
        )
    place: Any = slide.element(kind, str(region))
    group = _group(table)
    with _readable(table):
        obs, matrix = group["obs"], _matrix(table)
        instance = _column(obs[key])
        var = group["var"]
        genes = [str(name) for name in _column(var[var.attrs["_index"]]).tolist()]
        places = next(((r, c) for r, c in _PLACES if r in obs and c in obs), None)
        given = None if places is None else [_column(obs[column]) for column in places]
    if matrix.attrs.get("encoding-type") == "csc_matrix":
        raise CellquiltError(
            "bins-not-by-rows",
            f"the counts of table {name} are stored gene by gene (CSC)",
            "store them bin by bin: table.X = table.X.tocsr()",
        )
    with _readable(table):
        _check_lengths(matrix, instance.size, len(genes))
    if kind == "labels":
        labels = Labels(place)
        row, column = _places_of_labels(labels, instance, name)
        return Bins(table, labels.shape, row, column, genes, labels.transforms)
    if given is None:
        raise CellquiltError(
            "bins-no-grid",
            f"table {name} has no columns array_row and array_col, which say where on the grid each bin lies",
            "add them to the table's obs",
        )
    row, column, shape = _checked_places(given[0], given[1], name)
    shapes = ShapesFile(place)
    fit = _fit(row, column, _centres(shapes, instance, name), name)
    return Bins(table, shape, row, column, genes, {system: to @ fit for system, to in shapes.transforms.items()})


@contextmanager
def _readable(table: Path) -> Iterator[None]:
    """Whatever zarr and anndata raise on damaged files is an error of ours."""
    try:
        yield
    except CellquiltError:
        raise
    except Exception as error:
        raise CellquiltError(
            "bins-unreadable", f"{table} cannot be read: {type(error).__name__}: {error}", "make the store anew"
        ) from error


def _group(table: Path) -> Any:
    import zarr

    with _readable(table):
        return zarr.open_group(str(table), mode="r", use_consolidated=False)


def _column(element: Any) -> NDArray:
    """A column of a table as numbers or as strings."""
    from anndata.io import read_elem

    values = np.asarray(read_elem(element))
    return values if values.dtype.kind in "iufb" else np.asarray(values.tolist(), dtype=str)


def _matrix(table: Path) -> Any:
    with _readable(table):
        return _group(table)["X"]


def _check_lengths(matrix: Any, n_bins: int, n_genes: int) -> None:
    """Whether the parts of a matrix on disk belong together, as far as their lengths tell."""
    if "shape" in matrix.attrs:
        shape = tuple(matrix.attrs["shape"])
        sizes = [matrix[name].shape[0] for name in ("indptr", "indices", "data")]
        if sizes[0] != shape[0] + 1 or sizes[1] != sizes[2] or int(matrix["indptr"][-1]) != sizes[1]:
            raise ValueError(f"X of {shape[0]} rows has parts of lengths {sizes}")
    else:
        shape = tuple(matrix.shape)
    if shape != (n_bins, n_genes):
        raise ValueError(f"X has {shape[0]} rows and {shape[1]} columns, obs {n_bins} rows and var {n_genes}")


def _no_place(name: str, what: str) -> CellquiltError:
    return CellquiltError("bins-place", f"table {name}: {what}", "every bin needs one place of its own on the grid")


def _places_of_labels(labels: Labels, instance: NDArray, name: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Row and column of the pixel that has each bin's label."""
    if instance.dtype.kind not in "iu":
        raise _no_place(name, "its instance column holds no whole numbers, but the grid is an image of labels")
    pixels = labels.read_all()
    there = np.flatnonzero(pixels)
    found = pixels.ravel()[there]
    if not (found[1:] > found[:-1]).all():
        order = np.argsort(found, kind="stable")
        there, found = there[order], found[order]
    twice = np.flatnonzero(found[1:] == found[:-1])
    if twice.size:
        raise _no_place(name, f"bin {found[twice[0]]} covers several pixels of {labels.element.name}")
    if not np.array_equal(found, instance):
        there = there[_lookup(found, instance, name, labels.element.name)]
        if np.unique(there).size < there.size:
            raise _no_place(name, "two rows are one bin")
    column = (there % labels.shape[1]).astype(np.int32)
    there //= labels.shape[1]
    return there.astype(np.int32), column


def _lookup(known: NDArray, wanted: NDArray, name: str, element: str) -> NDArray[np.int64]:
    """Place of each of the wanted among the known, which are ascending."""
    at = np.minimum(np.searchsorted(known, wanted), max(known.size - 1, 0))
    missing = np.flatnonzero(known[at] != wanted) if known.size else np.arange(wanted.size)
    if missing.size:
        raise _no_place(name, f"{missing.size} bins, the first of them {wanted[missing[0]]}, are not in {element}")
    return at


def _checked_places(
    row: NDArray, column: NDArray, name: str
) -> tuple[NDArray[np.int32], NDArray[np.int32], tuple[int, int]]:
    """Rows and columns as whole numbers, and the size of the grid."""
    whole = [np.asarray(values, dtype=np.float64) for values in (row, column)]
    bad = np.flatnonzero(~np.logical_and.reduce([(v >= 0) & (v == np.floor(v)) for v in whole]))
    if bad.size:
        raise _no_place(name, f"bin {bad[0]} lies in row {row[bad[0]]}, column {column[bad[0]]}")
    shape = (int(whole[0].max(initial=-1)) + 1, int(whole[1].max(initial=-1)) + 1)
    if shape[0] * shape[1] > _MOST_PLACES:
        raise _no_place(name, f"a grid of {shape[0]} × {shape[1]} bins is more than any slide has")
    key = np.sort(whole[0] * shape[1] + whole[1])
    twice = np.flatnonzero(key[1:] == key[:-1])
    if twice.size:
        r, c = divmod(int(key[twice[0]]), shape[1])
        raise _no_place(name, f"two bins lie in row {r}, column {c}")
    return whole[0].astype(np.int32), whole[1].astype(np.int32), shape


def _centres(shapes: ShapesFile, instance: NDArray, name: str) -> NDArray[np.float64]:
    """(n, 2) centres of the table's bins, in the shapes' own coordinates."""
    centres, index = np.empty((len(shapes), 2)), []
    start = 0
    columns = [shapes.geometry, *([] if shapes.index is None else [shapes.index])]
    for batch in shapes.batches(columns):
        geometry = shapely.from_wkb(batch.column(shapes.geometry).to_numpy(zero_copy_only=False))
        points = shapely.centroid(geometry)
        centres[start : start + len(points)] = np.column_stack([shapely.get_x(points), shapely.get_y(points)])
        if shapes.index is not None:
            index.append(batch.column(shapes.index))
        start += len(points)
    ids = np.arange(len(shapes)) if shapes.index is None else pa.chunked_array(index).to_numpy()
    if ids.dtype.kind not in "iu" or instance.dtype.kind not in "iu":
        ids, instance = ids.astype(str), instance.astype(str)
    if np.array_equal(ids, instance):
        return centres
    order = np.argsort(ids, kind="stable")
    return centres[order[_lookup(ids[order], instance, name, shapes.path.parent.name)]]


def _fit(row: NDArray[np.int32], column: NDArray[np.int32], centres: NDArray[np.float64], name: str) -> Affine:
    """(3, 3) map from the grid to the coordinates of centres, by least squares."""
    matrix = np.eye(3)
    if row.size == 0:
        return matrix
    places = np.column_stack([column, row]).astype(np.float64) + 0.5
    middle, target = places.mean(axis=0), centres.mean(axis=0)
    places -= middle
    spread = places.T @ places
    if np.linalg.matrix_rank(spread) < 2:
        raise CellquiltError(
            "bins-no-grid",
            f"the bins of table {name} lie in one line, so that their grid cannot be told",
            "give at least two rows and two columns of bins",
        )
    matrix[:2, :2] = np.linalg.solve(spread, places.T @ (centres - target)).T
    matrix[:2, 2] = target - matrix[:2, :2] @ middle
    off = np.abs(centres - target - places @ matrix[:2, :2].T).max()
    width = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    if not off <= _OFF_GRID * width:
        raise CellquiltError(
            "bins-no-grid",
            f"the bins of table {name} do not lie on a grid: one is {off / max(width, 1e-300):.2g} bins off its row "
            "and column",
            "are array_row and array_col those of these shapes?",
        )
    return matrix


def write_bins(
    store: Store,
    row: NDArray[np.integer],
    column: NDArray[np.integer],
    genes: list[str],
    blocks: Iterable["csr_matrix"],
    transforms: Mapping[str, Affine],
    shape: tuple[int, int],
) -> None:
    """Write the bins of a slide: the table ``bins`` and the labels ``bins_grid``.

    Parameters
    ----------
    store
        A store that is being made.
    row, column
        (n,) place of each bin on the grid.
    genes
        Names of the columns of the counts, distinct.
    blocks
        The counts, some rows at a time: (m, n_genes) integers each, n rows in all.
    transforms
        Coordinate system → (3, 3) map from the grid.
    shape
        (rows, columns) of the grid.
    """
    import pandas as pd

    n = row.size
    grid = np.zeros(shape, dtype=np.uint32)
    grid[row, column] = np.arange(1, n + 1, dtype=np.uint32)
    write_labels(store.new_element("labels", BINS_GRID), grid, transforms)
    obs = pd.DataFrame(
        {
            _INSTANCE: np.arange(1, n + 1, dtype=np.int64),
            _REGION: one_category(BINS_GRID, n),
            "array_row": row.astype(np.int32),
            "array_col": column.astype(np.int32),
        },
        index=pd.RangeIndex(1, n + 1).astype(str),
    )
    annotation = {"region": BINS_GRID, "region_key": _REGION, "instance_key": _INSTANCE}
    write_table(store.new_element("tables", BINS), obs, genes, blocks, annotation)
