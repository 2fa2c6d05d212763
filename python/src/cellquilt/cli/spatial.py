"""Verbs of spatial statistics: of a slide, and of a cohort."""

from pathlib import Path
from typing import Any

import click

from cellquilt.cli.options import settings_options

_PATH = click.Path(path_type=Path)


class _SlideByDefault(click.Group):
    """A group whose first command is meant where none is named."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in context.help_option_names:
            args = ["slide", *args]
        return super().parse_args(context, args)


@click.group(cls=_SlideByDefault)
def stats() -> None:
    """Measure cells in space: of one slide (stats STORE), or of a cohort (stats cohort FOLDERS)."""


@stats.command()
@click.argument("store", type=_PATH)
@click.option("--table", default="table", show_default=True, help="Table of a SpatialData store.")
@click.option("-o", "--output", type=_PATH, required=True, help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace what stands there.")
@settings_options("resources", own="stats")
def slide(**arguments: Any) -> None:
    """Write a slide's neighbourhoods, distances, co-occurrence, niches and their network.

    STORE is a SpatialData store, an AnnData store or an .h5ad file.
    """
    from cellquilt.spatial.stage import stats_slide

    stats_slide(**arguments)


@stats.command()
@click.argument("folders", type=_PATH, nargs=-1, required=True)
@click.option("--condition-key", help="Column of the slides' obs with their condition: conditions are compared.")
@click.option("--sample-key", help="Column with the samples, the unit of comparisons; default: the slides.")
@click.option("--batch-key", help="Column with the samples' batch: samples are compared within batches.")
@click.option("--reference", help="Condition that the others are compared with; default: all pairs.")
@click.option(
    *("--permutations", "n_permutations"),
    default=9999,
    show_default=True,
    type=click.IntRange(1),
    help="Most ways to permute samples that are tried.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed.")
@click.option("-o", "--output", type=_PATH, required=True, help="Folder to write the tables to.")
@click.option("--html", type=_PATH, help="Write a page as well.")
@click.option("--overwrite", is_flag=True, help="Replace what stands there.")
def cohort(folders: tuple[Path, ...], output: Path, html: Path | None, overwrite: bool, **options: Any) -> None:
    """Bring the FOLDERS of several slides together, and compare conditions."""
    from cellquilt.core.atomic import refuse_existing
    from cellquilt.spatial import SlideStatistics, cohort_statistics

    if html is not None:
        refuse_existing(html, overwrite)
    slides = [SlideStatistics.read(folder) for folder in folders]
    found = cohort_statistics(slides, **options)
    found.write(output, overwrite=overwrite)
    if html is not None:
        from cellquilt.report.spatial import write_cohort_page

        write_cohort_page(found, [slide.sample for slide in slides], html, overwrite=overwrite)
