"""How a published store or cell table was made, and the commands that make it again."""

import csv
import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellquilt import __version__
from cellquilt.core import zarr_json
from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.settings import BY_NAME
from cellquilt.core.store import Store
from cellquilt.readers.base import describe_file
from cellquilt.report.provenance import (
    INPUTS,
    commands,
    differs,
    inputs_of,
    metadata_of,
    named_inputs,
    provenance,
    sample_of_sheet,
)
from cellquilt.report.qc import stage_versions

#: Key of what is known of an annotated cell table, in its `uns`: JSON.
ORIGIN = "cellquilt"
#: Parameters that say where, and not how.
_PLACES = ("input", "outdir", "technology", "source")


@dataclass
class Origin:
    """How a store or a cell table was made.

    Attributes
    ----------
    sample, technology, version, verdict
        As recorded; empty where they are not.
    records
        Of all stages, each with ``stage``, ``parameters``, ``facts``, ``versions`` and, of slides, ``seconds``.
    seeds
        By name.
    checksums
        Of inputs and weights: file → SHA-256.
    compared
        Methods that were compared with the chosen one.
    """

    sample: str
    technology: str = ""
    version: str = ""
    verdict: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    seeds: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    compared: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters in force, by name."""
        found = provenance(self.records, self.sample)["parameters"]
        if self.compared:
            found["compare"] = self.compared
        return {name: value for name, value in sorted(found.items()) if name not in _PLACES}

    @property
    def given(self) -> dict[str, Any]:
        """Those that differ from their default, as the pipeline takes them: lists by commas."""
        return {
            name: ",".join(map(str, value)) if isinstance(value, list) else value
            for name, value in self.parameters.items()
            if name in BY_NAME and value is not None and differs(name, value)
        }

    @property
    def of_cohort(self) -> bool:
        """Whether its domains were found together with other slides'."""
        return any(record["stage"] == "domains" for record in self.records)

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """The files that it was made of."""
        return inputs_of(self.records)

    def sheet_row(self, files: Mapping[str, str]) -> dict[str, str]:
        """The row of a sample sheet that it came by.

        Parameters
        ----------
        files
            Column of the sheet → path; a file that is not among them is called as it was.
        """
        known = {**named_inputs(self.records), **files}
        places = {column: known[column] for column in INPUTS if column in known}
        return {"sample": self.sample, "technology": self.technology, "path": "", **places, **metadata_of(self.records)}


def read_origin(path: Path | str) -> Origin:
    """Read how a store or table was made.

    Parameters
    ----------
    path
        A store that the pipeline or the command line wrote, or a cell table with domains (``.h5ad``, ``.zarr``).

    Raises
    ------
    CellquiltError
        ``store-missing`` if there is nothing, ``record-missing`` if it does not say how it was made.
    """
    path = Path(path)
    if not path.exists():
        raise CellquiltError("store-missing", f"{path} does not exist", "check the path")
    of_slide, of_table = _of_slide(path), _of_table(path)
    if of_slide is None and of_table is None:
        raise CellquiltError(
            "record-missing",
            f"{path} does not say how it was made",
            "name a store that cellquilt published, or a table to which it added domains",
        )
    if of_table is None:
        assert of_slide is not None
        return of_slide
    if of_slide is not None:  # a published slide, read once more as a table of cells
        of_table.records = [*of_slide.records, *of_table.records]
        of_table.seeds = of_slide.seeds | of_table.seeds
        of_table.checksums = of_slide.checksums | of_table.checksums
    return of_table


def _of_slide(path: Path) -> Origin | None:
    if not path.is_dir() or not zarr_json.is_group(path):
        return None
    store = Store(path)
    if not store.records:
        return None
    known = {**provenance(store.records, store.name), **store.attributes}
    return Origin(
        sample=sample_of_sheet(store.records, store.name),
        technology=known.get("technology") or "",
        version=known.get("version") or __version__,
        verdict=known.get("verdict") or "",
        records=store.records,
        seeds=known["seeds"],
        checksums=known["checksums"],
        compared=list(store.compared),
    )


