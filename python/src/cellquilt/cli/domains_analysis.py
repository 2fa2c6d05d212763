"""Verbs that look at the domains of a cohort's tables. Each reads the tables and writes what one function returns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_TABLE = "The table to write: CSV, TSV, Parquet or JSON by its suffix."


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Tables to read and the columns with domains and slides; then a command's own options."""
    all_options = (
        click.argument("tables", type=_PATH, nargs=-1, required=True),
        click.option("--table", "table_name", default="table", show_default=True, help="Table of SpatialData stores."),
        click.option("--domain-key", default="domain", show_default=True, help="Column of obs with the domains."),
        click.option("--slide-key", help="Column of obs that names the slides; default: each table is one."),
        *options,
        click.option("--overwrite", is_flag=True, help="Replace what stands there."),
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(all_options):
            function = option(function)
        return function

    return decorate


_output = click.option("-o", "--output", type=_PATH, required=True, help=_TABLE)
_layer = click.option("--layer", help="Layer to take instead of X.")
_kind = click.option(
    "--kind", type=click.Choice(["counts", "log1p", "protein"]), help="What it holds; default: by its values."
)
_condition = click.option("--condition-key", help="Column of obs with the slides' condition.")
_sample = click.option("--sample-key", help="Column with the samples, the unit of comparisons; default: the slides.")
_batch = click.option("--batch-key", help="Column with the samples' batch: samples are compared within batches.")
_permutations = click.option(
    *("--permutations", "n_permutations"),
    default=9999,
    show_default=True,
    type=click.IntRange(1),
    help="Most ways to permute samples that are tried.",
)
_seed = click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed.")


@click.command()
@_options(_condition, _output)
def proportions(tables: tuple[Path, ...], table_name: str, output: Path, overwrite: bool, **options: Any) -> None:
    """Write the share of every domain in every slide."""
    from cellquilt.domains import analysis

    analysis.check_output(output, overwrite)
    found = analysis.proportions(analysis.read_tables(tables, table_name), **options)
    analysis.write_table(found, output, overwrite=overwrite)


@click.command()
@_options(_output)
def architecture(tables: tuple[Path, ...], table_name: str, output: Path, overwrite: bool, **options: Any) -> None:
    """Write which domains border on which: edges, over those expected at random, and PAGA."""
    from cellquilt.domains import analysis

    analysis.check_output(output, overwrite)
    found = analysis.architecture(analysis.read_tables(tables, table_name), **options)
    analysis.write_table(found.to_frame(), output, overwrite=overwrite)


@click.command()
@_options(_layer, _kind, click.option("--by-domain", is_flag=True, help="A row for each domain and gene."), _output)
def genes(
    tables: tuple[Path, ...], table_name: str, by_domain: bool, output: Path, overwrite: bool, **options: Any
) -> None:
    """Write the genes that differ between domains, the most variable first."""
    from cellquilt.domains import analysis

    analysis.check_output(output, overwrite)
    found = analysis.gene_statistics(analysis.read_tables(tables, table_name), **options)
    analysis.write_table(found.by_domain() if by_domain else found.by_gene(), output, overwrite=overwrite)


@click.command()
@_options(
    click.option("--condition-key", required=True, help="Column of obs with the samples' condition."),
    _sample,
    _batch,
    click.option("--what", default="proportions", show_default=True, help="proportions, or expression in domains."),
    click.option("--reference", help="Condition that the others are compared with; default: all pairs."),
    click.option(
        "--min-cells",
        default=10,
        show_default=True,
        type=click.IntRange(1),
        help="Cells a sample's domain needs for its expression.",
    ),
    *(_permutations, _seed, _layer, _kind, _output),
)
def compare(
    tables: tuple[Path, ...],
    table_name: str,
    slide_key: str | None,
    sample_key: str | None,
    output: Path,
    overwrite: bool,
    **options: Any,
) -> None:
    """Compare conditions by permuting samples."""
    from cellquilt.domains import analysis

    analysis.check_output(output, overwrite)
    found = analysis.compare_conditions(
        analysis.read_tables(tables, table_name), sample_key=sample_key or slide_key, **options
    )
    analysis.write_table(found, output, overwrite=overwrite)


@click.command()
@_options(
    click.option("--gene-sets", type=_PATH, required=True, help="Gene sets: .gmt or .json."),
    click.option(
        "--min-genes", default=3, show_default=True, type=click.IntRange(1), help="Genes a set needs in all panels."
    ),
    *(_layer, _kind),
    click.option("--sets", "sets_output", type=_PATH, help="Write which genes of each set were used."),
    _output,
)
def pathways(
    tables: tuple[Path, ...],
    table_name: str,
    output: Path,
    sets_output: Path | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Write scores of gene sets in every domain of every slide."""
    from cellquilt.domains import analysis

    for path in filter(None, (output, sets_output)):
        analysis.check_output(path, overwrite)
    found = analysis.pathway_scores(analysis.read_tables(tables, table_name), **options)
    analysis.write_table(found.scores, output, overwrite=overwrite)
    if sets_output is not None:
        analysis.write_table(found.sets, sets_output, overwrite=overwrite)


@click.command()
@_options(
    *(_condition, _sample, _batch),
    click.option("--gene-sets", type=_PATH, help="Gene sets: .gmt or .json."),
    click.option("--model", type=_PATH, help="Folder of the model that assigned the domains: draws their tree."),
    click.option("--truth-key", default="domain_true", show_default=True, help="Column with the true domains."),
    click.option("--about", type=_PATH, help="JSON file with what else is known of the run."),
    click.option("--tables-output", type=_PATH, help="Folder to write all numbers to as CSV."),
    *(_permutations, _seed),
    click.option("-o", "--output", type=_PATH, required=True, help="The page to write."),
)
def report(
    tables: tuple[Path, ...], table_name: str, model: Path | None, tables_output: Path | None, **options: Any
) -> None:
    """Analyse a cohort's domains and write its report: one self-contained page."""
    from cellquilt.domains import analysis
    from cellquilt.report.cohort import report_cohort

    hierarchy = None
    if model is not None:
        from cellquilt.domains import Model

        hierarchy = Model.from_pretrained(model).hierarchy
    report_cohort(analysis.read_tables(tables, table_name), hierarchy=hierarchy, tables=tables_output, **options)


#: Added to the group ``domains``.
COMMANDS = (proportions, architecture, genes, compare, pathways, report)
