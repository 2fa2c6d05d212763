"""The store protocol: immutable stores that each task adds one of, and the one writer that puts them together.

A *delta store* has SpatialData's layout on disk but holds only the elements that one task adds. Nothing ever writes
into a store that it was given; `assemble` makes the published store from the raw one and all deltas.
"""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cellquilt.core import zarr_json
from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.privacy import scrub
from cellquilt.core.settings import Settings
from cellquilt.core.sizes import measured

KINDS = ("images", "labels", "points", "shapes", "tables")
#: Folder inside a store where `cellquilt segment STORE` leaves the patches' results for `cellquilt resolve STORE`.
PATCH_RESULTS = ".cellquilt"
#: Folder inside a store for shapes of no rows, by kind and name: spatialdata reads no store that shows one.
_WITHOUT_ROWS = f"{PATCH_RESULTS}/without_rows"
_SPATIALDATA_ATTRS = {"version": "0.2"}
_WHOLE_BYTES = 8 << 20  # of outlines that spatialdata reads at once; in memory they take six times as much


class Store:
    """A SpatialData store on disk, whole or a delta.

    Parameters
    ----------
    path
        Its folder.

    Raises
    ------
    CellquiltError
        ``store-missing`` or ``store-unreadable``.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise CellquiltError("store-missing", f"{self.path} does not exist", "check the path")
        if not zarr_json.is_group(self.path):
            raise CellquiltError(
                "store-unreadable", f"{self.path} is not a Zarr v3 store", "make one with `cellquilt convert`"
            )

    @property
    def name(self) -> str:
        """The store's name without ``.zarr`` and what a stage adds to it (``liver_1`` of ``liver_1.raw.zarr``)."""
        return self.attributes.get("sample") or self.path.name.removesuffix(".zarr").removesuffix(".raw")

    @property
    def attributes(self) -> dict[str, Any]:
        """What cellquilt wrote about the store (root attribute ``cellquilt``)."""
        return zarr_json.read_attributes(self.path).get("cellquilt", {})

    def parameter(self, stage: str, name: str) -> Any:
        """The value that a setting had in a stage that made this store; None if the stage left no record."""
        found = [record for record in self.records if record.get("stage") == stage]
        return found[-1]["parameters"].get(name) if found else None

    def chosen_z(self, settings: Settings) -> str:
        """The plane or projection that holds: what is asked for now, else what the slide was read with."""
        return str(settings.given.get("z") or self.parameter("convert", "z") or settings["z"])

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of the stages that made it."""
        return self.attributes.get("records", [])

    def annotate(self, **attributes: Any) -> None:
        """Add to the root attribute ``cellquilt``; only on a store that is being made."""
        zarr_json.update_attributes(self.path, {"cellquilt": {**self.attributes, **attributes}})

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Append a stage's record; only on a store that is being made."""
        self.annotate(records=[*self.records, dict(record)])

    @property
    def compared(self) -> dict[str, list[dict[str, Any]]]:
        """Method compared with the one whose cells are `cell_boundaries` → the records of the stages that it took."""
        return self.attributes.get("compared", {})

    def add_compared(self, methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Add the records of compared methods; only on a store that is being made."""
        if methods:
            self.annotate(compared={**self.compared, **methods})

    def names(self, kind: str) -> list[str]:
        """Names of the elements of one kind, sorted; those of no rows too, which spatialdata does not see."""
        return sorted({*_members(self.path / kind), *_members(self.path / _WITHOUT_ROWS / kind)})

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such an element."""
        return (self._place(kind, name) / "zarr.json").is_file()

    def _place(self, kind: str, name: str) -> Path:
        hidden = self.path / _WITHOUT_ROWS / kind / name
        return hidden if hidden.is_dir() else self.path / kind / name

    def element(self, kind: str, name: str) -> Path:
        """The folder of an element that is there.

        Raises
        ------
        CellquiltError
            ``element-missing`` with the names that are there.
        """
        if not self.has(kind, name):
            raise CellquiltError(
                "element-missing",
                f"{self.path} has no {kind} element {name!r}",
                did_you_mean(name, self.names(kind)) if self.names(kind) else f"it has no {kind} at all",
            )
        return self._place(kind, name)

    def new_element(self, kind: str, name: str) -> Path:
        """The folder of an element to write; only on a store that is being made."""
        return self.path / kind / name


def as_converted(store: Path, view: Path) -> Path:
    """Make a store that shows a slide without the cells that steps found on it: links to its other elements."""
    slide = Store(store)
    with new_store(view, sample=slide.name) as shown:
        for kind in KINDS:
            for name in slide.names(kind):
                if not name.endswith("_boundaries"):
                    shown.new_element(kind, name).symlink_to(slide.element(kind, name).resolve())
        shown.annotate(records=[record for record in slide.records if record.get("stage") == "convert"])
    return view


def _members(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if (entry / "zarr.json").is_file()] if folder.is_dir() else []


def _hide_empty_shapes(store: Store) -> None:
    """Put shapes of no rows where our own steps find them and spatialdata does not; only on one that is being made."""
    from cellquilt.core.shapes import count_shapes

    for name in _members(store.path / "shapes"):
        element = store.path / "shapes" / name
        if count_shapes(element) == 0:
            hidden = store.path / _WITHOUT_ROWS / "shapes" / name
            hidden.parent.mkdir(parents=True, exist_ok=True)
            element.rename(hidden)


@contextmanager
def new_store(path: Path | str, *, sample: str, overwrite: bool = False) -> Iterator[Store]:
    """Make a store; it stands under its name only when the block has ended well.

    Parameters
    ----------
    path
        Folder to make.
    sample
        The sample's name, kept in the attributes.
    """
    with atomic_path(path, overwrite=overwrite) as aside:
        zarr_json.write_group(
            aside,
            {"spatialdata_attrs": _SPATIALDATA_ATTRS, "cellquilt": {"sample": sample, "records": []}},
        )
        for kind in KINDS:
            zarr_json.write_group(aside / kind)
        yield Store(aside)
        _hide_empty_shapes(Store(aside))
        Store(aside).annotate(size=measured(aside))


@contextmanager
def result_of(
    store: Store, output: Path | None, *, overwrite: bool = False, extends: Sequence[tuple[str, str]] = ()
) -> Iterator[Store]:
    """Where a step writes what it adds to a store.

    Parameters
    ----------
    store
        The store that the step reads.
    output
        Delta store to make; None adds the step's elements, atomically, to `store` itself: the one in-place write
        there is, and only for a store that the user named.
    overwrite
        Replace the output, or elements of these names. Without it that is an error.
    extends
        (kind, name) of elements that the step takes over whole and adds columns to: these it may always replace.

    Yields
    ------
    Store
        To write elements and the record to.
    """
    if output is not None:
        with new_store(output, sample=store.name, overwrite=overwrite) as delta:
            yield delta
        return
    scratch = store.path.parent / f".{store.path.name}.{os.getpid()}.delta"
    try:
        with new_store(scratch, sample=store.name, overwrite=True) as delta:
            yield delta
        add_delta(store.path, scratch, overwrite=overwrite, extends=extends)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def add_delta(store: Path, delta: Path, *, overwrite: bool = False, extends: Sequence[tuple[str, str]] = ()) -> None:
    """Add the elements of a delta store to a whole store, one after the other, each atomically.

    Raises
    ------
    CellquiltError
        ``output-exists``, before anything is changed, if the store has an element of one of the names and `overwrite`
        is not set.
    """
    parent, added = Store(store), Store(delta)
    elements = [(kind, name) for kind in KINDS for name in added.names(kind)]
    for kind, name in elements:
        if parent.has(kind, name) and not overwrite and (kind, name) not in extends:
            raise CellquiltError(
                "output-exists", f"{store} has {kind} {name!r} already", "add --overwrite to replace it"
            )
    for kind, name in elements:
        if not (parent.path / kind).is_dir():
            zarr_json.write_group(parent.path / kind)
        source = added.element(kind, name)
        target = parent.path / source.relative_to(added.path)
        with atomic_path(target, overwrite=True) as aside:
            shutil.copytree(source, aside, copy_function=_link)
        for other in (parent.path / kind / name, parent.path / _WITHOUT_ROWS / kind / name):
            if other != target:
                shutil.rmtree(other, ignore_errors=True)
    for record in added.records:
        parent.add_record(record)
    parent.add_compared(added.compared)
    parent.annotate(size=measured(parent.path))
    consolidate(parent.path)


def consolidate(store: Path) -> None:
    """Write the consolidated metadata that object stores need."""
    import warnings

    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns that consolidation is not part of the v3 specification yet
        zarr.consolidate_metadata(zarr.storage.LocalStore(store))


def _link(source: str, target: str) -> None:
    """A hard link where the file system can, else a copy. Never a symbolic link: task folders come and go."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def assemble(parts: Sequence[Path], output: Path, *, sample: str, attributes: Mapping[str, Any]) -> None:
    """Put the raw store and all deltas together into one valid SpatialData store.

    Parameters
    ----------
    parts
        Stores; where two have an element of one name, the later one counts.
    output
        The store to make. It shares the parts' bytes by hard links where it can: publish it as a copy.
    sample
        The sample's name.
    attributes
        What goes into the root attribute ``cellquilt`` beside the parts' records, which lose all absolute paths.

    Raises
    ------
    CellquiltError
        ``assembly-invalid`` if spatialdata cannot read the result, or the table does not match its shapes.
    """
    chosen: dict[tuple[str, str], Path] = {}
    records: list[dict[str, Any]] = []
    compared: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        store = Store(part)
        records += store.records
        compared |= store.compared
        for kind in KINDS:
            for name in store.names(kind):
                chosen[kind, name] = store.element(kind, name)
    with new_store(output, sample=sample) as assembled:
        for (kind, name), source in sorted(chosen.items()):
            shutil.copytree(os.path.realpath(source), assembled.new_element(kind, name), copy_function=_link)
        _hide_empty_shapes(assembled)
        assembled.annotate(**attributes, records=scrub(records))
        assembled.add_compared(scrub(compared))
        consolidate(assembled.path)
        _check(assembled)


def _check(store: Store) -> None:
    """Read an assembled store as its users will, in bounded memory."""
    import numpy as np
    import spatialdata

    from cellquilt.core.bins import bins_tables, read_bins
    from cellquilt.core.shapes import ShapesFile

    bins = bins_tables(store)
    for name in bins:
        read_bins(store, name)
    left_out = {name for name, n_bytes in bins.items() if n_bytes > _WHOLE_BYTES}
    try:
        with _readable_at_once(store, left_out) as path:
            sdata = spatialdata.read_zarr(path)
    except Exception as error:  # whatever spatialdata raises, the store is not one
        raise CellquiltError("assembly-invalid", f"spatialdata cannot read the store: {error}") from error
    for kind in KINDS:
        there, written = sorted(getattr(sdata, kind)), sorted(_members(store.path / kind))
        if kind == "tables":
            written = [name for name in written if name not in left_out]
        if there != written:
            raise CellquiltError("assembly-invalid", f"spatialdata reads {kind} {there}, written {written}")
    for name, table in sdata.tables.items():
        annotation = table.uns.get("spatialdata_attrs")
        if not annotation or name in bins:
            continue
        region = annotation["region"]
        ids = table.obs[annotation["instance_key"]].to_numpy()
        index = ShapesFile(store.element("shapes", region if isinstance(region, str) else region[0])).ids()
        if not np.array_equal(ids.astype(str), index):
            raise CellquiltError("assembly-invalid", f"rows of {name} and of shapes {region} are not the same cells")


@contextmanager
def _readable_at_once(store: Store, left_out: Collection[str]) -> Iterator[Path]:
    """The store itself; if it has shapes too large to read whole, one that differs by only having their first rows.

    All rows of these are decoded here, part by part. The tables in `left_out` are missing in it.
    """
    from cellquilt.core.shapes import ShapesFile

    shapes = {name: ShapesFile(store.path / "shapes" / name) for name in _members(store.path / "shapes")}
    large = {name: file for name, file in shapes.items() if file.n_bytes > _WHOLE_BYTES}
    if not large and not left_out:
        yield store.path
        return
    for file in large.values():
        file.decode()
    with tempfile.TemporaryDirectory(prefix=".check-", dir=store.path.parent) as folder:
        probe = Path(folder)
        for entry in store.path.resolve().iterdir():
            if entry.name not in ("shapes", "tables", "zarr.json"):
                (probe / entry.name).symlink_to(entry)
        zarr_json.write_group(probe, zarr_json.read_attributes(store.path))  # without a list of all elements
        (probe / "tables").mkdir()
        for entry in (store.path.resolve() / "tables").iterdir():
            if entry.name not in left_out:
                (probe / "tables" / entry.name).symlink_to(entry)
        for entry in (store.path.resolve() / "shapes").iterdir():
            target = probe / "shapes" / entry.name
            target.parent.mkdir(exist_ok=True)
            if entry.name in large:
                target.mkdir()
                (target / "zarr.json").symlink_to(entry / "zarr.json")
                large[entry.name].write_head(target / large[entry.name].path.name, _WHOLE_BYTES)
            else:
                target.symlink_to(entry)
        yield probe
