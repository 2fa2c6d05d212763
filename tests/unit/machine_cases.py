"""What the tests of machines' readers share: conversion, given cells through to the table, and planted text."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cellquilt.aggregation.stage import aggregate_slide
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.core.points import iter_points
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import read_shapes
from cellquilt.core.store import Store
from cellquilt.readers import convert_slide
from cellquilt.resolve.stage import resolve_slide


def convert(path: Path, technology: str, output: Path, cells: Path | None = None, **given: Any) -> Store:
    convert_slide(
        path, technology=technology, sample="s", output=output, prior_cells=cells, settings=Settings(given),
        overwrite=True,
    )  # fmt: skip
    return Store(output)


def fails(path: Path, technology: str, output: Path, **given: Any) -> CellquiltError:
    with pytest.raises(CellquiltError) as caught:
        convert(path, technology, output, **given)
    assert not output.exists()
    assert caught.value.hint
    return caught.value


def pixels(store: Store) -> np.ndarray:
    image = open_image(store.path)
    return image.read(0, image.shape[1], 0, image.shape[2])


def channels(store: Store) -> list[str]:
    return open_image(store.path).channels


def facts(store: Store) -> dict[str, Any]:
    return store.records[-1]["facts"]


def points(store: Store) -> pd.DataFrame:
    batches = iter_points(store.element("points", "transcripts"))
    return pa.concat_tables(batches).unify_dictionaries().to_pandas()


def table_of_given_cells(
    path: Path, technology: str, truth: Path, folder: Path, **given: Any
) -> tuple[anndata.AnnData, Store]:
    """The slide's table for its true cells, given as prior cells: rows are named by the cells' true numbers."""
    given = {"prior_cells_unit": "px", "chunk_px": 256, **given}
    store = convert(path, technology, folder / "raw.zarr", cells=truth / "cells.parquet", **given)
    chosen = Settings({"segmentation": "vendor", **given})
    cells = resolve_slide(store.path, settings=chosen, output=folder / "cells.zarr")
    table = aggregate_slide(store.path, cells=cells, settings=chosen, output=folder / "table.zarr")
    found = anndata.read_zarr(Store(table).element("tables", "table"))
    found.obs_names = read_shapes(Store(cells).element("shapes", "cell_boundaries")).columns["vendor_id"].astype(str)
    return found, store


def assert_true_intensities(found: anndata.AnnData, truth: Path) -> None:
    """Every cell is there, and its channels' means are the true ones."""
    expected = pq.read_table(truth / "intensities.parquet").to_pandas()
    expected = expected.set_index(expected.pop("cell_id").astype(str)).drop(columns="n_pixels")
    means = found.obsm["intensities"]
    assert sorted(found.obs_names) == sorted(expected.index)
    assert len(expected) > 50
    assert list(means.columns) == list(expected.columns)
    means = pd.DataFrame(means.to_numpy(), index=found.obs_names, columns=means.columns)
    np.testing.assert_allclose(means.loc[expected.index].to_numpy(), expected.to_numpy(), rtol=1e-5)
    assert expected.to_numpy().std(axis=0).min() > 0


def assert_nowhere(store: Path, texts: list[str]) -> None:
    """None of the texts is in any file of a store, compressed pixels included as they are."""
    for path in sorted(store.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            for text in texts:
                assert text.encode() not in content, f"{text} in {path}"
