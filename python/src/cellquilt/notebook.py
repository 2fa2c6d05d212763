"""The steps on SpatialData objects, for notebooks: each runs the pipeline's own step on the object's store.

The public names are in `cellquilt`, `cellquilt.segmentation` and `cellquilt.io`; this module holds what they share.
"""

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.settings import BY_NAME, SETTINGS, Settings, resolve_name
from cellquilt.core.store import KINDS, Store, result_of
from cellquilt.core.store import add_delta as add_to_store

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from cellquilt.aggregation.columns import CellColumns

#: Objects without a store of their own → the temporary folder that holds one for them.
_TEMPORARY: "weakref.WeakKeyDictionary[SpatialData, tempfile.TemporaryDirectory[str]]" = weakref.WeakKeyDictionary()
#: Key of `SpatialData.attrs` under which the choices of earlier steps are kept for later ones.
_CHOICES = "cellquilt_choices"


def store_of(sdata: "SpatialData") -> Path:
    """The store on disk that steps read: the object's own, or a temporary one for an object in memory."""
    if sdata.path is not None:
        return Path(sdata.path)
    if sdata not in _TEMPORARY:
        folder = tempfile.TemporaryDirectory(prefix="cellquilt-")
        sdata.write(Path(folder.name) / "slide.zarr", update_sdata_path=False)
        _TEMPORARY[sdata] = folder
    return Path(_TEMPORARY[sdata].name) / "slide.zarr"


def add_delta(sdata: "SpatialData", delta: Path) -> None:
    """Give an object, and the store behind it, the elements of a delta store; elements of these names are replaced."""
    import spatialdata

    store, added = store_of(sdata), Store(delta)
    add_to_store(store, delta, overwrite=True)
    fresh = spatialdata.read_zarr(store)
    for kind in KINDS:
        for name in added.names(kind):
            if name in getattr(fresh, kind):
                getattr(sdata, kind)[name] = getattr(fresh, kind)[name]
            else:  # of no rows: spatialdata knows no such shapes
                getattr(sdata, kind).pop(name, None)


def prior_store(sdata: "SpatialData", prior: str, folder: Path) -> Path | None:
    """A store with the shapes that a user names as prior, where they are in the object but not in its store."""
    import spatialdata

    name = prior.removeprefix("shapes:")
    if name not in sdata.shapes or Store(store_of(sdata)).has("shapes", name):
        return None
    spatialdata.SpatialData(shapes={name: sdata.shapes[name]}).write(folder / "prior.zarr")
    return folder / "prior.zarr"


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for what a step hands to the next."""
    with tempfile.TemporaryDirectory(prefix="cellquilt-") as folder:
        yield Path(folder)


def keyword_settings(group: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords of an API function as settings by name; None means that the caller said nothing.

    Parameters
    ----------
    group
        The function's own group of settings, whose short keywords it takes.
    keywords
        Keyword → value; a setting's full name is understood as well.
    """
    short = {setting.keyword: setting.name for setting in SETTINGS if setting.group == group and setting.keyword}
    return {
        short.get(name) or BY_NAME[resolve_name(name)].name: value
        for name, value in keywords.items()
        if value is not None
    }


def remember(sdata: "SpatialData", given: dict[str, Any]) -> None:
    """Keep choices of one step for later ones."""
    sdata.attrs[_CHOICES] = {**sdata.attrs.get(_CHOICES, {}), **given}


def recall(sdata: "SpatialData", given: dict[str, Any]) -> Settings:
    """What earlier steps were told, and on top of it what this one is told."""
    return Settings({**sdata.attrs.get(_CHOICES, {}), **given})


def table_of(data: "SpatialData | AnnData") -> "AnnData":
    """The table of cells of a slide, or the table that was given.

    Raises
    ------
    CellquiltError
        ``table-missing``.
    """
    if not hasattr(data, "tables"):
        return data
    if "table" not in data.tables:
        raise CellquiltError("table-missing", 'the slide has no table "table"', "run `cellquilt.aggregate` on it first")
    return data.tables["table"]


def add_columns(data: "SpatialData | AnnData", found: "CellColumns") -> None:
    """Give a table, and that of the store behind a slide, what was found of its cells."""
    from cellquilt.aggregation.columns import add_columns as add_to_table

    cells = table_of(data)
    for name in found.columns:
        cells.obs[name] = found.columns[name].array
    cells.uns.update(found.tables)
    slide: Any = data
    if cells is data or (slide.path is None and slide not in _TEMPORARY):
        return
    store = Store(store_of(slide))
    try:
        with result_of(store, None, extends=[("tables", "table")]) as delta:
            add_to_table(store, delta, [found])
    except CellquiltError as error:
        if error.code not in ("cells-mismatch", "element-missing"):
            raise
        LOG.warning("only the object gets the columns, not its store: %s", error.message)
