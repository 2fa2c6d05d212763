"""The steps on SpatialData objects, for notebooks: each runs the pipeline's own step on the object's store.

The public names are in `cellquilt`, `cellquilt.segmentation` and `cellquilt.io`; this module holds what they share.
"""

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellquilt.core.settings import BY_NAME, SETTINGS, Settings, resolve_name
from cellquilt.core.store import KINDS, Store
from cellquilt.core.store import add_delta as add_to_store

if TYPE_CHECKING:
    from spatialdata import SpatialData

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
