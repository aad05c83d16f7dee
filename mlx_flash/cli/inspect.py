"""`mlx-flash info` and `verify`: what a folder holds, and whether it is whole."""

import json

import click

from ..errors import printable
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
@click.option(
    "--record",
    is_flag=True,
    help="Take the files as they are for sound. Of a flash folder: configuration and "
    "tokenizer; of a checkpoint that is read in place: all files.",
)
def verify(model, record):
    """Compare every file of a model with the digest noted of it.

    `convert` notes digests in the flash folder. Of a checkpoint with experts that is
    read in place, --record notes them in this user's cache folder. Without FOLDER, of
    the demo model.

    \b
    Examples:
      mlx-flash verify opt-6.7b-flash
      mlx-flash verify --record Qwen3-30B-A3B-4bit
    """
    from .. import inspection

    if record:
        inspection.record(model, lambda name: click.echo(f"noted  {name}"))
        return
    for name in inspection.verify(model, lambda name: click.echo(f"ok  {name}")):
        click.echo(f"no digest  {printable(name)}")
