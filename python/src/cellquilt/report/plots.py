"""Small charts as SVG: crisp at any size, a few kB, in the page's own colours.

Colours come from the page's style sheet (classes), so that charts follow its light, dark and printed dress.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 14, 40


def number(value: float | None, digits: int = 3) -> str:
    """A number as people read it: thousands apart, no false precision, a dash for none.

    Examples
    --------
    >>> number(1234567), number(0.01234), number(None), number(12.0)
    ('1,234,567', '0.0123', '–', '12')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int | np.integer) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.{digits}g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent, a dash for none."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _svg(body: Sequence[str], label: str, width: int = _WIDTH, height: int = _HEIGHT) -> str:
    inner = "".join(body)
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{inner}</svg>'


def _x_axis(labels: Sequence[str], place: Sequence[float], title: str) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>']
    for text, x in zip(labels, place, strict=True):
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{escape(text)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="title" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(title)}</text>')
    return parts


def _y_axis(top: float, title: str, *, as_percent: bool = False) -> list[str]:
    parts = []
    for value in ticks(0, top, 4):
        y = _y(value, top)
        text = f"{100 * value:g}%" if as_percent else number(value)
        parts.append(f'<line class="gl" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<text class="title" x="4" y="9">{escape(title)}</text>')
    return parts


def _y(value: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP - 6) * (value / top if top else 0)


def _bar(x0: float, x1: float, value: float, top: float, name: str, tip: str, base: float = 0.0) -> str:
    y0, y1 = _y(base, top), _y(base + value, top)
    width, height = max(x1 - x0, 0.3), max(y0 - y1, 0)
    return (
        f'<rect class="{name}" x="{x0:.2f}" y="{y1:.2f}" width="{width:.2f}" height="{height:.2f}">'
        f"<title>{escape(tip)}</title></rect>"
    )


def histogram(
    values: np.ndarray,
    title: str,
    *,
    unit: str = "",
    flagged: np.ndarray | None = None,
    integer: bool = False,
    bins: int = 40,
) -> str:
    """Distribution of a number over cells, with its median.

    Parameters
    ----------
    values
        (n,) numbers ≥ 0; those that are not finite are left out.
    title
        Name of the number, with its unit.
    unit
        For the median's label.
    flagged
        (n,) bool: cells that do not pass, drawn apart.
    integer
        Whole numbers: bins are whole numbers, too.
    bins
        About so many bars. The last bar holds all values beyond the 99.5th percentile.

    Returns
    -------
    str
        SVG; empty if there are no values.
    """
    known = np.isfinite(values)
    flagged = np.zeros(len(values), dtype=bool) if flagged is None else flagged
    values, flagged = np.asarray(values, dtype=np.float64)[known], flagged[known]
    if not len(values):
        return ""
    end = max(float(np.quantile(values, 0.995)), 1.0 if integer else 1e-9)
    if integer:
        step = max(1, math.ceil((end + 1) / bins))
        edges = np.arange(0, end + step + 1, step)
    else:
        edges = np.linspace(0, end, bins + 1)
    clipped = np.minimum(values, np.nextafter(edges[-1], 0))
    total, _ = np.histogram(clipped, edges)
    bad, _ = np.histogram(clipped[flagged], edges)
    top = float(total.max()) * 1.05
    scale = (_WIDTH - _RIGHT - _LEFT) / (edges[-1] - edges[0])
    place = _LEFT + (edges - edges[0]) * scale
    parts = _y_axis(top, "cells")
    for k, (all_cells, failing) in enumerate(zip(total.tolist(), bad.tolist(), strict=True)):
        if not all_cells:
            continue
        stop = number(edges[k + 1] - 1 if integer and k + 1 < len(edges) else edges[k + 1])
        span = f"{number(edges[k])} and more" if k == len(total) - 1 else f"{number(edges[k])} to {stop}"
        tip = f"{span}: {all_cells:,} cells" + (f", {failing:,} of them do not pass" if failing else "")
        parts.append(_bar(place[k] + 0.4, place[k + 1] - 0.4, all_cells - failing, top, "bar", tip))
        if failing:
            parts.append(_bar(place[k] + 0.4, place[k + 1] - 0.4, failing, top, "bar-bad", tip, all_cells - failing))
    marks = ticks(float(edges[0]), float(edges[-1]))
    parts += _x_axis([number(mark) for mark in marks], [_LEFT + (mark - edges[0]) * scale for mark in marks], title)
    median = float(np.median(values))
    parts += _marker(
        _LEFT + (min(median, edges[-1]) - edges[0]) * scale, f"median {number(median)}{unit and ' ' + unit}"
    )
    return _svg(parts, f"Histogram of {title}: median {number(median)} {unit}, {len(values):,} cells")


