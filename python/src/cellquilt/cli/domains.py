"""The group of verbs for spatial domains."""

import click

from cellquilt.cli.domains_analysis import COMMANDS


@click.group()
def domains() -> None:
    """Spatial domains of a cohort's cell tables."""


for _command in COMMANDS:
    domains.add_command(_command)
