"""From the showdown's stages to numbers, and from numbers to its page."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from showdown_measures import (
    Result,
    choose_windows,
    counting,
    differing,
    doubles,
    found_at_borders,
    inside,
    matched,
    placement,
    read_result,
    read_transcripts,
    same_but_for_order,
)

if TYPE_CHECKING:
    from showdown import Showdown

HERE = Path(__file__).resolve().parent
NEAR_UM = 10.0
_WINDOW_UM, _WINDOWS = 75.0, 3
_NUCLEI, _CELLS = "nuclei", "cells"


def measure(showdown: "Showdown") -> dict[str, Any]:
    """Everything that the page shows, as plain data: costs of the stages, and what the results are worth."""
    from showdown import DIAMETER_PX, OURS, OVERLAP_PX, PEER, PIXEL_UM, OurRun, PeerRun

    state = showdown.state
    size = (showdown.size.width_px,) * 2
    data: dict[str, Any] = {key: state[key] for key in ("size", "date", "machine", "input")}
    data |= {
        "loads": [state["loads.begin"][0], state["loads.end"][0]],
        "versions": {"cellquilt": _version(), **state["ours.versions"]},
        "peer_versions": state.get("peer.versions"),
        "setup": {
            "width_px": showdown.size.width_px,
            "pixel_um": PIXEL_UM,
            "patch_px": showdown.size.patch_px,
            "peer_patch_px": showdown.size.peer_patch_px,
            "overlap_px": OVERLAP_PX,
            "patches_per_task": showdown.size.patches_per_task,
            "diameter_px": DIAMETER_PX,
        },
        "tools": {},
        "domains": {name: state[f"domains.{name}"] for name in ("ours", "novae") if f"domains.{name}" in state},
    }
    truth = _truth(showdown.bundle)
    whole = {OURS: read_result(OurRun(showdown, "whole").store(), "cell_boundaries", size)}
    stages = {OURS: "ours"}
    if "peer.grown" in state:
        whole[PEER] = read_result(PeerRun(showdown, "whole").store, "cellpose_boundaries", size)
        stages[PEER] = "peer"
    for tool, result in whole.items():
        if tool == OURS:
            killed = read_result(OurRun(showdown, "killed").store(), "cell_boundaries", size)
            grown = read_result(OurRun(showdown, "whole").store("grown"), "cell_boundaries", size)
        else:
            killed = read_result(PeerRun(showdown, "killed").store, "cellpose_boundaries", size)
            grown = read_result(PeerRun(showdown, "grown").store, "grown", size, "table_grown")
        stage = stages[tool]
        data["tools"][tool] = {
            "cost": state[f"{stage}.whole"],
            "kill": {
                **state[f"{stage}.killed"],
                "differs": differing(result, killed),
                "same_but_for_order": same_but_for_order(result, killed),
            },
            "grown_cost": state[f"{stage}.grown"],
            _NUCLEI: _worth(showdown, result, truth, truth[_NUCLEI], one_cell=tool == OURS),
            _CELLS: _worth(showdown, grown, truth, truth[_CELLS], one_cell=tool == OURS),
            "borders": found_at_borders(result.outlines, truth[_NUCLEI], result.sides, NEAR_UM / PIXEL_UM),
        }
    if PEER in whole:
        apart = read_result(PeerRun(showdown, "grown").store, "apart", size, "table_apart")
        data["tools"][PEER]["apart"] = _worth(showdown, apart, truth, truth[_CELLS], one_cell=False)
    data["pictures"] = _pictures(OurRun(showdown, "whole").store(), whole, truth[_NUCLEI], size)
    return data


def _version() -> str:
    from cellquilt import __version__

    return __version__


def _truth(bundle: Path) -> dict[str, Any]:
    from cellquilt.core.shapes import read_geoparquet

    cells, _, _ = read_geoparquet(bundle / "truth" / "cells.parquet")
    nuclei, _, _ = read_geoparquet(bundle / "truth" / "nuclei.parquet")
    return {_CELLS: np.asarray(cells, dtype=object), _NUCLEI: np.asarray(nuclei, dtype=object)}


def _worth(
    showdown: "Showdown", result: Result, truth: Mapping[str, Any], outlines: np.ndarray, *, one_cell: bool
) -> dict[str, Any]:
    """Counts and outlines against the truth; `outlines` are what the result's outlines should be.

    Whether a transcript is in several outlines is asked of all outlines. Where the tool gives a transcript one cell,
    its counts are made of one pair a transcript.
    """
    from cellquilt.simulate.scores import truth_scores
    from showdown import MIN_QV, PIXEL_UM

    transcripts = read_transcripts(showdown.bundle, result.genes.tolist(), MIN_QV, PIXEL_UM)
    pairs = inside(transcripts.xy, result.outlines)
    counts = counting(result, pairs)
    if one_cell:
        _, first = np.unique(pairs[0], return_index=True)
        pairs = (pairs[0][first], pairs[1][first])
    scores = truth_scores(result.outlines, showdown.bundle / "truth", nuclei=result.outlines, inner_only=True)
    found = scores["nuclei" if outlines is truth[_NUCLEI] else "cells"]
    return {
        "n_cells": len(result.outlines),
        **counts,
        "recounted": len(pairs[0]),
        **placement(pairs, transcripts.cell, matched(result.outlines, truth[_CELLS])),
        **doubles(result.outlines),
        "mean_iou": found["mean_iou"],
        "f1_0.5": found["f1_0.5"],
        "f1_0.75": found["f1_0.75"],
        "n_true": found["n_true"],
    }


# --- pictures


def _pictures(
    store: Path, results: Mapping[str, Result], nuclei: np.ndarray, size: tuple[int, int]
) -> list[dict[str, Any]]:
    """The same windows for all tools and the truth: pixels, outlines, patch borders."""
    from cellquilt.core.images import open_image
    from cellquilt.report import pictures
    from showdown import PIXEL_UM

    width = round(_WINDOW_UM / PIXEL_UM)
    windows = choose_windows([result.sides for result in results.values()], nuclei, size, width, _WINDOWS)
    image = open_image(store)
    drawn = []
    for y0, y1, x0, x1 in windows:
        pixels = image.read(y0, y1, x0, x1, channels=[0])
        shown = pictures.Shown((0,), ("DAPI",), (pictures.GREY,))
        grey = pictures.compose(pixels, pictures.limits(pixels), shown)
        box = shapely.box(x0, y0, x1, y1)

        def path(outlines: np.ndarray, box: Any = box, origin: tuple[float, float] = (x0, y0)) -> str:
            near = outlines[shapely.intersects(outlines, box)]
            return pictures.path_of(near, origin=origin)

        panels = [{"name": "truth", "cells": path(nuclei), "sides": ""}]
        for tool, result in results.items():
            lines = result.sides - np.array([x0, y0, x0, y0])
            sides = "".join(f"M{a:.0f} {b:.0f}L{c:.0f} {d:.0f}" for a, b, c, d in lines.tolist())
            panels.append({"name": tool, "cells": path(result.outlines), "sides": sides})
        drawn.append(
            {
                "uri": pictures.data_uri(grey, quality=70),
                "width": x1 - x0,
                "height": y1 - y0,
                "x_um": round(x0 * PIXEL_UM),
                "y_um": round(y0 * PIXEL_UM),
                "scale": pictures.scale_bar(x1 - x0, y1 - y0, PIXEL_UM),
                "panels": panels,
            }
        )
    return drawn


# --- rows


def rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All numbers of both tools, with how each was measured.

    Returns
    -------
    list of dict
        ``group``, ``name``, ``how``, ``values`` (tool → text), ``best`` (tools that are ahead; empty where nothing is
        asked or both are the same), ``numbers`` (tool → number or None).
    """
    from cellquilt.report.plots import number, percent

    def mb(value: float) -> str:
        return f"{value:,.0f} MB"

    def size(value: float) -> str:
        return f"{value / 1e6:,.1f} MB"

    def time(value: float) -> str:
        return f"{value:,.0f} s"

    nuclei, cells = ("nuclei",), ("cells",)
    once = "a count more than one a transcript: the table's sum, less the transcripts that lie in an outline"
    wrong = "of all counts, those in another cell than the transcript came from (from none included)"
    right = "of the transcripts of all true cells, those counted in theirs (each the other's best match by IoU)"
    table: list[tuple[str, str, tuple[str, ...], Any, str, str]] = [
        ("Outlines of nuclei", "nuclei found", (*nuclei, "n_cells"), number, "", "rows of the table"),
        ("Outlines of nuclei", "F1 at IoU 0.5", (*nuclei, "f1_0.5"), _three, "high",
         "against true nuclei that the slide's edge does not cut"),
        ("Outlines of nuclei", "F1 at IoU 0.75", (*nuclei, "f1_0.75"), _three, "high", "the same, stricter"),
        ("Outlines of nuclei", "mean IoU", (*nuclei, "mean_iou"), _three, "high", "best match of each true nucleus"),
        ("Patch borders", "recall near a border", ("borders", "recall_near"), percent, "high",
         f"true nuclei within {NEAR_UM:g} µm of a side of the tool's own patches, found at IoU 0.5"),
        ("Patch borders", "recall elsewhere", ("borders", "recall_far"), percent, "high", "all other true nuclei"),
        ("Patch borders", "nuclei twice", (*nuclei, "doubles"), number, "low",
         "pairs of outlines with overlap / smaller area of 0.5 and more"),
        ("Patch borders", "overlapping pairs", (*nuclei, "overlapping"), number, "low",
         "pairs of outlines that share more than 1 % of the smaller"),
        ("Transcripts in nuclei", "counted", (*nuclei, "counted"), number, "", "sum of the table"),
        ("Transcripts in nuclei", "counted twice", (*nuclei, "twice"), number, "low", once),
        ("Transcripts in nuclei", "contamination", (*nuclei, "contamination"), percent, "low", wrong),
        ("Transcripts in nuclei", "in their own cell", (*nuclei, "in_right_cell"), percent, "high", right),
        ("Transcripts in grown cells", "counted", (*cells, "counted"), number, "", "sum of the table"),
        ("Transcripts in grown cells", "counted twice", (*cells, "twice"), number, "low", once),
        ("Transcripts in grown cells", "overlapping pairs", (*cells, "overlapping"), number, "low", "as above"),
        ("Transcripts in grown cells", "contamination", (*cells, "contamination"), percent, "low", wrong),
        ("Transcripts in grown cells", "in their own cell", (*cells, "in_right_cell"), percent, "high", right),
        ("Transcripts in grown cells", "F1 at IoU 0.5", (*cells, "f1_0.5"), _three, "high", "against true cells"),
        ("Cost, uninterrupted", "time", ("cost", "wall_s"), time, "low", "by the clock, first process to last"),
        ("Cost, uninterrupted", "processor time", ("cost", "cpu_s"), time, "low",
         "user and system, all processes, from the kernel"),
        ("Cost, uninterrupted", "largest process", ("cost", "largest_mb"), mb, "low",
         "peak resident memory, from the kernel"),
        ("Cost, uninterrupted", "all processes together", ("cost", "together_mb"), mb, "low",
         "sum of proportional shares, looked at four times a second"),
        ("Cost, uninterrupted", "disk at the end", ("disk",), size, "low", "work and output, a hard link once"),
        ("Cost, uninterrupted", "disk at its most", ("cost", "peak_bytes"), size, "low", "looked at every 3 s"),
        ("Cost, uninterrupted", "of it the slide's store", ("cost", "store", 0), size, "low",
         "the SpatialData store that a user keeps"),
        ("Cost, uninterrupted", "files", ("files",), number, "low", "work and output"),
        ("Cost, uninterrupted", "files of the store", ("cost", "store", 1), number, "low", "what a user keeps"),
        ("Killed and resumed", "time to the kill", ("kill", "killed", "wall_s"), time, "", "from the start"),
        ("Killed and resumed", "time to resume", ("kill", "resumed", "wall_s"), time, "low",
         "from starting again to the end"),
        ("Killed and resumed", "processor time to resume", ("kill", "resumed", "cpu_s"), time, "low", "as above"),
    ]  # fmt: skip
    out = []
    tools = {name: _with_disk(tool) for name, tool in data["tools"].items()}
    for group, name, path, text, better, how in table:
        numbers = {tool: _at(of_tool, path) for tool, of_tool in tools.items()}
        values = {tool: text(value) for tool, value in numbers.items()}
        out.append({"group": group, "name": name, "how": how, "values": values, "numbers": numbers,
                    "best": _best(numbers, values, better)})  # fmt: skip
    return out


