"""The sample sheet and the parameters of a run, checked before anything starts.

`lib/Inputs.groovy` does the same in the pipeline's head job from the two JSON schemas, with the same messages;
`tests/cases/bad_inputs.json` drives both. All mistakes come in one message.
"""

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellquilt.core.errors import CellquiltError, SeveralErrors, did_you_mean, did_you_mean_file
from cellquilt.core.log import LOG
from cellquilt.core.regions import read_features, region_sample
from cellquilt.core.schema import SHEET_COLUMNS, SHEET_FILES
from cellquilt.core.settings import (
    ALIASES,
    BY_NAME,
    SHIPPED_DOMAINS,
    TABLES,
    TECHNOLOGIES,
    TRANSCRIPT_METHODS,
    WITHOUT_IMAGE,
    Settings,
    Value,
    check,
    check_all,
    methods_of,
)

_REQUIRED = ("sample", "technology")
#: Technology of a cell table → what its path ends in.
_TABLE_SUFFIXES = {"anndata": (".h5ad", ".zarr"), "spatialdata": (".zarr",)}
#: Files of a model's folder.
_MODEL_FILES = ("config.json", "model.safetensors")
#: A model's name on a hub.
_HUB_ID = r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*"
#: Settings that only training of the published recipe has.
_OF_TRAINING = ("domains_max_epochs", "domains_processes", "domains_checkpoints")
#: A metadata column this similar to a parameter's name is probably meant to be one.
_NEARLY = 0.85


@dataclass(frozen=True)
class Row:
    """One slide of the sheet.

    Attributes
    ----------
    sample
        Its name.
    technology
        The machine.
    path, transcripts, prior_cells, he_image, he_matrix, regions, truth
        Absolute paths; None where the cell is empty.
    source
        The path as it is written in the sheet, for messages and records.
    overrides
        Parameter → value of this slide, typed; without empty cells.
    metadata
        Every other column → text.
    """

    sample: str
    technology: str
    path: Path | None = None
    transcripts: Path | None = None
    prior_cells: Path | None = None
    he_image: Path | None = None
    he_matrix: Path | None = None
    regions: Path | None = None
    truth: Path | None = None
    source: str = ""
    overrides: dict[str, Value] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def check_params(given: Mapping[str, Any]) -> dict[str, Value]:
    """Check parameters.

    Returns
    -------
    dict
        Name → typed value of what was given.

    Raises
    ------
    SeveralErrors
        ``input-invalid`` with all mistakes.
    """
    values, errors = _checked_params(given)
    _raise(errors)
    return values


def read_sheet(path: Path | str) -> list[Row]:
    """Read and check a sample sheet (CSV or TSV).

    Parameters
    ----------
    path
        The sheet. Relative paths in it are relative to its folder.

    Returns
    -------
    list of Row
        In the order of the sheet.

    Raises
    ------
    SeveralErrors
        ``input-invalid`` with all mistakes; each has a code of its own: ``sheet-*``, ``sample-*``, ``technology-*``,
        ``path-*`` or ``parameter-*``.
    """
    rows, errors = _checked_sheet(path)
    _raise(errors)
    return rows


def check_input(sheet: Path | str, given: Mapping[str, Any]) -> tuple[list[Row], dict[str, Value]]:
    """Check a sheet and the parameters of a run, as the pipeline does before it starts; all mistakes of both at once.

    Raises
    ------
    SeveralErrors
        ``input-invalid``.
    """
    values, parameter_errors = _checked_params(given)
    rows, sheet_errors = _checked_sheet(sheet)
    _raise(parameter_errors + sheet_errors)
    settings = {row.sample: Settings({**values, **row.overrides}) for row in rows}
    impossible = [error for row in rows for error in _impossible(row, settings[row.sample])]
    _raise(impossible + list(_names_of_regions(rows)))
    return rows, values


def _raise(errors: list[CellquiltError]) -> None:
    if errors:
        raise SeveralErrors("input-invalid", "The input has mistakes; nothing was started:", errors)


