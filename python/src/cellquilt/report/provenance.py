"""How a sample was made: parameters, commands, seeds, checksums, versions. No place, no person, no machine."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cellquilt import __version__
from cellquilt.core.privacy import scrub
from cellquilt.core.settings import BY_NAME

#: Stage → the verb of the command line that does the same, with placeholders for files.
_VERBS = {
    "convert": "convert SLIDE --output {sample}.raw.zarr",
    "tissue": "tissue {sample}.raw.zarr --output {sample}.tissue.zarr",
    "patchify": "patchify image {sample}.raw.zarr --tissue {sample}.tissue.zarr --bundles bundles "
    "--output {sample}.patches.zarr",
    "resolve": "resolve {sample}.raw.zarr bundles/*.cells.parquet --output {sample}.cells.zarr",
    "aggregate": "aggregate {sample}.raw.zarr --cells {sample}.cells.zarr --output {sample}.table.zarr",
    "domains_prepare": "domains prepare {sample}.table.zarr --sample {sample} --output {sample}.graph.zarr",
    "domains": "domains assign *.latents.parquet --weights model --output domains",
}


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
        ``version``, ``parameters`` (all in force), ``given`` (names of those that differ from their default),
        ``seeds``, ``checksums`` (of inputs and weights, file name → checksum) and ``command`` (one line a stage).
    """
    parameters: dict[str, Any] = {}
    checksums: dict[str, str] = {}
    for record in records:
        parameters |= record.get("parameters", {})
        facts = record.get("facts", {})
        checksums |= facts.get("checksums") or {}
        for task in facts.get("tasks") or []:
            used = task.get("facts") or {}
            if used.get("weights_sha256"):
                checksums[str(used.get("weights", "weights"))] = used["weights_sha256"]
    return scrub(
        {
            "version": __version__,
            "parameters": dict(sorted(parameters.items())),
            "given": [name for name, value in sorted(parameters.items()) if differs(name, value)],
            "seeds": {name: value for name, value in sorted(parameters.items()) if name.split("_")[-1] == "seed"},
            "checksums": {scrub(name): value for name, value in sorted(checksums.items())},
            "command": [command(record, sample) for record in records if record.get("stage") in _VERBS],
        }
    )


def differs(name: str, value: Any) -> bool:
    """Whether a parameter's value is not its default."""
    return name not in BY_NAME or value != BY_NAME[name].default


def command(record: Mapping[str, Any], sample: str) -> str:
    """The command line that does what a stage did, with the settings that differ from their defaults."""
    words = f"cellquilt {_VERBS[record['stage']].format(sample=sample)}".split()
    line = " ".join(words)
    for name, value in sorted(record.get("parameters", {}).items()):
        if value is None or not differs(name, value):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            line += f" {option if value else option.replace('--', '--no-', 1)}"
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            line += f" {option} {shlex.quote(scrub(text))}"
    return line