def _three(value: float) -> str:
    return f"{value:.3f}"


def _with_disk(tool: Mapping[str, Any]) -> dict[str, Any]:
    work, output = tool["cost"]["work"], tool["cost"]["output"]
    return {**tool, "disk": work[0] + output[0], "files": work[1] + output[1]}


def _at(tool: Mapping[str, Any], path: tuple[Any, ...]) -> Any:
    value: Any = tool
    for name in path:
        value = value[name]
    return value


def _best(numbers: Mapping[str, float], values: Mapping[str, str], better: str) -> list[str]:
    """Who is ahead by what is shown; nobody where that is the same."""
    if not better or len(numbers) < 2 or len(set(values.values())) == 1:
        return []
    goal = min(numbers.values()) if better == "low" else max(numbers.values())
    return [tool for tool, value in numbers.items() if value == goal]


def domain_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a method: mean and range of ARI over seeds, time, memory."""
    lines = []
    for name, runs in data["domains"].items():
        ari = [run["ari"] for run in runs]
        versions = {package: version for run in runs for package, version in run["versions"].items()}
        lines.append(
            {
                "name": "cellquilt" if name == "ours" else name,
                "ari": float(np.mean(ari)),
                "low": min(ari),
                "high": max(ari),
                "n_found": sorted({run["n_found"] for run in runs}),
                "slides": np.mean([[part["ari"] for part in run["slides"].values()] for run in runs], axis=0).tolist(),
                "wall_s": float(np.mean([run["wall_s"] for run in runs])),
                "cpu_s": float(np.mean([run["cpu_s"] for run in runs])),
                "largest_mb": max(run["largest_mb"] for run in runs),
                "seeds": len(runs),
                "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
            }
        )
    return lines


def kill_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a tool: what was done before the kill, what of it was kept, whether the tables are equal."""
    lines = []
    for name, tool in data["tools"].items():
        kill = tool["kill"]
        verdict = "yes, every byte" if not kill["differs"] else (
            "no: other order or names, the same counts and outlines" if kill["same_but_for_order"] else "no"
        )  # fmt: skip
        lines.append({"name": name, **kill, "verdict": verdict})
    return lines