def _impossible(row: Row, values: Settings) -> Iterator[CellquiltError]:
    """What is asked of a slide and cannot be had of it."""
    yield from _not_of_table(row, values) if row.technology in TABLES else _not_of_slide(row, values)
    where = f'sample "{row.sample}"'
    if row.he_matrix is not None and row.he_image is None:
        message = f"{where}: he_matrix is given, and he_image is empty"
        yield CellquiltError("he-image-missing", message, "give both, or leave he_matrix empty")
    looks = values["domains"] != "none" and values["domains_image_model"]
    if looks and row.he_image is None and not values["domains_image"]:
        message = f"{where}: domains_image_model is to look at an image, and there is none"
        yield CellquiltError("domains-image-missing", message, "give he_image or domains_image in the sheet")
    if looks and row.he_image is not None and row.regions is not None:
        message = f"{where}: domains_image_model is to look at he_image, and the slide is split into regions"
        yield CellquiltError("regions-he-image", message, "leave one of them out")
    if values["annotate_markers"] and values["annotate_reference"]:
        message = f"{where}: annotate_markers and annotate_reference both name cells"
        yield CellquiltError("annotate-both", message, "leave one of them out")
    if values["annotate_reference"] and not values["annotate_label"]:
        message = f"{where}: annotate_reference is given, and annotate_label names no column of it"
        yield CellquiltError("annotate-label", message, "name the column with the cell types")


def _names_of_regions(rows: list[Row]) -> Iterator[CellquiltError]:
    """Mistakes of the files with regions, as far as names go; outlines are looked at where the slide is read."""
    known = {row.sample: row.sample for row in rows}
    for row in rows:
        if row.regions is None or row.technology in TABLES:
            continue
        where = f'sample "{row.sample}"'
        try:
            names = [region_sample(row.sample, feature.slug) for feature in read_features(row.regions)]
        except CellquiltError as error:
            yield CellquiltError(error.code, f"{where}: {error.message.removeprefix(f'{where}: ')}", error.hint)
            continue
        for name in names:
            if name in known:
                message = f'{where}: a region makes the sample "{name}", which sample "{known[name]}" brings already'
                yield CellquiltError("sample-twice", message, "rename the region or the sample")
            known.setdefault(name, row.sample)


def _not_of_table(row: Row, values: Settings) -> Iterator[CellquiltError]:
    where = f'sample "{row.sample}"'
    suffixes = _TABLE_SUFFIXES[row.technology]
    assert row.path is not None
    if not row.path.name.lower().endswith(suffixes):
        message = f"{where}: path is {row.path.name}; technology {row.technology} is read from {' or '.join(suffixes)}"
        yield CellquiltError("table-suffix", message, "convert it first")
    if row.regions is not None:
        message = f"{where}: technology {row.technology} is a table, and regions split slides"
        yield CellquiltError("regions-table", message, "leave regions empty")
    if values["preview"]:
        message = f"{where}: technology {row.technology} has nothing to preview"
        yield CellquiltError("table-preview", message, "leave it out of the sheet, or leave preview out")
    elif values["domains"] == "none":
        message = f"{where}: technology {row.technology} has its cells, and no domains are to be found"
        yield CellquiltError("table-without-domains", message, "set domains to zeroshot, train or finetune")


def _not_of_slide(row: Row, values: Settings) -> Iterator[CellquiltError]:
    where, methods = f'sample "{row.sample}"', methods_of(values)
    if values["compare"] and len(methods) == 1:
        message = f"{where}: compare names only the chosen method, {values['segmentation']}"
        yield CellquiltError("compare-nothing", message, "name another one, or leave compare out")
    if "xeniumranger" in (values["export"] or []) and row.technology != "xenium":
        message = f"{where}: technology {row.technology} has nothing that xeniumranger reads"
        yield CellquiltError("export-not-xenium", message, "give export as a column of the sheet")
    for chain in methods if row.technology in WITHOUT_IMAGE else []:
        first = chain.split("+")[0]
        if first == "vendor" and row.prior_cells is None:
            message = f"{where}: technology {row.technology} has no cells of the machine for {chain}"
            yield CellquiltError("segmentation-no-cells", message, "give prior_cells, or choose another method")
        elif first not in ("vendor", *TRANSCRIPT_METHODS):
            message = f"{where}: technology {row.technology} has no image for {chain}"
            hint = f"set segmentation to {' or '.join(TRANSCRIPT_METHODS)}, or with prior_cells to vendor"
            yield CellquiltError("segmentation-no-image", message, hint)


