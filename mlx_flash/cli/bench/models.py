"""Are models the same from flash, how good is prediction, how good is the plan?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from ..common import DEMO_MODEL, Memory
from .options import FILE, PATH, TEXT, count, reported


@click.command()
@click.argument("text", type=TEXT)
@click.option("--model", type=PATH, default=DEMO_MODEL, show_default="the demo model")
@click.option("--memory", type=Memory(), default="50%", show_default=True)
@count("--tokens", 65536, "For perplexity.")
@count("--decode-tokens", 1024, "Per window.")
@reported(plot=False)
def perplexity(text, model, memory, tokens, decode_tokens):
    """What prediction costs in quality on TEXT, and what windows save in reads."""
    from ...bench import perplexity

    return perplexity.run(text, model, memory, tokens, decode_tokens)


@click.command()
@click.option("--family", help="Only this one.")
@click.option("--bits", type=int, help="Quantise the checkpoints, as mlx-lm does.")
@click.option(
    "--checkpoints",
    type=click.Path(file_okay=False, path_type=Path),
    default="tests/goldens",
    show_default=True,
    help="Further models, as FAMILY/NAME; it need not exist.",
)
@click.option("--write", type=FILE, help="Write the table there.")
def families(family, bits, checkpoints, write):
    """Compare every family from flash with the same model in memory.

    \b
    Examples:
      mlx-flash bench families --family olmoe
      mlx-flash bench families --write docs/families.md
    """
    import mlx.core as mx

    from ...bench.families import table

    found = table.all_families(checkpoints)
    if family and family not in found:
        raise click.BadParameter(f"{family!r} is none of {', '.join(found)}.")
    if write and (family or bits or mx.default_device() != mx.cpu):
        raise click.UsageError("--write is for all families in float32 on the CPU.")
    click.echo("\n".join(table.HEAD))
    verdicts = []
    for verdict in table.check_all({family: found[family]} if family else found, bits):
        click.echo(verdict.line())
        verdicts.append(verdict)
    facts = table.summarise(verdicts)
    click.echo(json.dumps(facts | {"bits": bits}))
    if write:
        write.write_text(table.page(verdicts))
    sys.exit(1 if facts["differ"] or facts["failed"] else 0)


@click.command("plan-check")
@click.argument("folder", type=PATH)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(["neurons", "experts", "blocks"]),
    help="Only this one; repeat it for more.",
)
@click.option(
    "--memory",
    "budgets",
    type=Memory(),
    multiple=True,
    default=("50%", "65%", "80%"),
    show_default=True,
)
@count("--prompt-tokens", 8)
@count("--tokens", 24)
@count("--rounds", 2)
@reported(plot=True)
def plan_check(folder, kinds, budgets, **options):
    """The cost model of `mlx-flash plan` beside runs on this machine.

    Models of about 1 GB are written below FOLDER if they are not there.

    \b
    Example:
      mlx-flash probe DIR && mlx-flash bench plan-check DIR
    """
    from ...bench import plan_check

    return plan_check.run(folder, kinds, budgets, **options)
