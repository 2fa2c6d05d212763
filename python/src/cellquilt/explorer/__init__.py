"""Xenium Explorer: slides as the viewer's folder, and what people do in the viewer back into slides.

``cq.io.explorer`` is this module. Slides are SpatialData objects or paths of stores. Of an object, elements are read
from its store; only `write` takes the table of cells as it is in memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellquilt.explorer.simplify import MAX_VERTICES

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from cellquilt.explorer.slide import ViewedSlide

__all__ = [
    "add_aligned", "add_categories", "add_explorer_selection", "add_lasso", "align", "update_obs", "validate", "write",
]  # fmt: skip


def write(
    sdata: "SpatialData | str | Path",
    path: "str | Path | SpatialData",
    *,
    mode: str | None = None,
    image: str | None = None,
    layer: str | None = None,
    columns: Sequence[str] = (),
    pixel_size_um: float | None = None,
    max_vertices: int = MAX_VERTICES,
    compression: str = "deflate",
    tables: bool = False,
    run_name: str | None = None,
    memory_mb: int = 1500,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write a slide for Xenium Explorer: open ``experiment.xenium`` in the folder with it.

    Parameters
    ----------
    sdata, path
        The slide, and the folder to make; in any order.
    mode
        Which parts to write: ``+`` and letters for these only, ``-`` and letters for all others; they replace those of
        an earlier folder, whose other files stay. i image, t transcripts, c counts, b boundaries, o observations
        (groups of cells), m manifest, p the tables of a Xenium bundle. None: all but p.
    image
        Name of the image; default: the main one.
    layer
        Layer of the table with the counts; default: X.
    columns
        Columns of obs to show as groups; default: all that are categories, texts or truth values.
    pixel_size_um
        Where the store does not say.
    max_vertices
        Most corners of a polygon, the first repeated as last.
    compression
        Of the image: ``deflate`` or ``jpeg2000``, which is smaller and takes many times as long.
    tables
        Write p as well.
    run_name
        What the viewer calls the run; default: the sample.
    memory_mb
        Memory for data in MB.
    overwrite
        Replace what stands there.

    Returns
    -------
    dict
        What the folder holds, as `validate` counts it.

    Raises
    ------
    CellquiltError
        ``explorer-mode`` and others of the parts; the earlier folder is then as it was.
    """
    from cellquilt.explorer.folder import write_folder

    if _is_slide(path) and not _is_slide(sdata):
        sdata, path = path, sdata  # type: ignore[assignment]
    with _viewed(sdata, image, pixel_size_um, memory_mb, table_in_memory=True) as slide:
        return write_folder(
            slide, Path(path), mode=mode, layer=layer, columns=columns, max_vertices=max_vertices,  # type: ignore[arg-type]
            compression=compression, tables=tables, run_name=run_name, overwrite=overwrite,
        )  # fmt: skip


def update_obs(adata: "AnnData | SpatialData | str | Path", path: str | Path, *, columns: Sequence[str] = ()) -> None:
    """Show other groups of cells in a folder that was written before: its ``analysis.zarr.zip`` is made anew.

    Parameters
    ----------
    adata
        The table with the columns, a slide that has one, or the path of either (``.h5ad``, ``.zarr``).
    path
        The folder.
    columns
        Columns of obs; default: all that are categories, texts or truth values.
    """
    from cellquilt.core.xenium import ANALYSIS
    from cellquilt.explorer.cells import NAMES
    from cellquilt.explorer.folder import rewrite
    from cellquilt.explorer.imports import names_of_folder, obs_rows
    from cellquilt.explorer.table import write_obs_groups

    obs = _obs_of(adata)
    rows = obs_rows(obs, names_of_folder(Path(path) / NAMES))
    rewrite(
        Path(path),
        {ANALYSIS},
        lambda aside: write_obs_groups(obs, rows, aside / ANALYSIS, columns=columns),
        overwrite=True,
    )


def align(
    sdata: "SpatialData | str | Path",
    image: str | Path,
    matrix: str | Path | None = None,
    *,
    name: str | None = None,
    folder: str | Path | None = None,
    image_key: str | None = None,
    to_store: bool = True,
    compression: str = "deflate",
    memory_mb: int = 1500,
    overwrite: bool = False,
) -> str:
    """Add an image that was aligned with the slide, such as H&E, to the slide, and to an Explorer folder.

    Parameters
    ----------
    sdata
        The slide.
    image
        TIFF of one plane.
    matrix
        CSV with the 3 × 3 map from its pixels to those of the morphology image, as the viewer exports it.
    name
        Its name; default: the file's.
    folder
        An Explorer folder, which gets ``<name>.ome.tif`` and ``<name>_alignment.csv``: in the viewer, add the image and
        give it the alignment file.
    image_key
        Name of the morphology image; default: the main one.
    to_store
        Whether the slide gets the image.
    compression, memory_mb, overwrite
        As for `write`.

    Returns
    -------
    str
        The image's name.
    """
    from cellquilt.explorer.aligned import align_image

    with _viewed(sdata, image_key, memory_mb=memory_mb) as slide:
        added = align_image(
            slide, Path(image), None if matrix is None else Path(matrix), name=name,
            folder=None if folder is None else Path(folder), to_store=to_store, compression=compression,
            overwrite=overwrite,
        )  # fmt: skip
    if to_store:
        _show(sdata, "images", added)
    return added


