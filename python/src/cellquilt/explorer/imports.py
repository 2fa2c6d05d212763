"""The way back: what people draw and name in the viewer, into shapes and the table of a store."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean, did_you_mean_file
from cellquilt.core.log import LOG
from cellquilt.core.record import Record
from cellquilt.core.shapes import ShapesTable, write_shapes
from cellquilt.core.store import Store, consolidate, result_of
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine
from cellquilt.core.xenium import xenium_numbers
from cellquilt.explorer.cells import NAMES
from cellquilt.explorer.slide import ViewedSlide
from cellquilt.formats.cells import TABLE
from cellquilt.geometry.locate import points_in_polygons
from cellquilt.geometry.polygons import Rings

if TYPE_CHECKING:
    import pandas as pd

_FORGOTTEN = "is it the file that the viewer exports?"


def _lines(path: Path, code: str) -> list[str]:
    if not path.is_file():
        raise CellquiltError(code, f"{path} does not exist or is no file", did_you_mean_file(path) or "check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CellquiltError(code, f"{path.name} is no text: {error}", _FORGOTTEN) from None
    return text.splitlines()


def _rows(path: Path, code: str, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a table between commas, after the viewer's own lines of remarks."""
    lines = [line for line in _lines(path, code) if line.strip() and not line.startswith("#")]
    reader = csv.DictReader(io.StringIO("\n".join(lines)))
    names = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = names
    missing = [name for name in needed if name not in names]
    if missing:
        raise CellquiltError(
            code, f"{path.name} has no column {' or '.join(missing)}; columns: {', '.join(names) or 'none'}", _FORGOTTEN
        )
    return list(reader)


def read_selections(path: Path | str) -> dict[str, shapely.Polygon | shapely.MultiPolygon]:
    """Read the coordinates of selections that the viewer exports: name → polygon in µm.

    Parameters
    ----------
    path
        CSV with ``X`` and ``Y`` (µm), and ``Selection`` where there are several; remarks begin with ``#``.

    Raises
    ------
    CellquiltError
        ``explorer-selection``.
    """
    path = Path(path)
    code = "explorer-selection"
    rows = _rows(path, code, ("X", "Y"))
    said = [line.partition(":")[2].strip() for line in _lines(path, code) if line.lower().startswith("#selection")]
    alone = said[0] if said and said[0] else path.stem
    corners: dict[str, list[tuple[float, float]]] = {}
    for number, row in enumerate(rows, 1):
        try:
            corner = float(row["X"]), float(row["Y"])
        except (TypeError, ValueError):
            corner = (np.nan, np.nan)
        if not np.isfinite(corner).all():
            raise CellquiltError(
                code, f"{path.name}, point {number}: X is {row['X']!r}, Y is {row['Y']!r}; µm were expected", _FORGOTTEN
            )
        corners.setdefault((row.get("Selection") or alone).strip(), []).append(corner)
    if not corners:
        raise CellquiltError(code, f"{path.name} has no points", _FORGOTTEN)
    out: dict[str, shapely.Polygon | shapely.MultiPolygon] = {}
    for name, places in corners.items():
        if len(set(places)) < 3:
            raise CellquiltError(
                code, f'{path.name}: selection "{name}" has {len(set(places))} points', "draw it again"
            )
        polygon = shapely.make_valid(shapely.Polygon(places))  # a line drawn by hand may cross itself
        parts = [part for part in shapely.get_parts(polygon) if part.geom_type == "Polygon"]
        whole = parts[0] if len(parts) == 1 else shapely.MultiPolygon(
            [piece for part in shapely.get_parts(polygon) for piece in shapely.get_parts(part)
             if piece.geom_type == "Polygon"])  # fmt: skip
        if whole.area == 0:
            raise CellquiltError(code, f'{path.name}: selection "{name}" has no area', "draw it again")
        out[name] = whole
    return out


