"""Figures of domains (matplotlib). Every function returns a figure and leaves matplotlib's own state alone."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.transforms import round_length
from cellquilt.domains.analysis.architecture import Architecture
from cellquilt.domains.analysis.dendrogram import Dendrogram
from cellquilt.domains.analysis.genes import GeneStatistics
from cellquilt.domains.maps import NO_DOMAIN, Raster, domain_colours, domain_raster
from cellquilt.spatial.slides import natural_order, slides

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Nearly black; the report puts its page's own colours in their place.
INK, SOFT, GRID, CARD = "#010203", "#5b6671", "#dde2e7", "#fffffd"
#: From less over nothing to more; safe for colour-blind readers.
_DIVERGING = "PuOr_r"
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.labelcolor": SOFT,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "figure.facecolor": "white",
    "font.size": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
}


def _styled[**P, R](draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in the package's style."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            import matplotlib
        except ModuleNotFoundError:
            raise CellquiltError(
                "package-missing", "figures need the package matplotlib", "install cellquilt[domains]"
            ) from None
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
            return draw(*args, **kwargs)

    return styled


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@_styled
def domain_maps(
    adatas: "AnnData | Sequence[AnnData]",
    domain_key: str = "domain",
    slide_key: str | None = None,
    *,
    columns: int = 3,
    colours: dict[str, str] | None = None,
) -> "Figure":
    """Maps of all slides, each with a scale bar; a domain has one colour on all of them.

    Parameters
    ----------
    adatas
        Tables with domains and ``obsm["spatial"]`` in µm.
    domain_key, slide_key
        Columns of `obs`; without `slide_key` each table is a slide.
    columns
        Maps in a row.
    colours
        Of the domains; default: `domain_colours` of all of them in natural order.
    """
    found = [
        (slide.name, slide.domains, domain_raster(spatial(slide.table)[slide.rows], slide.codes))
        for slide in slides(adatas, domain_key, slide_key)
    ]
    names = sorted({name for _, own, _ in found for name in own})
    colours = colours or domain_colours([names[k] for k in natural_order(names)])
    across = min(columns, len(found))
    down = -(-len(found) // across)
    figure = _figure(3.1 * across, 3.3 * down + 0.2)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    for axis, (title, own, raster) in zip(axes, found, strict=False):
        draw_map(axis, raster, [colours[name] for name in own])
        axis.set_title(title)
    _legend(figure, colours, "outside lower center")
    return figure


def spatial(table: "AnnData") -> NDArray[np.float64]:
    """(n, 2) coordinates of a table's cells in µm."""
    if "spatial" not in table.obsm:
        raise CellquiltError(
            "coordinates-missing", 'obsm has no "spatial"', "give the cells' centres there, (n_cells, 2) in µm"
        )
    return np.asarray(table.obsm["spatial"], dtype=np.float64)[:, :2]


def draw_map(axis: "Axes", raster: Raster, colours: Sequence[str]) -> None:
    """Draw a slide and a scale bar into axes."""
    axis.imshow(raster.colours(colours), interpolation="nearest")
    axis.set_axis_off()
    rows, width = raster.codes.shape
    length = round_length(width * raster.um / 4)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    bar = length / raster.um
    y = rows + 0.03 * max(rows, width)
    axis.plot([0, bar], [y, y], color=INK, linewidth=2, solid_capstyle="butt", clip_on=False)
    axis.text(bar + 0.02 * width, y, text, va="center", fontsize=8)
    axis.set_ylim(y + 0.03 * max(rows, width), -0.5)


