"""The report of a cohort's domains: one HTML page that holds all it shows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt import __version__
from cellquilt.core.atomic import atomic_path, refuse_existing
from cellquilt.core.errors import CellquiltError, did_you_mean_file
from cellquilt.core.privacy import scrub
from cellquilt.core.record import versions
from cellquilt.domains import plots as figures
from cellquilt.domains.analysis.cohort import CohortAnalysis, analyse_cohort
from cellquilt.domains.analysis.dendrogram import Dendrogram, dendrogram
from cellquilt.domains.hierarchy import Hierarchy
from cellquilt.domains.maps import NO_DOMAIN, domain_colours, domain_raster
from cellquilt.report import pictures
from cellquilt.report.figures import figure_svg
from cellquilt.report.html import embedded, environment
from cellquilt.report.plots import number, percent
from cellquilt.spatial.slides import slides
from cellquilt.spatial.tables import ABOUT

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_TOP_GENES, _TOP_COMPARED, _MOST_ROWS = 20, 25, 60
#: Pixels of a map's longer side, by how many slides there are at most.
_MAP_PX = ((12, 600), (48, 400), (None, 250))
#: Most slides whose architecture is drawn one by one; all are in the tables.
_MOST_SLIDES_DRAWN = 24


@dataclass
class SlideView:
    """What the page shows of a slide."""

    name: str
    n_cells: int
    n_with_domain: int
    n_genes: int
    pixels: NDArray[np.uint8]
    pixel_um: float
    graph: dict[str, Any] = field(default_factory=dict)


def report_cohort(
    adatas: "AnnData | Sequence[AnnData]",
    output: Path,
    *,
    domain_key: str = "domain",
    slide_key: str | None = None,
    condition_key: str | None = None,
    sample_key: str | None = None,
    batch_key: str | None = None,
    gene_sets: "Mapping[str, Sequence[str]] | Path | str | None" = None,
    hierarchy: Hierarchy | None = None,
    truth_key: str = "domain_true",
    n_permutations: int = 9999,
    seed: int = 0,
    about: Path | None = None,
    tables: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Analyse a cohort's domains and write its report.

    Parameters
    ----------
    adatas
        Tables with domains; of files (`read_tables`) one is in memory at a time.
    output
        The page to write.
    domain_key, slide_key, condition_key, sample_key, batch_key, gene_sets, truth_key, n_permutations, seed
        As `cellquilt.domains.analysis.analyse_cohort` takes them.
    hierarchy
        The model's; None draws no tree.
    about
        JSON file with what else is known of the run, such as the parameters of the model.
    tables
        Folder to write all numbers to as CSV.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        The page.
    """
    refuse_existing(output, overwrite)
    known = _about(about)
    found = analyse_cohort(
        adatas,
        domain_key,
        slide_key,
        condition_key=condition_key,
        sample_key=sample_key,
        batch_key=batch_key,
        gene_sets=gene_sets,
        truth_key=truth_key,
        n_permutations=n_permutations,
        seed=seed,
    )
    tree = None if hierarchy is None else dendrogram(hierarchy, found.domains)
    parameters = {
        "domain_key": domain_key,
        "slide_key": slide_key,
        "condition_key": condition_key,
        "sample_key": sample_key,
        "batch_key": batch_key,
        "gene_sets": None if gene_sets is None else gene_sets if isinstance(gene_sets, str | Path) else "given",
        "n_permutations": n_permutations,
        "seed": seed,
    }
    views = _views(adatas, domain_key, slide_key, found.domains, len(found.metrics))
    text = render_cohort(found, views, parameters, known, tree)
    with atomic_path(output, overwrite=overwrite) as aside:
        aside.write_text(text, encoding="utf-8")
    if tables is not None:
        found.write(tables, overwrite=overwrite)
    return Path(output)