def read_categories(path: Path | str) -> dict[str, str]:
    """Read cells' groups that the viewer exports, or that people write for it: the viewer's name → group.

    Parameters
    ----------
    path
        CSV with ``cell_id`` and ``group`` (or ``Cell ID`` and ``Cluster``).

    Raises
    ------
    CellquiltError
        ``explorer-categories``.
    """
    path = Path(path)
    code = "explorer-categories"
    lines = [line for line in _lines(path, code) if line.strip() and not line.startswith("#")]
    names = [name.strip() for name in (next(csv.reader(lines[:1])) if lines else [])]
    cell = next((name for name in ("cell_id", "Cell ID", "cell") if name in names), "cell_id")
    group = next((name for name in ("group", "Group", "cluster", "Cluster") if name in names), "group")
    rows = _rows(path, code, (cell, group))
    out: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        name, value = (row[cell] or "").strip(), (row[group] or "").strip()
        if not name:
            raise CellquiltError(code, f"{path.name}, row {number} names no cell", _FORGOTTEN)
        if out.setdefault(name, value) != value:
            raise CellquiltError(
                code, f'{path.name} puts cell {name} into "{out[name]}" and into "{value}"', "leave one of them"
            )
    if not out:
        raise CellquiltError(code, f"{path.name} has no rows", _FORGOTTEN)
    return out


def add_selections_to(
    slide: ViewedSlide, path: Path, *, name: str = "selections", output: Path | None = None, overwrite: bool = False
) -> dict[str, int]:
    """Add selections to a store: as shapes of this name, and as a column of the table of the cells in them.

    A cell belongs to the selection that its centroid lies in; where selections overlap, to the first.

    Parameters
    ----------
    slide
        The slide.
    path
        The viewer's CSV of coordinates.
    name
        Name of the shapes and of the column.
    output
        Delta store to make; None adds to the store itself.
    overwrite
        Replace shapes of this name.

    Returns
    -------
    dict
        Selection → its number of cells.
    """
    selections = read_selections(path)
    names = list(selections)
    geometry = np.array(list(selections.values()), dtype=object)
    record = Record("explorer_selections", slide.store.name, {"selections": path.name, "name": name})
    counts = dict.fromkeys(names, 0)
    values: NDArray[np.int64] | None = None
    if slide.cells is not None and slide.table is not None:
        matrix = slide.map_of(slide.cells.outlines.transforms, "cell_boundaries")
        from cellquilt.core.transforms import apply

        centres = apply(matrix, slide.cells.outlines.traits.centroids)
        found = np.full(len(centres), -1, np.int64)
        for k in range(len(names))[::-1]:
            found[points_in_polygons(centres, Rings.from_shapely(geometry[k : k + 1])) >= 0] = k
        counts = dict(zip(names, np.bincount(found[found >= 0], minlength=len(names)).tolist(), strict=True))
        values = _by_row(slide, found)
    with result_of(slide.store, output, overwrite=overwrite, extends=[("tables", TABLE)]) as delta:
        table = ShapesTable(np.array(names), geometry, {}, viewer_transforms(slide))
        write_shapes(delta.new_element("shapes", name), table)
        if values is not None:
            _add_column(slide, delta, name, values, names)
        record.facts["cells"] = counts
        delta.add_record(record.finish())
    for selection, n in counts.items():
        LOG.info("%s: %d cells in %s", slide.store.name, n, selection)
    return counts


def add_categories_to(
    slide: ViewedSlide, path: Path, *, name: str, folder: Path | None = None, output: Path | None = None
) -> dict[str, int]:
    """Add the viewer's groups of cells to the table, as a column; cells that are in none have none.

    Parameters
    ----------
    slide
        The slide.
    path
        The viewer's CSV of cells and groups.
    name
        Name of the column.
    folder
        The Explorer folder: its ``cell_ids.csv`` says which cell each of the viewer's names is. Default: as the folder
        would be written now.
    output
        Delta store to make; None adds to the store itself.

    Returns
    -------
    dict
        Group → its number of cells.

    Raises
    ------
    CellquiltError
        ``explorer-categories``, ``explorer-no-cells``.
    """
    groups = read_categories(path)
    if slide.cells is None or slide.table is None:
        raise CellquiltError(
            "explorer-no-cells", f"{slide.store.path} has no table of cells", "segment and aggregate it first"
        )
    cells = list(groups)
    row = _rows_of_names(slide, cells, None if folder is None else folder / NAMES)
    lost = [cell for cell, place in zip(cells, row.tolist(), strict=True) if place < 0]
    if len(lost) == len(cells):
        raise CellquiltError(
            "explorer-categories", f"{path.name}: none of its cells ({cells[0]}, …) is a cell of {slide.store.path}",
            did_you_mean(cells[0], slide.names[:1000].tolist()),
        )  # fmt: skip
    if lost:
        LOG.warning("%s: %d of %d cells are not in the store, %s for one", path.name, len(lost), len(cells), lost[0])
    known = sorted(set(groups.values()) - {""})
    number = {group: k for k, group in enumerate(known)}
    found = np.full(len(slide.cells), -1, np.int64)
    there = np.flatnonzero(row >= 0)
    codes = np.array([number.get(group, -1) for group in groups.values()], dtype=np.int64)
    found[row[there]] = codes[there]
    record = Record("explorer_categories", slide.store.name, {"categories": path.name, "name": name})
    counts = dict(zip(known, np.bincount(found[found >= 0], minlength=len(known)).tolist(), strict=True))
    record.facts["cells"] = counts
    with result_of(slide.store, output, extends=[("tables", TABLE)]) as delta:
        _add_column(slide, delta, name, _by_row(slide, found), known)
        delta.add_record(record.finish())
    return counts


