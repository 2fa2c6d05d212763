"""Verbs of the way from a machine's files to a published slide. Each calls one function of the package."""

from pathlib import Path
from typing import Any

import click

from cellquilt.cli.options import settings_options
from cellquilt.core.settings import GROUPS, METHODS, TRANSCRIPT_METHODS, Settings

_PATH = click.Path(path_type=Path)
_output = click.option("-o", "--output", type=_PATH, help="What to write; without it the store itself gets the result.")
_weights = click.option("--weights", type=_PATH, help="The model, where it was staged under another name.")
#: Groups of settings of the methods for images, any of which patches may be cut for.
_FOR_IMAGES = tuple(name for name in METHODS if name in GROUPS)
#: Groups of settings that cutting transcripts for any method needs.
_FOR_TRANSCRIPTS = ("segmentation", *(name for name in TRANSCRIPT_METHODS if name in GROUPS), "resources")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace what stands there.")


@click.command()
@click.argument("slide", type=_PATH, required=False)
@click.option("--technology", help="The machine.")
@click.option("--sample", help="The sample's name; default: the output's name.")
@click.option("--transcripts", type=_PATH, help="Table of transcripts, beside an image or alone.")
@click.option("--prior-cells", type=_PATH, help="GeoParquet or GeoJSON of cells to start from.")
@click.option("--regions", type=_PATH, help="GeoJSON of regions to split the slide into.")
@click.option("-o", "--output", "--sdata-path", type=_PATH, help="The store to make; default: beside the slide.")
@_overwrite
@settings_options("convert", "regions", "resources", extra=("technology", "source"))
@click.option("--source", hidden=True, help="The slide's name in messages, where it was staged under another.")
def convert(**arguments: Any) -> None:
    """Read a machine's output into a store."""
    from cellquilt.readers import convert_slide

    convert_slide(**arguments)


@click.command()
@click.argument("store", type=_PATH)
@_output
@_overwrite
@settings_options("resources", own="tissue")
def tissue(**arguments: Any) -> None:
    """Find the tissue: the shapes element region_of_interest."""
    from cellquilt.segment.stages import find_tissue

    find_tissue(**arguments)


@click.group()
def patchify() -> None:
    """Cut a slide into patches."""


@patchify.command("image")
@click.argument("store", type=_PATH)
@click.option("--tissue", type=_PATH, help="Store with region_of_interest; default: the store itself, if it has one.")
@click.option("--bundles", type=_PATH, help="Folder for the bundles of patches.")
@_weights
@_output
@_overwrite
@settings_options("patch", "segmentation", *_FOR_IMAGES, "resources")
def patchify_image(**arguments: Any) -> None:
    """Cut the image into overlapping patches: the shapes element image_patches, and bundles to segment."""
    from cellquilt.segment.stages import patchify_image

    patchify_image(**arguments)


@patchify.command("transcripts")
@click.argument("store", type=_PATH)
@click.option("--method", type=click.Choice(TRANSCRIPT_METHODS), help="The method that the bundles are for.")
@click.option("--cells", type=_PATH, help="Store with the prior's shapes; default: the store itself.")
@click.option("--bundles", type=_PATH, help="Folder for the bundles of patches.")
@_output
@_overwrite
@settings_options(*_FOR_TRANSCRIPTS, own="transcripts")
def patchify_transcripts(**arguments: Any) -> None:
    """Cut the transcripts into overlapping patches: the shapes element transcripts_patches, and bundles to segment."""
    from cellquilt.segment.stages import patchify_transcripts

    patchify_transcripts(**arguments)


@click.group()
def segment() -> None:
    """Segment the patches of a bundle, or of a store that has been patchified."""


def _segment_command(method: str) -> click.Command:
    @click.command(method, help=f"Segment with {method}.")
    @click.argument("source", type=_PATH)
    @_weights
    @_output
    @_overwrite
    @settings_options("segmentation", "patch", "resources", own=method)
    def command(**arguments: Any) -> None:
        from cellquilt.segment.stages import segment_source

        segment_source(method=method, **arguments)

    return command


def _segment_transcripts_command(method: str) -> click.Command:
    @click.command(method, help=f"Segment transcripts with {method}.")
    @click.argument("source", type=_PATH)
    @_output
    @_overwrite
    @settings_options("segmentation", "transcripts", "resources", own=method)
    def command(**arguments: Any) -> None:
        from cellquilt.segment.stages import segment_transcripts

        segment_transcripts(method=method, **arguments)

    return command


for _method in METHODS:
    if _method != "vendor":  # the machine's own cells are taken by `resolve`
        segment.add_command(_segment_command(_method))
for _method in TRANSCRIPT_METHODS:
    segment.add_command(_segment_transcripts_command(_method))


@click.command()
@click.argument("paths", type=_PATH, nargs=-1, required=True)
@click.option("--prior", type=_PATH, help="Store with the cells that a method for transcripts started from.")
@_output
@_overwrite
@settings_options("segmentation", "resources", own="resolve")
def resolve(paths: tuple[Path, ...], settings: Settings, **arguments: Any) -> None:
    """Put the patches' cells together and grow nuclei to cells.

    PATHS are a method's name (optional), the slide's store, and the patches' results (default: those in the store).
    """
    from cellquilt.resolve.stage import resolve_slide

    if str(paths[0]) in TRANSCRIPT_METHODS:
        arguments["method"], paths = str(paths[0]), paths[1:]
    elif str(paths[0]) in METHODS:
        settings = Settings({**settings.given, "segmentation": str(paths[0])})
        paths = paths[1:]
    if not paths:
        raise click.UsageError("name the slide's store")
    resolve_slide(paths[0], paths[1:], settings=settings, **arguments)


