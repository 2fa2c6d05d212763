"""Methods in published stores: one store with several outlines, or one slide segmented in several runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellquilt.comparison.cells import Segmentation
from cellquilt.comparison.markers import MarkerPairs, read_marker_pairs, read_reference
from cellquilt.comparison.methods import ComparisonTable, compare
from cellquilt.core.assignment import Assignment, has_assignment
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.core.log import LOG, progress
from cellquilt.core.points import batch_rows, count_points, floats, iter_points, points_columns, points_transforms
from cellquilt.core.settings import TRANSCRIPT_METHODS, Settings, element_name
from cellquilt.core.shapes import mapped, read_geoparquet, read_shapes
from cellquilt.core.store import Store
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, apply

POINTS = "transcripts"


@dataclass(frozen=True)
class Source:
    """Where a method's cells and its assignment of transcripts are.

    Attributes
    ----------
    name
        The method's name.
    store
        A published store.
    shapes
        Its shapes element with one outline a cell.
    column
        Column of its transcripts with the cell's id. None, or a column that is not there: what the element itself says
        of transcripts (`core.assignment`) holds, else its outlines.
    by_genes
        See `Segmentation`. The cells of a run are known to be so if they have an assignment of their own.
    """

    name: str
    store: Path
    shapes: str = "cell_boundaries"
    column: str | None = "cell_id"
    by_genes: bool = False


def compare_stores(sources: Sequence[Source], *, settings: Settings, truth: Path | None = None) -> ComparisonTable:
    """Compare segmentations of one slide that lie in one published store or in several.

    Parameters
    ----------
    sources
        The methods.
    settings
        Groups ``compare`` and ``resources``.
    truth
        The ``truth/`` folder of a simulated slide.

    Returns
    -------
    ComparisonTable

    Raises
    ------
    CellquiltError
        ``transcripts-differ`` if the stores are not of one slide; ``shapes-in-planes`` if a cell has several outlines;
        ``pixel-size-unknown``, and what reading raises.
    """
    sources = [replace(source, store=Path(source.store)) for source in sources]
    stores = [Store(path) for path in dict.fromkeys(source.store for source in sources)]
    ids: list[pa.Array] = []
    segmentations = []
    for source in sources:
        element = Store(source.store).element("shapes", source.shapes)
        shapes = read_shapes(element)
        by_genes = source.by_genes or (source.shapes == "cell_boundaries" and has_assignment(element))
        if "z_plane" in shapes.columns and "entity_id" in shapes.columns:
            raise CellquiltError(
                "shapes-in-planes",
                f"{source.store}: {source.shapes} has an outline a plane, not one a cell",
                "compare the cell_boundaries that `resolve` makes of them",
            )
        to_um = _microns(shapes.transforms, f"{source.store}: {source.shapes}")
        segmentations.append(Segmentation(source.name, mapped(shapes.geometry, to_um), by_genes))
        ids.append(pa.array(shapes.ids.tolist(), pa.string()))
    first = stores[0]
    has_points = first.has("points", POINTS)
    pairs, reference = markers_of(settings)
    known = _Truth(truth, first) if truth is not None else None
    batches = _batches(sources, stores, ids, known, settings) if has_points else iter(())
    table = compare(
        segmentations,
        batches,
        pairs=pairs,
        reference=reference,
        truth=None if known is None else known.cells,
        n_transcripts=count_points(first.element("points", POINTS)) if has_points else 0,
        sample=first.name,
        seed=settings["seed"],
        threads=settings["threads"],
    )
    LOG.info("%s: %d methods compared", first.name, len(sources))
    return table


def _microns(transforms: dict[str, Affine], what: str) -> Affine:
    if MICRONS not in transforms:
        raise CellquiltError("pixel-size-unknown", f"{what} has no map to microns", "make the store with a pixel size")
    return transforms[MICRONS]


class _Truth:
    """The true cells of a simulated slide, and the true cell of each of its transcripts."""

    def __init__(self, folder: Path, store: Store) -> None:
        folder = Path(folder)
        if not (folder / "cells.parquet").is_file():
            raise CellquiltError(
                "truth-missing", f"{folder} has no cells.parquet", "give the truth/ folder of a simulated slide"
            )
        outlines, table, _ = read_geoparquet(folder / "cells.parquet")
        self.cells = Segmentation("truth", mapped(outlines, self._pixels_to_um(store)))
        self.file = folder / "transcripts_truth.parquet"
        self.row = np.zeros(0, dtype=np.int32)
        if self.file.is_file():
            ids = pa.array(table.column("cell_id").to_pylist(), pa.int64())
            number = pq.read_table(self.file, columns=["cell_id"]).column("cell_id").cast(pa.int64())
            self.row = pc.fill_null(pc.index_in(number, value_set=ids), -1).to_numpy().astype(np.int32)

    @staticmethod
    def _pixels_to_um(store: Store) -> Affine:
        if store.has("points", POINTS):
            transforms = points_transforms(store.element("points", POINTS))
        else:
            transforms = read_shapes(store.element("shapes", "cell_boundaries")).transforms
        return _microns(transforms, str(store.path)) @ np.linalg.inv(transforms[GLOBAL])

    def rows(self, transcript: NDArray[np.int64], store: Store) -> NDArray[np.int32]:
        if transcript.size and transcript.max() >= self.row.size:
            raise CellquiltError(
                "truth-mismatch",
                f"{store.path} has other transcripts than {self.file}",
                "give the truth of this very slide",
            )
        return self.row[transcript]


def _batches(
    sources: Sequence[Source],
    stores: Sequence[Store],
    ids: Sequence[pa.Array],
    truth: _Truth | None,
    settings: Settings,
) -> Iterator[tuple[pa.Table, list[NDArray[np.integer] | None]]]:
    """The transcripts of all stores side by side, in µm, with their cells."""
    elements = [store.element("points", POINTS) for store in stores]
    rows = max(batch_rows(settings["memory_mb"]) // (1 + len(sources)), 10_000)
    readers = [
        iter_points(element, _columns(store, element, sources, store is stores[0]), rows)
        for store, element in zip(stores, elements, strict=True)
    ]
    transforms, size = points_transforms(elements[0]), _image_size(stores[0])
    to_um = _microns(transforms, f"{stores[0].path}: the transcripts")
    place = {store.path: k for k, store in enumerate(stores)}
    shapes = [Store(source.store).element("shapes", source.shapes) for source in sources]
    said = [Assignment(element) if has_assignment(element) else None for element in shapes]
    n_batches = max(count_points(elements[0]) // rows, 1)
    for parts in progress(_in_step(readers, stores), "transcripts", n_batches):
        number = parts[0].column("transcript_id").to_numpy().astype(np.int64)
        for part, store in zip(parts[1:], stores[1:], strict=True):
            if not np.array_equal(part.column("transcript_id").to_numpy().astype(np.int64), number):
                raise _differ(stores[0], store)
        xy = np.column_stack([floats(parts[0], "x"), floats(parts[0], "y")])
        x, y = apply(to_um, xy).T
        batch = parts[0].drop_columns(["x", "y"])
        batch = batch.append_column("x", pa.array(x)).append_column("y", pa.array(y))
        if size is not None:
            px = apply(transforms[GLOBAL], xy)
            inside = (px >= 0).all(axis=1) & (px[:, 0] < size[1]) & (px[:, 1] < size[0])
            batch = batch.append_column("inside", pa.array(inside))
        cells = [
            _cells(source, parts[place[source.store]], names, told)
            for source, names, told in zip(sources, ids, said, strict=True)
        ]
        yield batch, cells if truth is None else [*cells, truth.rows(number, stores[0])]


def _columns(store: Store, element: Path, sources: Sequence[Source], lead: bool) -> list[str]:
    """Columns to read of a store's transcripts; the first store's have all but the cells of the others."""
    there = points_columns(element)
    if "transcript_id" not in there:
        raise CellquiltError(
            "points-column-missing",
            f"the transcripts of {store.path} have no column transcript_id",
            "make the store anew with `cellquilt convert`",
        )
    wanted = ["transcript_id", *(s.column for s in sources if s.store == store.path and s.column)]
    wanted += ["x", "y", "gene", "is_control", "passes_qv"] if lead else []
    return [name for name in dict.fromkeys(wanted) if name in there]


def _cells(source: Source, part: pa.Table, ids: pa.Array, said: Assignment | None) -> NDArray[np.integer] | None:
    if source.column in part.column_names:
        return rows_of(part.column(source.column), ids)
    return None if said is None else said.next(part.column("transcript_id").to_numpy())


def _image_size(store: Store) -> tuple[int, int] | None:
    names = store.names("images")
    if not names:
        return None
    shape = open_image(store.path, names[0]).shape
    return int(shape[1]), int(shape[2])


def _differ(one: Store, other: Store) -> CellquiltError:
    return CellquiltError(
        "transcripts-differ",
        f"{other.path} has other transcripts than {one.path}",
        "compare stores of one slide, converted with the same settings",
    )


def _in_step(readers: Sequence[Iterator[pa.Table]], stores: Sequence[Store]) -> Iterator[list[pa.Table]]:
    """Pieces of the same rows of several tables, whatever pieces these come in."""
    held: list[pa.Table | None] = [None] * len(readers)
    while True:
        for k, reader in enumerate(readers):
            while held[k] is None or held[k].num_rows == 0:  # type: ignore[union-attr]
                held[k] = next(reader, None)
                if held[k] is None:
                    break
        ended = [k for k, part in enumerate(held) if part is None]
        if ended:
            if len(ended) < len(held):
                raise _differ(stores[ended[0]], stores[next(k for k in range(len(held)) if k not in ended)])
            return
        parts = [part for part in held if part is not None]
        n = min(part.num_rows for part in parts)
        yield [part.slice(0, n) for part in parts]
        held = [part.slice(n) for part in parts]


def rows_of(column: pa.ChunkedArray, ids: pa.Array) -> NDArray[np.int64]:
    """Rows of the cells that a column of transcripts names.

    Parameters
    ----------
    column
        (n,) strings, plain or dictionary; null for no cell.
    ids
        (m,) strings, the cells' names.

    Returns
    -------
    numpy.ndarray
        (n,) int64, -1 for null and for names that are not there.
    """
    if len(column) == 0:
        return np.zeros(0, dtype=np.int64)
    column = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    encoded = column.combine_chunks()
    encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
    place = pc.fill_null(pc.index_in(encoded.dictionary.cast(pa.string()), value_set=ids), -1).to_numpy()
    codes = pc.fill_null(encoded.indices, len(place)).to_numpy()
    return np.append(place, -1)[codes].astype(np.int64)


def markers_of(settings: Settings) -> tuple[MarkerPairs | None, tuple[list[str], NDArray[np.float64]] | None]:
    """What the settings name to measure contamination by, read: pairs of exclusive genes, or else a reference."""
    pairs, reference = settings["compare_markers"], settings["compare_reference"]
    return (
        read_marker_pairs(pairs) if pairs else None,
        read_reference(reference) if reference and not pairs else None,
    )


def method_of(store: Store) -> str:
    """The method, or the chain of two, whose cells are a store's `cell_boundaries`; empty if it does not say."""
    resolved = [record.get("facts", {}) for record in store.records if record.get("stage") == "resolve"]
    names = [str(facts.get("method") or "") for facts in resolved[-2:]]
    if len(names) == 2 and names[-1] in TRANSCRIPT_METHODS and names[0]:
        priors = [task.get("facts", {}).get("prior", {}) for task in resolved[-1].get("tasks") or []]
        if priors and priors[0].get("name") in ("cell_boundaries", "nucleus_boundaries"):
            return "+".join(names)
    return names[-1] if names else ""


def methods_in(path: Path, asked: Sequence[str] = ()) -> list[Source]:
    """The methods of a store: the one whose cells are `cell_boundaries`, and those that are compared with it.

    Parameters
    ----------
    path
        A published store.
    asked
        Methods that are wanted, in their order, of those that there are. Default: all.
    """
    store = Store(path)
    chosen = method_of(store)
    names = [name for name in (asked or sorted(store.compared)) if name in store.compared and name != chosen]
    beside = [
        Source(name, path, f"{element_name(name)}_boundaries", None, name.split("+")[-1] in TRANSCRIPT_METHODS)
        for name in names
    ]
    return [Source(chosen or "cell_boundaries", path), *beside]


def default_names(stores: Sequence[Path]) -> list[str]:
    """A name for the method of every store: what it was segmented with, else the first folder in which they differ."""
    found = [method_of(Store(path)) for path in stores]
    if all(found) and len(set(found)) == len(found):
        return found
    parts = [Path(path).absolute().parts for path in stores]
    for level in range(min(map(len, parts))):
        words = [part[level].removesuffix(".zarr") for part in parts]
        if len(set(words)) == len(words):
            return words
    return [f"{name or 'method'} {k}" for k, name in enumerate(found, 1)]