def viewer_transforms(slide: ViewedSlide) -> dict[str, Affine]:
    """Coordinate system → (3, 3) map from the viewer's µm."""
    if slide.image is not None:
        back = np.diag([1 / slide.pixel_um, 1 / slide.pixel_um, 1.0])
        return {system: matrix @ back for system, matrix in slide.image.transforms.items()}
    back = np.linalg.inv(slide.map_of({MICRONS: np.eye(3)}, "the viewer"))
    return {GLOBAL: back, MICRONS: back}


def names_of_folder(path: Path) -> dict[str, str]:
    """The viewer's name of each cell → its name in the store, from a folder's ``cell_ids.csv``."""
    rows = _rows(path, "explorer-names", ("cell_id", "store_cell_id"))
    return {row["cell_id"]: row["store_cell_id"] for row in rows}


def _rows_of_names(slide: ViewedSlide, names: list[str], path: Path | None) -> NDArray[np.int64]:
    """(n,) the cell of each name: the viewer's, or the store's own."""
    assert slide.cells is not None
    if path is not None and path.is_file():
        known = names_of_folder(path)
        return slide.cells.rows_of(pa.array([known.get(name, name) for name in names], pa.string()))
    numbers = xenium_numbers(np.array(names))
    order = np.argsort(slide.numbers)
    place = np.minimum(np.searchsorted(slide.numbers[order], numbers), len(order) - 1)
    row = np.where((numbers >= 0) & (slide.numbers[order][place] == numbers), order[place], -1)
    return np.where(row >= 0, row, slide.cells.rows_of(pa.array(names, pa.string())))


def _by_row(slide: ViewedSlide, of_cell: NDArray[np.int64]) -> NDArray[np.int64]:
    """Values of cells as values of the table's rows; -1 for rows without a cell."""
    out = np.full(len(slide.obs), -1, np.int64)
    there = slide.row_of_cell >= 0
    out[slide.row_of_cell[there]] = of_cell[there]
    return out


def _add_column(slide: ViewedSlide, delta: Store, name: str, codes: NDArray[np.int64], groups: list[str]) -> None:
    """The table with one more column, in a store that is being made."""
    import shutil

    import pandas as pd
    import zarr
    from anndata.io import read_elem, write_elem

    assert slide.table is not None
    element = delta.new_element("tables", TABLE)
    shutil.copytree(slide.table, element)
    group: Any = zarr.open_group(element, mode="r+", use_consolidated=False)
    obs: "pd.DataFrame" = read_elem(group["obs"])  # noqa: UP037
    obs[name] = pd.Categorical.from_codes(codes, groups)
    write_elem(group, "obs", obs)
    consolidate(element)


def obs_rows(obs: "pd.DataFrame", names: Mapping[str, str]) -> NDArray[np.int64]:
    """(n,) row of a table of each cell of a folder, by the store's name, else by the viewer's; -1 for none.

    Raises
    ------
    CellquiltError
        ``explorer-table-cells`` if the table has none of the cells.
    """
    import pandas as pd

    index = pd.Index(obs.index.astype(str))
    if index.has_duplicates:
        raise CellquiltError(
            "explorer-table-cells", f"the table has cell {index[index.duplicated()][0]} twice", "make its names unique"
        )
    row = index.get_indexer(pd.Index(list(names.values())))
    if not (row >= 0).any():
        row = index.get_indexer(pd.Index(list(names)))
    if not (row >= 0).any():
        raise CellquiltError(
            "explorer-table-cells",
            f"no row of the table ({index[0] if len(index) else 'it has none'}, …) is a cell of the folder "
            f"({next(iter(names.values()), 'none')}, …)",
            "is it the table that the folder was written from?",
        )
    return row.astype(np.int64)
