"""``cell_feature_matrix.zarr.zip`` and ``analysis.zarr.zip``: what the cells' table says of them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.log import LOG
from cellquilt.core.zarr_zip import Column, ZarrZip
from cellquilt.explorer.buckets import Buckets, bounds_of
from cellquilt.explorer.cells import number_pairs
from cellquilt.explorer.slide import ViewedSlide

if TYPE_CHECKING:
    import pandas as pd

TOTAL = "Total transcripts"
_ENTRY = np.dtype([("feature", "<u4"), ("cell", "<u4"), ("value", "<u4")])
_ENTRIES = 1 << 20  # of the matrix at a time
_COPIES = 4
_MOST_GROUPS = 500  # more are names or numbers, not groups
_PASSES, _FAILS = "passes", "fails"
_MISSING = "NA"
#: Columns that say the same of all cells of a slide, or name each.
_NOT_GROUPS = ("cell_id", "sample", "region")


# --- counts


def write_matrix(slide: ViewedSlide, path: Path, *, layer: str | None = None, memory_mb: int = 1500) -> int:
    """Write the counts of all cells, gene by gene; intensities where the slide has no transcripts.

    Parameters
    ----------
    slide
        A slide with cells and a table.
    path
        File to write; what does not fit in memory lies beside it meanwhile.
    layer
        Layer of the table to take instead of X.
    memory_mb
        Memory for entries of the matrix.

    Returns
    -------
    int
        The number of features.

    Raises
    ------
    CellquiltError
        ``explorer-layer``, ``explorer-counts``, ``table-unreadable``, ``explorer-table-cells``.
    """
    assert slide.cells is not None
    features, entries = _entries(slide, layer)
    rows, sizes = _sorted(entries, "feature", len(features), path, memory_mb, _Rounding(slide.store.name))
    names = [*features, TOTAL]
    attributes = {
        "major_version": 3,
        "minor_version": 0,
        "number_cells": len(slide.cells),
        "number_features": len(names),
        "feature_keys": names,
        "feature_ids": names,
        "feature_types": ["gene"] * len(features) + ["aggregate_gene"],
    }
    try:
        with ZarrZip(path, "blosc") as store:
            store.group("")
            store.group("cell_features", attributes)
            store.array("cell_features/cell_id", number_pairs(slide.numbers))
            data, indices = (Column(store, f"cell_features/{name}", "<u4") for name in ("data", "indices"))
            total = np.zeros(len(slide.cells), np.int64)
            for k in range(len(rows)):
                part = rows.take(k)
                part = part[np.lexsort((part["cell"], part["feature"]))]
                data.write(part["value"])
                indices.write(part["cell"])
                total += np.bincount(part["cell"], part["value"], len(total)).astype(np.int64)
            some = np.flatnonzero(total)
            data.write(np.minimum(total[some], 2**32 - 1))
            indices.write(some)
            data.close()
            indices.close()
            starts = np.concatenate([[0], np.cumsum(np.append(sizes, len(some)))])
            store.array("cell_features/indptr", starts.astype(np.uint32))
    finally:
        rows.close()
    return len(features)


def write_h5(slide: ViewedSlide, path: Path, *, layer: str | None = None, memory_mb: int = 1500) -> NDArray[np.int64]:
    """Write the counts of all cells, cell by cell, as the machine's ``cell_feature_matrix.h5``.

    Returns
    -------
    numpy.ndarray
        (n,) int64, each cell's sum.
    """
    import h5py

    assert slide.cells is not None
    features, entries = _entries(slide, layer)
    rows, sizes = _sorted(entries, "cell", len(slide.cells), path, memory_mb, None)
    total = np.zeros(len(slide.cells), np.int64)
    try:
        with h5py.File(path, "w") as file:
            group = file.create_group("matrix")
            data = group.create_dataset("data", (int(sizes.sum()),), np.int32)
            indices = group.create_dataset("indices", (int(sizes.sum()),), np.int64)
            start = 0
            for k in range(len(rows)):
                part = rows.take(k)
                part = part[np.lexsort((part["feature"], part["cell"]))]
                data[start : start + len(part)], indices[start : start + len(part)] = part["value"], part["feature"]
                start += len(part)
                total += np.bincount(part["cell"], part["value"], len(total)).astype(np.int64)
            group["indptr"] = np.concatenate([[0], np.cumsum(sizes)])
            group["shape"] = np.array([len(features), len(total)], np.int32)
            group["barcodes"] = np.char.encode(slide.names)
            texts = {"id": features, "name": features, "feature_type": ["Gene Expression"] * len(features)}
            texts |= {"genome": ["Unknown"] * len(features), "_all_tag_keys": ["genome"]}
            for name, values in texts.items():
                group[f"features/{name}"] = np.char.encode(np.asarray(values, dtype=str), "utf-8")
    finally:
        rows.close()
    return total


def _sorted(
    entries: "Callable[[_Rounding | None], Iterator[NDArray]]",
    by: str,
    n: int,
    path: Path,
    memory_mb: int,
    notice: "_Rounding | None",
) -> tuple[Buckets, NDArray[np.int64]]:
    """The entries in parts that fit in memory, by feature or cell, and the number of entries of each."""
    sizes = np.zeros(n, np.int64)
    for part in entries(notice):
        sizes += np.bincount(part[by], minlength=n)
    if notice is not None:
        notice.tell()
    budget = memory_mb * 1_000_000 // 4 // (_COPIES * _ENTRY.itemsize)
    rows = Buckets(path.parent, path.name, bounds_of(np.arange(n), sizes, budget), _ENTRY)
    for part in entries(None):
        rows.add(part[by], part)
    return rows, sizes


class _Rounding:
    """What rounding to whole numbers does, told once."""

    def __init__(self, name: str) -> None:
        self._name, self._rounded, self._gone, self._n = name, 0, 0, 0

    def count(self, values: NDArray, whole: NDArray) -> None:
        self._n += len(values)
        self._rounded += int((values != whole).sum())
        self._gone += int(((values != 0) & (whole == 0)).sum())

    def tell(self) -> None:
        if self._rounded:
            LOG.warning(
                "%s: %d of %d values are no whole numbers and are rounded, which the viewer wants; %d become 0",
                self._name, self._rounded, self._n, self._gone,
            )  # fmt: skip


def _entries(slide: ViewedSlide, layer: str | None):  # type: ignore[no-untyped-def]
    """Names of the features, and what gives their entries part by part, each time from the start."""
    import zarr
    from anndata.io import read_elem

    assert slide.table is not None
    try:
        group: Any = zarr.open_group(str(slide.table), mode="r")
        genes: Any = read_elem(group["var"])
        names = genes.index.astype(str).tolist()
        layers = sorted(group["layers"].keys()) if "layers" in group else []
        intensities: Any = (
            read_elem(group["obsm"]["intensities"]) if not names and "intensities" in group["obsm"] else None
        )
    except Exception as error:  # whatever zarr and anndata raise on damaged files
        raise CellquiltError(
            "table-unreadable", f"{slide.table} cannot be read: {error}", "run `aggregate` again"
        ) from error
    if layer is not None and layer not in layers:
        hint = did_you_mean(layer, layers) if layers else "it has none"
        raise CellquiltError("explorer-layer", f'{slide.table} has no layer "{layer}"', hint)
    # Row of the table → cell.
    row_of_cell = slide.row_of_cell
    cell_of_row = np.full(len(slide.obs), -1, np.int64)
    cell_of_row[row_of_cell[row_of_cell >= 0]] = np.flatnonzero(row_of_cell >= 0)

    def entries(notice: _Rounding | None) -> Iterator[NDArray]:
        if intensities is not None:
            parts = _dense(intensities.to_numpy())
        else:
            matrix = group["layers"][layer] if layer is not None else group["X"]
            parts = _sparse(matrix) if hasattr(matrix, "attrs") and "shape" in matrix.attrs else _dense(matrix)
        for row, column, value in parts:
            yield _whole(slide, cell_of_row[row], column, value, notice)

    return names if intensities is None else intensities.columns.astype(str).tolist(), entries


def _sparse(matrix: Any) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
    """Row, column and value of the entries of a CSR or CSC matrix on disk, some at a time."""
    starts = np.asarray(matrix["indptr"][:], dtype=np.int64)
    by_column = matrix.attrs.get("encoding-type") == "csc_matrix"
    for first in range(0, int(starts[-1]), _ENTRIES):
        last = min(first + _ENTRIES, int(starts[-1]))
        outer = np.searchsorted(starts, np.arange(first, last), side="right") - 1
        inner, value = np.asarray(matrix["indices"][first:last], dtype=np.int64), np.asarray(matrix["data"][first:last])
        yield (inner, outer, value) if by_column else (outer, inner, value)


def _dense(matrix: Any) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
    n, wide = matrix.shape
    step = max(_ENTRIES // max(wide, 1), 1)
    for first in range(0, n if wide else 0, step):
        block = np.asarray(matrix[first : first + step])
        row, column = np.nonzero(block)
        yield row + first, column, block[row, column]


def _whole(
    slide: ViewedSlide, cell: NDArray[np.int64], column: NDArray, value: NDArray, notice: _Rounding | None
) -> NDArray:
    """Entries as the file has them: whole numbers above 0, of cells that are shown."""
    whole = value
    if value.dtype.kind == "f":
        if not np.isfinite(value).all():
            raise CellquiltError(
                "explorer-counts", f"{slide.table} holds {value[~np.isfinite(value)][0]}; numbers were expected",
                "correct the table, or name a layer",
            )  # fmt: skip
        whole = np.rint(value)
        if notice is not None:
            notice.count(value, whole)
    if value.dtype.kind not in "iufb" or (value.dtype.kind in "if" and (value < 0).any()):
        found = value[value < 0][0] if value.dtype.kind in "if" else value.dtype
        raise CellquiltError(
            "explorer-counts", f"{slide.table} holds {found}; counts were expected",
            "is X normalised? name the layer that has counts",
        )  # fmt: skip
    kept = (cell >= 0) & (whole > 0)
    out = np.empty(int(kept.sum()), _ENTRY)
    out["feature"], out["cell"] = column[kept], cell[kept]
    out["value"] = np.minimum(whole[kept].astype(np.int64), 2**32 - 1)
    return out


# --- groups


def write_groups(slide: ViewedSlide, path: Path, *, columns: Sequence[str] = ()) -> list[str]:
    """Write the groups of cells: every categorical column of obs, texts and truth values too.

    Parameters
    ----------
    slide
        A slide with cells and a table.
    path
        File to write.
    columns
        Only these columns.

    Returns
    -------
    list of str
        The columns written.

    Raises
    ------
    CellquiltError
        ``explorer-column``, ``table-unreadable``, ``explorer-table-cells``.
    """
    return write_obs_groups(slide.obs, slide.row_of_cell, path, columns=columns)


def write_obs_groups(
    obs: "pd.DataFrame", row_of_cell: NDArray[np.int64], path: Path, *, columns: Sequence[str] = ()
) -> list[str]:
    """`write_groups` of a table that is at hand, and the row in it of each cell (-1 for none)."""
    for name in columns:
        if name not in obs:
            raise CellquiltError(
                "explorer-column", f'the table has no column "{name}" in obs',
                did_you_mean(name, obs.columns.astype(str).tolist()),
            )  # fmt: skip
    found = {name: _groups(obs[name], name in columns) for name in columns or obs.columns if name not in _NOT_GROUPS}
    shown = {str(name): groups for name, groups in found.items() if groups is not None}
    attributes: dict[str, Any] = {
        "major_version": 1,
        "minor_version": 0,
        "number_groupings": len(shown),
        "grouping_names": list(shown),
        "group_names": [],
    }
    with ZarrZip(path, "blosc") as store:
        store.group("")
        for k, (codes, names) in enumerate(shown.values()):
            code = np.where(row_of_cell >= 0, codes[np.maximum(row_of_cell, 0)], -1)
            if (code < 0).any():  # the viewer wants every cell in a group
                code, names = np.where(code < 0, len(names), code), [*names, _MISSING]
            sizes = np.bincount(code, minlength=len(names))
            attributes["group_names"].append(names)
            store.group(f"cell_groups/{k}")
            store.array(f"cell_groups/{k}/indices", np.argsort(code, kind="stable").astype(np.uint32))
            starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            store.array(f"cell_groups/{k}/indptr", starts.astype(np.uint32))
        store.group("cell_groups", attributes)
    return list(shown)


def _groups(values: "pd.Series", asked: bool) -> tuple[NDArray[np.int64], list[str]] | None:
    """(rows,) number of each row's group, -1 for none, and the groups' names; None for what is no grouping."""
    import pandas as pd

    if pd.api.types.is_bool_dtype(values.dtype):
        names = [_PASSES, _FAILS] if values.name == "passes_qc" else ["yes", "no"]
        return np.where(values.to_numpy(dtype=bool), 0, 1), names
    if not isinstance(values.dtype, pd.CategoricalDtype):
        if not asked and not (pd.api.types.is_string_dtype(values.dtype) or values.dtype == object):
            return None
        values = values.where(values.isna(), values.astype(str)).astype("category")
    if not asked and len(values) > 1 and len(values.cat.categories) == len(values):
        return None  # each cell's own name
    if len(values.cat.categories) > _MOST_GROUPS:
        if asked:
            LOG.warning("column %s has %d groups", values.name, len(values.cat.categories))
        else:
            LOG.info("column %s has %d different values and is no grouping", values.name, len(values.cat.categories))
            return None
    if values.cat.categories.empty:
        return None
    return values.cat.codes.to_numpy().astype(np.int64), [str(name) or "none" for name in values.cat.categories]