@click.command()
@click.argument("store", type=_PATH)
@click.option("--cells", type=_PATH, help="Store with cell_boundaries; default: the store itself.")
@click.option("--name", default="", help="Method of the cells, to compare: makes table_NAME of NAME_boundaries.")
@_output
@_overwrite
@settings_options("resources", own="aggregate", extra=("metadata",))
@click.option("--metadata", hidden=True, help="The sample's metadata.")
def aggregate(**arguments: Any) -> None:
    """Count transcripts and measure channels in cells: the table, and the transcripts with their cells."""
    from cellquilt.aggregation.stage import aggregate_slide

    aggregate_slide(**arguments)


@click.command()
@click.argument("parts", type=_PATH, nargs=-1, required=True)
@click.option("--regions", type=_PATH, help="GeoJSON with the regions; default: those that the slide was read with.")
@click.option("--columns", type=_PATH, help="Write each cell's region here, for the whole slide's table (Parquet).")
@click.option("-o", "--output", type=_PATH, required=True, help="Folder to make, with a store for each region.")
@_overwrite
@settings_options("resources", own="regions")
def split(**arguments: Any) -> None:
    """Split a slide whose cells were counted into a store for each region.

    PARTS are the slide's store, or its raw store and what the steps added.
    """
    from cellquilt.aggregation.split import split_slide

    split_slide(**arguments)


@click.command()
@click.argument("parts", type=_PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=_PATH, required=True, help="The store to make.")
@click.option("--qc", type=_PATH, help="File for the numbers and the verdict (JSON).")
@click.option("--domains", type=_PATH, help="The cells' domains, or why there are none (cellquilt domains).")
@click.option("--graph", type=_PATH, help="The cells' neighbours, where there are domains.")
@click.option(
    "--columns", type=_PATH, multiple=True, help="The cells' clusters or types (cellquilt cluster, annotate); repeat."
)
@_overwrite
@settings_options("resources", own="report")
def assemble(**arguments: Any) -> None:
    """Put a sample's raw store and what the steps added together into one store."""
    from cellquilt.report.stage import assemble_slide

    assemble_slide(**arguments)


@click.command()
@click.argument("store", type=_PATH)
@click.option("--qc", type=_PATH, help="The sample's qc.json; default: computed from the store.")
@click.option("--truth", type=_PATH, help="Folder with the truth of a simulated slide.")
@click.option("--comparison", type=_PATH, help="What `cellquilt compare` wrote as JSON.")
@click.option("--stats", type=_PATH, help="Folder that `cellquilt stats` wrote.")
@click.option("-o", "--output", type=_PATH, required=True, help="The page to write.")
@_overwrite
@settings_options("resources", own="report")
def report(**arguments: Any) -> None:
    """Write a sample's report: one self-contained page."""
    from cellquilt.report.stage import report_slide

    report_slide(**arguments)


@click.command()
@click.argument("qcs", type=_PATH, nargs=-1)
@click.option("--samples", "names", required=True, help="Names of all samples, comma-separated.")
@click.option("-o", "--output", type=_PATH, required=True, help="The table to write.")
@click.option("--checksums", type=_PATH, help="Write which inputs and weights each sample was made from here (TSV).")
@click.option("--multiqc", type=_PATH, help="Folder for a table that MultiQC takes into its report.")
@_overwrite
def samples(**arguments: Any) -> None:
    """Write the table of all samples of a run, failed ones too."""
    from cellquilt.report.stage import samples_table

    samples_table(**arguments)


@click.command()
@click.argument("stores", type=_PATH, nargs=-1, required=True)
@click.option(
    *("-o", "--output", "outputs"),
    type=_PATH,
    multiple=True,
    required=True,
    help="The table to write (TSV; JSON holds more); may be given twice.",
)
@click.option("--html", type=_PATH, help="Write a page as well.")
@click.option("--shapes", default="", help="Elements of one store to compare, comma-separated; default: its methods.")
@click.option("--names", default="", help="Names of the methods, comma-separated.")
@click.option("--truth", type=_PATH, help="Folder with the truth of a simulated slide.")
@_overwrite
@settings_options("resources", own="compare")
def compare(**arguments: Any) -> None:
    """Compare segmentations of one slide: STORES of several runs, or the methods or --shapes of one store."""
    from cellquilt.report.methods import compare_slide

    compare_slide(**arguments)


@click.command()
@click.argument("store", type=_PATH)
@click.option("--tissue", type=_PATH, help="Store with region_of_interest.")
@_weights
@click.option("-o", "--output", type=_PATH, required=True, help="The page to write.")
@_overwrite
@settings_options("preview", "patch", "segmentation", *_FOR_IMAGES, "resolve", "aggregate", "resources")
def preview(**arguments: Any) -> None:
    """Segment a few windows with every combination of some parameters: one page of outlines."""
    from cellquilt.report.preview import preview_slide

    preview_slide(**arguments)


@click.command()
@click.argument("paths", type=_PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=_PATH, required=True, help="Folder; each format has its own in it.")
@_overwrite
@settings_options("resources", own="export")
def export(paths: tuple[Path, ...], **arguments: Any) -> None:
    """Write cells as the files of other programs.

    PATHS are the formats (xeniumranger, vpt, qupath; several by commas; default: --export) and the slide's store.
    """
    from cellquilt.formats.stage import export_slide

    if len(paths) > 2:
        raise click.UsageError("name the formats, by commas, and one store")
    formats = [name for name in str(paths[0]).split(",") if name] if len(paths) == 2 else []
    export_slide(paths[-1], formats=formats, **arguments)