def _legend(figure: "Figure", colours: dict[str, str], where: Any) -> None:
    """The domains' colours, in as many columns as there is room for; the figure grows by their rows."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=_short(name, 40)) for name, colour in colours.items()]
    # A colour's box and the room beside it are half an inch wide.
    room = figure.get_figwidth() / (0.5 + _width(colours))
    columns = min(max(int(room), 1), len(colours))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(colours) // columns))
    figure.legend(handles=handles, loc=where, ncols=columns, handlelength=1.2, columnspacing=1.2)


def _width(names: Iterable[str]) -> float:
    """About the inches that the longest name takes, of at most 40 letters."""
    return 0.072 * max((min(len(name), 40) for name in names), default=0)


@_styled
def proportions(found: "pd.DataFrame", colours: dict[str, str] | None = None) -> "Figure":
    """Shares of the domains as a bar a slide, slides of one condition together.

    Parameters
    ----------
    found
        What `analysis.proportions` returns.
    colours
        Of the domains.
    """
    domains = list(dict.fromkeys(found["domain"]))
    colours = colours or domain_colours(domains)
    shares = found.pivot(index="slide", columns="domain", values="share").loc[
        list(dict.fromkeys(found["slide"])), domains
    ]
    condition = None
    if "condition" in found:
        condition = found.drop_duplicates("slide").set_index("slide")["condition"]
        shares = shares.loc[condition.loc[shares.index].sort_values(kind="stable").index]
    gaps = np.zeros(len(shares))
    if condition is not None:
        of_row = condition.loc[shares.index].to_numpy()
        gaps[1:] = 0.7 * (of_row[1:] != of_row[:-1])
    y = np.arange(len(shares)) + np.cumsum(gaps)
    figure = _figure(7.6, 0.7 + 0.27 * (y[-1] + 1))
    axis = figure.subplots()
    left = np.zeros(len(shares))
    for name in domains:
        width = shares[name].fillna(0).to_numpy()
        axis.barh(y, width, 0.82, left=left, color=colours[name], edgecolor=CARD, linewidth=0.5)
        left += width
    axis.set_yticks(y, [_short(name, 26) for name in shares.index])
    axis.set_ylim(y[-1] + 0.6, -0.6)
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axis.set_xlabel("share of the slide's cells")
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    if condition is not None:
        for name in dict.fromkeys(of_row):
            place = y[of_row == name]
            axis.text(1.015, place.mean(), _short(name, 22), va="center", transform=axis.get_yaxis_transform())
            if len(place) > 1:
                axis.plot(
                    [1.006] * 2, [place[0] - 0.4, place[-1] + 0.4], color=SOFT, linewidth=1,
                    transform=axis.get_yaxis_transform(), clip_on=False,
                )  # fmt: skip
    _legend(figure, {name: colours[name] for name in domains}, "outside upper center")
    return figure


@_styled
def shares_by_condition(found: "pd.DataFrame") -> "Figure":
    """A dot a slide, by domain and condition, and the conditions' means.

    Parameters
    ----------
    found
        What `analysis.proportions` returns, with conditions.
    """
    domains, conditions = list(dict.fromkeys(found["domain"])), sorted(found["condition"].unique())
    width = 0.8 / len(conditions)
    styles = [(colour, marker) for marker in "o^sD" for colour in (SOFT, "#d6457a", "#b58900", "#3f9fd0")]
    figure = _figure(min(max(4.5, 0.5 + 0.33 * len(domains) * max(len(conditions), 2)), 14), 3.1)
    axis = figure.subplots()
    for c, condition in enumerate(conditions):
        own = found[found["condition"] == condition]
        table = own.pivot(index="slide", columns="domain", values="share")[domains].to_numpy()
        x = np.arange(len(domains)) + (c - (len(conditions) - 1) / 2) * width
        # Dots side by side, so that equal ones show.
        jitter = np.linspace(-0.25, 0.25, len(table))[:, None] * width if len(table) > 1 else np.zeros((1, 1))
        colour, marker = styles[c % len(styles)]
        axis.scatter(x + jitter, table, s=14, color=colour, marker=marker, linewidths=0, label=condition, zorder=3)
        mean = np.nanmean(table, axis=0)
        axis.hlines(mean, x - 0.38 * width, x + 0.38 * width, color=colour, linewidth=2, zorder=4)
    long = _width(domains) > 0.33 * max(len(conditions), 2)
    axis.set_xticks(
        np.arange(len(domains)), [_short(name, 24) for name in domains], rotation=60 if long else 0,
        ha="right" if long else "center", rotation_mode="anchor",
    )  # fmt: skip
    axis.set_xlim(-0.6, len(domains) - 0.4)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(axis="x", length=0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axis.set_ylabel("share of a slide's cells")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=min(6, len(conditions)))
    return figure


@_styled
def adjacency(found: Architecture, slide: str | None = None) -> "Figure":
    """Edges between domains over those expected at random, as a heat map on a logarithmic scale."""
    ratio = found.ratio(slide)
    k = len(found.domains)
    with np.errstate(divide="ignore"):
        logs = np.clip(np.log2(ratio), -4, 4)
    names = [_short(name, 40) for name in found.domains]
    figure = _figure(1.9 + 0.44 * k + _width(names), 0.4 + 0.44 * k + _width(names))
    axis = figure.subplots()
    image = axis.imshow(logs, cmap=_DIVERGING, vmin=-4, vmax=4)
    axis.set_xticks(range(k), names, rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(k), names)
    _plain(axis)
    if k <= 16:
        for (i, j), value in np.ndenumerate(ratio):
            if np.isfinite(value):
                small = "0" if value == 0 else "<.01" if value < 0.005 else f"{value:.2f}".lstrip("0")
                text = f"{value:.1f}" if value >= 0.995 else small
                axis.text(j, i, text, ha="center", va="center", fontsize=7, color=_on(image, float(logs[i, j])))
    bar = _bar(axis, image, "edges, observed / expected", [-4, -2, 0, 2, 4])
    bar.ax.set_yticklabels(["≤ 1/16", "1/4", "1", "4", "≥ 16"])
    return figure


def _bar(axis: "Axes", image: Any, label: str, ticks: list[float] | None = None) -> Any:
    """The key of a heat map, as high as it."""
    bar = axis.figure.colorbar(image, cax=axis.inset_axes((1.03, 0, 0.035, 1)), ticks=ticks)
    bar.set_label(label)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return bar


def _plain(axis: "Axes") -> None:
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _on(image: Any, value: float) -> str:
    """Black or white, whichever reads better on a heat map's colour."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"


