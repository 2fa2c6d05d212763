"""What is found of a slide's cells, on the way from its task to the published table: Parquet, a row a cell."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.parquet import arrow_array, write_parquet
from cellquilt.core.privacy import scrub
from cellquilt.core.record import Record
from cellquilt.core.store import Store, consolidate

if TYPE_CHECKING:
    import pandas as pd

_ABOUT = b"cellquilt"
_CELL = "cell_id"


@dataclass(frozen=True)
class CellColumns:
    """Columns for a table of cells.

    Attributes
    ----------
    sample
        The slide's name.
    stage
        What found them: ``cluster`` or ``annotate``.
    columns
        A row a cell, by the cells' names: categories and numbers.
    tables
        Name in `uns` → a table of its own.
    parameters, facts, versions
        For the record; plain data.
    """

    sample: str
    stage: str
    columns: "pd.DataFrame"
    tables: "Mapping[str, pd.DataFrame]" = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def write(self, output: Path, *, overwrite: bool = False) -> Path:
        """Write the file; the same cells, the same bytes."""
        arrays = {_CELL: pa.array(self.columns.index.astype(str).tolist(), pa.string())}
        categories: dict[str, list[str]] = {}
        for name, values in self.columns.items():
            if hasattr(values, "cat"):
                categories[str(name)] = list(map(str, values.cat.categories))
                codes = values.cat.codes.to_numpy().astype(np.int32)
                arrays[str(name)] = pa.array(codes, pa.int32())
            else:
                arrays[str(name)] = arrow_array(values.to_numpy())
        about = {
            "sample": self.sample, "stage": self.stage, "categories": categories,
            "tables": {name: _plain(table) for name, table in self.tables.items()},
            "parameters": scrub(dict(self.parameters)), "facts": scrub(dict(self.facts)), "versions": self.versions,
        }  # fmt: skip
        text = json.dumps(about, sort_keys=True).encode()
        with atomic_path(output, overwrite=overwrite) as aside:
            write_parquet(aside, pa.table(arrays).replace_schema_metadata({_ABOUT: text}))
        return output


def _plain(table: "pd.DataFrame") -> dict[str, Any]:
    return {"columns": list(map(str, table.columns)), "values": [table[name].tolist() for name in table.columns]}


def read_columns(path: Path) -> CellColumns:
    """Read what `CellColumns.write` wrote.

    Raises
    ------
    CellquiltError
        ``cell-columns-invalid``.
    """
    import pandas as pd

    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[_ABOUT])
        index = pd.Index(np.asarray(table.column(_CELL).to_pylist(), dtype=object))
        columns: dict[str, Any] = {
            name: table.column(name).to_numpy() for name in table.column_names if name != _CELL
        }  # fmt: skip
        for name, known in about["categories"].items():
            columns[name] = pd.Categorical.from_codes(columns[name], known)
        tables = {
            name: pd.DataFrame(dict(zip(made["columns"], made["values"], strict=True)))
            for name, made in about["tables"].items()
        }
        return CellColumns(
            about["sample"], about["stage"], pd.DataFrame(columns, index=index), tables, about["parameters"],
            about["facts"], about["versions"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CellquiltError(
            "cell-columns-invalid",
            f"{Path(path).name} has no columns of cells: {type(error).__name__}: {error}",
            "make it with cellquilt cluster or cellquilt annotate",
        ) from None


def add_columns(store: Store, delta: Store, found: Sequence[CellColumns]) -> None:
    """Add columns to a slide's ``table``: the table of a store that is being made.

    Parameters
    ----------
    store
        Where the table is.
    delta
        Where the table with the columns shall be.
    found
        What to add; of two columns of one name the later one counts.

    Raises
    ------
    CellquiltError
        ``cells-mismatch`` if they are of other cells.
    """
    import zarr
    from anndata.io import read_elem, write_elem

    element = delta.new_element("tables", "table")
    shutil.copytree(store.element("tables", "table"), element)
    group: Any = zarr.open_group(element, mode="r+", use_consolidated=False)
    obs: Any = read_elem(group["obs"])
    for own in found:
        if not np.array_equal(obs.index.to_numpy().astype(str), own.columns.index.to_numpy().astype(str)):
            raise CellquiltError(
                "cells-mismatch",
                f"{own.sample}: what {own.stage} found is of {len(own.columns)} cells, the table has other {len(obs)}",
                f"run cellquilt {own.stage} on this table again",
            )
        for name in own.columns:
            obs[name] = own.columns[name].array
        if own.tables and "uns" not in group:
            write_elem(group, "uns", {})
        for name, table in own.tables.items():
            write_elem(group["uns"], name, table)
        record = Record(own.stage, store.name, dict(own.parameters))
        record.facts |= own.facts
        delta.add_record({**record.finish(), "versions": dict(own.versions)})
    write_elem(group, "obs", obs)
    consolidate(element)