def _checked_params(given: Mapping[str, Any]) -> tuple[dict[str, Value], list[CellquiltError]]:
    try:
        values = check_all(given)
    except SeveralErrors as several:
        return {}, several.errors
    return values, _missing_files(values, Path.cwd()) + list(_impossible_domains(Settings(values), Path.cwd()))


def _impossible_domains(values: Settings, folder: Path) -> Iterator[CellquiltError]:
    """What is asked of domains and cannot be had."""
    mode, model = values["domains"], values["domains_model"]
    if mode == "none":
        return
    if mode == "finetune" and not model:
        hint = f"name a model's folder, or {SHIPPED_DOMAINS} for the shipped one"
        yield CellquiltError("domains-model", "domains is finetune, and domains_model names no model", hint)
    elif mode == "train" and model:
        hint = "set domains to finetune to go on from the model, or leave it out"
        yield CellquiltError("domains-model", "domains is train, which starts without domains_model", hint)
    elif model and model != SHIPPED_DOMAINS:
        path = Path(os.path.abspath(folder / model))
        absent = [name for name in _MODEL_FILES if not os.path.isfile(path / name)]
        if not os.path.exists(path):
            hint = did_you_mean_file(path)
            if not hint and re.fullmatch(_HUB_ID, str(model)):
                command = f"cellquilt domains fetch {model} --output FOLDER"
                hint = f"of a hub it is fetched first: {command}, then name the folder"
            yield CellquiltError("path-not-found", f"domains_model not found: {path}", hint)
        elif absent:
            message = f"domains_model is no model: {path} has no {' and no '.join(absent)}"
            yield CellquiltError("domains-model", message, "name the folder that holds both files")
    for name in _OF_TRAINING if mode == "train" and values["domains_recipe"] != "published" else ():
        if values[name] not in (None, "", BY_NAME[name].default):
            message = f"{name} is for published models; domains_recipe is {values['domains_recipe']}"
            yield CellquiltError("domains-epochs", message, f"leave {name} out")
    network, weights = values["domains_image_model"], values["domains_image_weights"]
    if network and ":" not in network and not weights:
        message = f"domains_image_model is {network}, and domains_image_weights names no file; nothing is downloaded"
        yield CellquiltError("domains-image-weights", message, "give the file with its weights")
    if weights and (not network or ":" in network):
        message = "domains_image_weights is given, and domains_image_model names no network of torchvision or timm"
        yield CellquiltError("domains-image-weights", message, "leave domains_image_weights out, or name the network")
    if values["domains_n"] and values["domains_resolution"]:
        message = "domains_n and domains_resolution both say how many domains there are"
        yield CellquiltError("domains-number", message, "leave one of them out")


def _missing_files(values: Mapping[str, Value], folder: Path, where: str = "") -> list[CellquiltError]:
    """Mistakes of the settings that name files; relative ones lie in the folder."""
    errors = []
    for name in sorted(values):
        setting, text = BY_NAME[name], str(values[name])
        if not setting.is_file or not re.search(setting.file_pattern, text):
            continue
        path = Path(os.path.abspath(folder / text))
        if not os.path.isfile(path):
            errors.append(CellquiltError("path-not-found", f"{where}{name} not found: {path}", did_you_mean_file(path)))
    return errors


