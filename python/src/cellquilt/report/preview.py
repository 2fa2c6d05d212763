"""Try parameters: a few windows of a slide, segmented with every combination, on one page.

The windows go through the pipeline's own steps, with the slide's own normalisation and tile lattice: what the page
shows is what a full run with these parameters makes there.
"""

import html
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.log import LOG, progress
from cellquilt.core.settings import BY_NAME, Settings, of_stage, resolve_name
from cellquilt.core.store import Store

if TYPE_CHECKING:
    from cellquilt.core.images import Image
    from cellquilt.segment.tissue import Tissue

MAX_COMBINATIONS = 48
#: Width of what a candidate window is judged on, in pixels of the pyramid level that is read.
_JUDGED_PX = 16
_READ_PX = 2048


@dataclass(frozen=True)
class Tried:
    """One combination of parameters and what came out.

    Attributes
    ----------
    values
        Parameter → value of this combination.
    cells, nuclei
        A (k,) object array of polygons in pixels for each window.
    facts
        Name → value, over all windows.
    """

    values: dict[str, Any]
    cells: list[np.ndarray]
    nuclei: list[np.ndarray]
    facts: dict[str, Any]


def parse_grid(text: str | None) -> list[dict[str, Any]]:
    """The combinations of ``name=value,value;name=value,value``, in the order written; one empty one for no text.

    Raises
    ------
    CellquiltError
        ``preview-grid`` if it is not of this form or has too many combinations, ``parameter-unknown`` and
        ``parameter-*`` for names and values, ``preview-parameter`` for a parameter that no window depends on.
    """
    axes: list[list[tuple[str, Any]]] = []
    allowed = {setting.name for setting in of_stage("preview") if setting.group not in ("preview", "aggregate")}
    for part in (piece.strip() for piece in (text or "").split(";")):
        if not part:
            continue
        name, equals, values = part.partition("=")
        if not equals or not values.strip():
            raise CellquiltError(
                "preview-grid",
                f'"{part}" is not name=value,value',
                "for example cellpose_diameter_um=8,10;expand_um=3,5",
            )
        known = resolve_name(name.strip())
        if known not in allowed:
            raise CellquiltError(
                "preview-parameter",
                f"{known} does not change the segmentation of a window",
                did_you_mean(known, allowed),
            )
        checked = [Settings({known: value.strip()}).given[known] for value in values.split(",")]
        axes.append([(known, value) for value in checked])
    combinations = [dict(pairs) for pairs in itertools.product(*axes)]
    if len(combinations) > MAX_COMBINATIONS:
        raise CellquiltError(
            "preview-grid",
            f"{len(combinations)} combinations; at most {MAX_COMBINATIONS}",
            "try fewer values at a time",
        )
    return combinations


