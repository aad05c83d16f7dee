"""`mlx-flash list` and `rm`: models on this disk."""

import json

import click

from .common import agreed, json_option, yes
from .tables import markdown_option, print_table


@click.command("list")
@json_option
@markdown_option
def list_models(as_json, markdown):
    """List the models on this disk that run from flash, with their sizes.

    These are conversions in mlx-flash's own folder (MLX_FLASH_HOME, or
    ~/.cache/mlx-flash), and checkpoints in the Hugging Face cache that run as they
    are.
    """
    from ..checkpoints.shelf import shelf
    from ..library.listing import on_disk, table

    models = on_disk()
    if as_json:
        click.echo(json.dumps([model.to_dict() for model in models]))
    elif models:
        print_table(table(models), markdown)
    else:
        click.echo(f"No models yet: nothing in {shelf()} or the hub's cache.", err=True)


@click.command("rm")
@click.argument("name")
@yes("Do not ask.")
def remove_model(name):
    """Delete a model that mlx-flash converted, after asking.

    NAME is what mlx-flash list shows. Nothing outside mlx-flash's own folder is ever
    deleted; downloads of the Hugging Face hub go with hf cache rm.

    \b
    Example:
      mlx-flash rm Qwen/Qwen3-0.6B
    """
    from ..library.listing import size_of
    from ..library.removal import remove, to_remove

    place = to_remove(name)
    nbytes = sum(size_of(path) for path in place.paths() if path.is_dir())
    what = f"{place.folder} ({nbytes / 1e9:,.2f} GB)"
    say = f"Deleting {what}."
    if agreed(say, "Sure?", f"{what} would be deleted. Add --yes to agree."):
        remove(place)