def _about(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not path.is_file():
        raise CellquiltError("about-missing", f"there is no file {path}", did_you_mean_file(path))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CellquiltError("about-invalid", f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CellquiltError("about-invalid", f"{path} holds no JSON object", 'write {"name": value, …}')
    return found


def _views(
    adatas: "AnnData | Sequence[AnnData]", domain_key: str, slide_key: str | None, domains: Sequence[str], n_slides: int
) -> list[SlideView]:
    colours = domain_colours(domains)
    most_px = next(px for most, px in _MAP_PX if most is None or n_slides <= most)
    found = []
    for slide in slides(adatas, domain_key, slide_key):
        table = slide.table
        raster = domain_raster(figures.spatial(table)[slide.rows], slide.codes, most_px)
        found.append(
            SlideView(
                slide.name,
                slide.rows.size,
                int((slide.codes >= 0).sum()),
                table.n_vars,
                raster.colours([colours[name] for name in slide.domains]),
                raster.um,
                dict(table.uns.get(ABOUT, {})),
            )
        )
    return found


def render_cohort(
    found: CohortAnalysis,
    views: Sequence[SlideView],
    parameters: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    tree: Dendrogram | None = None,
) -> str:
    """Draw the page.

    Parameters
    ----------
    found
        The analysis.
    views
        The slides.
    parameters
        Of the analysis.
    about
        What else is known of the run.
    tree
        The hierarchy of the domains.

    Returns
    -------
    str
        HTML without any outside resource, absolute path, user or host.
    """
    colours = domain_colours(found.domains)
    context = {
        "version": __version__,
        "key_numbers": _key_numbers(found, views),
        "notes": [f"{note[0].upper()}{note[1:]}." for note in found.notes],
        "legend": [{"name": name, "colour": colour} for name, colour in colours.items()],
        "no_domain": NO_DOMAIN if any(view.n_with_domain < view.n_cells for view in views) else "",
        "maps": [_map(view) for view in views],
        "slides": _slides(found, views),
        "proportions": figure_svg(
            figures.proportions(found.proportions, colours), "Share of each domain in each slide"
        ),
        "architecture": _architecture(found, colours),
        "genes": _genes(found),
        "conditions": _conditions(found),
        "pathways": _pathways(found),
        "metrics": found.metrics.to_dict("records"),
        "has_fide": bool(found.metrics["fide"].notna().any()),
        "divergence": found.divergence,
        "agreement": found.agreement,
        "tree": None if tree is None else figure_svg(figures.dendrogram(tree, colours), "Tree of the domains"),
        "parameters": _parameters(parameters, views),
        "about": _flat(scrub(dict(about or {}))),
        "libraries": list(versions().items()),
        "data": embedded(_data(found, tree)),
    }
    return environment().get_template("cohort.html.j2").render(context)


def _key_numbers(found: CohortAnalysis, views: Sequence[SlideView]) -> list[dict[str, str]]:
    cells = sum(view.n_cells for view in views)
    without = cells - sum(view.n_with_domain for view in views)
    median = float(np.median([view.n_cells for view in views]))
    genes = [view.n_genes for view in views]
    panel = number(genes[0]) if len(set(genes)) == 1 else f"{number(min(genes))}–{number(max(genes))}"
    rows = [
        ("Slides", number(len(views)), f"{number(median)} cells in the median"),
        ("Cells", number(cells), f"{percent(without / max(cells, 1))} without a domain"),
        ("Domains", number(len(found.domains)), "shared by all slides"),
        ("Genes", panel, "in a slide's panel"),
    ]
    return [{"name": name, "value": value, "note": note} for name, value, note in rows]


def _map(view: SlideView) -> dict[str, Any]:
    height, width = view.pixels.shape[:2]
    # The bar stands below the slide: nothing of it is hidden.
    room = 0.09 * max(width, height)
    return {
        "name": view.name,
        "n_cells": view.n_cells,
        "uri": pictures.data_uri(view.pixels, lossless=True),
        "width": width,
        "rows": height,
        "height": height + room,
        "scale": pictures.scale_bar(width, height + room, view.pixel_um),
    }


def _slides(found: CohortAnalysis, views: Sequence[SlideView]) -> list[dict[str, Any]]:
    condition: dict[str, str] = {}
    if "condition" in found.proportions:
        condition = dict(zip(found.proportions["slide"], found.proportions["condition"], strict=True))
    return [
        {
            "name": view.name,
            "condition": condition.get(view.name, ""),
            "n_cells": view.n_cells,
            "n_with_domain": view.n_with_domain,
            "n_genes": view.n_genes,
        }
        for view in views
    ]


def _architecture(found: CohortAnalysis, colours: dict[str, str]) -> dict[str, Any] | None:
    if found.architecture is None:
        return None
    own = found.architecture
    drawn = own.slides if 1 < len(own.slides) <= _MOST_SLIDES_DRAWN else []
    return {
        "wide": len(own.domains) > 10,
        "adjacency": figure_svg(figures.adjacency(own), "Edges between domains, observed over expected"),
        "paga": figure_svg(figures.paga(own, colours=colours), "Which domains border on which"),
        "slides": [
            {"name": name, "paga": figure_svg(figures.paga(own, name, colours), f"Borders of domains in {name}")}
            for name in drawn
        ],
    }


def _genes(found: CohortAnalysis) -> dict[str, Any] | None:
    if found.genes is None:
        return None
    table = found.genes.by_gene()
    return {
        "dots": figure_svg(figures.genes(found.genes), "Genes that set each domain apart"),
        "rows": table.head(_TOP_GENES).to_dict("records"),
        "n": len(table),
    }


def _conditions(found: CohortAnalysis) -> dict[str, Any] | None:
    if found.compared is None and found.compared_genes is None:
        return None
    shown: dict[str, Any] = {"shares": "", "rows": [], "n_rows": 0, "genes": [], "n_genes": 0, "notes": []}
    if found.compared is not None:
        shown["shares"] = figure_svg(
            figures.shares_by_condition(found.proportions), "Shares of the domains by condition, a dot a slide"
        )
        shown["rows"] = found.compared.head(_MOST_ROWS).to_dict("records")
        shown["n_rows"] = len(found.compared)
    if found.compared_genes is not None:
        shown["genes"] = found.compared_genes.head(_TOP_COMPARED).to_dict("records")
        shown["n_genes"] = len(found.compared_genes)
    shown["notes"] = _notes(found.compared if found.compared is not None else found.compared_genes)
    return shown


def _notes(compared: "pd.DataFrame | None") -> list[str]:
    """What to keep in mind of each pair of conditions."""
    if compared is None:
        return []
    notes = []
    for (a, b), rows in compared.groupby(["condition_a", "condition_b"], sort=False):
        first = rows.iloc[0]
        text = f"{a} against {b}: {first['n_a']} and {first['n_b']} samples"
        if first["note"] == "confounded with batch":
            text += (
                ", confounded: every batch holds one of the two conditions only, so that a difference may be the "
                "batches'. Effect sizes are shown, and no p-values"
            )
        elif first["note"]:
            text += f"; {first['note']}. Effect sizes are shown, and no p-values"
        else:
            tried = "all" if first["exact"] else "random"
            text += (
                f", compared with {tried} {first['n_permutations']:,} ways to label them; no p-value can be below "
                f"{first['smallest_p']:.2g}"
            )
        notes.append(f"{text}.")
    return notes


def _pathways(found: CohortAnalysis) -> dict[str, Any] | None:
    if found.pathways is None:
        return None
    sets = found.pathways.sets
    return {
        "heat": figure_svg(figures.pathways(found.pathways.by_domain()), "Scores of gene sets in domains"),
        "rows": sets[sets["scored"]].to_dict("records"),
        "small": sets[~sets["scored"]].to_dict("records"),
    }


def _parameters(parameters: Mapping[str, Any], views: Sequence[SlideView]) -> list[tuple[str, str]]:
    rows = {name: value for name, value in parameters.items() if value is not None}
    graphs = {json.dumps(view.graph, sort_keys=True, default=_plain) for view in views if view.graph}
    for k, graph in enumerate(sorted(graphs)):
        for name, value in json.loads(graph).items():
            rows[f"graph {name}" + (f" ({k + 1})" if len(graphs) > 1 else "")] = value
    return [(name.replace("_", " "), _shown(scrub(value))) for name, value in rows.items()]


def _plain(value: Any) -> Any:
    """Numbers that come from files are numpy's."""
    return value.item() if hasattr(value, "item") else str(value)


def _flat(data: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested data as rows."""
    rows: list[tuple[str, str]] = []
    for name, value in data.items():
        title = f"{above}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{title} · ")
        elif value is not None:
            rows.append((title, _shown(value)))
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _data(found: CohortAnalysis, tree: Dendrogram | None) -> dict[str, Any]:
    """Numbers of the page, for machines."""
    shares = found.proportions.pivot(index="slide", columns="domain", values="n_cells")
    return {
        "domains": found.domains,
        "n_cells": {str(slide): row.to_dict() for slide, row in shares.iterrows()},
        "divergence": found.divergence,
        "agreement": found.agreement,
        "dendrogram": None if tree is None else tree.to_dict(),
    }
