"""The group of verbs for Xenium Explorer."""

import json
from pathlib import Path

import click

from cellquilt.cli.options import settings_options
from cellquilt.core.settings import Settings

_PATH = click.Path(path_type=Path)
_overwrite = click.option("--overwrite", is_flag=True, help="Replace what stands there.")


@click.group()
def explorer() -> None:
    """Slides as Xenium Explorer folders, and back."""


@explorer.command()
@click.argument("store", type=_PATH)
@click.option("-o", "--output", "--output-path", type=_PATH, required=True, help="Folder to make.")
@click.option(
    "--mode",
    help="Parts to write: +o the groups only, -it all but image and transcripts; c counts, b boundaries, m manifest, "
    "p Parquet tables.",
)
@click.option("--image", help="Name of the image; default: the main one.")
@click.option("--layer", help="Layer of the table with the counts; default: X.")
@click.option("--column", "columns", multiple=True, help="Column of obs to show as groups; default: all that can be.")
@click.option("--pixel-size-um", "--pixel-size", type=float, help="Where the store does not say.")
@click.option("--run-name", help="What the viewer calls the run; default: the sample.")
@_overwrite
@settings_options("resources", own="explorer")
def write(
    store: Path,
    output: Path,
    settings: Settings,
    mode: str | None,
    image: str | None,
    layer: str | None,
    columns: tuple[str, ...],
    pixel_size_um: float | None,
    run_name: str | None,
    overwrite: bool,
) -> None:
    """Write the slide STORE for Xenium Explorer, or some parts of its folder anew."""
    from cellquilt import explorer as writer

    writer.write(
        store, output, mode=mode, image=image, layer=layer, columns=columns, pixel_size_um=pixel_size_um,
        max_vertices=settings["explorer_max_vertices"], compression=settings["explorer_compression"],
        tables=settings["explorer_tables"], run_name=run_name, memory_mb=settings["memory_mb"], overwrite=overwrite,
    )  # fmt: skip


@explorer.command()
@click.argument("table", type=_PATH)
@click.argument("folder", type=_PATH)
@click.option("--column", "columns", multiple=True, help="Column of obs to show as groups; default: all that can be.")
def update(table: Path, folder: Path, columns: tuple[str, ...]) -> None:
    """Show other groups of cells in FOLDER: those of TABLE, an .h5ad file or a store."""
    from cellquilt import explorer as writer

    writer.update_obs(table, folder, columns=columns)


@explorer.command()
@click.argument("store", type=_PATH)
@click.argument("image", type=_PATH)
@click.argument("matrix", type=_PATH, required=False)
@click.option("--name", "--image-key", help="The image's name; default: the file's.")
@click.option("--folder", type=_PATH, help="Explorer folder to put the image and its alignment into.")
@click.option("--to-store/--not-to-store", default=True, show_default=True, help="Add the image to the store.")
@_overwrite
@settings_options("resources", own="explorer")
def align(
    store: Path,
    image: Path,
    matrix: Path | None,
    settings: Settings,
    name: str | None,
    folder: Path | None,
    to_store: bool,
    overwrite: bool,
) -> None:
    """Add the TIFF IMAGE, aligned with the slide STORE by MATRIX (CSV, 3 × 3, to pixels of the slide's image)."""
    from cellquilt import explorer as writer

    writer.align(
        store, image, matrix, name=name, folder=folder, to_store=to_store, overwrite=overwrite,
        compression=settings["explorer_compression"], memory_mb=settings["memory_mb"],
    )  # fmt: skip


@explorer.command()
@click.argument("store", type=_PATH)
@click.argument("file", type=_PATH)
@click.option("--name", help="Name of the shapes and of the column of obs; default: selections, or groups.")
@click.option("--groups", is_flag=True, help="FILE holds groups of cells, not coordinates.")
@click.option("--folder", type=_PATH, help="The Explorer folder that the groups are of; default: as it would be now.")
@_overwrite
def selections(store: Path, file: Path, name: str | None, groups: bool, folder: Path | None, overwrite: bool) -> None:
    """Add selections drawn in the viewer, or groups of cells, to the slide STORE; FILE is what the viewer exports."""
    from cellquilt import explorer as writer

    if groups:
        found = writer.add_categories(store, file, name=name or "groups", folder=folder)
    else:
        found = writer.add_lasso(store, file, name=name or "selections", overwrite=overwrite)
    click.echo(json.dumps(found, ensure_ascii=False))


@explorer.command()
@click.argument("folder", type=_PATH)
def check(folder: Path) -> None:
    """Check that all files of FOLDER agree."""
    from cellquilt import explorer as writer

    click.echo(json.dumps(writer.validate(folder)))


for _name, _command in (("update-obs", update), ("add-aligned", align)):  # as sopa calls them
    explorer.add_command(_command, _name)