add_aligned = align


def add_lasso(
    sdata: "SpatialData | str | Path", path: str | Path, *, name: str = "selections", overwrite: bool = False
) -> dict[str, int]:
    """Add selections drawn in the viewer: shapes of this name, and a column of obs of the cells in them.

    Parameters
    ----------
    sdata
        The slide.
    path
        The CSV of coordinates that the viewer exports.
    name
        Name of the shapes and of the column.
    overwrite
        Replace shapes of this name.

    Returns
    -------
    dict
        Selection → number of cells whose centroid lies in it.
    """
    from cellquilt.explorer.imports import add_selections_to

    with _viewed(sdata) as slide:
        found = add_selections_to(slide, Path(path), name=name, overwrite=overwrite)
    _show(sdata, "shapes", name)
    _show(sdata, "tables", "table", name)
    return found


add_explorer_selection = add_lasso


def add_categories(
    sdata: "SpatialData | str | Path", path: str | Path, *, name: str, folder: str | Path | None = None
) -> dict[str, int]:
    """Add groups of cells made in the viewer to the table.

    Parameters
    ----------
    sdata
        The slide.
    path
        The CSV of cells and groups that the viewer exports.
    name
        Name of the column.
    folder
        The Explorer folder, where the slide's cells may have changed since it was written.

    Returns
    -------
    dict
        Group → number of cells.
    """
    from cellquilt.explorer.imports import add_categories_to

    with _viewed(sdata) as slide:
        found = add_categories_to(slide, Path(path), name=name, folder=None if folder is None else Path(folder))
    _show(sdata, "tables", "table", name)
    return found


def validate(path: str | Path) -> dict[str, int]:
    """Check that all files of an Explorer folder agree; see `cellquilt.explorer.rules`."""
    from cellquilt.explorer.rules import validate as check

    return check(path)


# --- slides in memory


def _is_slide(value: Any) -> bool:
    return hasattr(value, "shapes") and hasattr(value, "tables")


@contextmanager
def _viewed(
    sdata: "SpatialData | str | Path",
    image: str | None = None,
    pixel_size_um: float | None = None,
    memory_mb: int = 1500,
    *,
    table_in_memory: bool = False,
) -> "Iterator[ViewedSlide]":
    import tempfile

    from cellquilt.core.store import Store
    from cellquilt.explorer.slide import ViewedSlide

    if not _is_slide(sdata):
        yield ViewedSlide(Store(sdata), image, pixel_size_um, memory_mb)  # type: ignore[arg-type]
        return
    from cellquilt.notebook import store_of

    slide = ViewedSlide(Store(store_of(sdata)), image, pixel_size_um, memory_mb)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="cellquilt-") as folder:
        if table_in_memory and "table" in sdata.tables:  # type: ignore[union-attr]
            slide.table = Path(folder) / "table"
            sdata.tables["table"].write_zarr(slide.table)  # type: ignore[union-attr]
        yield slide


def _show(sdata: "SpatialData | str | Path", kind: str, name: str, column: str | None = None) -> None:
    """Give an object what its store has got."""
    if not _is_slide(sdata):
        return
    import spatialdata

    from cellquilt.notebook import store_of

    fresh = spatialdata.read_zarr(store_of(sdata))  # type: ignore[arg-type]
    if name not in getattr(fresh, kind):
        return
    if column is None:
        getattr(sdata, kind)[name] = getattr(fresh, kind)[name]
    elif column in fresh.tables[name].obs:
        sdata.tables[name].obs[column] = fresh.tables[name].obs[column]  # type: ignore[union-attr]


def _obs_of(adata: "AnnData | SpatialData | str | Path") -> Any:
    if _is_slide(adata):
        return adata.tables["table"].obs  # type: ignore[union-attr]
    if hasattr(adata, "obs"):
        return adata.obs
    import anndata

    from cellquilt.core.errors import CellquiltError, did_you_mean_file
    from cellquilt.core.store import Store
    from cellquilt.explorer.slide import ViewedSlide

    path = Path(adata)  # type: ignore[arg-type]
    if not path.exists():
        raise CellquiltError("table-missing", f"{path} does not exist", did_you_mean_file(path))
    if path.is_dir():
        slide = ViewedSlide(Store(path))
        if slide.table is None:
            raise CellquiltError("table-missing", f"{path} has no table of cells", "run `aggregate` first")
        return slide.obs
    try:
        return anndata.read_h5ad(path, backed="r").obs
    except Exception as error:  # whatever h5py and anndata raise on what is no table
        raise CellquiltError("table-unreadable", f"{path} cannot be read: {error}", "is it an .h5ad file?") from error
