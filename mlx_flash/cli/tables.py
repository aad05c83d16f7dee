"""Print a table as whoever reads it needs it."""

import sys

import click

from ..tables import Table

markdown_option = click.option(
    "--markdown",
    is_flag=True,
    help="Print the table in Markdown.  [default: where it does not go to a terminal]",
)


def print_table(table: Table, markdown: bool = False) -> None:
    """Draw it on a terminal, else print Markdown."""
    if markdown or not sys.stdout.isatty():
        click.echo(table.markdown())
        return
    from rich.console import Console

    Console().print(table.rich())
