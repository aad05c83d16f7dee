"""`mlx-flash info` and `verify`: what a folder holds, and whether it is whole."""

import json

import click

from ..bench.options import MemoryType
from ..errors import printable
from .common import chosen_model, demo_argument, json_option, yes_option
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
@click.option(
    "--budget",
    "budgets",
    type=MemoryType(),
    multiple=True,
    help="Compare the model's answers at this memory and at others; repeat it.",
)
@click.option("--prompt", "-p", default="Once upon a time", help="With --budget.")
@click.option(
    "--max-tokens", "-m", default=32, type=click.IntRange(1), help="With --budget."
)
@yes_option
def verify(model, record, budgets, prompt, max_tokens):
    """Compare every file of a model with the digest noted of it.

    NAME is a flash folder, a checkpoint, or a hub name. `convert` notes digests in the
    flash folder. Of a checkpoint, --record notes them in this user's cache folder. Of
    one that mlx-flash converted into its own folder, the conversion is compared.
    Without NAME, of the demo model.

    \b
    Examples:
      mlx-flash verify opt-6.7b-flash
      mlx-flash verify --record Qwen3-30B-A3B-4bit
      mlx-flash verify opt-6.7b-flash --budget 50% --budget 90%
    """
    if budgets:
        if record:
            raise click.UsageError("Either --record or --budget.")
        _verify_outputs(model, budgets, prompt, max_tokens)
        return
    from .. import inspection
    from ..library.opening import converted

    model = converted(model) or model
    if record:
        inspection.record(model, lambda name: click.echo(f"noted  {name}"))
        return
    for name in inspection.verify(model, lambda name: click.echo(f"ok  {name}")):
        click.echo(f"no digest  {printable(name)}")
    if share := inspection.share_of(model):
        click.echo(f"{printable(str(model))} is {share}")


def _verify_outputs(model, budgets, prompt, max_tokens) -> None:
    """Say of each budget what it answered with, and that all answers are one."""
    if len(set(budgets)) < 2:
        raise click.UsageError("--budget compares: give it twice, as 40% and 80%.")
    from ..same_output import compare, output

    folder, _ = chosen_model(model, None)
    outputs = []
    for memory in budgets:
        found = output(folder, memory, prompt, max_tokens)
        hits = "all" if found.hit_rate is None else f"{found.hit_rate:.0%}"
        click.echo(
            f"{memory}  {found.budget_bytes / 1e6:,.1f} MB, {len(found.tokens)} "
            f"tokens, {hits} of the units from memory"
        )
        outputs.append(found)
    agreed = compare(outputs)
    same = f"to {agreed.worst:.0e} of the largest log probability"
    if not agreed.worst:
        same = "bit for bit"
    tie = "; then two are as likely as each other" if agreed.tied else ""
    click.echo(f"ok  the same {agreed.tokens} tokens, {same}{tie}")
