"""The way out: the cells of SpatialData objects as the files of other programs; see docs/export.md."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spatialdata import SpatialData


def xeniumranger(sdata: "SpatialData", output: str | Path, *, overwrite: bool = False) -> Path:
    """Write what ``xeniumranger import-segmentation`` takes.

    Parameters
    ----------
    sdata
        A Xenium slide with ``cell_boundaries``, and transcripts with their ``cell_id``.
    output
        Folder; the files lie in its folder ``xeniumranger``.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        The folder with the files.
    """
    return _export("xeniumranger", sdata, output, overwrite)


def vpt(sdata: "SpatialData", output: str | Path, *, overwrite: bool = False) -> Path:
    """Write Parquet as Vizgen's post-processing tool reads it; see `xeniumranger` for the parameters."""
    return _export("vpt", sdata, output, overwrite)


def qupath(sdata: "SpatialData", output: str | Path, *, overwrite: bool = False) -> Path:
    """Write GeoJSON with cells as QuPath has them; see `xeniumranger` for the parameters."""
    return _export("qupath", sdata, output, overwrite)


def _export(name: str, sdata: "SpatialData", output: str | Path, overwrite: bool) -> Path:
    from cellquilt.formats.stage import export_slide
    from cellquilt.notebook import recall, store_of

    settings = recall(sdata, {})
    return export_slide(store_of(sdata), Path(output), [name], settings=settings, overwrite=overwrite)[0]