def behind(table: list[dict[str, Any]], domains: list[dict[str, Any]], ours: str = "cellquilt") -> list[str]:
    """What the peers do better, in words."""
    lines = []
    for row in table:
        if row["best"] and ours not in row["best"]:
            others = ", ".join(f"{tool} {row['values'][tool]}" for tool in row["best"])
            lines.append(f"{row['group']}, {row['name']}: {others}; {ours} {row['values'][ours]}.")
    mine = next((line for line in domains if line["name"] == ours), None)
    for line in domains:
        if mine is None or line["name"] == ours:
            continue
        for key, text in (("ari", "ARI"), ("cpu_s", "processor time"), ("largest_mb", "memory")):
            if line[key] != mine[key] and (line[key] > mine[key]) == (key == "ari"):
                lines.append(f"Domains, {text}: {line['name']} {line[key]:.3g}; {ours} {mine[key]:.3g}.")
    return lines


def render(data: Mapping[str, Any]) -> str:
    """The page: HTML without any outside resource, absolute path, user or host."""
    from cellquilt.report.html import embedded, environment
    from jinja2 import ChoiceLoader, FileSystemLoader

    found = environment()
    found.loader = ChoiceLoader([FileSystemLoader(HERE), found.loader])
    table, domains = rows(data), domain_rows(data)
    shown = {key: value for key, value in data.items() if key != "pictures"}
    return found.get_template("showdown.html.j2").render(
        version=_version(),
        data=embedded(shown),
        run=data,
        tools=list(data["tools"]),
        rows=table,
        domains=domains,
        kills=kill_rows(data),
        behind=behind(table, domains),
        commands=_commands(data),
    )


