"""Describe what sopa writes for Xenium Explorer: names, shapes, types and attributes of all arrays, as JSON.

    python tests/benchmarks/explorer_layout.py STORE FOLDER OUTPUT.json     # with a Python that has sopa 2.2.11

STORE is a published store of ours; sopa writes it to FOLDER. The result is kept in tests/data, where a test compares
our folder of the same slide with it, field by field; docs/explorer.md explains what differs. The slide is that of
tests/unit/test_explorer.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

_MOST = 12  # values of a list that are shown


def describe(folder: Path) -> dict[str, Any]:
    """File → array or group → what it says of itself; of the image its pages, of JSON its fields."""
    import tifffile
    import zarr

    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".zarr.zip"):
            root = zarr.open_group(zarr.storage.ZipStore(path, mode="r", read_only=True), mode="r")
            members = sorted(root.members(max_depth=None), key=lambda member: member[0])
            found[path.name] = {"": _node(root), **{name: _node(node) for name, node in members}}
        elif path.name.endswith(".ome.tif"):
            with tifffile.TiffFile(path) as tiff:
                levels = tiff.series[0].levels
                found[path.name] = {
                    "dtype": str(levels[0].dtype),
                    "levels": [list(level.shape) for level in levels],
                    "um_a_pixel": [round(_um(level.pages[0]), 6) for level in levels],
                    "tile": list(levels[0].pages[0].tile),
                    "compression": levels[0].pages[0].compression.name,
                }
        elif path.suffix == ".xenium":
            found[path.name] = json.loads(path.read_text())
    return found


def _um(page: Any) -> float:
    over, under = page.tags["XResolution"].value
    return 1e4 * under / over


def _node(node: Any) -> dict[str, Any]:
    attributes = {name: _short(value) for name, value in sorted(node.attrs.items())}
    if not hasattr(node, "shape"):
        return {"attributes": attributes}
    return {"shape": list(node.shape), "dtype": str(node.dtype), "attributes": attributes}


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(part) for name, part in sorted(value.items())[:_MOST]}
    if isinstance(value, list):
        return [_short(part) for part in value[:_MOST]]
    return value


def main() -> None:
    """Write with sopa, then describe."""
    import sopa
    import spatialdata

    store, folder, output = map(Path, sys.argv[1:4])
    sdata = spatialdata.read_zarr(store)
    table = sdata.tables["table"]
    table.uns["sopa_attrs"] = {}
    sopa.io.explorer.write(
        str(folder), sdata, image_key="morphology", shapes_key="cell_boundaries", points_key="transcripts",
        gene_column="gene", pixel_size=0.2125,
    )  # fmt: skip
    document = {"sopa": sopa.__version__, "files": describe(folder)}
    output.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
