"""A run's result as a short table for the terminal."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cellquilt.core.errors import CellquiltError
from cellquilt.report.plots import number, percent

_EMBEDDED = re.compile(r'<script type="application/json" id="cellquilt-report">(.*?)</script>', re.DOTALL)


def summary_table(outdir: Path | str) -> str:
    """What a run reached: one line a sample, and where the reports lie.

    Parameters
    ----------
    outdir
        The run's results: ``samples.tsv``, and per sample ``qc.json`` and ``report.html``.

    Returns
    -------
    str
        Lines of text: sample, cells, transcripts, share of transcripts in cells, verdict, seconds of all tasks, and for
        slides with a known truth F1 of nuclei and cells at IoU 0.5; of a cohort the number of spatial domains. A failed
        sample, or one that lacks something, shows its stage and cause.

    Raises
    ------
    CellquiltError
        ``results-missing`` if there is no ``samples.tsv``.
    """
    folder = Path(outdir)
    table = folder / "samples.tsv"
    if not table.is_file():
        raise CellquiltError("results-missing", f"{folder} has no samples.tsv", "name the --outdir of a finished run")
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    accuracy = {row["sample"]: _accuracy(folder / row["sample"] / "report.html") for row in rows}
    header = ["sample", "cells", "transcripts", "in cells", "verdict", "time"]
    with_truth = any(accuracy.values())
    if with_truth:
        header += ["F1 nuclei", "F1 cells"]
    with_domains = any(row.get("n_domains") for row in rows)
    if with_domains:
        header.append("domains")
    lines = [header]
    notes: list[str] = []
    for row in rows:
        name = row["sample"]
        if row["status"] != "done":
            lines.append([name, "–", "–", "–", "failed", *["–"] * (len(header) - 5)])
            cause = ": ".join(part for part in (row.get("stage"), row.get("cause")) if part)
            notes.append(f"{name} failed{cause and ' in ' + cause}")
            continue
        line = [name, _count(row["n_cells"]), _count(row["n_transcripts"]), _share(row["share_assigned"])]
        line += [row["verdict"], _time(row["seconds"])]
        if with_truth:
            line += [_f1(accuracy[name], "nuclei"), _f1(accuracy[name], "cells")]
        if with_domains:
            line.append(row.get("n_domains") or "–")
        lines.append(line)
        if row.get("cause"):
            notes.append(f"{name}: {row['cause']}")
        report = folder / name / "report.html"
        if report.is_file():
            notes.append(f"report of {name}: {report}")
    cohort = folder / "cohort" / "report.html"
    if cohort.is_file():
        notes.append(f"report of the cohort's domains: {cohort}")
    return "\n".join([*_aligned(lines), "", *notes, f"all results: {folder}"])


def _accuracy(report: Path) -> dict[str, Any]:
    """The scores that a report holds as data; empty for a slide without truth."""
    if not report.is_file():
        return {}
    found = _EMBEDDED.search(report.read_text(encoding="utf-8"))
    return (json.loads(found.group(1)).get("accuracy") or {}) if found else {}


def _f1(scores: dict[str, Any], kind: str) -> str:
    value = scores.get(kind, {}).get("f1_0.5")
    return "–" if value is None else f"{value:.3f}"


def _count(text: str) -> str:
    return number(int(text)) if text else "–"


def _share(text: str) -> str:
    return percent(float(text)) if text else "–"


def _time(text: str) -> str:
    if not text:
        return "–"
    seconds = round(float(text))
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60:02d} s"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width; the first and the verdict to the left, numbers to the right."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    left = {0, lines[0].index("verdict")}
    rows = [
        "  ".join(
            text.ljust(width) if k in left else text.rjust(width)
            for k, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [rows[0], "─" * len(max(rows, key=len)), *rows[1:]]
