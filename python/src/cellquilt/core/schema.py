"""The files that are generated from the table of settings and the catalogue of errors.

``python -m cellquilt.core.schema <repository>`` writes them; a test compares what is there with what it would write.
"""

import json
import sys
from pathlib import Path
from typing import Any

from cellquilt.core.explain import errors_page
from cellquilt.core.settings import (
    GROUPS,
    PRESETS,
    SETTINGS,
    TABLES,
    TECHNOLOGIES,
    TRANSCRIPT_METHODS,
    WITHOUT_IMAGE,
    Setting,
)

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: As nf-core's lint wants it of a pipeline of the manifest's name; an identifier, nothing is fetched from it.
_ID = "https://raw.githubusercontent.com/cellquilt/main/nextflow_schema.json"
#: What the manifest in nextflow.config says, too.
_DESCRIPTION = "Spatial omics from raw machine output to cells, tables and domains"
_JSON_TYPES = {"int": "integer", "float": "number", "str": "string", "bool": "boolean", "list": "string"}
_GENERATED = "Generated from python/src/cellquilt/core/settings.py by `make generate`; do not edit."
_GENERATED_ERRORS = _GENERATED.replace("settings.py", "errors.toml")

#: Columns of the sample sheet that are not settings: name → (what it is, pattern).
SHEET_COLUMNS: dict[str, tuple[str, str]] = {
    "sample": ("Name of the slide, unique", r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"),
    "technology": ("The machine", ""),
    "path": ("The machine's folder, the image or the cell table; relative paths are relative to the sheet", ""),
    "transcripts": ("Table of transcripts (CSV, CSV.GZ, Parquet), beside an image or all there is", ""),
    "prior_cells": ("GeoParquet or GeoJSON of cells to start from", ""),
    "he_image": ("TIFF of an aligned image of the same tissue, such as H&E", ""),
    "he_matrix": ("Its 3 × 3 map (CSV) to pixels of the slide's main image, or to µm where there is none", ""),
    "regions": ("GeoJSON of named regions: the slide is split into one slide each, SAMPLE_REGION", ""),
    "truth": ("Folder with the truth of a simulated slide, to score against", ""),
}
SHEET_FILES = ("path", "transcripts", "prior_cells", "he_image", "he_matrix", "regions", "truth")


def _property(setting: Setting) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": _JSON_TYPES[setting.kind], "description": setting.help}
    if setting.default is not None:
        entry["default"] = setting.default
    if setting.choices:
        # Of a list each item is one of them; for JSON schema itself the list is still one string.
        choices = {"enum": list(setting.choices)}
        entry |= {"items": choices} if setting.kind == "list" else choices
    if setting.minimum is not None:
        entry["minimum"] = setting.minimum
    if setting.maximum is not None:
        entry["maximum"] = setting.maximum
    if setting.pattern:
        entry["pattern"] = setting.pattern
    if setting.aliases:
        entry["aliases"] = list(setting.aliases)
    if setting.kind == "list":
        entry["list"] = True
    if setting.hidden:
        entry["hidden"] = True
    if setting.is_file:
        entry["format"] = "file-path"
    if setting.is_folder:
        entry["format"] = "directory-path"
    if setting.file_pattern:
        entry["file_pattern"] = setting.file_pattern
    entry["per_sample"] = setting.per_sample
    return entry


def pipeline_schema() -> dict[str, Any]:
    """The pipeline's parameters as JSON schema 2020-12, in groups."""
    groups: dict[str, Any] = {}
    for name, (title, stages) in GROUPS.items():
        members = [setting for setting in SETTINGS if setting.group == name]
        group: dict[str, Any] = {
            "title": title,
            "type": "object",
            "stages": list(stages),
            "properties": {setting.name: _property(setting) for setting in members},
        }
        required = [setting.name for setting in members if setting.required]
        if required:
            group["required"] = required
        groups[name] = group
    return {
        "$schema": _DIALECT,
        "$id": _ID,
        "$comment": _GENERATED,
        "title": "cellquilt pipeline parameters",
        "description": _DESCRIPTION,
        "type": "object",
        "presets": PRESETS,
        "transcript_methods": list(TRANSCRIPT_METHODS),
        "$defs": groups,
        "allOf": [{"$ref": f"#/$defs/{name}"} for name in groups],
    }


def sheet_schema() -> dict[str, Any]:
    """The sample sheet as JSON schema 2020-12: an array of rows."""
    properties: dict[str, Any] = {}
    for name, (text, pattern) in SHEET_COLUMNS.items():
        entry: dict[str, Any] = {"type": "string", "description": text}
        if pattern:
            entry["pattern"] = pattern
        if name in SHEET_FILES:
            entry["format"] = "path"
        properties[name] = entry
    properties["technology"] |= {
        "enum": list(TECHNOLOGIES),
        "without_image": list(WITHOUT_IMAGE),
        "tables": list(TABLES),
    }
    return {
        "$schema": _DIALECT,
        "$comment": _GENERATED,
        "title": "cellquilt sample sheet",
        "description": "Any parameter marked per_sample may be a column too; any other column is metadata.",
        "type": "array",
        "items": {"type": "object", "properties": properties, "required": ["sample", "technology"]},
    }


def _groovy(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)


def params_config() -> str:
    """The defaults as a Nextflow `params` block; null where a preset may come between user and default."""
    brought = {name for preset in PRESETS.values() for name in preset}
    width = max(len(setting.name) for setting in SETTINGS)
    lines = [f"// {_GENERATED}", "params {"]
    for group, (title, _) in GROUPS.items():
        lines.append(f"    // {title}")
        for setting in SETTINGS:
            if setting.group == group and not setting.early:
                value = None if setting.name in brought else setting.default
                lines.append(f"    {setting.name:<{width}} = {_groovy(value)}")
        lines.append("")
    lines[-1] = "}"
    return "\n".join(lines) + "\n"


def nf_core_config() -> str:
    """Parameters without a default in `params_config`, for the lint of nf-core's tools; see nextflow.config."""
    names = ", ".join(f"'{setting.name}'" for setting in SETTINGS if setting.early)
    return f"// {_GENERATED}\nvalidation.defaultIgnoreParams = [{names}]\n"


def parameters_page() -> str:
    """The page of the documentation that lists all parameters."""
    lines = [
        "# Parameters",
        "",
        f"<!-- {_GENERATED} -->",
        "",
        "As pipeline parameter: `--name value`; as column of the sheet: `name` (where marked *per sample*);",
        "in the API and on the command line: the keyword, where one is given.",
        "",
    ]
    for group, (title, _) in GROUPS.items():
        lines += [f"## {title}", "", "| parameter | default | meaning |", "|---|---|---|"]
        for setting in SETTINGS:
            if setting.group != group:
                continue
            shown = "" if setting.default is None else f"`{json.dumps(setting.default)}`"
            notes = [setting.help]
            if setting.choices:
                several = "Some" if setting.kind == "list" else "One"
                notes.append(f"{several} of " + ", ".join(f"`{choice}`" for choice in setting.choices) + ".")
            if setting.keyword:
                notes.append(f"Keyword `{setting.keyword}`.")
            if setting.aliases:
                notes.append("Also " + ", ".join(f"`{alias}`" for alias in setting.aliases) + ".")
            if setting.per_sample:
                notes.append("*Per sample.*")
            lines.append(f"| `{setting.name}` | {shown} | {' '.join(notes)} |")
        lines.append("")
    lines += [
        "## Presets",
        "",
        "What `--preset NAME` brings where you give no value:",
        "",
        "| preset | values |",
        "|---|---|",
    ]
    for name, values in PRESETS.items():
        lines.append(f"| `{name}` | {', '.join(f'`{key} = {value}`' for key, value in values.items())} |")
    return "\n".join(lines) + "\n"


def generated_files() -> dict[str, str]:
    """Path in the repository → content, of all generated files."""
    return {
        "nextflow_schema.json": json.dumps(pipeline_schema(), indent=2, ensure_ascii=False) + "\n",
        "assets/schema_input.json": json.dumps(sheet_schema(), indent=2, ensure_ascii=False) + "\n",
        "conf/params.config": params_config(),
        "conf/nf_core.config": nf_core_config(),
        "docs/parameters.md": parameters_page(),
        "docs/errors.md": errors_page(_GENERATED_ERRORS),
    }


def main(repository: Path) -> None:
    """Write all generated files into the repository."""
    for name, content in generated_files().items():
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
