"""The part of a page that compares methods, and a page of its own for it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cellquilt import __version__
from cellquilt.comparison.methods import MATRICES, MEASURES, ComparisonTable, Measure, write_comparison
from cellquilt.comparison.stores import Source, compare_stores, default_names, methods_in
from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.settings import Settings
from cellquilt.report import plots
from cellquilt.report.html import embedded, environment
from cellquilt.report.plots import number, percent

_GROUPS = {
    "overall": "Overall",
    "sensitivity": "Sensitivity",
    "contamination": "Contamination",
    "shape": "Size and shape",
    "truth": "Against the truth (simulated slide)",
}
_ARROWS = {"more": "↑", "less": "↓", "": ""}
#: Numbers of the table that the page leaves to the TSV.
_IN_TSV_ONLY = {"leakage_standard_error", "area_p25_um2", "area_p75_um2"}
#: What stands for contamination in the charts: the first that is known for most methods.
_CONTAMINATION = ("coexpression_ratio", "leakage", "control_rate_in_cells")
_SOURCES = {
    "derived": "found on the slide itself, without any cells",
    "reference": "from the reference",
    "file": "from the file given",
}


def compare_slide(
    stores: Sequence[Path],
    outputs: Sequence[Path],
    *,
    settings: Settings,
    shapes: str | Sequence[str] = (),
    names: str | Sequence[str] = (),
    truth: Path | None = None,
    html: Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Compare several segmentations of one slide.

    Parameters
    ----------
    stores
        Published stores of the slide, a segmentation each; or one store with several methods or shapes elements.
    outputs
        Files to write: the table (TSV), or with the suffix ``.json`` all that is known.
    settings
        Groups ``compare`` and ``resources``. Of one store ``compare`` says which methods are wanted; those that it does
        not have are named in the notes.
    shapes
        Shapes elements of the one store (comma-separated, or a list). Default: the cells of its methods.
    names
        Names of the methods (comma-separated, or a list); default: of the elements, or what the stores were segmented
        with.
    truth
        Folder with the truth of a simulated slide.
    html
        Page to write as well.
    overwrite
        Replace what stands there.

    Returns
    -------
    list of pathlib.Path
        The files.

    Raises
    ------
    CellquiltError
        ``methods-too-few``, ``method-names`` and what `compare_stores` raises.
    """
    asked, elements, given = settings["compare"] or [], _listed(shapes), _listed(names)
    if elements and len(stores) > 1:
        raise CellquiltError("usage", "--shapes names elements of one store, but there are several", "give one store")
    if elements:
        columns = ["cell_id" if element == "cell_boundaries" else None for element in elements]
        sources = [Source(name, stores[0], name, column) for name, column in zip(elements, columns, strict=True)]
    elif len(stores) == 1:
        sources = methods_in(stores[0], asked)
    else:
        sources = [Source(name, store) for name, store in zip(default_names(stores), stores, strict=True)]
    missing = [name for name in asked if name not in [source.name for source in sources]]
    if len(sources) < 2 and not missing:
        raise CellquiltError(
            "methods-too-few",
            f"{stores[0]} alone is nothing to compare",
            "give a second store, or several --shapes of this one",
        )
    known = given or [source.name for source in sources]
    if len(known) != len(sources) or len(set(known)) < len(known):
        raise CellquiltError(
            "method-names", f"{len(sources)} methods are called {', '.join(known)}", "give every method its own name"
        )
    table = compare_stores(
        [replace(source, name=name) for source, name in zip(sources, known, strict=True)],
        settings=settings,
        truth=truth if settings["report_truth"] else None,
    )
    if missing:
        LOG.warning("%s: no cells by %s to compare", table.sample, ", ".join(missing))
        table = replace(table, notes=(f"no cells by {', '.join(missing)}: the run's log says why", *table.notes))
    if html is not None:
        with atomic_path(html, overwrite=overwrite) as aside:
            aside.write_text(render_methods(table), encoding="utf-8")
    return [write_comparison(table, output, overwrite=overwrite) for output in outputs]


def _listed(words: str | Sequence[str]) -> list[str]:
    parts = words.split(",") if isinstance(words, str) else words
    return [part.strip() for part in parts if part.strip()]


def methods_context(table: ComparisonTable, chosen: str = "") -> dict[str, Any]:
    """What the template ``methods.html.j2`` needs, under the name ``methods``.

    Parameters
    ----------
    table
        The methods, measured.
    chosen
        The one of them that a report is about.
    """
    by_name = {measure.name: measure for measure in MEASURES}
    shown = [by_name[name] for name in table.values if name not in _IN_TSV_ONLY]
    groups = [
        {"title": title, "rows": [_row(measure, table) for measure in shown if measure.group == group]}
        for group, title in _GROUPS.items()
    ]
    names = list(table.methods)
    return {
        "names": names,
        "chosen": chosen,
        "groups": [group for group in groups if group["rows"]],
        "scatters": _scatters(table),
        "matrices": [
            chart for key, title in MATRICES.items() if (chart := plots.matrix(names, table.matrices[key], title))
        ],
        "areas": plots.ridges(
            names, table.area_counts, table.area_edges_um2, table.values["median_area_um2"], "area of a cell (µm²)"
        ),
        "pairs": [f"{a} – {b}" for a, b in table.marker_pairs],
        "pairs_source": _SOURCES.get(table.marker_source, ""),
        "notes": [f"{note[0].upper()}{note[1:]}." for note in table.notes],
    }


def methods_section(table: ComparisonTable) -> str:
    """The section alone, as HTML for a page with the report's style sheet."""
    return environment().get_template("methods.html.j2").render(methods=methods_context(table))


def render_methods(table: ComparisonTable) -> str:
    """A page with nothing but the comparison; it needs nothing else."""
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            methods=methods_context(table),
            sample=table.sample,
            version=__version__,
            data=embedded({"comparison": table.to_dict()}),
        )
    )


def _row(measure: Measure, table: ComparisonTable) -> dict[str, Any]:
    values = table.values[measure.name]
    texts = [_shown(measure, value) for value in values]
    # The best are all that read like the best: what no digit shows is no difference.
    known = [(value, text) for value, text in zip(values, texts, strict=True) if value is not None]
    best = ""
    if measure.better and len({text for _, text in known}) > 1:
        best = (max if measure.better == "more" else min)(known)[1]
    return {
        "title": measure.title,
        "arrow": _ARROWS[measure.better],
        "better": measure.better,
        "cells": [{"text": text, "best": bool(best) and text == best} for text in texts],
        "strong": measure.name == "rank",
    }


def _shown(measure: Measure, value: float | int | None) -> str:
    if measure.kind != "share" or value is None:
        return number(value)
    # Rates of controls are tiny: as many digits as tell them apart.
    return percent(value, 1 if abs(value) >= 0.02 or value == 0 else 2)


def _scatters(table: ComparisonTable) -> list[str]:
    known = {name: sum(v is not None for v in table.values[name]) for name in _CONTAMINATION}
    across = max(_CONTAMINATION, key=lambda name: known[name])
    if not known[across]:
        return []
    by_name = {measure.name: measure for measure in MEASURES}
    charts = []
    for up in ("share_assigned", "median_transcripts_per_cell"):
        chart = plots.scatter(
            table.methods,
            table.values[across],
            table.values[up],
            by_name[across].title.lower(),
            by_name[up].title.lower(),
            percent_x=by_name[across].kind == "share",
            percent_y=by_name[up].kind == "share",
        )
        charts += [chart] if chart else []
    return charts