def preview_slide(
    store: Path,
    output: Path,
    *,
    settings: Settings,
    tissue: Path | None = None,
    weights: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Segment windows of a slide with every combination of ``preview_grid`` and show them side by side.

    Parameters
    ----------
    store
        The slide.
    output
        The page to write.
    settings
        The settings in force, and group ``preview``.
    tissue
        Store with ``region_of_interest``; None takes the slide's own, or the whole image.
    weights
        File of the model, where it was staged under another name than the setting says.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        The page.
    """
    from cellquilt.core.images import open_image
    from cellquilt.segment.engine import with_model
    from cellquilt.segment.stages import tissue_of

    slide = Store(store)
    image = open_image(slide.path)
    found = tissue_of(slide if tissue is None else Store(tissue))
    regions = None if found is None else found.polygons
    combinations = parse_grid(settings["preview_grid"])
    windows = choose_windows(
        image, max(settings["preview"], 1), settings["preview_size_um"], regions, settings["preview_seed"]
    )
    given = with_model(settings.given, settings["segmentation"], weights)
    tried = [
        try_windows(slide, image, windows, Settings({**given, **values}), found, values)
        for values in progress(combinations, f"{slide.name}: combinations")
    ]
    for one in tried:
        _count_transcripts(slide, image, windows, one)
    page = render(slide.name, image, windows, tried, settings)
    with atomic_path(output, overwrite=overwrite) as aside:
        aside.write_text(page, encoding="utf-8")
    LOG.info("%s: %d windows × %d combinations", slide.name, len(windows), len(combinations))
    return Path(output)


def choose_windows(
    image: "Image", count: int, size_um: float, regions: np.ndarray | None, seed: int
) -> list[tuple[int, int, int, int]]:
    """Windows (y0, y1, x0, x1) from dense to sparse tissue, chosen by how much the nuclear stain varies in them.

    The same seed gives the same windows. There are fewer than asked for only where the tissue holds no more.
    """
    from cellquilt.segment.engine import pick_channels

    height, width = int(image.shape[1]), int(image.shape[2])
    size = max(1, min(round(size_um / (image.pixel_size_um or 1.0)), height, width))
    level = 0
    while level + 1 < image.n_levels and size / 2 ** (level + 1) >= _JUDGED_PX:
        level += 1
    rows, columns = height // size, width // size
    contrast = _contrast(image, pick_channels(image, None)[0], level, size, (rows, columns))
    middle_y, middle_x = ((np.arange(n) + 0.5) * size for n in (rows, columns))
    inside = np.ones((rows, columns), dtype=bool)
    if regions is not None:
        grid = np.meshgrid(middle_x, middle_y)
        inside = np.asarray(shapely.contains_xy(shapely.union_all(regions), *grid)) if len(regions) else ~inside
    candidates = np.flatnonzero(inside)
    if not candidates.size:
        raise CellquiltError(
            "preview-no-tissue", "no window lies in tissue", "lower preview_size_um, or tissue_mode none"
        )
    ranked = candidates[np.argsort(contrast.ravel()[candidates], kind="stable")[::-1]]
    rng = np.random.default_rng(seed)
    # One window from each of `count` bands between the densest and the sparsest.
    bands = [band for band in np.array_split(ranked, min(count, len(ranked))) if band.size]
    chosen = [int(rng.choice(band)) for band in bands]
    return [
        (place // columns * size, place // columns * size + size, place % columns * size, place % columns * size + size)
        for place in chosen
    ]


def _contrast(image: "Image", channel: str, level: int, size: int, shape: tuple[int, int]) -> np.ndarray:
    """Standard deviation of a channel in every window of a lattice, read in strips of a pyramid level."""
    step = 2**level
    out = np.zeros(shape)
    per_read = max(1, _READ_PX * step // size)
    level_height, level_width = image.level_shape(level)[-2:]
    for row in range(0, shape[0], per_read):
        for column in range(0, shape[1], per_read):
            y0, x0 = row * size // step, column * size // step
            y1 = min(min(row + per_read, shape[0]) * size // step, level_height)
            x1 = min(min(column + per_read, shape[1]) * size // step, level_width)
            pixels = image.read(y0, y1, x0, x1, channels=[channel], level=level)[0].astype(np.float32)
            y_of = np.minimum(((np.arange(y0, y1) + 0.5) * step / size).astype(int), shape[0] - 1)
            x_of = np.minimum(((np.arange(x0, x1) + 0.5) * step / size).astype(int), shape[1] - 1)
            place = (y_of[:, None] * shape[1] + x_of[None, :]).ravel()
            n = np.bincount(place, minlength=out.size)
            total = np.bincount(place, pixels.ravel(), minlength=out.size)
            square = np.bincount(place, pixels.ravel() ** 2, minlength=out.size)
            seen = n > 0
            mean = total[seen] / n[seen]
            out.ravel()[seen] = np.sqrt(np.maximum(square[seen] / n[seen] - mean**2, 0))
    return out


def try_windows(
    slide: Store,
    image: "Image",
    windows: list[tuple[int, int, int, int]],
    settings: Settings,
    tissue: "Tissue | None",
    values: dict[str, Any],
) -> Tried:
    """Segment the windows with one combination, by the pipeline's own steps."""
    import tempfile

    from cellquilt.core.shapes import read_geoparquet
    from cellquilt.core.transforms import length_scale
    from cellquilt.resolve.choose import resolve_cells
    from cellquilt.resolve.nuclei import expand_nuclei
    from cellquilt.resolve.stage import growth_um
    from cellquilt.segment.run import make_image_patches, segment_bundle

    started = time.perf_counter()
    pixel = length_scale(image.transforms["microns"])
    method = settings["segmentation"]
    with tempfile.TemporaryDirectory() as scratch:
        _, plan, (bundle,) = make_image_patches(
            image, Path(scratch), method=method, settings=settings, sample=slide.name, tissue=tissue, windows=windows
        )
        result = Path(scratch) / "cells.parquet"
        record = segment_bundle(bundle, result, settings=settings)
        geometry, table, _ = read_geoparquet(result)
    patch = table.column("patch").to_numpy()
    shape = (int(image.shape[1]), int(image.shape[2]))
    cells, nuclei = [], []
    for number, window in enumerate(windows):
        own = patch == number
        # One patch alone: resolving only splits what overlaps.
        resolved = resolve_cells(
            geometry[own], patch[own], np.zeros(int(own.sum()), dtype=bool), np.zeros(int(own.sum()))
        ).geometry
        grow, nuclear = growth_um(record, settings)
        grown = expand_nuclei(resolved, grow / pixel, bounds=shape) if nuclear else resolved
        centre = shapely.centroid(grown) if len(grown) else np.zeros(0, dtype=object)
        y0, y1, x0, x1 = window
        inside = (
            (shapely.get_x(centre) >= x0)
            & (shapely.get_x(centre) < x1)
            & (shapely.get_y(centre) >= y0)
            & (shapely.get_y(centre) < y1)
        )
        cells.append(grown[inside])
        nuclei.append(resolved[inside] if nuclear else resolved[:0])
    together = np.concatenate(cells) if cells else np.zeros(0, dtype=object)
    own_area = np.concatenate(nuclei) if nuclei and sum(map(len, nuclei)) else together
    window_um2 = sum((y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in windows) * pixel**2
    area = shapely.area(own_area) * pixel**2
    facts = {
        "cells": len(together),
        "cells_per_mm2": len(together) / window_um2 * 1e6,
        "median_diameter_um": float(np.median(2 * np.sqrt(area / np.pi))) if len(area) else None,
        "median_cell_area_um2": float(np.median(shapely.area(together) * pixel**2)) if len(together) else None,
        "share_covered": float(shapely.area(together).sum() * pixel**2 / window_um2),
        "expected_diameter_um": plan.diameter_px * pixel,
        "seconds": time.perf_counter() - started,
    }
    return Tried(values, cells, nuclei, facts)


def _count_transcripts(slide: Store, image: "Image", windows: list[tuple[int, int, int, int]], tried: Tried) -> None:
    """Share of the windows' transcripts that lie in cells, where there are transcripts."""
    from cellquilt.core.points import iter_points, points_transforms, xy
    from cellquilt.core.transforms import GLOBAL, apply
    from cellquilt.geometry.locate import points_in_polygons
    from cellquilt.geometry.polygons import Rings

    if not slide.has("points", "transcripts"):
        return
    element = slide.element("points", "transcripts")
    to_image = points_transforms(element)[GLOBAL]
    n_inside = n_assigned = 0
    for batch in iter_points(element, columns=["x", "y"]):
        points = apply(to_image, xy(batch))
        for window, cells in zip(windows, tried.cells, strict=True):
            y0, y1, x0, x1 = window
            inside = points[(points[:, 0] >= x0) & (points[:, 0] < x1) & (points[:, 1] >= y0) & (points[:, 1] < y1)]
            n_inside += len(inside)
            if len(inside) and len(cells):
                n_assigned += int((points_in_polygons(inside, Rings.from_shapely(cells)) >= 0).sum())
    tried.facts["transcripts"] = n_inside
    tried.facts["share_assigned"] = n_assigned / n_inside if n_inside else None
    tried.facts["transcripts_per_cell"] = n_assigned / tried.facts["cells"] if tried.facts["cells"] else None


#: Fact → its heading and how it is written.
_COLUMNS = {
    "cells": ("cells", "{:,.0f}"),
    "cells_per_mm2": ("cells/mm²", "{:,.0f}"),
    "median_diameter_um": ("median diameter, µm", "{:.1f}"),
    "median_cell_area_um2": ("median cell area, µm²", "{:.0f}"),
    "share_covered": ("area covered", "{:.0%}"),
    "share_assigned": ("transcripts in cells", "{:.1%}"),
    "transcripts_per_cell": ("transcripts a cell", "{:.0f}"),
    "seconds": ("seconds", "{:.1f}"),
}


def render(
    sample: str,
    image: "Image",
    windows: list[tuple[int, int, int, int]],
    tried: list[Tried],
    settings: Settings,
) -> str:
    """The page: one row a combination, one column a window."""
    from cellquilt.report import pictures

    shown = pictures.choose_channels(image)
    pixel = image.pixel_size_um or 1.0
    rules, sizes = [], []
    for number, (y0, y1, x0, x1) in enumerate(windows):
        pixels = image.read(y0, y1, x0, x1, channels=list(shown.channels))
        picture = pictures.compose(pixels, pictures.limits(pixels), shown)
        # Each picture is in the page once, as a class; the outlines of every combination are laid over it.
        rules.append(f".window-{number}{{background-image:url({pictures.data_uri(picture)})}}")
        sizes.append((x1 - x0, y1 - y0))
    columns = [name for name in _COLUMNS if any(one.facts.get(name) is not None for one in tried)]
    parts = [_numbers(tried, columns)]
    for one in tried:
        figures = []
        for number, (window, cells, nuclei) in enumerate(zip(windows, one.cells, one.nuclei, strict=True)):
            wide, high = sizes[number]
            origin = (float(window[2]), float(window[0]))
            figures.append(
                f'<figure><svg class="window window-{number}" viewBox="0 0 {wide} {high}" role="img" '
                f'aria-label="{len(cells)} cells">'
                f'<path class="cell" d="{pictures.path_of(cells, origin=origin)}"/>'
                f'<path class="nucleus" d="{pictures.path_of(nuclei, origin=origin)}"/>'
                f"{pictures.scale_bar(wide, high, pixel)}</svg>"
                f"<figcaption>window {number + 1}: {len(cells)} cells</figcaption></figure>"
            )
        parts.append(
            f'<section><h2>{html.escape(_title(one.values))}</h2><div class="grid three">{"".join(figures)}</div>'
            f"<p>For the whole slide:</p><pre><code>{html.escape(command(one.values, settings))}</code></pre></section>"
        )
    style = (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(sample)}: preview</title><style>{style}{_STYLE}{''.join(rules)}</style></head><body>"
        f'<p class="brand">cellquilt preview</p><h1>{html.escape(sample)}</h1>'
        f"<p>{len(windows)} windows of {settings['preview_size_um']:g} µm, the densest tissue first, "
        f"{len(tried)} combinations of parameters. Cells are outlined in yellow, nuclei in white. Shown: "
        f"{html.escape(', '.join(shown.names))}.</p>{''.join(parts)}</body></html>"
    )


_STYLE = """
.window { width: 100%; background-size: 100% 100%; border-radius: 6px; display: block; }
.window path { fill: none; vector-effect: non-scaling-stroke; }
.window .cell { stroke: #ffd84d; stroke-width: 1.4; }
.window .nucleus { stroke: #ffffff; stroke-width: 1; stroke-opacity: .8; }
.window .scale rect, .window .scale text { fill: #fff; }
figure { margin: 0; }
pre { overflow-x: auto; padding: 10px 12px; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; }
table.preview { border-collapse: collapse; }
table.preview th, table.preview td { padding: 5px 14px 5px 0; text-align: right;
  border-bottom: 1px solid var(--line); }
table.preview th:first-child, table.preview td:first-child { text-align: left; }
"""


def _title(values: dict[str, Any]) -> str:
    return (
        ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        or "as given"
    )


def _numbers(tried: list[Tried], columns: list[str]) -> str:
    head = "".join(f"<th>{_COLUMNS[name][0]}</th>" for name in columns)
    rows = []
    for one in tried:
        cells = "".join(
            f"<td>{_COLUMNS[name][1].format(one.facts[name]) if one.facts.get(name) is not None else '–'}</td>"
            for name in columns
        )
        rows.append(f"<tr><td>{html.escape(_title(one.values))}</td>{cells}</tr>")
    return (
        f'<div class="card scroll"><table class="preview"><thead><tr><th>parameters</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def command(values: dict[str, Any], settings: Settings) -> str:
    """The command of the full run with a combination: what was given, without the preview's own parameters."""
    import shlex

    given = {name: value for name, value in settings.given.items() if BY_NAME[name].group != "preview"}
    options = []
    for name, value in sorted({**given, **values}.items()):
        text = (
            ",".join(value)
            if isinstance(value, list)
            else str(value).lower()
            if isinstance(value, bool)
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )
        if value != BY_NAME[name].default:
            options.append(f"--{name} {shlex.quote(text)}")
    return " ".join(["nextflow run main.nf --input sheet.csv --outdir results", *options])
