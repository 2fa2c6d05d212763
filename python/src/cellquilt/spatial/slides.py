"""The slides of a cohort, one after the other, with their domains."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.spatial.tables import slides_of

if TYPE_CHECKING:
    from anndata import AnnData

#: Column of `obs` that cellquilt's own tables name their slide in.
SAMPLE = "sample"
#: Columns of `obs` that cell types, and domains, are in.
CELL_TYPE, DOMAIN = "cell_type", "domain"


@dataclass(frozen=True)
class Slide:
    """The cells of a slide (or of a sample of several slides) in one table.

    Attributes
    ----------
    name
        The slide's.
    table
        Where its cells are.
    rows
        (n,) int64 its cells' rows.
    codes
        (n,) int64 number of each cell's domain in `domains`, -1 for none.
    domains
        Names.
    """

    name: str
    table: "AnnData"
    rows: NDArray[np.int64]
    codes: NDArray[np.int64]
    domains: list[str]

    @property
    def numbers(self) -> NDArray[np.int64]:
        """(n_domains,) cells of each domain."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.domains))


def slides(
    adatas: "AnnData | Sequence[AnnData]", domain_key: str, slide_key: str | None, *, parts: bool = False
) -> Iterator[Slide]:
    """All slides, table by table.

    Parameters
    ----------
    adatas
        One or several tables; of a sequence that reads them from disk only one is held.
    domain_key
        Column of `obs` with the domains; cells may be without one.
    slide_key
        Column of `obs` that names the slides; None: each table is one, named by its column ``sample`` if that names
        one, else by its place.
    parts
        Whether one name may be in several tables.

    Raises
    ------
    CellquiltError
        ``tables-missing``, ``domains-missing``, ``domains-empty``, ``slide-key-unknown``, ``slide-unnamed``,
        ``slide-twice``.
    """
    seen: set[str] = set()
    n_with_domain = 0
    for place, table in enumerate(_each(adatas), 1):
        codes, names = codes_of(table, domain_key, "domains-missing")
        if slide_key is not None and slide_key in table.obs and table.obs[slide_key].isna().any():
            row = int(np.flatnonzero(table.obs[slide_key].isna())[0])
            raise CellquiltError(
                "slide-unnamed",
                f'cell {table.obs_names[row]}: obs["{slide_key}"] is empty',
                "name the slide of every cell",
            )
        for part in slides_of(table, slide_key):
            name = part.name if slide_key is not None else _name(table, place)
            if name in seen and not parts:
                raise CellquiltError(
                    "slide-twice", f'two tables are of a slide "{name}"', "give each slide its own name, or one table"
                )
            seen.add(name)
            own = codes[part.rows]
            n_with_domain += int((own >= 0).sum())
            yield Slide(name, table, part.rows, own, names)
    if not seen:
        raise CellquiltError("tables-missing", "there are no tables", "give one table or more")
    if not n_with_domain:
        raise CellquiltError(
            "domains-empty", f'no cell has a domain in obs["{domain_key}"]', "assign domains to the tables first"
        )


def _each(adatas: "AnnData | Sequence[AnnData]") -> "Iterator[AnnData]":
    if hasattr(adatas, "obs"):
        yield adatas  # type: ignore[misc]
    else:
        yield from adatas  # type: ignore[misc]


def _name(table: "AnnData", place: int) -> str:
    if SAMPLE in table.obs:
        column: Any = table.obs[SAMPLE]
        names = column.dropna().unique()
        if len(names) == 1:
            return str(names[0])
    return f"slide_{place}"


def codes_of(table: "AnnData", key: str, code: str) -> tuple[NDArray[np.int64], list[str]]:
    """Number of each cell's group, -1 for none, and the names of those that occur, in natural order.

    Raises
    ------
    CellquiltError
        With the code given if `obs` has no such column.
    """
    require_column(table, key, code)
    column = table.obs[key].astype("category").cat.remove_unused_categories()
    names = [str(name) for name in column.cat.categories]
    order = natural_order(names)
    place = np.full(len(names) + 1, -1)
    place[order] = np.arange(len(names))
    return place[np.asarray(column.cat.codes, dtype=np.int64)], [names[k] for k in order]


def require_column(table: "AnnData", key: str, code: str) -> None:
    """Refuse a table without a column of `obs`."""
    if key not in table.obs:
        raise CellquiltError(code, f'obs has no column "{key}"', did_you_mean(key, list(map(str, table.obs.columns))))


def natural_order(names: Sequence[str]) -> list[int]:
    """Order in which D2 comes before D10."""
    return sorted(range(len(names)), key=lambda k: _natural(names[k]))


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    parts = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
    return parts, name


def all_domains(lists: Sequence[Sequence[str]]) -> tuple[list[str], list[NDArray[np.int64]]]:
    """The domains of all slides in natural order, and the place of each slide's own among them."""
    names = list(dict.fromkeys(name for own in lists for name in own))
    names = [names[k] for k in natural_order(names)]
    place = {name: k for k, name in enumerate(names)}
    return names, [np.array([place[name] for name in own], dtype=np.int64) for own in lists]


def one_value(slide: Slide, key: str) -> str:
    """What a column of `obs` says of a slide.

    Raises
    ------
    CellquiltError
        ``condition-missing`` without the column or a value, ``condition-mixed`` if the slide has several.
    """
    require_column(slide.table, key, "condition-missing")
    column = slide.table.obs[key].iloc[slide.rows]
    values = sorted(map(str, column.dropna().unique()))
    if not values or column.isna().any():
        empty = int(column.isna().sum())
        raise CellquiltError(
            "condition-missing",
            f'{slide.name}: obs["{key}"] is empty for {empty} of {len(column)} cells',
            f"give every slide a value of {key}, or leave the slide out",
        )
    if len(values) > 1:
        raise CellquiltError(
            "condition-mixed",
            f'{slide.name}: obs["{key}"] is {" and ".join(values[:3])}',
            "one value a slide was expected: is the slide's column right?",
        )
    return values[0]
