"""Verbs around the pipeline: simulated and demo inputs, checks, and how a store was made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cellquilt.core.schema import SHEET_FILES

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("output", type=_PATH)
@click.option("--preset", default="default", show_default=True, help="How hard the slide is: easy, default or hard.")
@click.option("--slides", default=1, show_default=True, type=click.IntRange(1), help="How many slides.")
@click.option("--width-px", default=2048, show_default=True, type=click.IntRange(64), help="Width in pixels.")
@click.option("--height-px", type=click.IntRange(64), help="Height in pixels; default: the width.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed.")
@click.option(
    "--format",
    default="ome_tif",
    show_default=True,
    help="ome_tif, merscope, xenium, cosmx, visium_hd, phenocycler, macsima, hyperion or molecular_cartography.",
)
def simulate(output: Path, **options: Any) -> None:
    """Simulate slides whose cells, types, domains and transcripts are known, with a sheet to run them."""
    from cellquilt.simulate.cohort import simulate as make_cohort

    make_cohort(output, **options)
    click.echo(f"{output / 'sheet.csv'}")


@click.command()
@click.argument("sheet", type=_PATH)
@click.argument("parameters", nargs=-1, metavar="[NAME=VALUE]...")
def check(sheet: Path, parameters: tuple[str, ...]) -> None:
    """Check a sample sheet and parameters as the pipeline does before it starts; all mistakes at once."""
    from cellquilt.core.sheet import check_input

    rows, _ = check_input(sheet, _given(parameters))
    click.echo(f"{sheet}: {len(rows)} sample{'s' if len(rows) != 1 else ''}, no mistakes")


def _given(parameters: tuple[str, ...]) -> dict[str, str]:
    """Parameters of a run as NAME=VALUE."""
    from cellquilt.core.errors import CellquiltError

    given = {}
    for parameter in parameters:
        name, equals, value = parameter.partition("=")
        if not equals:
            raise CellquiltError("usage", f'"{parameter}" is not NAME=VALUE', "for example expand_um=3")
        given[name] = value
    return given


@click.command()
@click.argument("sheet", required=False, type=_PATH)
@click.argument("parameters", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--prices", type=_PATH, help="Prices (YAML); default: the examples in assets/prices.yml.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--json-output", type=_PATH, help="Write the JSON to a file, too.")
@click.option("--settings", "request", default="{}", metavar="JSON", help="Parameters by name, and the sheet.")
def estimate(
    sheet: Path | None,
    parameters: tuple[str, ...],
    prices: Path | None,
    as_json: bool,
    json_output: Path | None,
    request: str,
) -> None:
    """Say what a run will take: tasks, hours, memory, disk and money, from the headers of its input."""
    import cellquilt
    from cellquilt.cli.options import parse_json
    from cellquilt.core.atomic import atomic_path
    from cellquilt.core.errors import CellquiltError

    given = {**parse_json(request), **_given(parameters)}
    asked = given.pop("sheet", None)
    sheet = sheet or (Path(asked) if asked else None)
    if sheet is None:
        raise CellquiltError("usage", "Missing argument 'SHEET'.", "see --help")
    found = cellquilt.estimate(sheet, prices=prices, **given)
    text = json.dumps(found.as_dict(), indent=1, sort_keys=True)
    if json_output is not None:
        with atomic_path(json_output, overwrite=True) as aside:
            aside.write_text(text + "\n", encoding="utf-8")
    click.echo(text if as_json else found)


@click.group()
def demo() -> None:
    """The demo's input and result."""


@demo.command("input")
@click.argument("output", type=_PATH)
def demo_input(output: Path) -> None:
    """Make the demo's input: a real micrograph of nuclei, two simulated slides, and the sheet. Keeps what is there."""
    from cellquilt.simulate.demo import make_demo_input

    click.echo(make_demo_input(output))


