"""The numbers of qc.json, and the verdict."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cellquilt.core.errors import CellquiltError
from cellquilt.core.points import iter_points, points_columns, points_transforms, xy
from cellquilt.core.privacy import scrub
from cellquilt.core.transforms import GLOBAL, apply
from cellquilt.report.borders import border_check
from cellquilt.report.cells import Cells, read_cells
from cellquilt.report.provenance import checksums_of
from cellquilt.report.view import View

THRESHOLDS = Path(__file__).with_name("qc_thresholds.yml")
LEVELS = ("PASS", "WARN", "FAIL")
_LIMITS = ("warn_below", "warn_above", "fail_below", "fail_above")
_CHECK_KEYS = {"check", "metric", "only_if", "text", "advice", *_LIMITS}
_NUMBERS = """
method n_cells_pass share_cells_pass median_area_um2 median_transcripts_per_cell median_genes_per_cell n_genes
tissue_area_um2 n_transcripts n_inside_image n_assigned n_in_nucleus n_counted n_countable_inside_image n_control
share_inside_image share_assigned transcripts_per_100um2 control_rate_in_cells control_rate_outside
share_assigned_by_z transcripts_by_z z_unit n_counts_differing border_cell_density_ratio border_cell_density_interval
n_border_cells border_area_um2 n_interior_cells interior_area_um2 border_profile conflict_rate n_conflicts n_cut
n_merged share_cut n_overlapping_pairs overlap_ratio_histogram share_patches_failed n_domains n_cells_with_domain
domains_missing
"""
_EMPTY: dict[str, Any] = {
    "n_cells": 0,
    "cells_by_qc_reason": {},
    "cells_dropped_by_reason": {},
    "patches": {"n": 0, "n_failed": 0, "n_missing": 0, "failed": []},
    "seconds": {"total": None},
    "peak_rss_mb": {"max": None},
    "gpu_hours": 0.0,
    "versions": {},
    "checksums": {},
    "reasons": [],
}
_BATCH_ROWS = 1_000_000
_MANY_PLANES = 40  # more different z than any machine has planes: z is continuous


@dataclass
class TranscriptSums:
    """Transcripts counted in one pass over the points.

    Attributes
    ----------
    n
        All rows.
    inside
        Rows inside the image; all rows where there is no image.
    assigned, assigned_inside, in_nucleus
        Rows with a cell; those inside the image; those in its nucleus. Controls and rows of low quality included.
    counted
        Rows with a cell that are no controls and pass the quality limit: what the matrix holds.
    countable_inside
        Rows inside the image that could have been counted.
    control
        All controls.
    cells_passing, cells_control
        Rows of passing quality in cells, and how many of them are controls.
    outside_passing, outside_control
        The same for rows inside the image but in no cell.
    by_z
        Plane index, or z in µm → [rows inside the image, those with a cell].
    z_unit
        ``plane`` or ``um``; None where z is not known.
    """

    n: int = 0
    inside: int = 0
    assigned: int = 0
    assigned_inside: int = 0
    in_nucleus: int = 0
    counted: int = 0
    countable_inside: int = 0
    control: int = 0
    cells_passing: int = 0
    cells_control: int = 0
    outside_passing: int = 0
    outside_control: int = 0
    by_z: dict[float, list[int]] = field(default_factory=dict)
    z_unit: str | None = None


def sum_transcripts(element: Path, image_size: tuple[int, int] | None) -> TranscriptSums:
    """Count the transcripts of a points element by what became of them; memory is that of one batch.

    Parameters
    ----------
    element
        The element's folder.
    image_size
        (height, width) of the main image in pixels, None if there is none.
    """
    there = points_columns(element)
    wanted = ["x", "y", "z", "z_plane", "cell_id", "in_nucleus", "is_control", "passes_qv"]
    to_pixels = points_transforms(element)[GLOBAL]
    sums = TranscriptSums()
    for batch in iter_points(element, [name for name in wanted if name in there], _BATCH_ROWS):
        n = batch.num_rows
        assigned = _valid(batch, "cell_id", n)
        control, passing = _flag(batch, "is_control", n, False), _flag(batch, "passes_qv", n, True)
        inside = _inside(apply(to_pixels, xy(batch)), image_size)
        countable = passing & ~control
        counted = countable & assigned
        outside = inside & ~assigned & passing
        sums.n += n
        sums.inside += int(inside.sum())
        sums.assigned += int(assigned.sum())
        sums.assigned_inside += int((assigned & inside).sum())
        sums.in_nucleus += int((_flag(batch, "in_nucleus", n, False) & assigned).sum())
        sums.counted += int(counted.sum())
        sums.countable_inside += int((countable & inside).sum())
        sums.control += int(control.sum())
        sums.cells_passing += int((assigned & passing).sum())
        sums.cells_control += int((assigned & passing & control).sum())
        sums.outside_passing += int(outside.sum())
        sums.outside_control += int((outside & control).sum())
        column = next((name for name in ("z_plane", "z") if name in batch.schema.names), None)
        if column is not None:
            sums.z_unit = "plane" if column == "z_plane" else "um"
            _add_planes(sums.by_z, batch.column(column), inside, inside & assigned)
    if len(sums.by_z) > _MANY_PLANES:
        sums.by_z = _whole_microns(sums.by_z)
    return sums


def _valid(batch: Any, name: str, n: int) -> np.ndarray:
    if name not in batch.schema.names:
        return np.zeros(n, dtype=bool)
    return batch.column(name).is_valid().to_numpy()


def _flag(batch: Any, name: str, n: int, default: bool) -> np.ndarray:
    import pyarrow.compute as pc

    if name not in batch.schema.names:
        return np.full(n, default)
    return pc.fill_null(batch.column(name), False).to_numpy().astype(bool)


def _inside(pixels: np.ndarray, image_size: tuple[int, int] | None) -> np.ndarray:
    if image_size is None:
        return np.ones(len(pixels), dtype=bool)
    height, width = image_size
    x, y = pixels.T
    return (x >= 0) & (x < width) & (y >= 0) & (y < height)


def _add_planes(by_z: dict[float, list[int]], z: Any, total: np.ndarray, hit: np.ndarray) -> None:
    """Add a batch's rows to those of its planes; z in µm counts to a tenth. Rows without z are left out."""
    planes = np.round(z.to_numpy().astype(np.float64), 1)
    known = np.isfinite(planes)
    values, place = np.unique(planes[known], return_inverse=True)
    totals = np.bincount(place, weights=total[known], minlength=len(values))
    hits = np.bincount(place, weights=hit[known], minlength=len(values))
    for plane, all_rows, hit_rows in zip(values.tolist(), totals.tolist(), hits.tolist(), strict=True):
        entry = by_z.setdefault(plane, [0, 0])
        entry[0] += int(all_rows)
        entry[1] += int(hit_rows)


