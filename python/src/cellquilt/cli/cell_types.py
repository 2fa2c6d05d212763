"""Verbs for the types of a slide's cells. Each calls one function of the package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cellquilt.cli.options import settings_options

_PATH = click.Path(path_type=Path)


def _of_table(command: Callable[..., Any]) -> Callable[..., Any]:
    """What these verbs have in common."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace what stands there."),
        click.option("--allow-none", is_flag=True, help="Of a slide with too little in it say so; no error then."),
        click.option("--sample", help="The slide's name; default: the file's."),
        click.option(
            *("-o", "--output"), type=_PATH, help="Parquet file to write; without it the store's table gets the result."
        ),
        click.argument("table", type=_PATH),
    ):
        command = option(command)
    return command


@click.command()
@_of_table
@click.option("--markers", type=_PATH, help="Write the clusters' markers here (CSV, TSV, Parquet, JSON).")
@settings_options("resources", own="cluster")
def cluster(**arguments: Any) -> None:
    """Cluster the cells of a slide: the column cluster, and the clusters' markers.

    TABLE is a SpatialData store, an .h5ad file or an AnnData .zarr folder.
    """
    from cellquilt.celltypes.stage import cluster_table

    cluster_table(**arguments)


@click.group()
def annotate() -> None:
    """Name the types of a slide's cells: the column cell_type."""


@annotate.command("markers")
@_of_table
@settings_options("resources", own="annotate")
def by_markers(**arguments: Any) -> None:
    """Name cells by the markers of cell types, which --markers names a file of."""
    from cellquilt.celltypes.stage import annotate_by_markers

    annotate_by_markers(**arguments)


@annotate.command("transfer")
@_of_table
@settings_options("resources", own="annotate")
def transfer(**arguments: Any) -> None:
    """Name cells as those of a reference that they resemble: --reference and --label."""
    from cellquilt.celltypes.stage import annotate_by_reference

    annotate_by_reference(**arguments)