def _commands(data: Mapping[str, Any]) -> str:
    setup = data["setup"]
    width = setup["peer_patch_px"] + setup["overlap_px"]
    return (
        f"nextflow run main.nf --input sheet.csv --outdir results --segmentation cellpose --cellpose_model nuclei.pt "
        f"--cellpose_diameter_px {setup['diameter_px']} --cellpose_flow_threshold 0.4 --cellpose_cellprob_threshold 0 "
        f"--patch_width_px {setup['patch_px']} --patch_overlap_px {setup['overlap_px']} --patches_per_task "
        f"{setup['patches_per_task']} --tissue_mode none --min_qv 20 --expand_um 0\n\n"
        f"sopa convert slide_0 --technology xenium --sdata-path slide.zarr --kwargs \"{{'qv_threshold': 20}}\"\n"
        f"sopa patchify image slide.zarr --patch-width-pixel {width} --patch-overlap-pixel {setup['overlap_px']}\n"
        f"sopa segmentation cellpose slide.zarr --diameter {setup['diameter_px']} --channels DAPI --flow-threshold 0.4 "
        f"--cellprob-threshold 0 --clip-limit 0 --gaussian-sigma 0 --pretrained-model nuclei.pt\n"
        f"sopa aggregate slide.zarr --aggregate-channels"
    )


def summary(data: Mapping[str, Any]) -> str:
    """The table as plain text (Markdown)."""
    tools = list(data["tools"])
    lines = ["| | " + " | ".join(tools) + " |", "|---|" + "---|" * len(tools)]
    for row in rows(data):
        lines.append(f"| {row['group']}: {row['name']} | " + " | ".join(row["values"][tool] for tool in tools) + " |")
    kills = {line["name"]: line for line in kill_rows(data)}
    for what, text in (("finished work kept", "{kept} of {done_before} {unit}"), ("tables equal", "{verdict}")):
        cells = " | ".join(text.format(**kills[tool]) for tool in tools)
        lines.append(f"| Killed and resumed: {what} | {cells} |")
    for line in domain_rows(data):
        lines.append(f"\nTwo panels, {line['name']}: ARI {line['ari']:.3f}, {line['cpu_s']:.0f} CPU s, "
                     f"{line['largest_mb']:.0f} MB")  # fmt: skip
    return "\n".join(lines)