def _whole_microns(by_z: dict[float, list[int]]) -> dict[float, list[int]]:
    """Continuous z in steps of 1 µm, each named by its lower end."""
    merged: dict[float, list[int]] = {}
    for z, (total, hit) in by_z.items():
        entry = merged.setdefault(math.floor(z), [0, 0])
        entry[0] += total
        entry[1] += hit
    return merged


def compute_qc(view: View, *, thresholds: Path | None = None, cells: Cells | None = None) -> dict[str, Any]:
    """All numbers of qc.json and the verdict.

    Parameters
    ----------
    view
        The sample's stores: the parts before they are assembled, or the assembled store.
    thresholds
        File of limits; default the packaged one.
    cells
        What `read_cells` returns, if the caller has it already.

    Returns
    -------
    dict
        Plain data: finite numbers, strings, None where a number has no meaning (no transcripts, one patch).
        ``docs/report.md`` defines every key.
    """
    cells = read_cells(view) if cells is None else cells
    resolved = view.facts("resolve")
    numbers: dict[str, Any] = {"sample": view.sample, "n_cells": len(cells)}
    numbers |= _cell_numbers(cells)
    numbers["tissue_area_um2"] = _tissue_area(view)
    numbers |= _transcript_numbers(view, cells, numbers["tissue_area_um2"])
    numbers |= _border_numbers(view, cells)
    numbers |= _patch_numbers(view, resolved, len(cells))
    numbers |= {name: view.facts("domains").get(name) for name in ("n_domains", "n_cells_with_domain")}
    numbers["domains_missing"] = view.facts("domains_prepare").get("domains_missing")
    numbers["cells_dropped_by_reason"] = view.facts("aggregate").get("dropped_by_reason", {})
    numbers |= _resources(view)
    numbers = _clean(numbers)
    verdict, reasons = judge(numbers, load_thresholds(thresholds))
    return {**numbers, "verdict": verdict, "reasons": reasons}


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def _cell_numbers(cells: Cells) -> dict[str, Any]:
    reasons, counts = np.unique(cells.qc_reason[~cells.passes_qc].astype(str), return_counts=True)
    counted = cells.has_counts
    return {
        "n_cells_pass": int(cells.passes_qc.sum()),
        "share_cells_pass": _ratio(int(cells.passes_qc.sum()), len(cells)),
        "cells_by_qc_reason": dict(zip(reasons.tolist(), counts.tolist(), strict=True)),
        "median_area_um2": _median(cells.area_um2),
        "median_transcripts_per_cell": _median(cells.transcripts) if counted else None,
        "median_genes_per_cell": _median(cells.genes) if counted else None,
        "n_genes": len(cells.gene_names),
    }


