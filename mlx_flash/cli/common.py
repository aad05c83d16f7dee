"""What several commands share: the demo model, and options of one meaning."""

from collections.abc import Callable
from pathlib import Path

import click

from .. import DEMO_MODEL
from ..bench.options import MemoryType

DEMO_MEMORY = "50%"
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def memory_option(default: str | None, note: str = "") -> Callable:
    """--memory, or MLX_FLASH_MEMORY; `note` follows the help text."""
    return click.option(
        "--memory",
        type=MemoryType(),
        default=default,
        show_default=True,
        envvar="MLX_FLASH_MEMORY",
        help=f"All that the model may hold.{note}",
    )


def run_options(command: Callable) -> Callable:
    """--model and --memory of a command that runs the demo model if none is named."""
    note = f"  [default: auto; demo model: {DEMO_MEMORY}]"
    command = memory_option(None, note)(command)
    return click.option(
        "--model",
        metavar="FOLDER",
        help="Flash folder, checkpoint with experts, or a hub name of one.  "
        "[default: demo model]",
    )(command)


def chosen_model(model: str | None, memory: str | None) -> tuple[Path, str]:
    """The folder and the memory that `run_options` stand for."""
    from ..assembly import can_stream
    from ..checkpoints.hub import find_model

    if model is None:
        return DEMO_MODEL, memory or DEMO_MEMORY
    return find_model(model, checkpoint=can_stream), memory or "auto"


check_option = click.option(
    "--check",
    type=click.Choice(["none", "sample", "full"]),
    default="sample",
    show_default=True,
    help="Compare with digests before loading: configuration, tokenizer and samples of "
    "the weights, or every byte.",
)


page_cache_option = click.option(
    "--page-cache",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    is_flag=False,
    flag_value="on",
    help="Let the system cache what is read: auto, where memory is free for it.",
)


def sampling_options(temp: float, seed: int | None) -> Callable:
    """--temp and --seed with these defaults."""

    def add(command: Callable) -> Callable:
        command = click.option(
            "--seed",
            type=click.IntRange(0, 2**64 - 1),
            default=seed,
            show_default=seed is not None,
            help="Seed of the sampling.",
        )(command)
        return click.option(
            "--temp",
            type=click.FloatRange(0),
            default=temp,
            show_default=True,
            help="Sampling temperature.",
        )(command)

    return add


def plot_option(drawn: str) -> Callable:
    """--plot FILE.png of a command that draws `drawn`."""
    return click.option(
        "--plot",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE.png",
        help=f"Draw {drawn} (needs matplotlib).",
    )


demo_argument = click.argument("model", default=str(DEMO_MODEL), metavar="[FOLDER]")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object."
)
revision_option = click.option(
    "--revision", help="Branch, tag or commit of a hub repository."
)


elastic_option = click.option(
    "--elastic/--no-elastic",
    default=None,
    help="Hold less while other programs need memory.  [default: with --memory auto]",
)