def _checked_sheet(path: Path | str) -> tuple[list[Row], list[CellquiltError]]:
    path = Path(path)
    errors: list[CellquiltError] = []
    try:
        records = _records(path)
        columns = _columns(path, next(records, (1, []))[1], errors)
    except CellquiltError as error:
        return [], [error]
    rows: list[Row] = []
    first_row_of: dict[str, int] = {}
    if not columns:
        return [], errors
    try:
        for number, values in records:
            if any(value.strip() for value in values):
                rows += _row(path, number, columns, values, first_row_of, errors)
    except CellquiltError as error:
        errors.append(error)
    if not first_row_of and not errors:
        errors.append(CellquiltError("sheet-no-rows", f"{path.name}: has no samples", "add one row a sample"))
    return rows, errors


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Row number (as a spreadsheet counts, the header is 1) and fields of every row, empty ones too."""
    if not path.is_file():
        raise CellquiltError("sheet-missing", f"sample sheet not found: {path}", "is --input right?")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CellquiltError("sheet-encoding", f"{path.name}: is not UTF-8 text", "save it as CSV UTF-8") from None
    if "\0" in text:
        raise CellquiltError("sheet-encoding", f"{path.name}: is not UTF-8 text", "save it as CSV UTF-8")
    if not text.strip():
        raise CellquiltError(
            "sheet-empty", f"{path.name}: is empty", f"expected the columns {', '.join(_REQUIRED)}, path"
        )
    header = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    delimiter = max(",\t;", key=header.count)  # the first of them where all are absent
    return _split(path, text.replace("\r\n", "\n").replace("\r", "\n"), delimiter)


def _split(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows by RFC 4180; the standard library's reader lets unclosed quotes swallow the rest of a sheet."""
    number, at = 1, 0
    while at < len(text):
        values = []
        while True:
            if text[at : at + 1] == '"':
                value = ""
                while True:
                    end = text.find('"', at + 1)
                    if end < 0:
                        raise _quotes(path, number)
                    value += text[at + 1 : end]
                    at = end + 1
                    if text[at : at + 1] != '"':
                        break
                    value += '"'
            else:
                end = min(
                    position for position in (text.find(delimiter, at), text.find("\n", at), len(text)) if position >= 0
                )
                value, at = text[at:end], end
            values.append(value)
            if text[at : at + 1] != delimiter:
                break
            at += 1
        if text[at : at + 1] not in ("\n", ""):
            raise _quotes(path, number)
        at += 1
        yield number, values
        number += 1


def _quotes(path: Path, number: int) -> CellquiltError:
    return CellquiltError(
        "sheet-quotes", f"{path.name} row {number}: quotes do not match", 'write a quote inside a quoted field as ""'
    )


def _columns(path: Path, header: list[str], errors: list[CellquiltError]) -> list[str]:
    """The columns' names, parameters by their full name; mistakes of the header go to `errors`.

    An empty list where required columns are absent, so that no row can be read.
    """
    names = [name.strip() for name in header]
    while names and not names[-1]:
        names.pop()
    columns = [_column(name) for name in names]
    for index, name in enumerate(names):
        if not name:
            errors.append(CellquiltError("sheet-column-unnamed", f"{path.name}: column {index + 1} has no name"))
    for column, count in Counter(columns).items():
        if column and count > 1:
            errors.append(CellquiltError("sheet-column-twice", f'{path.name}: column "{column}" stands {count} times'))
    for column in dict.fromkeys(columns):
        if column in BY_NAME and not BY_NAME[column].per_sample:
            hint = f"give it as --{column}, or name the column otherwise"
            message = f'{path.name}: column "{column}" is a parameter of the whole run, not of a sample'
            errors.append(CellquiltError("sheet-column-run", message, hint))
    missing = [required for required in _REQUIRED if required not in columns]
    for required in missing:
        hint = did_you_mean(required, filter(None, names)).replace("known:", "columns:")
        errors.append(CellquiltError("sheet-column-missing", f'{path.name}: has no column "{required}"', hint))
    if missing:
        return []
    for column in columns:
        near = difflib.get_close_matches(column, list(BY_NAME), n=1, cutoff=_NEARLY)
        if near and column not in BY_NAME and column not in SHEET_COLUMNS:
            LOG.warning('%s: column "%s" is kept as metadata; the parameter is called "%s"', path.name, column, near[0])
    return columns


