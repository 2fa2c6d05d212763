"""The table of all samples of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.report.qc import read_qc

#: Keys of qc.json in the table, in this order.
NUMBERS = (
    "n_cells",
    "n_cells_pass",
    "n_transcripts",
    "n_inside_image",
    "n_counted",
    "share_assigned",
    "median_transcripts_per_cell",
    "median_genes_per_cell",
    "median_area_um2",
    "tissue_area_um2",
    "control_rate_in_cells",
    "border_cell_density_ratio",
    "n_domains",
    "gpu_hours",
)
_FAILURE = ("stage", "error", "cause", "hint", "log")
COLUMNS = ("sample", "status", "verdict", *NUMBERS, "seconds", "peak_rss_mb", "reasons", *_FAILURE)


def row(qc: Mapping[str, Any]) -> dict[str, str]:
    """The row of a sample that came through."""
    cells = {name: _text(qc.get(name)) for name in NUMBERS}
    missing = qc.get("domains_missing") or {}
    if missing:
        cells |= {"stage": missing["stage"], "error": missing.get("code", ""), "hint": missing["hint"]}
        cells["cause"] = f"domains missing: {missing['message']}"
    return {
        "sample": qc["sample"],
        "status": "done",
        "verdict": qc.get("verdict") or "",
        **cells,
        "seconds": _text((qc.get("seconds") or {}).get("total")),
        "peak_rss_mb": _text((qc.get("peak_rss_mb") or {}).get("max")),
        "reasons": ",".join(reason["check"] for reason in qc.get("reasons", [])),
    }


def _text(value: Any) -> str:
    """A number as text that reads back as the same number; empty for none."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


#: How MultiQC writes shares, with bars from nothing to all.
_SHARE = {"min": 0, "max": 1, "format": "{:.1%}"}
#: Columns of the MultiQC table: key of qc.json → title, what it is, and how MultiQC shows it.
_MULTIQC: dict[str, tuple[str, str, dict[str, Any]]] = {
    "verdict": ("Verdict", "PASS, WARN or FAIL by the limits of quality control", {"scale": False}),
    "n_cells": ("Cells", "Cells found", {"format": "{:,.0f}"}),
    "share_cells_pass": ("Cells passing", "Share of the cells that pass quality control", _SHARE),
    "n_transcripts": ("Transcripts", "Transcripts in the machine's output", {"format": "{:,.0f}"}),
    "share_assigned": ("Assigned", "Share of the transcripts that are in a cell", _SHARE),
    "median_transcripts_per_cell": ("Transcripts/cell", "Median of transcripts in a cell", {"format": "{:,.1f}"}),
    "median_genes_per_cell": ("Genes/cell", "Median of genes in a cell", {"format": "{:,.1f}"}),
    "median_area_um2": ("Area (µm²)", "Median area of a cell", {"format": "{:,.1f}"}),
    "control_rate_in_cells": (
        "Controls",
        "Share of controls among the transcripts in cells",
        {**_SHARE, "format": "{:.2%}"},
    ),
    "n_domains": ("Domains", "Spatial domains present", {"format": "{:,.0f}"}),
    "gpu_hours": ("GPU-h", "Hours of a GPU", {"format": "{:,.2f}"}),
}


def write_multiqc(qcs: Sequence[Path], folder: Path) -> Path:
    """Write the samples' main numbers as a table that MultiQC takes into its own report.

    Parameters
    ----------
    qcs
        The qc.json of every sample that came through, in any order.
    folder
        Where ``cellquilt_samples_mqc.tsv`` is written.

    Returns
    -------
    pathlib.Path
        The file.
    """
    found = sorted((read_qc(path) for path in qcs), key=lambda qc: qc["sample"])
    head = {
        "id": "cellquilt_samples",
        "section_name": "cellquilt",
        "description": "Cells and transcripts of each sample; its own report says more.",
        "plot_type": "table",
        "pconfig": {"id": "cellquilt_samples_table", "title": "cellquilt: samples", "col1_header": "Sample"},
        "headers": {key: {"title": title, "description": text, **how} for key, (title, text, how) in _MULTIQC.items()},
    }
    lines = [f"# {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    lines.append("\t".join(("Sample", *_MULTIQC)))
    lines += ["\t".join((qc["sample"], *(_text(qc.get(key)) for key in _MULTIQC))) for qc in found]
    path = Path(folder) / "cellquilt_samples_mqc.tsv"
    with atomic_path(path, overwrite=True) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_checksums(qcs: Sequence[Path], output: Path, *, overwrite: bool = False) -> None:
    """Write which inputs and weights each sample was made from: sample, file, SHA-256.

    Parameters
    ----------
    qcs
        The qc.json of every sample that came through, in any order.
    output
        The file to write (TSV), sorted.
    overwrite
        Replace what stands there.
    """
    rows = sorted(
        (qc["sample"], name, checksum)
        for qc in map(read_qc, qcs)
        for name, checksum in (qc.get("checksums") or {}).items()
    )
    lines = ["sample\tfile\tsha256", *("\t".join(row) for row in rows)]
    with atomic_path(output, overwrite=overwrite) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_samples(qcs: Sequence[Path], names: Sequence[str], output: Path, *, overwrite: bool = False) -> None:
    """Write ``samples.tsv``.

    Parameters
    ----------
    qcs
        The qc.json of every sample that came through, in any order; a sample is known by what its file says.
    names
        All samples of the run: the rows, in this order. One without a qc.json has failed; its columns ``stage``,
        ``error``, ``cause``, ``hint`` and ``log`` stay empty for who knows them.
    output
        The file to write.
    overwrite
        Replace what stands there.

    Raises
    ------
    CellquiltError
        ``sample-unknown`` if a qc.json is of none of these samples, ``sample-duplicate`` if two are of one.
    """
    found: dict[str, dict[str, str]] = {}
    for path in qcs:
        qc = read_qc(path)
        name = qc["sample"]
        if name not in names:
            raise CellquiltError(
                "sample-unknown", f"{path} is of sample {name!r}, which is none of this run", did_you_mean(name, names)
            )
        if name in found:
            raise CellquiltError("sample-duplicate", f"{path}: there are two results of sample {name!r}")
        found[name] = row(qc)
    lines = ["\t".join(COLUMNS)]
    for name in names:
        values = found.get(name, {"sample": name, "status": "failed"})
        # A message may have lines of its own; a row is one.
        lines.append("\t".join(" ".join(values.get(column, "").split()) for column in COLUMNS))
    with atomic_path(output, overwrite=overwrite) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
