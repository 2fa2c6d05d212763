"""The report of a sample: one HTML page that holds all it shows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import shapely

from cellquilt import __version__
from cellquilt.comparison.methods import ComparisonTable
from cellquilt.comparison.stores import method_of
from cellquilt.core.privacy import scrub
from cellquilt.core.settings import BY_NAME
from cellquilt.core.transforms import apply
from cellquilt.report import pictures, plots
from cellquilt.report.borders import inner_sides
from cellquilt.report.cells import Cells, read_cells
from cellquilt.report.celltypes import celltypes_context
from cellquilt.report.gather import Dots, Maps, extent_px, make_maps, thinned
from cellquilt.report.html import embedded, environment
from cellquilt.report.methods import methods_context
from cellquilt.report.pictures import Shown
from cellquilt.report.plots import number, percent
from cellquilt.report.provenance import differs, provenance
from cellquilt.report.qc import stage_costs
from cellquilt.report.view import View
from cellquilt.report.zooms import Zoom, choose_zooms, outlines, zoom_size

_TOP_GENES = 20
_MAX_THUMBNAILS = 12
_THUMBNAIL_PX = 300
_VERDICTS = {
    "PASS": "All checks passed.",
    "WARN": "Usable, but look at the points below first.",
    "FAIL": "Do not use this result before the points below are settled.",
}
_ZOOM_TITLES = {
    "dense": "Densest place",
    "typical": "Typical place",
    "sparse": "Sparse place",
    "border": "Across a patch border",
}


def render(
    view: View,
    qc: Mapping[str, Any],
    accuracy: Mapping[str, Any] | None = None,
    methods: ComparisonTable | None = None,
    space: Mapping[str, Any] | None = None,
) -> str:
    """Draw a sample's report.

    Parameters
    ----------
    view
        The sample's store.
    qc
        The numbers of its qc.json.
    accuracy
        What `cellquilt.simulate.scores.truth_scores` returns, for a slide whose truth is known.
    methods
        The methods that are compared, if there are several.
    space
        Of the spatial statistics what `cellquilt.report.spatial.spatial_context` returned.

    Returns
    -------
    str
        HTML without any outside resource, absolute path, user or host.
    """
    cells = read_cells(view)
    context = {
        "sample": view.sample,
        "version": __version__,
        "qc": qc,
        "summary": _VERDICTS[qc["verdict"]],
        "key_numbers": _key_numbers(qc),
        "accuracy": _accuracy(accuracy),
        "methods": None if methods is None else methods_context(methods, method_of(view.stores[0])),
        **_slide(view, cells, qc),
        "histograms": _histograms(cells, qc),
        "spatial": space,
        "celltypes": celltypes_context(view, cells),
        "fates": _fates(qc),
        "by_plane": plots.share_by_plane(
            qc.get("share_assigned_by_z") or {}, qc.get("transcripts_by_z") or {}, qc.get("z_unit")
        ),
        "top_genes": _top_genes(cells),
        "overlaps": plots.overlap_histogram(qc.get("overlap_ratio_histogram") or [], _threshold(view)),
        "borders": _borders(qc),
        "intensities": _intensities(cells),
        "stages": _stages(view),
        "parameters": _parameters(view),
        "made": provenance(view.records, view.sample),
        "engine": _engine(view),
        "libraries": _libraries(qc["versions"]),
        "data": embedded(
            {"qc": qc, "accuracy": accuracy, "comparison": None if methods is None else methods.to_dict()}
        ),
    }
    return environment().get_template("report.html.j2").render(context)


def _libraries(versions: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    """Packages and Python with the versions that made the sample; several where stages differ."""
    found: dict[str, list[str]] = {}
    for packages in versions.values():
        for package, version in packages.items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    found.pop("cellquilt", None)  # has a row of its own
    return [(package, ", ".join(several)) for package, several in sorted(found.items())]


def _key_numbers(qc: Mapping[str, Any]) -> list[dict[str, str]]:
    cells = number(qc["n_cells"])
    passing = f"{number(qc['n_cells_pass'])} pass the filters" if qc["n_cells"] else "none were found"
    rows = [
        ("Cells", cells, passing),
        ("Transcripts", number(qc["n_transcripts"]), f"{number(qc['n_counted'])} counted in cells"),
        ("Assigned", percent(qc["share_assigned"]), "of the transcripts inside the image"),
        ("Transcripts a cell", number(qc["median_transcripts_per_cell"]), "median"),
        ("Genes a cell", number(qc["median_genes_per_cell"]), f"median, of {number(qc.get('n_genes'))} in the panel"),
        ("Cell area", f"{number(qc['median_area_um2'])} µm²", "median"),
        ("Tissue", _area(qc["tissue_area_um2"]), f"{number(qc['transcripts_per_100um2'])} transcripts per 100 µm²"),
        (
            "Controls in cells",
            percent(qc["control_rate_in_cells"], 2),
            f"{percent(qc['control_rate_outside'], 2)} outside",
        ),
    ]
    if qc["n_transcripts"] is None:
        skipped = {"Transcripts", "Assigned", "Transcripts a cell", "Genes a cell", "Controls in cells"}
        rows = [row for row in rows if row[0] not in skipped]
        rows[-1] = ("Tissue", _area(qc["tissue_area_um2"]), "")
    return [{"name": name, "value": value, "note": note} for name, value, note in rows]


def _area(um2: float | None) -> str:
    if um2 is None:
        return "–"
    return f"{number(um2 / 1e6)} mm²" if um2 >= 1e5 else f"{number(um2)} µm²"


# --- the slide: overview, maps, zooms, channels


def _slide(view: View, cells: Cells, qc: Mapping[str, Any]) -> dict[str, Any]:
    size = extent_px(view, cells)
    windows, tissue = view.shapes("image_patches"), view.shapes("region_of_interest")
    boxes = np.zeros((0, 4)) if windows is None else shapely.bounds(windows.geometry).reshape(-1, 4)
    sides = inner_sides(boxes, size)
    zooms: list[Zoom] = []
    if view.image is not None:
        zooms = choose_zooms(apply(view.to_pixels, cells.xy_um), size, zoom_size(view.pixel_size_um, size), sides)
    maps, dots = make_maps(view, cells, zooms, qc["tissue_area_um2"])
    drawn: dict[str, Any] = {
        "maps": _maps(maps, size),
        "has_nuclei": view.find("shapes", "nucleus_boundaries") is not None,
        "overview": None,
        "zooms": [],
        "thumbnails": [],
        "shown": None,
    }
    if view.image is None:
        return drawn
    shown = pictures.choose_channels(view.image, _segmented(view))
    small, step = pictures.read_reduced(view.image)
    mask = None if tissue is None else pictures.mask_of(tissue.geometry, small.shape[1:], step)
    ranges = pictures.limits(small, mask)
    composed = pictures.compose(small[list(shown.channels)], ranges[list(shown.channels)], shown)
    failed = {patch["index"] for patch in qc["patches"]["failed"]}
    drawn["overview"] = {
        "uri": pictures.data_uri(composed),
        "width": small.shape[2],
        "height": small.shape[1],
        "tissue": "" if tissue is None else pictures.path_of(_simple(tissue.geometry, step), step=step),
        "patches": _boxes_path(boxes, step),
        "failed": _boxes_path(_failed_boxes(view, failed), step),
        "density": _map_uri(np.where(maps.cells > 0, maps.cells, np.nan)),
        "density_width": maps.cells.shape[1] * maps.cell_bin_px / step,
        "density_height": maps.cells.shape[0] * maps.cell_bin_px / step,
        "zooms": [
            {"number": k, "x": z.window[2] / step, "y": z.window[0] / step, "size": (z.window[3] - z.window[2]) / step}
            for k, z in enumerate(zooms, 1)
        ],
        "scale": pictures.scale_bar(small.shape[2], small.shape[1], step * view.pixel_size_um),
        "n_patches": len(boxes),
        "pixel_um": view.pixel_size_um,
        "size": size,
    }
    drawn["shown"] = [
        {"name": name, "colour": "rgb({:.0f},{:.0f},{:.0f})".format(*(255 * part for part in colour))}
        for name, colour in zip(shown.names, shown.colours, strict=True)
    ]
    drawn["zooms"] = _zooms(view, cells, zooms, dots, shown, boxes)
    drawn["thumbnails"] = _thumbnails(view, small, ranges, mask)
    return drawn


def _segmented(view: View) -> list[str]:
    parameters = {name: value for record in view.records for name, value in record.get("parameters", {}).items()}
    methods = ("cellpose", "generic", "stardist")
    return [channel for method in methods for channel in parameters.get(f"{method}_channels") or []]


def _simple(geometry: np.ndarray, step: float) -> np.ndarray:
    return shapely.simplify(geometry, step / 2)


def _boxes_path(boxes: np.ndarray, step: float) -> str:
    pieces = [f"M{x0:.1f} {y0:.1f}H{x1:.1f}V{y1:.1f}H{x0:.1f}z" for x0, y0, x1, y1 in (boxes / step).tolist()]
    return "".join(pieces)


def _failed_boxes(view: View, failed: set[int]) -> np.ndarray:
    patches = view.facts("resolve").get("patches") or []
    chosen = [(patch["x0"], patch["y0"], patch["x1"], patch["y1"]) for patch in patches if patch["index"] in failed]
    return np.asarray(chosen, dtype=np.float64).reshape(-1, 4)


def _map_uri(values: np.ndarray) -> str:
    high = float(np.nanquantile(values, 0.99)) if np.isfinite(values).any() else 1.0
    return pictures.data_uri(pictures.colour_map(values, high), lossless=True)


def _maps(maps: Maps, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Maps with their keys; a bin without anything is left clear."""
    density = maps.cells / (maps.cell_bin_px * maps.pixel_size_um) ** 2 * 1e4
    wanted: list[tuple[str, np.ndarray, str, float]] = [
        ("Cell density", np.where(maps.cells > 0, density, np.nan), "cells per 100 × 100 µm", maps.cell_bin_px),
    ]
    if maps.transcripts is not None:
        density = maps.transcripts / (maps.bin_px * maps.pixel_size_um) ** 2 * 100
        wanted.append(
            ("Transcript density", np.where(maps.transcripts > 0, density, np.nan), "per 100 µm²", maps.bin_px)
        )
        wanted.append(("Transcripts a cell", maps.per_cell, "mean, counted", maps.cell_bin_px))
    drawn = []
    for title, values, unit, bin_px in wanted:
        if not np.isfinite(values).any():
            continue
        high = float(np.nanquantile(values, 0.99)) or 1.0
        rows, columns = values.shape
        drawn.append(
            {
                "title": title,
                "uri": pictures.data_uri(pictures.colour_map(values, high), lossless=True),
                "columns": columns,
                "rows": rows,
                # The last bins reach beyond the slide's edge.
                "width": size[1] / bin_px,
                "height": size[0] / bin_px,
                "key": plots.colour_bar(0, high, unit, pictures.STOPS),
                "high": high,
                "unit": unit,
            }
        )
    return drawn