def _column(name: str) -> str:
    snake = name.replace("-", "_")
    found = ALIASES.get(snake, snake)
    return found if found in BY_NAME or found in SHEET_COLUMNS else name


def _row(
    path: Path,
    number: int,
    columns: list[str],
    values: list[str],
    first_row_of: dict[str, int],
    errors: list[CellquiltError],
) -> list[Row]:
    """The row as a slide, or an empty list where it has mistakes."""
    where = f"{path.name} row {number}"
    before = len(errors)
    while len(values) > len(columns) and not values[-1].strip():
        values = values[:-1]
    if len(values) > len(columns):
        message = f"{where}: has {len(values)} fields; the header has {len(columns)}"
        errors.append(CellquiltError("sheet-row-length", message, "put fields that hold the delimiter in quotes"))
        values = values[: len(columns)]
    cells = dict(zip(columns, values, strict=False))

    sample = cells.pop("sample", "").strip()
    if not sample:
        errors.append(CellquiltError("sample-missing", f"{where}: sample is empty"))
    else:
        where += f', sample "{sample}"'
        if not re.fullmatch(SHEET_COLUMNS["sample"][1].strip("^$"), sample):
            hint = "at most 64 letters, digits, dots, dashes and underscores, the first a letter or digit"
            errors.append(CellquiltError("sample-name", f"{where}: the name cannot be used", hint))
        elif sample in first_row_of:
            message = f"{where}: the name stands in row {first_row_of[sample]} already"
            errors.append(CellquiltError("sample-twice", message, "each row needs a name of its own"))
    first_row_of.setdefault(sample, number)

    technology = cells.pop("technology", "").strip()
    if not technology:
        message = f"{where}: technology is empty"
        errors.append(CellquiltError("technology-missing", message, f"one of {', '.join(sorted(TECHNOLOGIES))}"))
    elif technology not in TECHNOLOGIES:
        message = f'{where}: unknown technology "{technology}"'
        errors.append(CellquiltError("technology-unknown", message, did_you_mean(technology, TECHNOLOGIES)))

    source = cells.get("path", "")
    alone = technology in WITHOUT_IMAGE
    if not source.strip() and not (alone and cells.get("transcripts", "").strip()):
        missing = "path and transcripts are" if alone else "path is"
        errors.append(CellquiltError("path-missing", f"{where}: {missing} empty"))
    if alone and not source.strip():
        source = cells.get("transcripts", "")
    files: dict[str, Path] = {}
    for column in SHEET_FILES:
        written = cells.pop(column, "")
        if written.strip():
            # Not Path.resolve: a link's own name may say what the file is.
            files[column] = Path(os.path.abspath(path.parent / written))
            if re.search(r"[\n\r]", written):
                hint = "rename the file, or mend the quotes"
                errors.append(CellquiltError("path-line-break", f"{where}: {column} holds a line break", hint))
            elif not os.path.exists(files[column]):  # unlike Path.exists it takes names that are too long as absent
                errors.append(CellquiltError("path-not-found", f"{where}: {column} not found: {files[column]}"))

    overrides: dict[str, Value] = {}
    metadata: dict[str, str] = {}
    for column, text in cells.items():
        text = text.strip()
        if column not in BY_NAME:
            metadata[column] = text
        elif text and BY_NAME[column].per_sample:
            try:
                overrides[column] = check(BY_NAME[column], text)
            except CellquiltError as error:
                errors.append(CellquiltError(error.code, f"{where}: {error.message}", error.hint))
    errors += _missing_files(overrides, path.parent, f"{where}: ")
    if len(errors) > before:
        return []
    return [Row(sample, technology, **files, source=source, overrides=overrides, metadata=metadata)]
