"""The few lines of Zarr v3 metadata that a store needs around its elements."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FILE = "zarr.json"


def write_group(folder: Path, attributes: Mapping[str, Any] | None = None) -> None:
    """Make `folder` a Zarr v3 group with the attributes given (the folder may exist)."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"attributes": dict(attributes or {}), "zarr_format": 3, "node_type": "group"}
    (folder / _FILE).write_text(json.dumps(document, indent=1, sort_keys=True))


def is_group(folder: Path) -> bool:
    """Whether the folder is a Zarr v3 group."""
    try:
        return json.loads((folder / _FILE).read_text()).get("node_type") == "group"
    except (OSError, ValueError):
        return False


def read_attributes(folder: Path) -> dict[str, Any]:
    """The attributes of a Zarr v3 group or array."""
    return json.loads((folder / _FILE).read_text()).get("attributes", {})


def update_attributes(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Add to a group's attributes, atomically; only for stores this process is making."""
    path = folder / _FILE
    document = json.loads(path.read_text())
    document["attributes"] = {**document.get("attributes", {}), **attributes}
    aside = path.with_name(".zarr.json.partial")
    aside.write_text(json.dumps(document, indent=1, sort_keys=True))
    aside.rename(path)