@demo.command("show")
@click.argument("outdir", type=_PATH)
def demo_show(outdir: Path) -> None:
    """Show the table of a finished run, and where its reports lie."""
    from cellquilt.report.summary import summary_table

    click.echo(summary_table(outdir))


@click.command()
@click.argument("name")
@click.option("--generation", default="3", show_default=True, type=click.Choice(["3", "4"]), help="Cellpose's.")
def download_weights(name: str, generation: str) -> None:
    """Fetch a model of Cellpose's or StarDist's hub, once, before any run, and show where it lies."""
    from cellquilt.segment import cellpose, stardist

    click.echo(stardist.download(name) if name in stardist.PUBLISHED else cellpose.download_weights(name, generation))


def _sheet_files(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each column of the sheet that names a file that results are made of."""
    for column in reversed([column for column in SHEET_FILES if column != "truth"]):
        option = f"--{column.replace('_', '-')}"
        text = f"What stood in the sheet's column {column}: compared with the recorded checksums."
        function = click.option(option, column, type=_PATH, help=text)(function)
    return function


@click.command()
@click.argument("store", type=_PATH)
@_sheet_files
@click.option("--sheet", type=_PATH, help="Write a sample sheet of this slide here.")
@click.option("--params-file", type=_PATH, help="Write the parameters that differ from their defaults here (JSON).")
@click.option("--overwrite", is_flag=True, help="Replace these two files.")
@click.option("--full", is_flag=True, help="Show all parameters and whole checksums.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def provenance(
    store: Path,
    sheet: Path | None,
    params_file: Path | None,
    overwrite: bool,
    full: bool,
    as_json: bool,
    **given: Path | None,
) -> None:
    """Show how a store was made: inputs, steps, seeds, checksums, versions, and the commands to make it again.

    STORE is a published store, or a cell table to which cellquilt added domains.
    """
    from cellquilt.report import remake

    origin = remake.read_origin(store)
    there = {column: place for column, place in given.items() if place is not None}
    same = remake.check_inputs(origin, there)
    files = {column: str(place.absolute()) for column, place in there.items()}
    if sheet is not None:
        remake.write_sheet(origin, sheet, files, overwrite=overwrite)
    if params_file is not None:
        remake.write_parameters(origin, params_file, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(remake.as_dict(origin, files, full=full), indent=2, ensure_ascii=False))
        return
    click.echo(remake.as_text(origin, files, full=full, sheet=sheet, parameters=params_file))
    if same:
        click.echo(f"\nThe same as recorded: {', '.join(same)}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--require",
    multiple=True,
    metavar="NAMES",
    help="Fail where one of these does not work here: stages (core, cellpose3, cellpose4, stardist, domains, proseg, "
    "baysor), nextflow, java, gpu, or a program of the table; by commas.",
)
@click.option("--outdir", type=_PATH, help="Show the free disk there.")
@click.option("--workdir", type=_PATH, help="Show the free disk there.")
@click.option("--explain", metavar="CODE", help="Show what an error means, its usual cause and how to mend it.")
@click.option("--compile", "folder", type=_PATH, help="Compile all kernels now, with a tiny slide in this folder.")
def doctor(
    as_json: bool,
    require: tuple[str, ...],
    outdir: Path | None,
    workdir: Path | None,
    explain: str | None,
    folder: Path | None,
) -> None:
    """Show what is installed here and whether it works: tools, containers, GPUs, environments, weights, disk."""
    if explain is not None:
        from cellquilt.core.explain import explain as explained

        click.echo(explained(explain))
        return
    if folder is not None:
        from cellquilt.warm_up import compile_kernels

        click.echo(compile_kernels(folder))
        return
    from cellquilt import doctor as checks

    wanted = checks.known_requirements(name for names in require for name in names.split(","))
    folders = {"outdir": outdir, "workdir": workdir}
    found = checks.run_checks({name: path for name, path in folders.items() if path is not None})
    click.echo(checks.as_json(found) if as_json else checks.table(found))
    checks.require(found, wanted)
