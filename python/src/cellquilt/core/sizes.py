"""How much there is in a store, recorded in it, so that a task's memory and time can be asked for before it starts.

The head job reads what stores say of themselves in ``zarr.json`` and how large files are, and nothing else:
`lib/Resources.groovy` does as `size_of` does, and a test compares them.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from cellquilt.core import zarr_json

#: What a task may be given much of. Numbers of one name add up over all that it gets; of patches the largest counts.
NAMES = ("pixels", "transcripts", "cells", "bytes", "outline_bytes", "patch_pixels", "patch_transcripts")
#: Files of a folder that are looked at, at most: a machine's folder may hold tiles by the hundred thousand.
_MOST_FILES = 20_000
#: Metadata larger than this is not read in the head job.
_MOST_METADATA = 64 << 20


def measured(store: Path) -> dict[str, int]:
    """How much a store holds, from its metadata and the footers of its tables.

    Parameters
    ----------
    store
        Folder with SpatialData's layout.

    Returns
    -------
    dict
        ``pixels`` of all channels at full resolution, ``transcripts``, and ``cells``: rows of shapes and of tables.
        Names of which there is nothing are left out.
    """
    from cellquilt.core.points import count_points
    from cellquilt.core.shapes import count_shapes

    found = {
        "pixels": sum(_pixels(element) for element in _elements(store / "images")),
        "transcripts": sum(count_points(element) for element in _elements(store / "points")),
        "cells": sum(count_shapes(element) for element in _elements(store / "shapes"))
        + sum(rows_of(element) for element in _elements(store / "tables")),
    }
    return {name: count for name, count in found.items() if count}


def _elements(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/zarr.json"))


def _shape(array: Path) -> list[int]:
    """Shape that an array's zarr.json says; empty where it says none."""
    return json.loads(array.read_text(encoding="utf-8")).get("shape") or []


def _pixels(element: Path) -> int:
    levels = [path for path in element.glob("*/zarr.json") if path.parent.name in ("0", "s0", "scale0")]
    return max((math.prod(_shape(path) or [0]) for path in levels), default=0)


def rows_of(table: Path) -> int:
    """Rows of an AnnData folder: the length of its index, which is an array or has one; 0 if it has none."""
    obs = table / "obs"
    if not (obs / "zarr.json").is_file():
        return 0
    index = obs / str(zarr_json.read_attributes(obs).get("_index", "_index"))
    arrays = [path for path in (index / "zarr.json", index / "values" / "zarr.json") if path.is_file()]
    return next((shape[0] for path in arrays if (shape := _shape(path))), 0)


def size_of(paths: Iterable[Path]) -> dict[str, int]:
    """How much there is in all that a task gets.

    Parameters
    ----------
    paths
        Stores and bundles, which say it themselves, files, and other folders.

    Returns
    -------
    dict
        Of `NAMES`, those of which there is something. What cannot be read counts as nothing.
    """
    total: dict[str, int] = {}
    for path in paths:
        for name, count in (recorded(Path(path)) or _of_files(Path(path))).items():
            total[name] = max(total.get(name, 0), count) if name.startswith("patch_") else total.get(name, 0) + count
    return total


def recorded(store: Path) -> Mapping[str, int]:
    """What a store or bundle says of itself; nothing if it says nothing."""
    try:
        if (store / "zarr.json").stat().st_size > _MOST_METADATA:
            return {}
        size = zarr_json.read_attributes(store)["cellquilt"]["size"]
        return {name: int(size[name]) for name in NAMES if name in size}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _of_files(path: Path) -> dict[str, int]:
    """Bytes of a file, or of the files of a folder; of those with outlines of cells apart as well."""
    total = outlines = seen = 0
    folders = [path]
    try:
        if path.is_file():
            return {"bytes": path.stat().st_size}
        while folders and seen < _MOST_FILES:
            for entry in os.scandir(folders.pop()):
                seen += 1
                if entry.is_dir():
                    folders.append(Path(entry.path))
                elif entry.is_file():
                    n_bytes = entry.stat().st_size
                    total += n_bytes
                    outlines += n_bytes if "boundaries" in entry.name else 0
    except OSError:
        return {}
    return {name: count for name, count in {"bytes": total, "outline_bytes": outlines}.items() if count}