def _zooms(
    view: View, cells: Cells, zooms: list[Zoom], dots: list[Dots], shown: Shown, boxes: np.ndarray
) -> list[dict[str, Any]]:
    if not zooms or view.image is None:
        return []
    crops = [view.image.read(*zoom.window, channels=list(shown.channels)) for zoom in zooms]
    # One range for all windows, so that they compare.
    together = np.concatenate([crop.reshape(len(crop), -1) for crop in crops], axis=1)[:, None, :]
    ranges = pictures.limits(together)
    paths = _outline_paths(view, cells, zooms)
    drawn = []
    for position, (zoom, crop, found) in enumerate(zip(zooms, crops, dots, strict=True), 1):
        y0, y1, x0, x1 = zoom.window
        assigned, free, every = thinned(found)
        drawn.append(
            {
                "number": position,
                "title": _ZOOM_TITLES[zoom.name] if len(zooms) > 1 else "Close-up",
                "uri": pictures.data_uri(pictures.compose(crop, ranges, shown), quality=85),
                "width": x1 - x0,
                "height": y1 - y0,
                "n_cells": zoom.n_cells,
                "x": x0,
                "y": y0,
                "um": (x1 - x0) * view.pixel_size_um,
                "cells": paths["cell_boundaries"][position - 1],
                "nuclei": paths["nucleus_boundaries"][position - 1],
                "borders": _border_lines(boxes, zoom.window),
                "assigned": _dots_path(assigned, x0, y0),
                "free": _dots_path(free, x0, y0),
                "every": every,
                "scale": pictures.scale_bar(x1 - x0, y1 - y0, view.pixel_size_um),
            }
        )
    return drawn


