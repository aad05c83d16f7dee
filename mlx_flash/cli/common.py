"""What several commands share: the demo model, and options of one meaning."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from ..bench.options import MemoryType, ShareType
from ..demo_models import DEMO_MODEL, demo_model
from ..errors import FlashError, NotEnoughMemory

if TYPE_CHECKING:
    from ..library.opening import Offer

T = TypeVar("T")
DEMO_MEMORY = "50%"
YES = "mlx_flash.yes"  # in the context of a command
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


skip_option = click.option(
    "--skip",
    type=ShareType(),
    help="Leave out this share of the neurons, such as 50%: faster and lossy. For "
    "folders of convert --skippable.",
)


def run_options(command: Callable) -> Callable:
    """--model and --memory of a command that runs the demo model if none is named."""
    note = f"  [default: auto; demo models: {DEMO_MEMORY}]"
    command = memory_option(None, note)(yes_option(command))
    return click.option(
        "--model",
        metavar="NAME",
        help="Flash folder, checkpoint, a hub name of one, or demo-moe.  "
        "[default: demo, the demo model]",
    )(command)


def chosen_model(model: str | None, memory: str | None) -> tuple[Path, str]:
    """The folder and the memory that `run_options` stand for."""
    if model is None:
        return DEMO_MODEL, memory or DEMO_MEMORY
    if memory is None and demo_model(model):
        memory = DEMO_MEMORY
    return model_folder(model), memory or "auto"


def load_with(load: Callable[[str | int], T], memory: str, free: bool) -> T:
    """What `load` makes of `memory`, or of the least that works.

    Args:
        free: Whether nobody said which model and how much memory: so the demo model
            gives answers of any length.
    """
    try:
        return load(memory)
    except NotEnoughMemory as error:
        if not free:
            raise
        return load(error.least_bytes)


def model_folder(model: str | Path) -> Path:
    """The folder of a model by any name, converted first if it has to be.

    Of a command that has `yes_option`.
    """
    from ..library.opening import runnable

    return runnable(model, _agree)


def _agree(offer: "Offer") -> bool:
    """Ask at the terminal whether to convert; --yes answers."""
    return agreed(str(offer), "Convert it now?", f"{offer} Add --yes to agree.")


def agreed(announcement: str, question: str, refusal: str) -> bool:
    """Say what will happen, and ask whether it may.

    Args:
        refusal: What to say where there is nobody to ask and no --yes.
    """
    if click.get_current_context().meta.get(YES):
        click.echo(announcement, err=True)
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise FlashError(refusal)
    return click.confirm(f"{announcement} {question}", err=True)


def _note_yes(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[YES] = value


def yes(meaning: str) -> Callable:
    """--yes, which `agreed` looks up: it is not among a command's parameters."""
    return click.option(
        "--yes",
        "-y",
        is_flag=True,
        expose_value=False,
        callback=_note_yes,
        help=meaning,
    )


yes_option = yes("Convert the model, if it has to be, without asking.")


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


demo_argument = click.argument("model", default=str(DEMO_MODEL), metavar="[NAME]")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object."
)
revision_option = click.option(
    "--revision", help="Branch, tag or commit of a hub repository."
)


shares_option = click.option(
    "--shares",
    metavar="2:1",
    help="With mlx.launch: how the units of each layer are shared out over the "
    "machines.  [default: by their memory and disks]",
)


elastic_option = click.option(
    "--elastic/--no-elastic",
    default=None,
    help="Hold less while other programs need memory.  [default: with --memory auto]",
)
