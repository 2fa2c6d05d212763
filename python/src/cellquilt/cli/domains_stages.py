"""Verbs that find the domains of a cohort, the pipeline's own stages: from files to files."""

from pathlib import Path
from typing import Any

import click

from cellquilt.cli.options import settings_options

_PATH = click.Path(path_type=Path)
_weights = click.option("--weights", type=_PATH, help="The model's folder, where it was staged under another name.")
_sample = click.option("--sample", help="The slide's name; default: the file's.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace what stands there.")


def _output(what: str) -> Any:
    return click.option("-o", "--output", type=_PATH, required=True, help=what)


@click.command()
@click.argument("table", type=_PATH)
@_sample
@click.option("--slide", type=_PATH, help="The store with the slide's images; default: TABLE's own.")
@click.option("--he-image", type=_PATH, help="TIFF of an aligned image to look at.")
@click.option("--he-matrix", type=_PATH, help="Its 3 × 3 map (CSV) to pixels of the main image; to µm without one.")
@click.option("--image-weights", type=_PATH, help="The network's weights, where they were staged under another name.")
@click.option("--refusal", type=_PATH, help="Say here (JSON) why there is nothing to find domains from; no error then.")
@_output("The graph store to make.")
@_overwrite
@settings_options("domains_image", "resources", own="domains_graph")
def prepare(**arguments: Any) -> None:
    """Write the cells of a slide and their neighbours as a compact store.

    TABLE is an .h5ad file, an AnnData .zarr folder, or a SpatialData store.
    """
    from cellquilt.domains.stages import prepare_slide

    prepare_slide(**arguments)


@click.command()
@click.argument("graphs", type=_PATH, nargs=-1, required=True)
@_weights
@_output("The model's folder to make.")
@_overwrite
@settings_options("domains_training", "domains_image", "resources", own="domains")
def train(**arguments: Any) -> None:
    """Make a model of all slides' graph stores, or go on from the one that --model names."""
    from cellquilt.domains.stages import train_model

    train_model(**arguments)


@click.command()
@click.argument("graph", type=_PATH)
@_weights
@_output("The Parquet file to write.")
@_overwrite
@settings_options("resources", own="domains")
def embed(**arguments: Any) -> None:
    """Write the latents of the cells of one slide's graph store."""
    from cellquilt.domains.stages import embed_slide

    embed_slide(**arguments)


@click.command()
@click.argument("latents", type=_PATH, nargs=-1, required=True)
@_weights
@_output("The folder to make.")
@_overwrite
@settings_options("domains_level", "resources", own="domains")
def assign(**arguments: Any) -> None:
    """Assign the cells of all slides to domains that they share."""
    from cellquilt.domains.stages import assign_domains

    assign_domains(**arguments)


@click.command()
@click.argument("table", type=_PATH)
@click.option("--domains", type=_PATH, required=True, help="The slide's file of those that `assign` wrote.")
@click.option("--graph", type=_PATH, help="The slide's graph store: its neighbours are added, too.")
@_sample
@click.option("--qc", type=_PATH, help="File for the table's numbers (JSON).")
@_output("The copy to make, of the same kind.")
@_overwrite
@settings_options(extra=("metadata",))
@click.option("--metadata", hidden=True, help="The sample's metadata.")
def annotate(settings: Any, **arguments: Any) -> None:
    """Write a copy of a cell table with the domains of its cells."""
    from cellquilt.report.stage import annotate_sample

    annotate_sample(**arguments)


@click.command()
@click.argument("name")
@_output("The folder to make.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@_overwrite
def fetch(**arguments: Any) -> None:
    """Put a model into a folder, for --domains_model: tasks fetch nothing.

    NAME is owner/name on a model hub, which needs the package huggingface_hub; or default, the shipped one.
    """
    from cellquilt.domains.hub import fetch_model

    fetch_model(**arguments)


#: Added to the group ``domains``.
COMMANDS = (fetch, prepare, train, embed, assign, annotate)
