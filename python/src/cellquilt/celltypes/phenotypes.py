"""Cell types by markers that a biologist names: which cells have them, which must not."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.celltypes.measured import marker_levels, measured
from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.spatial.slides import CELL_TYPE

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

#: Column of a table that says how well its cells' types fit.
SCORE = "cell_type_score"
#: Type of cells that fit none, or several alike.
UNKNOWN = "unknown"
_SEPARATOR = ";"
_HINT = "give JSON, or CSV with the columns cell_type, positive and negative, markers separated by ;"


@dataclass(frozen=True)
class Signature:
    """Markers that cells of a type have, and such that they do not have."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


def read_signatures(path: Path | str) -> dict[str, Signature]:
    """Read the markers of cell types.

    Parameters
    ----------
    path
        CSV with the columns ``cell_type``, ``positive`` and, if you like, ``negative``, markers separated by ``;``; or
        JSON: type → list of markers, or ``{"positive": […], "negative": […]}``.

    Raises
    ------
    CellquiltError
        ``annotate-markers``.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CellquiltError("annotate-markers", f"{path.name} cannot be read: {error}", _HINT) from None
    try:
        given = _from_json(text) if path.suffix.lower() == ".json" else _from_csv(text)
        return as_signatures(given)
    except CellquiltError as error:
        raise CellquiltError(error.code, f"{path.name}: {error.message}", error.hint) from None


def _from_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise CellquiltError("annotate-markers", f'"{name}" is there twice', "name each cell type once")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        raise CellquiltError("annotate-markers", f"no JSON: {error}", _HINT) from None


def _from_csv(text: str) -> dict[str, dict[str, list[str]]]:
    lines = [line for line in text.splitlines() if line.strip()]
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    rows = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    absent = [name for name in ("cell_type", "positive") if name not in (rows.fieldnames or [])]
    if absent:
        raise CellquiltError("annotate-markers", f"there is no column {absent[0]}", _HINT)
    found: dict[str, dict[str, list[str]]] = {}
    for number, row in enumerate(rows, 2):
        name = (row["cell_type"] or "").strip()
        if not name or None in row:
            raise CellquiltError(
                "annotate-markers", f"row {number} {'has too many fields' if name else 'names no cell type'}", _HINT
            )
        if name in found:
            raise CellquiltError("annotate-markers", f'"{name}" is there twice', "name each cell type once")
        found[name] = {
            column: [marker.strip() for marker in (row.get(column) or "").split(_SEPARATOR) if marker.strip()]
            for column in ("positive", "negative")
        }
    return found


def as_signatures(given: Any) -> dict[str, Signature]:
    """Cell type → its markers, from plain data; see `read_signatures`.

    Raises
    ------
    CellquiltError
        ``annotate-markers``.
    """
    if not isinstance(given, Mapping) or not given:
        raise CellquiltError("annotate-markers", "there are no cell types", _HINT)
    return {str(name): _signature(str(name), value) for name, value in given.items()}


def _signature(name: str, value: Any) -> Signature:
    if isinstance(value, Signature):
        return value
    lists = value if isinstance(value, Mapping) else {"positive": value}
    wrong = sorted(set(map(str, lists)) - {"positive", "negative"})
    if wrong:
        hint = did_you_mean(wrong[0], ("positive", "negative"))
        raise CellquiltError("annotate-markers", f'cell type "{name}": unknown key "{wrong[0]}"', hint)
    parts = [lists.get(key, []) for key in ("positive", "negative")]
    if not all(isinstance(part, list | tuple) and all(isinstance(one, str) for one in part) for part in parts):
        raise CellquiltError("annotate-markers", f'cell type "{name}": markers are no list of names', _HINT)
    if name == UNKNOWN:
        raise CellquiltError("annotate-markers", f'"{UNKNOWN}" is what cells of no type are called', "rename the type")
    positive, negative = (tuple(dict.fromkeys(part)) for part in parts)
    if not positive:
        raise CellquiltError("annotate-markers", f'cell type "{name}" has no positive marker', "name one or more")
    both = [marker for marker in positive if marker in negative]
    if both:
        raise CellquiltError(
            "annotate-markers", f'cell type "{name}": marker "{both[0]}" is positive and negative', "choose one"
        )
    return Signature(positive, negative)


def phenotype(
    table: "AnnData",
    signatures: Mapping[str, Any],
    *,
    min_score: float = 0.5,
    min_margin: float = 0.1,
    kind: str | None = None,
    name: str = "table",
) -> "pd.DataFrame":
    """Name the types of cells by their markers.

    A cell's score for a type is the mean level of the type's positive markers, times 1 less the highest level of its
    negative ones. Levels go from 0 to 1 on the slide's own scale.

    Parameters
    ----------
    table
        The cells of one slide; see `measured`.
    signatures
        Cell type → its markers; see `read_signatures`.
    min_score
        Cells whose best score is less are ``unknown``.
    min_margin
        So are those whose second best type is as near as this.
    kind
        What X holds; None: by its values.
    name
        Of the slide, for messages.

    Returns
    -------
    pandas.DataFrame
        A row a cell: ``cell_type`` (categorical; none for cells that fail QC) and ``cell_type_score`` (float32, of the
        best type, from 0 to 1; NaN for those).

    Raises
    ------
    CellquiltError
        ``annotate-markers``, ``annotate-marker-unknown``, and what `measured` refuses.
    """
    types = as_signatures(signatures)
    cells = measured(table, kind, name=name)
    markers = list(dict.fromkeys(marker for own in types.values() for marker in own.positive + own.negative))
    levels = marker_levels(cells, _columns(markers, list(cells.raw.var_names), name))
    place = {marker: number for number, marker in enumerate(markers)}
    scores = np.empty((len(levels), len(types)), dtype=np.float32)
    for number, own in enumerate(types.values()):
        has = levels[:, [place[marker] for marker in own.positive]].mean(axis=1)
        must_not = levels[:, [place[marker] for marker in own.negative]].max(axis=1, initial=0)
        scores[:, number] = has * (1 - must_not)
    order = np.sort(scores, axis=1)
    best = order[:, -1]
    second = order[:, -2] if len(types) > 1 else np.zeros_like(best)
    found = np.where((best < min_score) | (best - second < min_margin), len(types), scores.argmax(axis=1))
    return labelled(cells.cells, cells.passes, found, list(types), SCORE, best)


def labelled(
    names: NDArray[Any], passes: NDArray[np.bool_], found: NDArray[np.integer], types: Sequence[str],
    measure: str, values: NDArray[np.floating],
) -> "pd.DataFrame":  # fmt: skip
    """A row a cell of the table: of those that pass QC the type, by number (unknown is the last), and a measure."""
    import pandas as pd

    codes = np.full(len(names), -1, dtype=np.int64)
    codes[passes] = found
    measured_in = np.full(len(names), np.nan, dtype=np.float32)
    measured_in[passes] = values
    kind = pd.Categorical.from_codes(codes, [*types, UNKNOWN])
    return pd.DataFrame({CELL_TYPE: kind, measure: measured_in}, index=pd.Index(names))


def _columns(markers: Sequence[str], known: Sequence[str], name: str) -> NDArray[np.int64]:
    place = {marker: number for number, marker in enumerate(known)}
    unknown = [marker for marker in markers if marker not in place]
    if unknown:
        listed = ", ".join(f'"{marker}"' for marker in unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise CellquiltError(
            "annotate-marker-unknown",
            f"{name} has no marker {listed}",
            f"{unknown[0]}: {did_you_mean(unknown[0], known)}",
        )
    return np.array([place[marker] for marker in markers], dtype=np.int64)
