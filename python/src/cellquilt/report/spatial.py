"""The part of a slide's page on spatial statistics, and the cohort's page on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import NDArray

from cellquilt import __version__
from cellquilt.core.atomic import atomic_path
from cellquilt.core.shapes import read_geoparquet
from cellquilt.domains.maps import domain_colours
from cellquilt.report import pictures, plots
from cellquilt.report.html import embedded, environment
from cellquilt.report.plots import number
from cellquilt.spatial.cohort import QUANTITIES, CohortStatistics
from cellquilt.spatial.slides import natural_order
from cellquilt.spatial.summary import SlideStatistics

if TYPE_CHECKING:
    import pandas as pd

#: Groups that a chart shows: those of most cells.
_MOST_GROUPS = 16
_MOST_CURVES = 8
_MOST_ROWS = 40
_MOST_CHARTS = 6
_MAP_WIDTH = 1000


def spatial_context(folder: Path) -> dict[str, Any]:
    """What the page shows of a slide's spatial statistics.

    Parameters
    ----------
    folder
        What `cellquilt stats` wrote.

    Raises
    ------
    CellquiltError
        ``stats-unreadable``.
    """
    found = SlideStatistics.read(folder)
    tables = found.tables
    notes = [f"{note[0].upper()}{note[1:]}." for note in found.about["notes"]]
    charts: list[tuple[str, str]] = []
    for of, what in (("cell_type", "cell types"), ("domain", "domains")):
        if "enrichment" in tables:
            charts.append((_enrichment(tables["enrichment"], of, what), _ENRICHMENT))
    if "distances" in tables:
        for unit, name in (("um", "µm"), ("hops", "steps")):
            charts.append((_distances(tables["distances"], "cell_type", unit, name), _DISTANCES))
        charts.append((_distances(tables["distances"], "domain", "um", "µm"), _TO_DOMAINS))
    curves, legend = _co_occurrence(tables["co_occurrence"]) if "co_occurrence" in tables else ("", [])
    return {
        "notes": notes,
        "n_permutations": found.about["parameters"]["n_permutations"],
        "charts": [{"svg": svg, "caption": caption} for svg, caption in charts if svg],
        "curves": curves,
        "legend": legend,
        "network": _network(tables) if "network" in tables else "",
        "niches": _niches(folder, tables) if "niches_by_domain" in tables else None,
    }


_ENRICHMENT = (
    "Edges between two groups, in standard deviations from what groups dealt to the cells at random would have: above "
    "0 they are neighbours more often than by chance."
)
_DISTANCES = (
    "Mean distance from the row's cells to the nearest of the column, over that by chance, as logarithm to base 2: "
    "below 0 is nearer. A rare group is far by chance alone, which is taken into account."
)
_TO_DOMAINS = (
    "The same from cell types to domains; chance deals the types to the cells and leaves the domains in place."
)


def _largest(names: "pd.Series", sizes: "pd.Series") -> list[str]:
    """The groups of most cells, in natural order."""
    size = dict(zip(names, sizes, strict=True))
    kept = sorted(size, key=lambda name: (-size[name], name))[:_MOST_GROUPS]
    return [kept[k] for k in natural_order(kept)]


def _grid(table: "pd.DataFrame", a: str, b: str, rows: Sequence[str], columns: Sequence[str], value: str) -> NDArray:
    known = {(x, y): v for x, y, v in zip(table[a], table[b], table[value], strict=True)}
    return np.array([[known.get((x, y), np.nan) for y in columns] for x in rows], dtype=np.float64)


def _enrichment(table: "pd.DataFrame", of: str, what: str) -> str:
    own = table[table["of"] == of]
    if own.empty:
        return ""
    names = _largest(own["a"], own["n_a"])
    z = _grid(own, "a", "b", names, names, "z")
    z = np.where(np.isnan(z), z.T, z)
    return plots.signed_matrix(names, names, z, f"Neighbours among {what}: z")


def _distances(table: "pd.DataFrame", to: str, unit: str, name: str) -> str:
    own = table[(table["to"] == to) & (table["unit"] == unit)]
    if own.empty:
        return ""
    rows = _largest(own["source"], own["n_source"])
    columns = _largest(own["target"], own["n_target"])
    ratio = _grid(own, "source", "target", rows, columns, "ratio")
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log2(ratio)
    where = "domains" if to == "domain" else "cell types"
    return plots.signed_matrix(
        rows, columns, logs, f"Distance to {where} in {name}: log2 of observed over chance", digits=2
    )


def _co_occurrence(table: "pd.DataFrame") -> tuple[str, list[dict[str, str]]]:
    """Curves of the pairs of different groups that stand out most in the first rings, and what they are."""
    own = table[table["a"] != table["b"]]
    if own.empty:
        return "", []
    near = own[own["from_um"] <= own["from_um"].min() + 30]
    most = near.assign(far=near["z"].abs()).groupby(["a", "b"], sort=False)["far"].max()
    pairs = most.sort_values(ascending=False, kind="stable").index[:_MOST_CURVES]
    lines = {}
    for a, b in pairs:
        rows = own[(own["a"] == a) & (own["b"] == b)]
        lines[f"{a} – {b}"] = rows["ratio"].tolist()
    middle = own[(own["a"] == pairs[0][0]) & (own["b"] == pairs[0][1])]
    x = ((middle["from_um"] + middle["to_um"]) / 2).tolist()
    colours = list(domain_colours(list(lines)).values())
    legend = [{"name": name, "colour": colour} for name, colour in zip(lines, colours, strict=True)]
    return plots.curves(x, lines, colours, "distance (µm)", "co-occurrence, likelihood over chance"), legend


def _network(tables: "dict[str, pd.DataFrame]") -> str:
    table = tables["network"]
    kinds = dict(zip(table["a"], table["kind_a"], strict=True)) | dict(zip(table["b"], table["kind_b"], strict=True))
    composition = tables["composition"]
    size = composition.groupby("cell_type")["n_cells"].sum().to_dict()
    size |= composition.groupby("niche")["n_cells"].sum().to_dict()
    names = [name for kind in ("cell_type", "niche") for name in _largest(*_of_kind(kinds, size, kind))]
    weights = _grid(table, "a", "b", names, names, "weight")
    weights = np.nan_to_num(np.where(np.isnan(weights), weights.T, weights))
    groups = [0 if kinds[name] == "cell_type" else 1 for name in names]
    sizes = [float(size.get(name, 0)) for name in names]
    return plots.network(names, groups, sizes, weights, "Cell types and domains: nearness")


def _of_kind(kinds: dict[str, str], size: dict[str, int], kind: str) -> "tuple[pd.Series, pd.Series]":
    import pandas as pd

    own = [name for name, known in kinds.items() if known == kind]
    return pd.Series(own, dtype=object), pd.Series([size.get(name, 0) for name in own])


def _niches(folder: Path, tables: "dict[str, pd.DataFrame]") -> dict[str, Any]:
    table = tables["niches_by_domain"]
    colours = domain_colours(list(table["domain"]))
    rows = [{**row, "colour": colours[row["domain"]]} for row in table.to_dict("records")]
    return {"rows": rows, "map": _map(folder / "niches.parquet", colours)}


def _map(path: Path, colours: dict[str, str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    outlines, table, _ = read_geoparquet(path)
    if not len(outlines):
        return None
    left, top, right, bottom = shapely.total_bounds(outlines)
    scale = _MAP_WIDTH / max(right - left, 1e-9)
    paths = []
    simple = shapely.simplify(outlines, 0.8 / scale)
    for outline, domain in zip(simple, table.column("domain").to_pylist(), strict=True):
        paths.append({"d": _path(outline, left, top, scale), "colour": colours[str(domain)], "name": str(domain)})
    height = (bottom - top) * scale
    room = 0.06 * max(_MAP_WIDTH, height)
    return {
        "paths": paths,
        "width": _MAP_WIDTH,
        "height": height + room,
        "scale": pictures.scale_bar(_MAP_WIDTH, height + room, 1 / scale),
    }


def _path(outline: shapely.Geometry, left: float, top: float, scale: float) -> str:
    parts = []
    for polygon in shapely.get_parts(outline):
        for ring in shapely.get_rings(polygon):
            xy = (shapely.get_coordinates(ring) - (left, top)) * scale
            parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in xy[:-1]) + "Z")
    return "".join(parts)


def write_cohort_page(
    found: CohortStatistics, samples: Sequence[str], output: Path, *, overwrite: bool = False
) -> Path:
    """Write the cohort's page on spatial statistics.

    Parameters
    ----------
    found
        What `cellquilt.spatial.cohort_statistics` returned.
    samples
        Names of all slides.
    output
        The page to write.
    overwrite
        Replace what stands there.
    """
    compared = found.compared
    shown: list[dict[str, Any]] = []
    charts = []
    if compared is not None:
        shown = compared.head(_MOST_ROWS).to_dict("records")
        for row in shown[:_MOST_CHARTS]:
            own = found.values[
                (found.values["quantity"] == row["quantity"])
                & (found.values["a"] == row["a"])
                & (found.values["b"] == row["b"])
            ]
            groups = {
                name: own.loc[own["condition"] == name, "value"].tolist()
                for name in sorted(own["condition"].astype(str).unique())
            }
            pair = " – ".join(name for name in (row["a"], row["b"]) if name)
            charts.append(plots.dots_by_group(groups, f"{row['quantity']}: {pair} (log2)"))
    means = (
        found.values.groupby(["quantity", "a", "b"], sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    )
    enriched = means[means["quantity"] == "enrichment"]
    names = [str(name) for name in dict.fromkeys([*enriched["a"], *enriched["b"]])]
    names = [names[k] for k in natural_order(names)][:_MOST_GROUPS]
    grid = _grid(enriched, "a", "b", names, names, "mean") if names else np.zeros((0, 0))
    context = {
        "version": __version__,
        "n_slides": len(samples),
        "notes": found.notes[:_MOST_ROWS],
        "n_notes": len(found.notes),
        "quantities": QUANTITIES,
        "design": _design(compared),
        "rows": shown,
        "n_rows": 0 if compared is None else len(compared),
        "charts": charts,
        "enrichment": plots.signed_matrix(
            names,
            names,
            np.where(np.isnan(grid), grid.T, grid),
            "Neighbours: log2 of observed over chance, mean of samples",
        ),
        "data": embedded({"means": means.to_dict("records"), "compared": shown}),
    }
    text = environment().get_template("spatial_cohort.html.j2").render(context)
    with atomic_path(output, overwrite=overwrite) as aside:
        aside.write_text(text, encoding="utf-8")
    return Path(output)


def _design(compared: "pd.DataFrame | None") -> list[str]:
    """What to keep in mind of each pair of conditions."""
    if compared is None or compared.empty:
        return []
    out = []
    for (a, b), rows in compared.groupby(["condition_a", "condition_b"], sort=False):
        first = rows.iloc[0]
        text = f"{a} against {b}: {first['n_a']} and {first['n_b']} samples"
        if first["note"]:
            text += f"; {first['note']}: effect sizes, and no p-values"
        else:
            text += (
                f", compared with {number(int(first['n_permutations']))} ways to label them; no p-value can be below "
            )
            text += f"{first['smallest_p']:.2g}"
        out.append(f"{text}.")
    return out
