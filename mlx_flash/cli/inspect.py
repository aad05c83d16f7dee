"""`mlx-flash info` and `verify`: what a folder holds, and whether it is whole."""

import json

import click

from .common import demo_argument, json_option


@click.command()
@demo_argument
@json_option
def info(model, as_json):
    """Say what of a model is resident and what is on flash, layer by layer.

    Without FOLDER, of the demo model.
    """
    from ..inspection import facts, table

    click.echo(json.dumps(facts(model)) if as_json else table(model))


@click.command()
@demo_argument
def verify(model):
    """Compare every weight file of a model with the digest noted at conversion.

    Without FOLDER, of the demo model.
    """
    from ..inspection import verify as check

    check(model, lambda name: click.echo(f"ok  {name}"))
