"""Patch after patch of a transcript bundle: what every transcript method does around its own work on one patch."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG, progress
from cellquilt.patches.transcripts import TranscriptBundle
from cellquilt.segment.molecules import BORDER_COLUMNS, CELL_COLUMNS, EXPECTED_SCHEMA, MoleculeResult


@dataclass(frozen=True)
class PatchCells:
    """What a method made of one patch.

    Attributes
    ----------
    geometry
        (n,) polygons in µm.
    columns
        Column → (n,) array: ``label``, ``prior_cell``, ``n_transcripts``, and what else the method tells, as floats.
    transcripts
        Tables with a row for every transcript of the patch; see `molecules.TRANSCRIPT_SCHEMA`.
    expected
        Expected counts; see `molecules.EXPECTED_SCHEMA`. None if the method has none.
    facts
        Plain data for the patch's record.
    """

    geometry: np.ndarray
    columns: dict[str, np.ndarray]
    transcripts: Iterable[pa.Table]
    expected: pa.Table | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def segment_patches(
    bundle: TranscriptBundle, method: str, segment: Callable[[dict[str, Any]], PatchCells], *, keep_going: bool
) -> MoleculeResult:
    """Segment the patches of a bundle.

    Parameters
    ----------
    bundle
        The bundle.
    method
        The method's name.
    segment
        Patch's record → its cells. A `CellquiltError` is the patch's; anything else ends the task.
    keep_going
        Note a patch's error and go on, instead of failing.

    Returns
    -------
    MoleculeResult
        Without a record.

    Raises
    ------
    CellquiltError
        ``patch-failed`` with the patch's position.
    """
    patches: list[dict[str, Any]] = []
    found: list[tuple[int, PatchCells]] = []
    for record in progress(bundle.patches, method, len(bundle)):
        started = time.perf_counter()
        entry = {**record, "n_cells": 0, "error": None}
        patches.append(entry)
        try:
            cells = segment(record)
        except CellquiltError as error:
            entry["error"] = error.as_dict()
            failed = patch_failed(bundle, record, error)
            if not keep_going:
                raise failed from error
            LOG.warning("%s", failed)
        else:
            entry |= {"n_cells": len(cells.geometry), **cells.facts}
            found.append((int(record["index"]), cells))
        finally:
            entry["seconds"] = round(time.perf_counter() - started, 3)
    return _joined(method, patches, found)


def patch_failed(bundle: TranscriptBundle, record: Mapping[str, Any], error: CellquiltError) -> CellquiltError:
    """A patch's error as that of a slide: which sample, which patch, where."""
    x0, y0, x1, y1 = (record[side] for side in ("x0", "y0", "x1", "y1"))
    hint = f"{error.hint}; " if error.hint else ""
    return CellquiltError(
        "patch-failed",
        f"sample {bundle.sample}, patch {record['index']} (x {x0:g}-{x1:g} µm, y {y0:g}-{y1:g} µm): {error.message}",
        f"{hint}--on_patch_error skip goes on without the patch and says so",
    )


@dataclass(frozen=True)
class _Chained:
    """Tables of several patches, again and again."""

    parts: list[Iterable[pa.Table]]

    def __iter__(self) -> Iterator[pa.Table]:
        return chain.from_iterable(self.parts)


def _joined(method: str, patches: list[dict[str, Any]], found: list[tuple[int, PatchCells]]) -> MoleculeResult:
    parts = [{**cells.columns, "patch": np.full(len(cells.geometry), index)} for index, cells in found]
    names = {name: np.empty(0, kind) for name, kind in CELL_COLUMNS.items()}
    others = dict.fromkeys(name for part in parts for name in part if name not in CELL_COLUMNS)
    names |= {name: np.empty(0, BORDER_COLUMNS.get(name, np.float32)) for name in others}
    columns = {
        name: np.concatenate([first, *(_column(part, name) for part in parts)]).astype(first.dtype)
        for name, first in names.items()
    }
    geometry = np.concatenate([np.empty(0, object), *(cells.geometry for _, cells in found)])
    expected = [cells.expected.cast(EXPECTED_SCHEMA) for _, cells in found if cells.expected is not None]
    return MoleculeResult(
        method,
        patches,
        geometry,
        columns,
        _Chained([cells.transcripts for _, cells in found]),
        pa.concat_tables(expected).unify_dictionaries() if expected else None,
    )


def _column(part: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A column of a patch; a measure that it lacks is NaN."""
    return part[name] if name in part else np.full(len(part["label"]), np.nan, np.float32)