def _outline_paths(view: View, cells: Cells, zooms: list[Zoom]) -> dict[str, list[str]]:
    """Outlines of nuclei and cells that reach into each window."""
    xy = apply(view.to_pixels, cells.xy_um)
    # A cell whose centroid lies outside may reach in: up to its own size.
    reach = 2.0 * np.sqrt(np.nan_to_num(cells.area_um2, nan=400.0)) / view.pixel_size_um + 2
    near = np.zeros(len(cells), dtype=bool)
    for zoom in zooms:
        y0, y1, x0, x1 = zoom.window
        near |= (xy[:, 0] > x0 - reach) & (xy[:, 0] < x1 + reach) & (xy[:, 1] > y0 - reach) & (xy[:, 1] < y1 + reach)
    paths: dict[str, list[str]] = {}
    for name in ("cell_boundaries", "nucleus_boundaries"):
        element = view.find("shapes", name)
        pieces: list[list[str]] = [[] for _ in zooms]
        for batch in outlines(element, cells.ids[near]) if element is not None else ():
            for found, zoom in zip(pieces, zooms, strict=True):
                y0, y1, x0, x1 = zoom.window
                inside = batch[shapely.intersects(batch, shapely.box(x0, y0, x1, y1))]
                if len(inside):
                    found.append(pictures.path_of(inside, origin=(x0, y0)))
        paths[name] = ["".join(found) for found in pieces]
    return paths