def _of_table(path: Path) -> Origin | None:
    said = next(_said(path), None)
    if said is None:
        return None
    try:
        known = json.loads(said)
        return Origin(
            sample=known["sample"],
            technology=known["technology"],
            version=known["version"],
            records=known["records"],
            seeds=known["seeds"],
            checksums=known["checksums"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CellquiltError(
            "record-missing", f"{path}: what it says of how it was made cannot be read: {error}", "copy it again"
        ) from error


def _said(path: Path) -> Iterator[str]:
    """What a table's `uns` holds under `ORIGIN`."""
    from anndata.io import read_elem

    if path.is_dir():
        import zarr

        for folder in (path, *sorted((path / "tables").glob("*"))):
            if (folder / "uns" / ORIGIN).is_dir():
                yield str(read_elem(zarr.open_group(folder, mode="r", use_consolidated=False)["uns"][ORIGIN]))  # type: ignore[index,arg-type]
        return
    import h5py

    try:
        with h5py.File(path) as file:
            if f"uns/{ORIGIN}" in file:
                yield str(read_elem(file[f"uns/{ORIGIN}"]))
    except OSError as error:
        raise CellquiltError("table-unreadable", f"{path} cannot be read: {error}", "give .h5ad or .zarr") from error


def add_origin(table: Path, origin: Origin) -> None:
    """Keep in a cell table that is being made how its domains were found."""
    from anndata.io import write_elem

    text = json.dumps(
        {
            "sample": origin.sample,
            "technology": origin.technology,
            "version": origin.version,
            "records": origin.records,
            "seeds": origin.seeds,
            "checksums": origin.checksums,
        },
        sort_keys=True,
    )

    def put(group: Any) -> None:
        if "uns" not in group:
            write_elem(group, "uns", {})
        write_elem(group["uns"], ORIGIN, text)

    if not table.is_dir():
        import h5py

        with h5py.File(table, "r+") as file:
            put(file)
        return
    import zarr

    from cellquilt.core.store import consolidate

    inside = sorted(folder for folder in (table / "tables").glob("*") if (folder / "obs" / "domain").is_dir())
    for folder in inside or [table]:
        put(zarr.open_group(folder, mode="r+", use_consolidated=False))
        consolidate(folder)
    if inside:
        consolidate(table)


# --- files that it is made of


def check_inputs(origin: Origin, files: Mapping[str, Path]) -> list[str]:
    """Compare files with those that a store was made of.

    Parameters
    ----------
    origin
        How it was made.
    files
        Column of the sheet → folder or file; what is not given is not compared.

    Returns
    -------
    list of str
        Names of the files that were compared.

    Raises
    ------
    CellquiltError
        ``record-input-missing``, ``record-input-differs``.
    """
    same, sources = [], named_inputs(origin.records)
    for known in origin.inputs:
        given = files.get(known["column"])
        if given is None:
            continue
        whole = known["column"] != "path" or known["name"] == sources.get("path")
        slide = given if whole else given / known["name"]
        if not slide.exists():
            raise CellquiltError(
                "record-input-missing",
                f"{origin.sample} was made of {known['name']}, which is not in {given}",
                f"name what stood in the column {known['column']} of the sheet",
            )
        found = describe_file(slide)
        if any(found.get(key) != known[key] for key in known if key not in ("column", "name")):
            raise CellquiltError(
                "record-input-differs",
                f"{slide} ({found['bytes']} bytes) is not the file that {origin.sample} was made of "
                f"({known['bytes']} bytes)",
                "give the file with the recorded checksum; cellquilt provenance --full shows it",
            )
        same.append(known["name"])
    return same


# --- what is written and said


def write_sheet(origin: Origin, output: Path, files: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Write a sample sheet of the one slide."""
    row = origin.sheet_row(files)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), lineterminator="\n")
    writer.writeheader()
    writer.writerow(row)
    with atomic_path(output, overwrite=overwrite) as aside:
        aside.write_text(text.getvalue(), encoding="utf-8")


def write_parameters(origin: Origin, output: Path, *, overwrite: bool = False) -> None:
    """Write the parameters that differ from their defaults, for Nextflow's ``-params-file``."""
    with atomic_path(output, overwrite=overwrite) as aside:
        aside.write_text(json.dumps(origin.given, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def nextflow_command(sheet: str = "sheet.csv", parameters: str = "params.json", outdir: str = "results") -> str:
    """The pipeline's command line."""
    words = ["run", "main.nf", "--input", sheet, "-params-file", parameters, "--outdir", outdir]
    return f"nextflow {' '.join(map(shlex.quote, words))}"


def as_dict(origin: Origin, files: Mapping[str, str], *, full: bool = False) -> dict[str, Any]:
    """All that is known as plain data."""
    shown = {
        "sample": origin.sample,
        "technology": origin.technology,
        "version": origin.version,
        "verdict": origin.verdict,
        "inputs": origin.inputs,
        "metadata": metadata_of(origin.records),
        "parameters": origin.parameters if full else origin.given,
        "seeds": origin.seeds,
        "checksums": origin.checksums,
        "versions": stage_versions(origin.records),
        "compared": origin.compared,
        "sheet": origin.sheet_row(files),
        "nextflow": nextflow_command(),
        "commands": commands(origin.records, origin.sample, {**named_inputs(origin.records), **files}),
    }
    return {**shown, "records": origin.records} if full else shown


def as_text(
    origin: Origin,
    files: Mapping[str, str],
    *,
    full: bool = False,
    sheet: Path | None = None,
    parameters: Path | None = None,
) -> str:
    """How it was made, for the terminal.

    Parameters
    ----------
    origin
        What is known.
    files
        Column of the sheet → path, where they are known.
    full
        All parameters and whole checksums, not only what differs from the defaults.
    sheet, parameters
        Files that were written, to stand in the command.
    """
    about = as_dict(origin, files, full=full)
    named = [f"cellquilt {origin.version}", origin.technology, origin.verdict]
    lines = [f"{origin.sample}: {', '.join(word for word in named if word)}"]
    lines += _section("Made of", [_file_line(file, full) for file in origin.inputs])
    lines += _section("Columns of the sheet", [f"{name}: {value}" for name, value in about["metadata"].items()])
    lines += _section("Steps", list(_steps(origin.records, full)))
    lines += _section("Seeds", [f"{name} = {value}" for name, value in origin.seeds.items()])
    inputs = {file["name"] for file in origin.inputs}
    weights = [f"{name}: SHA-256 {_shown(sha, full)}" for name, sha in origin.checksums.items() if name not in inputs]
    lines += _section("Weights and models", [line for line in weights if not line.endswith("SHA-256 ")])
    lines += _section("Versions", _versions(about["versions"]))
    lines += _section("Compared with it", origin.compared)
    command = nextflow_command(str(sheet or "sheet.csv"), str(parameters or "params.json"))
    lines += ["", "The same again, by the pipeline", f"  {command}"]
    if sheet is None:
        row = origin.sheet_row(files)
        lines += ["  sheet.csv (--sheet FILE writes it):", f"    {','.join(row)}", f"    {','.join(row.values())}"]
    if parameters is None:
        lines += [
            "  params.json (--params-file FILE writes it):",
            f"    {json.dumps(origin.given, ensure_ascii=False)}",
        ]
    if origin.of_cohort:
        lines.append(
            "  Its domains were found together with other slides: take the sheet of the whole cohort for them."
        )
    if about["commands"]:
        lines += ["", "The same again, by hand", *(f"  {line}" for line in about["commands"])]
    if origin.version != __version__:
        lines += ["", f"This is cellquilt {__version__}; take {origin.version} to get the same bytes."]
    return "\n".join(lines)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)] if lines else []


def _shown(sha256: str, full: bool) -> str:
    return sha256 if full or len(sha256) <= 16 else f"{sha256[:16]}…"


def _file_line(file: Mapping[str, Any], full: bool) -> str:
    kind = "sha256" if "sha256" in file else "sha256_sampled"
    how = "SHA-256" if kind == "sha256" else "SHA-256 of samples"
    return f"{file['name']} ({file['column']}): {file['bytes']} bytes, {how} {_shown(file[kind], full)}"


def _steps(records: Sequence[Mapping[str, Any]], full: bool) -> Iterator[str]:
    for record in records:
        used = {
            name: value
            for name, value in sorted(record.get("parameters", {}).items())
            if name not in _PLACES and (full or (value is not None and differs(name, value)))
        }
        seconds = f" ({record['seconds']:g} s)" if record.get("seconds") else ""
        settings = ", ".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in used.items())
        yield f"{record['stage']}{seconds}: {settings or 'all at their defaults'}"


def _versions(by_stage: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line a package; where stages differ, each with its own."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage, packages in by_stage.items():
        for package, version in packages.items():
            found.setdefault(package, {}).setdefault(version, []).append(stage)
    lines = []
    for package, versions in sorted(found.items()):
        if len(versions) == 1:
            lines.append(f"{package} {next(iter(versions))}")
        else:
            each = (f"{version} ({', '.join(stages)})" for version, stages in versions.items())
            lines.append(f"{package} {'; '.join(each)}")
    return lines
