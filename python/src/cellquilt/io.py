"""Readers for notebooks: each returns a SpatialData object, backed by a store."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatialdata import SpatialData


def read(path: str | Path, technology: str, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read a machine's output.

    Parameters
    ----------
    path
        The machine's folder, or the image file.
    technology
        The machine, as in the sample sheet.
    output
        Store to make; default: a temporary one.
    **settings
        Settings of the group ``convert``, and ``transcripts``: a table beside an image.

    Returns
    -------
    spatialdata.SpatialData
        Backed by the store.
    """
    import spatialdata

    from cellquilt.core.settings import Settings
    from cellquilt.readers import convert_slide

    transcripts = settings.pop("transcripts", None)
    if output is None:
        output = Path(tempfile.mkdtemp(prefix="cellquilt-")) / f"{Path(path).stem}.zarr"
    store = convert_slide(
        Path(path),
        technology=technology,
        sample=Path(output).name.removesuffix(".zarr"),
        transcripts=None if transcripts is None else Path(transcripts),
        output=Path(output),
        settings=Settings(settings),
    )
    return spatialdata.read_zarr(store)


def merscope(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read a MERSCOPE region's folder; see `read`."""
    return read(path, "merscope", output=output, **settings)


def ome_tif(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read any TIFF, with ``transcripts`` a table beside it; see `read`."""
    return read(path, "ome_tif", output=output, **settings)


def xenium(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read a Xenium region's bundle; see `read`."""
    return read(path, "xenium", output=output, **settings)