def _border_lines(boxes: np.ndarray, window: tuple[int, int, int, int]) -> str:
    """Sides of patches inside a window, once each."""
    y0, y1, x0, x1 = window
    rows = np.unique(boxes[:, [1, 3]])
    columns = np.unique(boxes[:, [0, 2]])
    lines = [f"M0 {row - y0:g}H{x1 - x0}" for row in rows[(rows > y0) & (rows < y1)].tolist()]
    lines += [f"M{column - x0:g} 0V{y1 - y0}" for column in columns[(columns > x0) & (columns < x1)].tolist()]
    return "".join(lines)


def _dots_path(dots: np.ndarray, x0: int, y0: int) -> str:
    """Points as strokes of no length, which round line caps make dots of."""
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in (dots - (x0, y0)).tolist())


def _thumbnails(view: View, small: np.ndarray, ranges: np.ndarray, mask: np.ndarray | None) -> list[dict[str, Any]]:
    assert view.image is not None
    every = max(1, -(-max(small.shape[1:]) // _THUMBNAIL_PX))
    grey = Shown((0,), ("",), (pictures.GREY,))
    drawn = []
    for channel, name in enumerate(view.image.channels[:_MAX_THUMBNAILS]):
        pixels = small[channel : channel + 1, ::every, ::every]
        inside = small[channel][mask] if mask is not None and mask.any() else small[channel].ravel()
        drawn.append(
            {
                "name": str(name),
                "uri": pictures.data_uri(pictures.compose(pixels, ranges[channel : channel + 1], grey), quality=75),
                "width": pixels.shape[2],
                "height": pixels.shape[1],
                "median": float(np.median(inside)) if inside.size else None,
                "low": float(ranges[channel, 0]),
                "high": float(ranges[channel, 1]),
            }
        )
    return drawn


# --- numbers


def _histograms(cells: Cells, qc: Mapping[str, Any]) -> list[str]:
    failing = ~cells.passes_qc
    drawn = [plots.histogram(cells.area_um2, "cell area (µm²)", unit="µm²", flagged=failing)]
    if cells.has_counts:
        drawn.append(plots.histogram(cells.transcripts, "transcripts a cell", flagged=failing, integer=True))
        drawn.append(plots.histogram(cells.genes, "genes a cell", flagged=failing, integer=True))
    return [chart for chart in drawn if chart]


def _fates(qc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What became of every transcript; the rows add up to all of them."""
    total = qc["n_transcripts"]
    if not total:
        return []
    outside = 0 if qc["n_inside_image"] is None else total - qc["n_inside_image"]
    inside = total - outside
    counted = qc["n_counted"]
    free = max(qc["n_countable_inside_image"] - counted, 0)
    rows = [
        ("Counted in a cell", counted, "good"),
        ("In no cell", free, "soft"),
        ("Controls, or below the quality limit", max(inside - counted - free, 0), "soft"),
        ("Outside the image", outside, "soft"),
    ]
    return [{"name": name, "n": n, "share": n / total, "kind": kind} for name, n, kind in rows]


def _top_genes(cells: Cells) -> list[dict[str, Any]]:
    order = np.lexsort((cells.gene_names, -cells.gene_totals))[:_TOP_GENES]
    total, most = int(cells.gene_totals.sum()), int(cells.gene_totals.max(initial=0))
    if not total:
        return []
    return [
        {
            "name": str(cells.gene_names[k]),
            "n": int(cells.gene_totals[k]),
            "share": int(cells.gene_totals[k]) / total,
            "bar": int(cells.gene_totals[k]) / most,
        }
        for k in order.tolist()
        if cells.gene_totals[k]
    ]


def _threshold(view: View) -> float:
    for record in view.records:
        if "resolve_threshold" in record.get("parameters", {}):
            return float(record["parameters"]["resolve_threshold"])
    return 0.5


def _borders(qc: Mapping[str, Any]) -> dict[str, Any] | None:
    if qc.get("n_border_cells") is None:
        return None
    areas = qc["border_area_um2"], qc["interior_area_um2"]
    counts = qc["n_border_cells"], qc["n_interior_cells"]
    return {
        "rows": [
            (name, n, area, n / area * 1e4 if area else None)
            for name, n, area in zip(("Within 10 µm of a border", "Elsewhere"), counts, areas, strict=True)
        ],
        "ratio": qc["border_cell_density_ratio"],
        "interval": qc["border_cell_density_interval"],
        "profile": plots.border_profile(qc["border_profile"] or []),
    }


def _intensities(cells: Cells) -> list[dict[str, Any]]:
    if cells.intensities is None or not len(cells):
        return []
    rows = []
    for name in cells.intensities.columns:
        values = cells.intensities[name].to_numpy(dtype=np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            low, middle, high = np.quantile(values, [0.05, 0.5, 0.95]).tolist()
            rows.append({"name": str(name), "low": low, "median": middle, "high": high})
    return rows


def _stages(view: View) -> list[dict[str, Any]]:
    costs = stage_costs(view.records)
    longest = max((cost["seconds"] for cost in costs.values()), default=0.0) or 1.0
    return [{"name": stage, **cost, "bar": cost["seconds"] / longest} for stage, cost in costs.items()]


def _parameters(view: View) -> list[dict[str, Any]]:
    """Every parameter in force, those that are not at their default first."""
    values = {name: value for record in view.records for name, value in record.get("parameters", {}).items()}
    rows = []
    for name, value in sorted(values.items()):
        setting = BY_NAME.get(name)
        rows.append(
            {
                "name": name,
                "value": _shown(scrub(value)),
                "default": "" if setting is None else _shown(setting.default),
                "help": "" if setting is None else setting.help,
                "given": differs(name, value),
            }
        )
    return sorted(rows, key=lambda row: (not row["given"], row["name"]))


def _shown(value: Any) -> str:
    if value is None:
        return "automatic"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _engine(view: View) -> list[tuple[str, str]]:
    """What the segmentation engine says about itself, and what it was told by the slide."""
    tasks = view.facts("resolve").get("tasks") or []
    found: dict[str, Any] = {}
    for task in tasks:
        found |= {**(task.get("parameters") or {}), **(task.get("facts") or {})}
    found |= {name: value for name, value in view.facts("patchify").items() if not isinstance(value, dict)}
    # Numbers of objects are each task's own and stand elsewhere.
    plain = {name: value for name, value in found.items() if not isinstance(value, dict) and not name.startswith("n_")}
    return [(name.replace("_", " "), _shown(scrub(value))) for name, value in sorted(plain.items())]


# --- accuracy

_SCORES = (("f1", "F1"), ("precision", "Precision"), ("recall", "Recall"))


def _accuracy(scores: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Accuracy as tables: objects by IoU, transcripts."""
    if scores is None:
        return None
    objects = []
    for kind in ("cells", "nuclei"):
        found = scores.get(kind)
        if not found:
            continue
        at = sorted({key.split("_")[1] for key in found if key.startswith("f1_")}, key=float)
        objects.append(
            {
                "name": kind,
                "n_true": found["n_true"],
                "n_found": found["n_found"],
                "mean_iou": found.get("mean_iou"),
                "thresholds": at,
                "rows": [(label, [found.get(f"{key}_{level}") for level in at]) for key, label in _SCORES],
            }
        )
    meanings = {
        "share_in_true_cell": "of the transcripts that came from a cell are in that cell",
        "precision": "of the assigned transcripts are in the cell they came from",
        "share_assigned": "of all transcripts are in a cell",
        "ari": "adjusted Rand index of the assignment (1: perfect, 0: chance)",
    }
    found = scores.get("transcripts") or {}
    transcripts = [(found[key], text, key == "ari") for key, text in meanings.items() if found.get(key) is not None]
    return {"objects": objects, "transcripts": transcripts}