def _tissue_area(view: View) -> float | None:
    import shapely

    tissue = view.shapes("region_of_interest")
    if tissue is not None:
        return float(shapely.area(tissue.geometry).sum()) * abs(
            float(np.linalg.det(tissue.transforms["microns"][:2, :2]))
        )
    if view.image_size is not None:
        return view.image_size[0] * view.image_size[1] * view.pixel_size_um**2
    return None


def _transcript_numbers(view: View, cells: Cells, tissue_um2: float | None) -> dict[str, Any]:
    element, facts = view.find("points", "transcripts"), view.facts("aggregate")
    if element is None or "n_bins" in facts:
        names = (
            "n_transcripts n_inside_image n_assigned n_in_nucleus n_counted n_countable_inside_image n_control "
            "share_inside_image share_assigned transcripts_per_100um2 control_rate_in_cells control_rate_outside "
            "share_assigned_by_z transcripts_by_z z_unit n_counts_differing"
        )
        numbers = dict.fromkeys(names.split())
        if "n_bins" in facts:  # the counts of bins are transcripts, of which nothing but the bin is known
            numbers |= {name: facts[name] for name in ("n_transcripts", "n_assigned", "n_counted", "share_assigned")}
            numbers["n_countable_inside_image"] = facts["n_transcripts"]
            numbers["transcripts_per_100um2"] = _ratio(100.0 * facts["n_transcripts"], tissue_um2)
            numbers["n_counts_differing"] = abs(facts["n_counted"] - int(cells.transcripts.sum()))
        return numbers
    sums = sum_transcripts(element, view.image_size)
    inside = sums.inside if view.image is not None else None
    return {
        "n_transcripts": sums.n,
        "n_inside_image": inside,
        "n_assigned": sums.assigned,
        "n_in_nucleus": sums.in_nucleus if view.find("shapes", "nucleus_boundaries") else None,
        "n_counted": sums.counted,
        "n_countable_inside_image": sums.countable_inside,
        "n_control": sums.control,
        "share_inside_image": None if inside is None else _ratio(inside, sums.n),
        "share_assigned": _ratio(sums.assigned_inside, sums.inside),
        "transcripts_per_100um2": _ratio(100.0 * sums.countable_inside, tissue_um2),
        "control_rate_in_cells": _ratio(sums.cells_control, sums.cells_passing),
        "control_rate_outside": _ratio(sums.outside_control, sums.outside_passing),
        "share_assigned_by_z": {f"{z:g}": _ratio(hit, total) for z, (total, hit) in sorted(sums.by_z.items())} or None,
        "transcripts_by_z": {f"{z:g}": total for z, (total, _) in sorted(sums.by_z.items())} or None,
        "z_unit": sums.z_unit,
        "n_counts_differing": abs(sums.counted - int(cells.transcripts.sum())) if cells.has_counts else None,
    }


def _border_numbers(view: View, cells: Cells) -> dict[str, Any]:
    import shapely

    found = None
    windows, tissue = view.shapes("image_patches"), view.shapes("region_of_interest")
    if windows is not None and len(windows) and view.image_size is not None:
        found = border_check(
            shapely.bounds(windows.geometry),
            view.image_size,
            None if tissue is None else tissue.geometry,
            apply(view.to_pixels, cells.xy_um),
            view.pixel_size_um,
        )
    if found is None:
        names = ("border_cell_density_ratio", "border_cell_density_interval", "n_border_cells", "border_profile")
        return dict.fromkeys(names)
    return {
        "border_cell_density_ratio": found.ratio,
        "border_cell_density_interval": None if found.interval is None else list(found.interval),
        "n_border_cells": found.n_border,
        "border_area_um2": found.border_um2,
        "n_interior_cells": found.n_interior,
        "interior_area_um2": found.interior_um2,
        "border_profile": list(found.profile),
    }