@_styled
def paga(found: Architecture, slide: str | None = None, colours: dict[str, str] | None = None) -> "Figure":
    """Domains as dots, as large as they have cells, joined by lines as thick as PAGA's connectivity.

    Domains that border on each other stand beside each other on the circle.
    """
    colours = colours or domain_colours(found.domains)
    strength = found.paga(slide)
    sizes = (found.sizes if slide is None else found.sizes[[found.slides.index(slide)]]).sum(axis=0)
    order = _around(strength)
    k = len(order)
    angle = np.empty(k)
    angle[order] = np.pi / 2 - 2 * np.pi * np.arange(k) / k
    x, y = np.cos(angle), np.sin(angle)
    names = [_short(name, 24) for name in found.domains]
    width, height, inch = 3.4 + 2 * _width(names), 3.7, 1 / 1.3
    figure = _figure(width, height)
    figure.set_layout_engine("none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(-width / 2 * inch, width / 2 * inch)
    axis.set_ylim(-height / 2 * inch, height / 2 * inch)
    top = max(float(strength.max()), 1e-9)
    for i, j in zip(*np.nonzero(np.triu(strength) >= 0.02 * top), strict=True):
        axis.plot(x[[i, j]], y[[i, j]], color=SOFT, linewidth=0.4 + 6 * strength[i, j] / top, alpha=0.75, zorder=1)
    axis.scatter(
        x, y, s=60 + 540 * np.sqrt(sizes / max(int(sizes.max()), 1)), zorder=2,
        c=[colours[name] for name in found.domains], edgecolors=CARD, linewidths=1.2,
    )  # fmt: skip
    for name, right, up in zip(names, x.tolist(), y.tolist(), strict=True):
        side = "left" if right > 0.15 else "right" if right < -0.15 else "center"
        axis.text(1.2 * right, 1.2 * up, name, ha=side, va="center")
    axis.set_axis_off()
    return figure


def _around(strength: NDArray[np.float64]) -> NDArray[np.int64]:
    """Order around a circle in which strongly joined ones are near: by angle in the Laplacian's first two vectors."""
    degree = strength.sum(axis=1)
    if len(strength) < 4 or not degree.any():
        return np.arange(len(strength))
    scale = 1 / np.sqrt(np.maximum(degree, 1e-12))
    _, vectors = np.linalg.eigh(np.eye(len(strength)) - scale[:, None] * strength * scale)
    # The sign of an eigenvector is arbitrary: its largest entry shall be positive.
    found = vectors[:, 1:3] * np.sign(vectors[np.abs(vectors[:, 1:3]).argmax(axis=0), [1, 2]])
    return np.argsort(np.round(np.arctan2(found[:, 1], found[:, 0]), 9), kind="stable")


@_styled
def genes(found: GeneStatistics, top: int = 4) -> "Figure":
    """The genes that set each domain apart, as a dot plot: size is how many cells have them, colour how much more.

    Parameters
    ----------
    found
        What `analysis.gene_statistics` returns.
    top
        Genes of each domain.
    """
    table = found.by_domain()
    chosen = table[(table["difference"] > 0) & (table["rank"] <= top)]
    names = list(dict.fromkeys(chosen["gene"]))
    if not names:
        names = list(dict.fromkeys(table["gene"]))[:top]
    place = {gene: k for k, gene in enumerate(found.genes)}
    column = [place[name] for name in names]
    k = len(found.domains)
    figure = _figure(1.7 + 0.23 * len(names) + _width(found.domains), 1.7 + 0.25 * k)
    axis = figure.subplots()
    difference = found.difference[:, column]
    limit = float(np.nanmax(np.abs(difference), initial=1e-9))
    x, y = np.meshgrid(np.arange(len(names)), np.arange(k))
    share = np.nan_to_num(found.share_in[:, column])
    dots = axis.scatter(
        x.ravel(), y.ravel(), s=(2 + 92 * share).ravel(), c=difference.ravel(), cmap=_DIVERGING,
        vmin=-limit, vmax=limit, linewidths=0.3, edgecolors=SOFT,
    )  # fmt: skip
    axis.set_xticks(range(len(names)), [_short(name, 16) for name in names], rotation=90)
    axis.set_yticks(range(k), [_short(name, 40) for name in found.domains])
    axis.set_xlim(-0.7, len(names) - 0.3)
    axis.set_ylim(k - 0.4, -0.6)
    _plain(axis)
    _bar(axis, dots, "difference of\nmean log1p")
    handles = [
        axis.scatter([], [], s=2 + 92 * value, color=SOFT, label=f"{100 * value:g} %") for value in (0.1, 0.5, 1)
    ]
    figure.legend(
        handles=handles, loc="outside upper right", title="cells with the gene", ncols=3, title_fontsize=8.5,
    )  # fmt: skip
    return figure


@_styled
def pathways(found: "pd.DataFrame") -> "Figure":
    """Scores of gene sets in domains as a heat map.

    Parameters
    ----------
    found
        Domains × sets: `Pathways.by_domain`.
    """
    values = found.to_numpy(dtype=np.float64).T
    limit = float(np.nanmax(np.abs(values), initial=1e-9))
    n, k = values.shape
    figure = _figure(1.2 + 0.36 * k + _width(found.columns), 0.9 + max(0.26 * n, 0.9) + _width(found.index))
    axis = figure.subplots()
    image = axis.imshow(values, cmap=_DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    axis.set_xticks(
        range(k), [_short(name, 40) for name in found.index], rotation=60, ha="right", rotation_mode="anchor"
    )
    axis.set_yticks(range(n), [_short(name, 40) for name in found.columns])
    _plain(axis)
    _bar(axis, image, "score, slide's mean taken off")
    return figure


@_styled
def dendrogram(found: Dendrogram, colours: dict[str, str] | None = None) -> "Figure":
    """The tree of domains, the root to the left."""
    k = len(found.domains)
    colours = colours or domain_colours(found.domains)
    figure = _figure(4.8 + _width(found.domains), 0.8 + 0.25 * k)
    axis = figure.subplots()
    place = [(0.0, float(row)) for row in range(k)]
    for a, b, height, _ in found.links.tolist():
        (xa, ya), (xb, yb) = place[int(a)], place[int(b)]
        axis.plot([xa, height, height, xb], [ya, ya, yb, yb], color=SOFT, linewidth=1, solid_joinstyle="miter")
        place.append((height, (ya + yb) / 2))
    top = max([x for x, _ in place], default=0.0) or 1.0
    axis.scatter(np.zeros(k), np.arange(k), s=34, c=[colours.get(name, NO_DOMAIN) for name in found.domains], zorder=3)
    axis.set_xlim(1.05 * top, -0.02 * top)
    axis.set_ylim(k - 0.4, -0.6)
    axis.yaxis.tick_right()
    axis.set_yticks(range(k), [_short(name, 40) for name in found.domains])
    axis.tick_params(axis="y", length=0, pad=6)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("distance at which they merge")
    return figure


def _short(name: object, most: int) -> str:
    """A name of at most so many letters; names often differ at their end, so what is left out is the middle."""
    text = str(name)
    end = most // 2
    return text if len(text) <= most else f"{text[: most - end - 1]}…{text[-end:]}"
