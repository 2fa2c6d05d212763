"""The group of verbs for spatial domains."""

import click

from cellquilt.cli import domains_analysis, domains_stages


@click.group()
def domains() -> None:
    """Spatial domains of a cohort's cell tables."""


for _command in (*domains_stages.COMMANDS, *domains_analysis.COMMANDS):
    domains.add_command(_command)
