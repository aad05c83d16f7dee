"""Print a table as whoever reads it needs it."""

import sys
from typing import TYPE_CHECKING

import click

from ..tables import Table

if TYPE_CHECKING:
    from ..bench.report import Report

markdown_option = click.option(
    "--markdown",
    is_flag=True,
    help="Print the table in Markdown.  [default: where it does not go to a terminal]",
)


def print_report(report: "Report", markdown: bool = False) -> None:
    """Print a benchmark's notes, its table, and what could not be measured."""
    if markdown or not sys.stdout.isatty():
        click.echo(report.markdown())
        return
    click.echo("\n".join([*report.notes, ""]))
    print_table(report.table())
    if errors := report.errors():
        click.echo("\n".join(["", *errors]))


def print_table(table: Table, markdown: bool = False) -> None:
    """Draw it on a terminal, else print Markdown."""
    if markdown or not sys.stdout.isatty():
        click.echo(table.markdown())
        return
    from rich.console import Console

    Console().print(table.rich())
