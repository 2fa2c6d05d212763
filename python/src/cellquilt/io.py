"""Readers for notebooks: each returns a SpatialData object, backed by a store."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from cellquilt import explorer as explorer


def __getattr__(name: str) -> Any:
    import importlib

    if name == "explorer":
        return importlib.import_module("cellquilt.explorer")
    raise AttributeError(f"module 'cellquilt.io' has no attribute {name!r}")


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


def cosmx(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read a CosMx slide's folder; see `read`."""
    return read(path, "cosmx", output=output, **settings)


def merscope(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read a MERSCOPE region's folder; see `read`."""
    return read(path, "merscope", output=output, **settings)


def ome_tif(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read any TIFF, with ``transcripts`` a table beside it; see `read`."""
    return read(path, "ome_tif", output=output, **settings)


def visium_hd(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read Space Ranger's output of a Visium HD slide; see `read`."""
    return read(path, "visium_hd", output=output, **settings)


def xenium(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read a Xenium region's bundle; see `read`."""
    return read(path, "xenium", output=output, **settings)


def bioio(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read any image that bioio reads; see `read`."""
    return read(path, "bioio", output=output, **settings)


def hyperion(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read a Hyperion region: a folder of TIFFs, or an OME-TIFF; see `read`."""
    return read(path, "hyperion", output=output, **settings)


def macsima(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read a MACSima experiment's folder; see `read`."""
    return read(path, "macsima", output=output, **settings)


def molecular_cartography(
    path: str | Path, region: str | None = None, *, output: str | Path | None = None, **settings: Any
) -> "SpatialData":
    """Read a region of a Molecular Cartography folder; see `read`. `region` is short for ``vendor_region``."""
    if region is not None:
        settings["vendor_region"] = region
    return read(path, "molecular_cartography", output=output, **settings)


def phenocycler(path: str | Path, *, output: str | Path | None = None, **settings: Any) -> "SpatialData":
    """Read a PhenoCycler slide: a QPTIFF, or a TIFF that QuPath made of it; see `read`."""
    return read(path, "phenocycler", output=output, **settings)
