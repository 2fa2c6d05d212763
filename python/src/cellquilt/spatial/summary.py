"""All spatial statistics of a slide, in one object and one folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError, did_you_mean_file
from cellquilt.core.shapes import write_geoparquet
from cellquilt.spatial.cooccurrence import RINGS_UM, co_occurrence_of
from cellquilt.spatial.distances import Distances, distances_of, distances_to_groups
from cellquilt.spatial.enrichment import enrichment_of
from cellquilt.spatial.measures import PERMUTATIONS, check_permutations, graph_or_new, groups_of
from cellquilt.spatial.network import network_of
from cellquilt.spatial.niches import MIN_CELLS, Niches, niches_of
from cellquilt.spatial.slides import CELL_TYPE, DOMAIN, SAMPLE
from cellquilt.spatial.tables import coordinates_of

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

#: Columns that cell types are looked for in, where none is named: the first that is there.
CELL_TYPE_KEYS = (CELL_TYPE, "cluster", "leiden")
_ABOUT, _NICHES = "about.json", "niches.parquet"
_FORMAT = "cellquilt spatial statistics"


@dataclass(frozen=True)
class SlideStatistics:
    """What `slide_statistics` found.

    Attributes
    ----------
    about
        ``sample``, ``n_cells``, ``cell_type_key`` and ``domain_key`` (None where there is no such column),
        ``parameters``, ``metadata`` (columns of `obs` that say one thing of the whole slide) and ``notes`` (what is
        missing, and why).
    tables
        Name → table, those there are of: ``enrichment``, ``distances``, ``co_occurrence``, ``niches``,
        ``niches_by_domain``, ``network``, ``composition``.
    niches
        With their outlines; None without domains.
    """

    about: dict[str, Any]
    tables: "dict[str, pd.DataFrame]"
    niches: Niches | None = field(default=None)

    @property
    def sample(self) -> str:
        """The slide's name."""
        return str(self.about["sample"])

    def write(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write ``about.json``, a CSV of each table, and the niches with their outlines in µm as GeoParquet.

        Raises
        ------
        CellquiltError
            ``output-exists``.
        """
        with atomic_path(folder, overwrite=overwrite) as aside:
            aside.mkdir()
            text = json.dumps({"format": _FORMAT, **self.about}, indent=1, sort_keys=True, ensure_ascii=False)
            (aside / _ABOUT).write_text(text + "\n", encoding="utf-8")
            for name, table in self.tables.items():
                table.to_csv(aside / f"{name}.csv", index=False)
            if self.niches is not None:
                own = self.tables["niches"]
                columns = {name: own[name].to_numpy() for name in own.columns if name != "niche"}
                index = ("niche", own["niche"].to_numpy())
                write_geoparquet(aside / _NICHES, self.niches.outlines, columns, index=index)
        return Path(folder)

    @classmethod
    def read(cls, folder: Path | str) -> "SlideStatistics":
        """Read what `write` wrote, without the outlines.

        Raises
        ------
        CellquiltError
            ``stats-unreadable``.
        """
        import pandas as pd

        folder = Path(folder)
        try:
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            if not isinstance(about, dict) or about.pop("format", "") != _FORMAT:
                raise ValueError(f"{_ABOUT} is of something else")
            # Groups keep their names, such as "1" or "nan".
            names = dict.fromkeys(("a", "b", "source", "target", "domain", "niche", "cell_type", "of"), str)
            tables = {
                path.stem: pd.read_csv(path, dtype=names, keep_default_na=False, na_values=[""])
                for path in sorted(folder.glob("*.csv"))
            }
        except (OSError, ValueError) as error:
            hint = did_you_mean_file(folder) or "write it with `cellquilt stats`"
            raise CellquiltError("stats-unreadable", f"{folder} holds no spatial statistics: {error}", hint) from error
        return cls(about, tables)


def slide_statistics(
    table: "AnnData",
    cell_type_key: str | None = None,
    domain_key: str | None = None,
    *,
    radius: float | None = 80.0,
    edges_um: Sequence[float] = RINGS_UM,
    min_cells: int = MIN_CELLS,
    n_permutations: int = PERMUTATIONS,
    seed: int = 0,
    threads: int = 1,
) -> SlideStatistics:
    """Do all spatial statistics that a slide's table allows; see the functions of each.

    Parameters
    ----------
    table
        A slide's cells with ``obsm["spatial"]`` in µm.
    cell_type_key
        Column of `obs` with the cell types. None: the first of ``cell_type``, ``cluster``, ``leiden`` that is there.
    domain_key
        Column of `obs` with the domains. None: ``domain``, if it is there.
    radius
        Longest edge in µm, where the table has no graph.
    edges_um
        Rings of distance of the co-occurrence.
    min_cells
        Cells that make a niche.
    n_permutations, seed
        Of all tests.
    threads
        Changes nothing but the time.

    Raises
    ------
    CellquiltError
        What the functions raise for mistakes of the caller; what the table lacks is in ``about["notes"]``.
    """
    check_permutations(n_permutations)
    notes: list[str] = []
    columns = [str(name) for name in table.obs.columns]
    types_in = cell_type_key or next((key for key in CELL_TYPE_KEYS if key in columns), None)
    domains_in = domain_key or (DOMAIN if DOMAIN in columns else None)
    if types_in is None:
        notes.append(f"no cell types: obs has none of {', '.join(CELL_TYPE_KEYS)}")
    if domains_in is None:
        notes.append(f'no domains: obs has no column "{DOMAIN}"')
    xy = coordinates_of(table)
    tables: dict[str, Any] = {}
    niches = None
    how: Any = {"n_permutations": n_permutations, "seed": seed, "threads": threads}
    if table.n_obs < 3:
        notes.append(f"{table.n_obs} cells: there is nothing to measure between them")
        types_in = domains_in = None
    types = None if types_in is None else groups_of(table, types_in)
    domains = None if domains_in is None else groups_of(table, domains_in)
    graph = None if types is None and domains is None else graph_or_new(table, radius)
    enriched, far = [], []
    for key, found in ((CELL_TYPE, types), (DOMAIN, domains)):
        if found is None or graph is None:
            continue
        codes, names = found
        if len(names) < 2:
            notes.append(f"no enrichment: all cells are of one {key.replace('_', ' ')}, {names[0]}")
            continue
        own = enrichment_of(graph, codes, names, **how).to_frame()
        own.insert(0, "of", key)
        enriched.append(own)
    if types is not None and graph is not None:
        codes, names = types
        far += [(CELL_TYPE, distances_of(places, codes, names, **how)) for places in (xy, graph)]
        if len(names) > 1:
            tables["co_occurrence"] = co_occurrence_of(xy, codes, names, edges_um, **how).to_frame()
    if domains is not None and graph is not None:
        codes, names = domains
        if types is not None:
            far += [(DOMAIN, distances_to_groups(places, *types, *domains, **how)) for places in (xy, graph)]
            network = network_of(graph, *types, *domains, threads=threads)
            tables["network"], tables["composition"] = network.to_frame(), network.composition()
        niches = niches_of(xy, graph, codes, names, min_cells=min_cells)
        tables["niches"], tables["niches_by_domain"] = niches.to_frame(), niches.by_domain()
    if enriched:
        import pandas as pd

        tables["enrichment"] = pd.concat(enriched, ignore_index=True)
    if far:
        tables["distances"] = _joined(far)
        notes += _unreachable(tables["distances"])
    about = {
        "sample": _sample_of(table),
        "n_cells": int(table.n_obs),
        "cell_type_key": types_in,
        "domain_key": domains_in,
        "metadata": _metadata(table, {types_in, domains_in}),
        "notes": notes,
        "parameters": {
            "radius": radius,
            "edges_um": [float(edge) for edge in edges_um],
            "min_cells": min_cells,
            "n_permutations": n_permutations,
            "seed": seed,
        },
    }
    return SlideStatistics(about, dict(sorted(tables.items())), niches)


def _joined(found: list[tuple[str, Distances]]) -> "pd.DataFrame":
    import pandas as pd

    parts = []
    for to, distances in found:
        own = distances.to_frame()
        own.insert(0, "to", to)
        parts.append(own)
    return pd.concat(parts, ignore_index=True)


def _unreachable(distances: "pd.DataFrame") -> list[str]:
    """What to say of pairs without a way between some of their cells: they are named, and left out of the means."""
    lost = distances[(distances["unit"] == "hops") & (distances["n_unreachable"] > 0)]
    # A group of one cell has no other of its own.
    lost = lost[(lost["source"] != lost["target"]) | (lost["n_source"] > 1)]
    if lost.empty:
        return []
    worst = lost.loc[(lost["n_unreachable"] / lost["n_source"]).idxmax()]
    text = f"{len(lost)} pairs of groups have cells without a way along the graph, most of all {worst['source']} to "
    text += f"{worst['target']}: {worst['n_unreachable']:,} of {worst['n_source']:,} cells; they are in no mean in hops"
    return [text]


def _sample_of(table: "AnnData") -> str:
    if SAMPLE in table.obs:
        column: Any = table.obs[SAMPLE]
        names = column.dropna().astype(str).unique()
        if len(names) == 1:
            return str(names[0])
    return "table"


def _metadata(table: "AnnData", left_out: set[str | None]) -> dict[str, str]:
    """Columns of `obs`, of text or categories, that say one thing of all cells."""
    import pandas as pd

    found = {}
    for name in table.obs.columns:
        column: Any = table.obs[name]
        if name in left_out or name == SAMPLE or pd.api.types.is_numeric_dtype(column) or not len(column):
            continue
        values = column.astype(str).unique() if not column.isna().any() else []
        if len(values) == 1:
            found[str(name)] = str(values[0])
    return found