def _marker(x: float, text: str) -> list[str]:
    anchor, dx = ("end", -4) if x > 0.62 * _WIDTH else ("start", 4)
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>',
        f'<text class="mark-text" x="{x + dx:.1f}" y="{_TOP + 10}" text-anchor="{anchor}">{escape(text)}</text>',
    ]


def overlap_histogram(counts: Sequence[int], threshold: float) -> str:
    """Pairs of cells of different patches by overlap / smaller area, on a square-root scale so that few pairs show."""
    if not sum(counts):
        return ""
    top_count = max(counts)
    top = math.sqrt(top_count) * 1.06
    place = np.linspace(_LEFT, _WIDTH - _RIGHT, len(counts) + 1)
    edges = np.linspace(0, 1, len(counts) + 1)
    parts = []
    for value in sorted({round(top_count * share) for share in (0, 0.06, 0.25, 0.56, 1)}):
        y = _y(math.sqrt(value), top)
        parts.append(f'<line class="gl" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    parts.append('<text class="title" x="4" y="9">pairs of cells (square-root scale)</text>')
    for k, count in enumerate(counts):
        if count:
            tip = f"{edges[k]:.2f} to {edges[k + 1]:.2f}: {count:,} pairs"
            name = "bar" if edges[k] >= threshold - 1e-9 else "bar-soft"
            parts.append(_bar(place[k] + 0.6, place[k + 1] - 0.6, math.sqrt(count), top, name, tip))
    marks = [0.0, 0.25, 0.5, 0.75, 1.0]
    place_of = [_LEFT + mark * (_WIDTH - _RIGHT - _LEFT) for mark in marks]
    parts += _x_axis([number(mark) for mark in marks], place_of, "overlap / smaller area")
    parts += _marker(_LEFT + threshold * (_WIDTH - _RIGHT - _LEFT), f"same cell from {threshold:g}")
    same = sum(count for k, count in enumerate(counts) if edges[k] >= threshold - 1e-9)
    return _svg(parts, f"Overlap of {sum(counts):,} pairs of cells of different patches; {same:,} are the same cell")


def share_by_plane(shares: dict[str, float | None], totals: dict[str, int], unit: str | None = "plane") -> str:
    """Share of transcripts that lie in a cell, plane by plane."""
    planes = sorted(shares, key=float)
    known = [shares[plane] or 0.0 for plane in planes]
    if not known:
        return ""
    top = max(*known, 0.05) * 1.1
    place = np.linspace(_LEFT, _WIDTH - _RIGHT, len(planes) + 1)
    gap = min(6.0, (place[1] - place[0]) * 0.12)
    parts = _y_axis(top, "share in cells", as_percent=True)
    for k, (plane, share) in enumerate(zip(planes, known, strict=True)):
        tip = f"z {plane}: {percent(share)} of {totals.get(plane, 0):,} transcripts"
        parts.append(_bar(place[k] + gap, place[k + 1] - gap, share, top, "bar", tip))
    every = max(1, math.ceil(len(planes) / 12))
    shown = range(0, len(planes), every)
    middle = [(place[k] + place[k + 1]) / 2 for k in shown]
    parts += _x_axis([planes[k] for k in shown], middle, "z (µm)" if unit == "um" else "z-plane")
    return _svg(parts, f"Share of transcripts in cells on {len(planes)} planes")


def border_profile(rings: Sequence[dict]) -> str:
    """Density of cells by distance to the nearest patch border, over the density of all; bars are 95% intervals."""
    area = sum(ring["area_um2"] for ring in rings)
    cells = sum(ring["n_cells"] for ring in rings)
    used = [ring for ring in rings if ring["area_um2"] > 0]
    if not cells or not used or not area:
        return ""
    density = cells / area
    ratios = [ring["n_cells"] / ring["area_um2"] / density for ring in used]
    halves = [1.96 * math.sqrt(max(ring["n_cells"], 1)) / ring["area_um2"] / density for ring in used]
    top = min(max(r + h for r, h in zip(ratios, halves, strict=True)), max(ratios) * 1.5 + 0.5) * 1.05
    place = np.linspace(_LEFT, _WIDTH - _RIGHT, len(used) + 1)
    parts = _y_axis(top, "density (all = 1)")
    labels = []
    for k, (ring, ratio, half) in enumerate(zip(used, ratios, halves, strict=True)):
        start, stop = ring["from_um"], ring["to_um"]
        labels.append(f"> {start:g}" if stop is None else f"{start:g}–{stop:g}")
        tip = f"{labels[-1]} µm: {ring['n_cells']:,} cells, {ratio:.2f} times the density of all"
        parts.append(_bar(place[k] + 5, place[k + 1] - 5, ratio, top, "bar", tip))
        x, low, high = (place[k] + place[k + 1]) / 2, _y(max(ratio - half, 0), top), _y(min(ratio + half, top), top)
        parts.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    one = _y(1.0, top)
    parts.append(f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{one:.1f}" y2="{one:.1f}"/>')
    middle = [(a + b) / 2 for a, b in itertools.pairwise(place)]
    parts += _x_axis(labels, middle, "distance to the nearest patch border (µm)")
    return _svg(parts, "Density of cells by distance to the nearest patch border")


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A range with room on either side, that does not leave zero without need."""
    low, high = min(values), max(values)
    room = 0.18 * (high - low) or 0.1 * abs(high) or 0.1
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def scatter(
    names: Sequence[str],
    x: Sequence[float | None],
    y: Sequence[float | None],
    x_title: str,
    y_title: str,
    *,
    percent_x: bool = False,
    percent_y: bool = False,
) -> str:
    """A named dot for everything of which both numbers are known.

    Parameters
    ----------
    names, x, y
        What to draw.
    x_title, y_title
        Names of the numbers.
    percent_x, percent_y
        Whether they are shares.

    Returns
    -------
    str
        SVG; empty if there is nothing to draw.
    """
    known = [(name, a, b) for name, a, b in zip(names, x, y, strict=True) if a is not None and b is not None]
    if not known:
        return ""
    (x0, x1), (y0, y1) = (_range([entry[k] for entry in known]) for k in (1, 2))  # type: ignore[misc]
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def across(value: float) -> float:
        return _LEFT + (right - _LEFT) * (value - x0) / (x1 - x0)

    def up(value: float) -> float:
        return bottom - (bottom - _TOP - 6) * (value - y0) / (y1 - y0)

    def shown(value: float, as_percent: bool) -> str:
        return f"{100 * value:g}%" if as_percent else number(value)

    parts = []
    for value in ticks(y0, y1, 4):
        parts.append(f'<line class="gl" x1="{_LEFT}" x2="{right}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        text = shown(value, percent_y)
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{up(value) + 3.5:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<text class="title" x="4" y="9">{escape(y_title)}</text>')
    marks = ticks(x0, x1)
    parts += _x_axis([shown(mark, percent_x) for mark in marks], [across(mark) for mark in marks], x_title)
    dots = [(across(a), up(b)) for _, a, b in known]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    for (name, a, b), (place_x, place_y) in zip(known, dots, strict=True):
        tip = f"{name}: {x_title} {shown(a, percent_x)}, {y_title} {shown(b, percent_y)}"
        centre = f'cx="{place_x:.1f}" cy="{place_y:.1f}"'
        parts.append(f'<circle class="dot-mark" {centre} r="4.5"><title>{escape(tip)}</title></circle>')
        text = _short(name)
        at_x, at_y, anchor = _label_place(place_x, place_y, text, taken)
        parts.append(f'<text class="name" x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')
    return _svg(parts, f"{y_title} against {x_title} of {', '.join(names)}")


def _label_place(
    x: float, y: float, text: str, taken: list[tuple[float, float, float, float]]
) -> tuple[float, float, str]:
    """Where a dot's label goes (x, y, anchor): the first free place around the dot; it is noted as taken."""
    width = 6.0 * len(text)
    starts = {"start": 0.0, "middle": -width / 2, "end": -width}
    beside = [(9, 4, "start"), (-9, 4, "end"), (0, -9, "middle"), (0, 16, "middle")]
    corners = [(7, -8, "start"), (-7, -8, "end"), (7, 16, "start"), (-7, 16, "end")]
    found = None
    for dx, dy, anchor in (*beside, *corners):
        left, top = x + dx + starts[anchor], y + dy - 9
        box = (left, top, left + width, top + 11)
        free = all(box[2] < o[0] or o[2] < box[0] or box[3] < o[1] or o[3] < box[1] for o in taken)
        inside = box[0] >= _LEFT - 2 and box[2] <= _WIDTH and box[1] >= _TOP and box[3] <= _HEIGHT - _BOTTOM
        if found is None or (free and inside):
            found = (x + dx, y + dy, anchor), box
        if free and inside:
            break
    assert found is not None
    taken.append(found[1])
    return found[0]


def matrix(names: Sequence[str], values: np.ndarray, title: str) -> str:
    """Numbers in 0..1 between all pairs, the stronger the colour the higher.

    Parameters
    ----------
    names
        n of them.
    values
        (n, n) float64; NaN is not drawn. The diagonal is left out.
    title
        Name of the numbers.

    Returns
    -------
    str
        SVG; empty for fewer than two names.
    """
    n = len(names)
    if n < 2 or not np.isfinite(values[~np.eye(n, dtype=bool)]).any():
        return ""
    texts = [_short(name) for name in names]
    left = 16 + 6.0 * max(map(len, texts))
    size = min(46.0, (_WIDTH - left - 30) / n)
    top = 26 + 4.6 * max(map(len, texts))
    parts = [f'<text class="title" x="4" y="9">{escape(title)}</text>']
    for k, text in enumerate(texts):
        middle = (k + 0.5) * size
        x, y = left + middle - 2, top - 6
        parts.append(
            f'<text class="name" x="{left - 8:.1f}" y="{top + middle + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        )
        parts.append(f'<text class="name" transform="translate({x:.1f} {y:.1f}) rotate(-42)">{escape(text)}</text>')
    for i, j in itertools.product(range(n), repeat=2):
        value = float(values[i, j]) if i != j else math.nan
        x, y = left + j * size, top + i * size
        parts += _heat(x, y, size, value, f"{names[i]} and {names[j]}: {value:.3f}")
    return _svg(parts, f"{title}, for {n} methods", _WIDTH, math.ceil(top + n * size + 8))


def _heat(x: float, y: float, size: float, value: float, tip: str) -> list[str]:
    """A square with its number."""
    box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{size - 2:.1f}" height="{size - 2:.1f}" rx="2"'
    if not math.isfinite(value):
        return [f'<rect class="heat-none" {box}/>']
    strength = min(max(value, 0.0), 1.0)
    opacity = f'fill-opacity="{0.06 + 0.94 * strength:.3f}"'
    kind = "heat-text strong" if strength > 0.62 else "heat-text"
    place = f'x="{x + size / 2:.1f}" y="{y + size / 2 + 4:.1f}"'
    return [
        f'<rect class="heat-ground" {box}/>',
        f'<rect class="heat" {box} {opacity}><title>{escape(tip)}</title></rect>',
        f'<text class="{kind}" {place} text-anchor="middle">{value:.2f}</text>',
    ]


def ridges(
    names: Sequence[str], counts: np.ndarray, edges: np.ndarray, medians: Sequence[float | None], title: str
) -> str:
    """Distributions one below the other on one logarithmic axis, each with its median.

    Parameters
    ----------
    names
        n of them.
    counts
        (n, b) how many fall into each bin.
    edges
        (b + 1,) edges of the bins, above 0, of equal width in the logarithm.
    medians
        n numbers, None where there is nothing.
    title
        Name of the number, with its unit.

    Returns
    -------
    str
        SVG; empty if there is nothing to draw.
    """
    if not counts.size or not counts.sum():
        return ""
    texts = [_short(name) for name in names]
    left, right = 16 + 6.0 * max(map(len, texts)), _WIDTH - _RIGHT
    step, top = 34.0, 18.0
    height = math.ceil(top + step * len(names) + _BOTTOM)
    low, high = math.log10(edges[0]), math.log10(edges[-1])

    def across(value: float) -> float:
        return left + (right - left) * (math.log10(value) - low) / (high - low)

    bottom = height - _BOTTOM
    parts = [f'<line class="axis" x1="{left:.1f}" x2="{right}" y1="{bottom}" y2="{bottom}"/>']
    for power in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            if edges[0] <= value <= edges[-1]:
                x = across(value)
                parts.append(f'<line class="gl" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
                parts.append(
                    f'<text class="tick" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{number(value)}</text>'
                )
    middle = (left + right) / 2
    parts.append(f'<text class="title" x="{middle:.1f}" y="{height - 6}" text-anchor="middle">{escape(title)}</text>')
    place = np.linspace(left, right, counts.shape[1] + 1)
    centre = (place[:-1] + place[1:]) / 2
    for k, (text, row, median) in enumerate(zip(texts, counts, medians, strict=True)):
        base = top + (k + 1) * step
        parts.append(
            f'<text class="name" x="{left - 8:.1f}" y="{base - 6:.1f}" text-anchor="end">{escape(text)}</text>'
        )
        if not row.sum() or median is None:
            continue
        # Every distribution fills its own row: cells are many or few, shapes compare.
        levels = base - (step - 5) * row / row.max()
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(centre.tolist(), levels.tolist(), strict=True))
        tip = f"{names[k]}: {int(row.sum()):,} cells, median {number(median)}"
        path = f"M{left:.1f} {base:.1f}L{line}L{right} {base:.1f}z"
        parts.append(f'<path class="ridge" d="{path}"><title>{escape(tip)}</title></path>')
        x = across(min(max(median, edges[0]), edges[-1]))
        parts.append(
            f'<line class="ridge-median" x1="{x:.1f}" x2="{x:.1f}" y1="{base - step + 8:.1f}" y2="{base:.1f}"/>'
        )
    return _svg(parts, f"Distribution of {title} of {', '.join(names)}", _WIDTH, height)


def colour_bar(low: float, high: float, unit: str, stops: np.ndarray) -> str:
    """The key of a map: colours from `low` to `high`."""
    colours = "".join(
        f'<stop offset="{k / (len(stops) - 1):.3f}" stop-color="rgb({r},{g},{b})"/>'
        for k, (r, g, b) in enumerate(stops)
    )
    key = f"key{hash_text(unit):x}"
    label = f"from {number(low)} to {number(high)} {escape(unit)}"
    return (
        f'<svg class="key" viewBox="0 0 260 30" role="img" aria-label="{label}">'
        f'<defs><linearGradient id="{key}">{colours}</linearGradient></defs>'
        f'<rect x="0" y="2" width="260" height="9" rx="2" fill="url(#{key})"/>'
        f'<text class="tick" x="0" y="25">{number(low)}</text>'
        f'<text class="tick" x="130" y="25" text-anchor="middle">{escape(unit)}</text>'
        f'<text class="tick" x="260" y="25" text-anchor="end">{number(high)}</text></svg>'
    )


def hash_text(text: str) -> int:
    """A number for a text that is the same in every run (Python's own hash is not)."""
    import zlib

    return zlib.crc32(text.encode())


def signed_matrix(
    rows: Sequence[str], columns: Sequence[str], values: np.ndarray, title: str, *, digits: int = 1
) -> str:
    """Numbers around zero between two lists of names: one colour above, another below, the stronger the farther.

    Parameters
    ----------
    rows, columns
        n and m names.
    values
        (n, m) float64; NaN is not drawn.
    title
        Name of the numbers.
    digits
        Decimals to show.

    Returns
    -------
    str
        SVG; empty if there is no number.
    """
    known = np.isfinite(values)
    if not known.any():
        return ""
    n, m = values.shape
    limit = max(float(np.abs(values[known]).max()), 1e-9)
    row_texts, column_texts = [_short(name) for name in rows], [_short(name) for name in columns]
    left = 16 + 6.0 * max(map(len, row_texts))
    size = min(46.0, (_WIDTH - left - 30) / m)
    top = 26 + 4.6 * max(map(len, column_texts))
    parts = [f'<text class="title" x="4" y="9">{escape(title)}</text>']
    for k, text in enumerate(row_texts):
        y = top + (k + 0.5) * size + 4
        parts.append(f'<text class="name" x="{left - 8:.1f}" y="{y:.1f}" text-anchor="end">{escape(text)}</text>')
    for k, text in enumerate(column_texts):
        place = f"translate({left + (k + 0.5) * size - 2:.1f} {top - 6:.1f}) rotate(-42)"
        parts.append(f'<text class="name" transform="{place}">{escape(text)}</text>')
    for i, j in itertools.product(range(n), range(m)):
        x, y, value = left + j * size, top + i * size, float(values[i, j])
        box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{size - 2:.1f}" height="{size - 2:.1f}" rx="2"'
        if not known[i, j]:
            parts.append(f'<rect class="heat-none" {box}/>')
            continue
        strength = 0.05 + 0.95 * abs(value) / limit
        tip = f"{rows[i]} and {columns[j]}: {value:.3g}"
        kind = "bar" if value >= 0 else "bar-bad"
        parts.append(f'<rect class="heat-ground" {box}/>')
        parts.append(f'<rect class="{kind}" {box} fill-opacity="{strength:.3f}"><title>{escape(tip)}</title></rect>')
        if size >= 26:
            strong = " strong" if strength > 0.62 else ""
            place = f'x="{x + size / 2:.1f}" y="{y + size / 2 + 4:.1f}"'
            text = f"{round(value, digits) + 0.0:.{digits}f}"  # no -0
            parts.append(f'<text class="heat-text{strong}" {place} text-anchor="middle">{text}</text>')
    return _svg(parts, f"{title}: {n} by {m}", _WIDTH, math.ceil(top + n * size + 8))


def curves(
    x: Sequence[float], lines: Mapping[str, Sequence[float]], colours: Sequence[str], x_title: str, y_title: str
) -> str:
    """Several named curves around 1, on a logarithmic axis.

    Parameters
    ----------
    x
        n ascending numbers.
    lines
        Name → n numbers above 0; others are left out.
    colours
        One a line.
    x_title, y_title
        Names of the numbers.

    Returns
    -------
    str
        SVG; empty if there is nothing to draw.
    """
    known = np.array([[value if value > 0 else math.nan for value in line] for line in lines.values()], dtype=float)
    if not known.size or not np.isfinite(known).any():
        return ""
    reach = max(float(np.nanmax(np.abs(np.log2(known)))) * 1.08, 0.25)
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def up(value: float) -> float:
        return _TOP + 6 + (bottom - _TOP - 6) * (0.5 - math.log2(value) / (2 * reach))

    def across(value: float) -> float:
        return _LEFT + (right - _LEFT) * (value - x[0]) / ((x[-1] - x[0]) or 1)

    whole = math.floor(reach)
    step = max(1, math.ceil(whole / 2))
    marks = [2.0**k for k in range(-whole, whole + 1) if k % step == 0] if whole else [2**-reach, 1.0, 2**reach]
    parts = []
    for value in marks:
        parts.append(f'<line class="gl" x1="{_LEFT}" x2="{right}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{up(value) + 3.5:.1f}" text-anchor="end">{value:.2g}</text>'
        )
    parts.append(f'<line class="mark" x1="{_LEFT}" x2="{right}" y1="{up(1):.1f}" y2="{up(1):.1f}"/>')
    parts.append(f'<text class="title" x="4" y="9">{escape(y_title)}</text>')
    shown = ticks(float(x[0]), float(x[-1]))
    parts += _x_axis([number(mark) for mark in shown], [across(mark) for mark in shown], x_title)
    for (name, _), line, colour in zip(lines.items(), known, colours, strict=True):
        points = [f"{across(a):.1f},{up(b):.1f}" for a, b in zip(x, line, strict=True) if math.isfinite(b)]
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.8">'
            f"<title>{escape(name)}</title></polyline>"
        )
    return _svg(parts, f"{y_title} of {', '.join(lines)}")


def network(
    names: Sequence[str], groups: Sequence[int], sizes: Sequence[float], weights: np.ndarray, title: str
) -> str:
    """Nodes on a circle, a line between two as strong as their weight.

    Parameters
    ----------
    names
        n of them.
    groups
        Kind of each node, 0 or 1: a disc or a square.
    sizes
        How large each is; areas are drawn alike.
    weights
        (n, n) symmetric, 0 or more.
    title
        What it is.

    Returns
    -------
    str
        SVG; empty for fewer than two nodes.
    """
    n = len(names)
    if n < 2:
        return ""
    width, height = _WIDTH, _WIDTH - 60
    radius, middle_x, middle_y = height / 2 - 40, width / 2, height / 2 + 4
    angle = 2 * np.pi * np.arange(n) / n - np.pi / 2
    x, y = middle_x + radius * np.cos(angle), middle_y + radius * np.sin(angle)
    strongest = max(float(weights.max(initial=0)), 1e-9)
    parts = [f'<text class="title" x="4" y="9">{escape(title)}</text>']
    pairs = [(float(weights[i, j]), i, j) for i, j in itertools.combinations(range(n), 2) if weights[i, j] > 0]
    for weight, i, j in sorted(pairs):
        share = weight / strongest
        parts.append(
            f'<line x1="{x[i]:.1f}" y1="{y[i]:.1f}" x2="{x[j]:.1f}" y2="{y[j]:.1f}" stroke="var(--accent)" '
            f'stroke-width="{0.4 + 5 * share**2:.2f}" stroke-opacity="{0.08 + 0.8 * share**2:.2f}">'
            f"<title>{escape(names[i])} and {escape(names[j])}: {weight:.2f}</title></line>"
        )
    largest = max(max(sizes), 1e-9)
    for k, name in enumerate(names):
        half = 4 + 9 * math.sqrt(sizes[k] / largest)
        tip = f"<title>{escape(name)}: {number(sizes[k])} cells</title>"
        if groups[k] == 0:
            parts.append(f'<circle class="dot-mark" cx="{x[k]:.1f}" cy="{y[k]:.1f}" r="{half:.1f}">{tip}</circle>')
        else:
            box = f'x="{x[k] - half:.1f}" y="{y[k] - half:.1f}" width="{2 * half:.1f}" height="{2 * half:.1f}"'
            parts.append(f'<rect class="bar-bad" {box} rx="2">{tip}</rect>')
        cosine = float(np.cos(angle[k]))
        anchor = "middle" if abs(cosine) < 0.2 else "start" if cosine > 0 else "end"
        reach = half + (6 if abs(cosine) >= 0.2 else 9)
        at_x, at_y = x[k] + reach * cosine, y[k] + reach * float(np.sin(angle[k])) + 4
        parts.append(
            f'<text class="name" x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}">{escape(_short(name))}</text>'
        )
    return _svg(parts, f"{title}: {n} nodes", width, height)


def dots_by_group(groups: Mapping[str, Sequence[float]], title: str) -> str:
    """A dot a number, group beside group, with the groups' means.

    Parameters
    ----------
    groups
        Name → numbers.
    title
        Name of the numbers.

    Returns
    -------
    str
        SVG; empty if there is no number.
    """
    every = [value for values in groups.values() for value in values if math.isfinite(value)]
    if not every:
        return ""
    low, high = min(every), max(every)
    room = 0.15 * (high - low) or 0.1 * abs(high) or 0.1
    low, high = low - room, high + room
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def up(value: float) -> float:
        return bottom - (bottom - _TOP - 6) * (value - low) / (high - low)

    parts = []
    for value in ticks(low, high, 4):
        parts.append(f'<line class="gl" x1="{_LEFT}" x2="{right}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{up(value) + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text class="title" x="4" y="9">{escape(title)}</text>')
    step = (right - _LEFT) / len(groups)
    for k, values in enumerate(groups.values()):
        middle = _LEFT + (k + 0.5) * step
        finite = [value for value in values if math.isfinite(value)]
        for q, value in enumerate(finite):
            x = middle + min(0.25 * step, 40) * ((q + 0.5) / len(finite) - 0.5) * 2
            parts.append(f'<circle class="dot-mark" cx="{x:.1f}" cy="{up(value):.1f}" r="4"/>')
        if finite:
            y = up(sum(finite) / len(finite))
            half = min(0.3 * step, 48)
            parts.append(
                f'<line class="whisker" x1="{middle - half:.1f}" x2="{middle + half:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
    places = [_LEFT + (k + 0.5) * step for k in range(len(groups))]
    parts += _x_axis([_short(name) for name in groups], places, "")
    return _svg(parts, f"{title} in {', '.join(groups)}")
