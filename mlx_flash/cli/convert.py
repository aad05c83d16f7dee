"""`mlx-flash convert`: make a flash folder of a checkpoint."""

from functools import partial
from pathlib import Path

import click

from ..converters.options import DENSE_UNITS, ORDERS, WEIGHT_DTYPES, ConvertOptions
from .common import revision_option


@click.command()
@click.argument("source")
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    help="Where to write.  [default: mlx-flash's own folder, where every command finds "
    "it by the name of SOURCE]",
)
@revision_option
@click.option(
    "--dtype",
    type=click.Choice(WEIGHT_DTYPES),
    help="Of all weights.  [default: the checkpoint's]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text to train predictors on, or to set thresholds by.  [default: sampled "
    "from the model]",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(1),
    default=ConvertOptions.calibration_tokens,
    show_default=True,
    help="How much of it.",
)
@click.option(
    "--rank", type=int, help="Of all predictors, 0 for none.  [default: by layer]"
)
@click.option(
    "--threshold",
    type=float,
    help="Probability from which a neuron is read.  [default: by --recall]",
)
@click.option(
    "--recall",
    default=ConvertOptions.recall,
    show_default=True,
    help="Share of active neurons that predictors must find.",
)
@click.option(
    "--order",
    type=click.Choice(ORDERS),
    default=ConvertOptions.order,
    show_default=True,
    help="Of neurons on flash.",
)
@click.option(
    "--unit",
    type=click.Choice(DENSE_UNITS),
    help="What a dense FFN is cut into.  [default: as its sparsity suggests]",
)
@click.option(
    "--blocks",
    is_flag=True,
    help="Put the dense FFNs of a mixture of experts on flash, too, as blocks.",
)
@click.option(
    "--skippable",
    is_flag=True,
    help="Keep the gates of a dense FFN in memory, so that a run can --skip neurons, "
    "and measure what that costs.",
)
@click.option("--bits", type=int, help="Quantise FFNs.  [default: as they are]")
@click.option("--group-size", type=int, help="Weights that share a scale.")
@click.option(
    "--mode",
    default=ConvertOptions.mode,
    show_default=True,
    help="affine, mxfp4, mxfp8 or nvfp4.",
)
@click.option("--resident-bits", type=int, help="Quantise what stays in memory.")
@click.option(
    "--share",
    metavar="1/2",
    help="Keep only one part's units, for one of several machines.  [default: all]",
)
@click.option(
    "--shares",
    metavar="2:1",
    help="How the parts share out the units, with --share.  [default: all alike]",
)
@click.option(
    "--delete-source",
    is_flag=True,
    help="Delete the checkpoint's weights when the result was verified.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier flash folder.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
def convert(source, output, quiet, **options):
    """Convert SOURCE, a checkpoint's folder or hub name, to a flash folder.

    Interrupted, it goes on where it stopped when the same command is run again.

    \b
    Examples:
      mlx-flash convert facebook/opt-6.7b -o opt-6.7b-flash --calibration notes.txt
      mlx-flash convert ./my-opt -o my-opt-flash --dtype float16
      mlx-flash convert ./my-opt -o my-opt-flash --share 1/2
      mlx-flash convert ./my-llama -o my-llama-flash --skippable --calibration notes.txt
    """
    from ..converters.convert import convert as run
    from ..library.opening import convert_to_shelf

    run_to = partial(run, dst=output) if output else convert_to_shelf
    try:
        run_to(source, progress=not quiet, **options)
    except KeyboardInterrupt:
        click.echo("Interrupted. The same command goes on where it stopped.", err=True)
        raise
    if not quiet:
        click.echo(_ready(output or source, options["share"]), err=True)


def _ready(name: str, share: str | None) -> str:
    """What to do now that the conversion is there."""
    run = f'mlx-flash generate "…" --model {name}'
    if share is None:
        return f"{name} is ready: {run}"
    return (
        f"Part {share} of {name} is ready. Convert the other parts on the other "
        f"machines, under the same path, and run them together: mlx.launch … {run}"
    )
