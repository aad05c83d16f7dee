"""`mlx-flash info` and `verify`: what a folder holds, and whether it is whole."""

import json

import click

from ..errors import printable
from .common import demo_argument, json_option
from .tables import markdown_option, print_table


@click.command()
@demo_argument
@json_option
@markdown_option
def info(model, as_json, markdown):
    """Say what of a model is resident and what is on flash, layer by layer.

    NAME is a flash folder, a checkpoint, or a hub name, of which no weights are
    downloaded. Without NAME, of the demo model.
    """
    from ..library.opening import converted
    from ..planning.info import look_at

    found = look_at(converted(model) or model)
    if as_json:
        click.echo(json.dumps(found.facts()))
        return
    click.echo(found.text() + "\n")
    print_table(found.layers(), markdown)


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

    NAME is a flash folder, a checkpoint, or a hub name. `convert` notes digests in the
    flash folder. Of a checkpoint, --record notes them in this user's cache folder. Of
    one that mlx-flash converted into its own folder, the conversion is compared.
    Without NAME, of the demo model.

    \b
    Examples:
      mlx-flash verify opt-6.7b-flash
      mlx-flash verify --record Qwen3-30B-A3B-4bit
    """
    from .. import inspection
    from ..library.opening import converted

    model = converted(model) or model
    if record:
        inspection.record(model, lambda name: click.echo(f"noted  {name}"))
        return
    for name in inspection.verify(model, lambda name: click.echo(f"ok  {name}")):
        click.echo(f"no digest  {printable(name)}")