def _patch_numbers(view: View, resolved: Mapping[str, Any], n_cells: int) -> dict[str, Any]:
    patches = resolved.get("patches") or []
    failed = [patch for patch in patches if patch.get("error")]
    windows = view.shapes("image_patches")
    # Patches that were cut but never came back are as bad as those that failed.
    n_patches = len(patches) if windows is None else max(len(windows), len(patches))
    n_missing = n_patches - len(patches)
    n_cut, histogram = resolved.get("n_cut"), resolved.get("overlap_ratio_histogram")
    return {
        "method": resolved.get("method"),
        "conflict_rate": resolved.get("conflict_rate"),
        "n_conflicts": resolved.get("n_conflicts"),
        "n_cut": n_cut,
        "n_merged": resolved.get("n_merged"),
        "share_cut": None if n_cut is None else _ratio(n_cut, n_cells),
        "n_overlapping_pairs": None if histogram is None else sum(histogram),
        "overlap_ratio_histogram": histogram,
        "patches": {"n": n_patches, "n_failed": len(failed), "n_missing": n_missing, "failed": scrub(failed)},
        "share_patches_failed": _ratio(len(failed) + n_missing, n_patches),
    }


def stage_costs(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds and peak memory (MiB) by stage.

    Returns
    -------
    dict
        Stage → ``{"seconds": sum over its tasks, "peak_rss_mb": the largest, "n_tasks": how many}``, in the order in
        which they ran.
    """
    costs: dict[str, dict[str, float]] = {}
    for stage, record in _by_stage(records):
        _add_cost(costs, stage, record)
    return costs


def stage_versions(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Versions of the packages that each stage had loaded, in the order in which the stages ran."""
    versions: dict[str, dict[str, str]] = {}
    for stage, record in _by_stage(records):
        versions.setdefault(stage, {}).update(record.get("versions") or {})
    return versions


def _by_stage(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every record with its stage. The segmentation tasks make no store: theirs are found in resolve's facts."""
    for record in records:
        if record.get("stage") == "resolve":
            yield from (("segment", task) for task in record.get("facts", {}).get("tasks", []))
        yield str(record.get("stage")), record


def _add_cost(costs: dict[str, dict[str, float]], stage: str, record: Mapping[str, Any]) -> None:
    entry = costs.setdefault(stage, {"seconds": 0.0, "peak_rss_mb": 0.0, "n_tasks": 0})
    entry["seconds"] += float(record.get("seconds") or 0.0)
    entry["peak_rss_mb"] = max(entry["peak_rss_mb"], float(record.get("peak_rss_mb") or 0.0))
    entry["n_tasks"] += 1
    if (record.get("facts") or {}).get("device") not in (None, "cpu"):
        entry["gpu_seconds"] = entry.get("gpu_seconds", 0.0) + float(record.get("seconds") or 0.0)


def _resources(view: View) -> dict[str, Any]:
    costs = stage_costs(view.records)
    seconds = {stage: round(cost["seconds"], 3) for stage, cost in costs.items()}
    peaks = {stage: round(cost["peak_rss_mb"], 1) for stage, cost in costs.items()}
    return {
        "seconds": {**seconds, "total": round(sum(seconds.values()), 3)},
        "peak_rss_mb": {**peaks, "max": max(peaks.values(), default=0.0)},
        "gpu_hours": round(sum(cost.get("gpu_seconds", 0.0) for cost in costs.values()) / 3600, 4),
        "versions": stage_versions(view.records),
        "checksums": checksums_of(view.records),
    }


def _clean(value: Any) -> Any:
    """Plain, finite data: numpy's numbers as Python's, NaN and infinity as None, floats to 9 significant digits."""
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        # The last digits of sums depend on the library's version, and mean nothing.
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def load_thresholds(path: Path | None = None) -> list[dict[str, Any]]:
    """The checks of a file of limits.

    Raises
    ------
    CellquiltError
        ``qc-thresholds-unreadable`` or ``qc-thresholds-invalid``, naming the entry and what is wrong with it.
    """
    import yaml

    path = Path(path or THRESHOLDS)
    hint = "start from a copy of assets/qc_thresholds.yml"
    try:
        checks = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CellquiltError("qc-thresholds-unreadable", f"{path} cannot be read: {error}", hint) from None
    if not isinstance(checks, list):
        raise CellquiltError("qc-thresholds-invalid", f"{path} is not a list of checks", hint)
    for number, check in enumerate(checks, 1):
        problem = _problem(check)
        if problem:
            raise CellquiltError("qc-thresholds-invalid", f"{path}, check {number}: {problem}", hint)
    return checks


def _problem(check: Any) -> str:
    if not isinstance(check, dict):
        return "is not a mapping"
    missing = [key for key in ("check", "metric", "text") if not isinstance(check.get(key), str)]
    if missing:
        return f"lacks {', '.join(missing)}"
    unknown = sorted(set(map(str, check)) - _CHECK_KEYS)
    if unknown:
        return f"unknown key {', '.join(unknown)}; known: {', '.join(sorted(_CHECK_KEYS))}"
    limits = {key: check[key] for key in _LIMITS if key in check}
    if not limits:
        return f"has no limit; give one of {', '.join(_LIMITS)}"
    needs = check.get("only_if", {})
    if not isinstance(needs, dict):
        return "only_if is not a mapping"
    for key, value in {**limits, **needs}.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{key} is {value!r}; expected a number"
    try:
        check["text"].format(value=1.0, limit=1.0)
    except (KeyError, IndexError, ValueError):
        return f"text {check['text']!r} may hold {{value}} and {{limit}} only"
    return ""


def judge(numbers: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The verdict and its reasons.

    Parameters
    ----------
    numbers
        Of qc.json.
    checks
        What `load_thresholds` returns.

    Returns
    -------
    verdict : str
        ``PASS``, ``WARN`` or ``FAIL``: the worst of all checks.
    reasons : list of dict
        One a check that was not passed, the worst first: ``check, level, metric, value, limit, text, advice``.
    """
    reasons = []
    for check in checks:
        value = numbers.get(check["metric"])
        if value is None or isinstance(value, dict | list | str):
            continue
        if any((numbers.get(key) or 0) < least for key, least in check.get("only_if", {}).items()):
            continue
        found = _broken(check, value)
        if found:
            level, limit = found
            # The text names what is usual: the limit of a warning, also where the number is worse than that.
            usual = check.get("warn_below", check.get("warn_above", limit))
            reasons.append(
                {
                    "check": check["check"],
                    "level": level,
                    "metric": check["metric"],
                    "value": value,
                    "limit": limit,
                    "text": check["text"].format(value=value, limit=usual),
                    "advice": check.get("advice", ""),
                }
            )
    reasons.sort(key=lambda reason: -LEVELS.index(reason["level"]))
    verdict = max((reason["level"] for reason in reasons), key=LEVELS.index, default="PASS")
    return verdict, reasons


def _broken(check: Mapping[str, Any], value: float) -> tuple[str, float] | None:
    for level in ("FAIL", "WARN"):
        below, above = check.get(f"{level.lower()}_below"), check.get(f"{level.lower()}_above")
        if below is not None and value < below:
            return level, below
        if above is not None and value > above:
            return level, above
    return None


def qc_json(qc: Mapping[str, Any]) -> str:
    """The numbers as the text of qc.json: sorted keys, finite numbers only."""
    return json.dumps(qc, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def read_qc(path: Path) -> dict[str, Any]:
    """Read a qc.json.

    Returns
    -------
    dict
        All keys: those that another version did not write yet are None, or empty.

    Raises
    ------
    CellquiltError
        ``qc-unreadable`` if it is not one.
    """
    try:
        qc = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(qc["sample"], str):
            raise KeyError("sample")
        if qc["verdict"] not in (*LEVELS, None):  # nothing is judged of a table that was made elsewhere
            raise ValueError(f"its verdict is {qc['verdict']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CellquiltError(
            "qc-unreadable", f"{path} is not a sample's qc.json: {error}", "make one with `cellquilt assemble --qc`"
        ) from None
    known = {**dict.fromkeys(_NUMBERS.split()), **_EMPTY, **qc}
    return {**known, "patches": {**_EMPTY["patches"], **known["patches"]}}
