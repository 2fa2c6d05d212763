"""The table of all samples of a run."""

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


def write_versions(qcs: Sequence[Path], output: Path, *, overwrite: bool = False) -> None:
    """Write the versions of the packages that every stage used, as YAML: stage → package → version.

    Parameters
    ----------
    qcs
        The qc.json of every sample that came through, in any order.
    output
        The file to write. Where two samples were made by different versions, both stand there, comma-separated.
    overwrite
        Replace what stands there.
    """
    import yaml

    found: dict[str, dict[str, set[str]]] = {}
    for path in qcs:
        for stage, packages in (read_qc(path).get("versions") or {}).items():
            for package, version in packages.items():
                found.setdefault(stage, {}).setdefault(package, set()).add(version)
    named = {
        stage: {package: ", ".join(sorted(several)) for package, several in packages.items()}
        for stage, packages in found.items()
    }
    with atomic_path(output, overwrite=overwrite) as aside:
        aside.write_text(yaml.safe_dump(named, sort_keys=True), encoding="utf-8")


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
