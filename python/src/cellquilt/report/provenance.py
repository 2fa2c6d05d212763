"""How a sample was made: parameters, commands, seeds, checksums, versions. No place, no person, no machine."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cellquilt import __version__
from cellquilt.core.privacy import scrub
from cellquilt.core.schema import SHEET_FILES
from cellquilt.core.settings import BY_NAME, TRANSCRIPT_METHODS, WITHOUT_IMAGE

#: Columns of the sheet with what a slide is made of.
INPUTS = tuple(column for column in SHEET_FILES if column != "truth")
#: What a step's command may be told: groups of settings; "" stands for the group of the step's own method.
_OPTIONS = {
    "convert": ("convert", "regions", "resources"),
    "tissue": ("tissue", "resources"),
    "patchify": ("patch", "segmentation", "", "resources"),
    "patchify_transcripts": ("transcripts", "segmentation", "", "resources"),
    "resolve": ("segmentation", "resolve", "resources"),
    "aggregate": ("aggregate", "resources"),
    "split": ("regions", "resources"),
    "cluster": ("cluster", "resources"),
    "annotate": ("annotate", "resources"),
}
#: A method stands in the command itself.
_IN_VERB = ("segmentation",)
_PLACEHOLDER = "SLIDE"


def provenance(records: Sequence[Mapping[str, Any]], sample: str) -> dict[str, Any]:
    """What the root attribute ``cellquilt`` of a published store says beside its records.

    Parameters
    ----------
    records
        Of all stages.
    sample
        The sample's name.

    Returns
    -------
    dict
        ``version``, ``technology``, ``inputs`` (each file's column of the sheet, name, size and checksum), ``metadata``
        (of the sheet), ``parameters`` (all in force), ``given`` (names of those that differ from their default),
        ``seeds``, ``checksums`` (of inputs and weights, file name → checksum) and ``command`` (lines that make it again
        on one store).
    """
    parameters: dict[str, Any] = {}
    for record in records:
        parameters |= record.get("parameters", {})
    methods = [method for method in map(method_of, of_stage(records, "resolve")) if method]
    if methods:
        parameters["segmentation"] = ",".join(dict.fromkeys(methods))
    return scrub(
        {
            "version": __version__,
            "technology": parameters.get("technology"),
            "inputs": inputs_of(records),
            "metadata": metadata_of(records),
            "parameters": dict(sorted(parameters.items())),
            "given": [name for name, value in sorted(parameters.items()) if differs(name, value)],
            "seeds": {name: value for name, value in sorted(parameters.items()) if name.split("_")[-1] == "seed"},
            "checksums": checksums_of(records),
            "command": commands(records, sample, named_inputs(records)),
        }
    )


def checksums_of(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """File name → SHA-256 of all inputs and weights that the records name."""
    checksums: dict[str, str] = {}
    for record in records:
        facts = record.get("facts", {})
        checksums |= facts.get("checksums") or {}
        for file in facts.get("inputs") or []:
            checksums[file["name"]] = file.get("sha256") or file["sha256_sampled"]
        for task in facts.get("tasks") or []:
            used = task.get("facts") or {}
            if used.get("weights_sha256"):
                checksums[str(used.get("weights", "weights"))] = used["weights_sha256"]
    return {scrub(name): value for name, value in sorted(checksums.items())}


def of_stage(records: Sequence[Mapping[str, Any]], stage: str) -> list[Mapping[str, Any]]:
    """The records of one stage."""
    return [record for record in records if record.get("stage") == stage]


def method_of(record: Mapping[str, Any]) -> str | None:
    """The method that a record of `patchify`, `patchify_transcripts` or `resolve` is about."""
    return record.get("facts", {}).get("method") or record.get("parameters", {}).get("segmentation")


def inputs_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The files that a slide or table was made of: ``column`` of the sheet, ``name``, ``bytes`` and the checksum."""
    return [dict(file) for record in records for file in record.get("facts", {}).get("inputs") or []]


def metadata_of(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The sheet's columns that are no settings."""
    found: dict[str, str] = {}
    for record in records:
        found |= record.get("facts", {}).get("metadata") or {}
    return found


def named_inputs(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Column of the sheet → name of the folder or file that stood there."""
    found: dict[str, str] = {}
    for record in records:
        found |= record.get("facts", {}).get("sources") or {}
    return found


def differs(name: str, value: Any) -> bool:
    """Whether a parameter's value is not its default."""
    return name not in BY_NAME or value != BY_NAME[name].default


def sample_of_sheet(records: Sequence[Mapping[str, Any]], sample: str) -> str:
    """The sample in whose row of the sheet a slide stands: of a region that of the whole slide."""
    parents = [record.get("facts", {}).get("parent") for record in of_stage(records, "split")]
    return next((str(parent) for parent in parents if parent), sample)


def commands(records: Sequence[Mapping[str, Any]], sample: str, files: Mapping[str, str]) -> list[str]:
    """The command lines that make a slide again, on one store, with the settings that differ from their defaults.

    Parameters
    ----------
    records
        Of all stages; what compares methods or finds domains is not among the lines.
    sample
        The sample's name.
    files
        Column of the sheet → path.
    """
    region, sample = sample, sample_of_sheet(records, sample)
    store = f"{sample}.zarr"
    lines: list[str] = []
    for record in of_stage(records, "convert")[:1]:
        lines.append(_convert(record, sample, store, files))
    lines += [_line(["tissue", store], record) for record in of_stage(records, "tissue")[:1]]
    resolved = {method_of(record): record for record in of_stage(records, "resolve")}
    cut = {"patchify": False, "patchify_transcripts": True}
    written = False
    for stage, of_transcripts in cut.items():
        patches = of_stage(records, stage)[:1]
        for method, record in resolved.items():
            if method is None or (method in TRANSCRIPT_METHODS) != of_transcripts:
                continue
            if method != "vendor":
                lines += [_line(["segment", method, store], each, method) for each in patches]
            again = ["--overwrite"] if written else []
            lines.append(_line(["resolve", method, store, *again], record))
            written = True
    for record in of_stage(records, "aggregate")[:1]:
        metadata = record.get("facts", {}).get("metadata")
        more = ["--settings", json.dumps({"metadata": metadata})] if metadata else []
        lines.append(_line(["aggregate", store, *more], record))
    if region != sample:
        lines += [_line(["split", store, "--output", "split"], record) for record in of_stage(records, "split")[:1]]
        store = f"split/{region}.slide.zarr"
    for record in of_stage(records, "cluster")[-1:]:
        lines.append(_line(["cluster", store], record))
    for record in of_stage(records, "annotate")[-1:]:
        by = "markers" if record.get("parameters", {}).get("annotate_markers") else "transfer"
        lines.append(_line(["annotate", by, store], record))
    return lines


def _convert(record: Mapping[str, Any], sample: str, store: str, files: Mapping[str, str]) -> str:
    technology = record.get("parameters", {}).get("technology")
    words = ["convert"]
    if technology not in WITHOUT_IMAGE:
        words.append(files.get("path", _PLACEHOLDER))
    for column in INPUTS:
        if column != "path" and column in files:
            words += [f"--{column.replace('_', '-')}", files[column]]
    if technology:
        words += ["--technology", technology]
    return _line([*words, "--sample", sample, "--output", store], record)


def _line(words: Sequence[str], record: Mapping[str, Any], method: str = "") -> str:
    """A command with what a step was told that differs from the defaults."""
    groups = {group or method for group in _OPTIONS[record["stage"]]}
    options: list[str] = []
    for name, value in sorted(record.get("parameters", {}).items()):
        known = BY_NAME.get(name)
        if known is None or known.group not in groups or name in _IN_VERB or value is None or not differs(name, value):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            options.append(option if value else option.replace("--", "--no-", 1))
        else:
            options += [option, scrub(",".join(map(str, value)) if isinstance(value, list) else str(value))]
    return " ".join(["cellquilt", *map(shlex.quote, [*words, *options])])
