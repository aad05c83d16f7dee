"""All families one by one, and the page that lists them."""

import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import click
import mlx.core as mx

from ...layers.kinds import BLOCK, EXPERT, NEURON
from ..options import FOLDER
from .check import DECODED, DENSE_PROMPT, PROMPT, ROWS, Verdict, check
from .configs import DENSE, EXPERTS

LIMIT_S = 180  # for one family; a crash of its process ends like this, too
HEAD = (
    "| family | unit | layers from flash | largest difference to the reference |",
    "| --- | --- | --- | --- |",
)


def run(
    family: Annotated[str | None, "Only this one."] = None,
    bits: Annotated[
        int | None, click.INT, "Quantise the checkpoints, as mlx-lm does."
    ] = None,
    blocks: Annotated[
        bool, "Of families with experts, dense FFNs on flash, too: convert --blocks."
    ] = False,
    checkpoints: Annotated[
        Path, FOLDER, "Further models, as FAMILY/NAME; it need not exist."
    ] = Path("tests/goldens"),
    write: Annotated[
        Path | None,
        click.Path(dir_okay=False, writable=True, path_type=Path),
        "Write the table there.",
    ] = None,
) -> None:
    """Compare every family from flash with the same model in memory.

    \b
    Examples:
      mlx-flash bench families --family olmoe
      mlx-flash bench families --write docs/families.md
    """
    found = all_families(checkpoints)
    if family and family not in found:
        raise click.BadParameter(f"{family!r} is none of {', '.join(found)}.")
    if blocks:
        found = dict.fromkeys(EXPERTS)
    if write and (family or bits or blocks or mx.default_device() != mx.cpu):
        raise click.UsageError("--write is for all families in float32 on the CPU.")
    click.echo("\n".join(HEAD))
    verdicts = []
    chosen = {family: found.get(family)} if family else found
    for verdict in check_all(chosen, bits, blocks):
        click.echo(verdict.line())
        verdicts.append(verdict)
    facts = summarise(verdicts)
    click.echo(json.dumps(facts | {"bits": bits}))
    if write:
        write.write_text(page(verdicts))
    sys.exit(1 if facts["differ"] or facts["failed"] else 0)


def all_families(checkpoints: Path) -> dict[str, Path | None]:
    """Every family by name, and further models with checkpoints of their own."""
    own = {f"{p.parent.name}/{p.name}": p for p in sorted(checkpoints.glob("*/*"))}
    return dict.fromkeys(EXPERTS) | dict.fromkeys(DENSE) | own


def check_all(
    families: dict[str, Path | None], bits: int | None = None, blocks: bool = False
) -> Iterator[Verdict]:
    """The verdicts one by one, made in a process that may crash or hang."""
    spawn = multiprocessing.get_context("spawn")
    rest = list(families)
    while rest:
        with spawn.Pool(1) as pool, tempfile.TemporaryDirectory() as work:
            while rest:
                name = rest.pop(0)
                folder = Path(work) / name.replace("/", "-")
                folder.mkdir()
                words = name, families[name], folder, bits, blocks
                result = pool.apply_async(check, words)
                try:
                    yield result.get(LIMIT_S)
                except multiprocessing.TimeoutError:
                    yield Verdict(name, f"FAILED: crashed, or took {LIMIT_S} s")
                    break  # with this pool
            else:
                pool.close()
                pool.join()


def summarise(verdicts: Sequence[Verdict]) -> dict:
    """Counts, and the names of those that need somebody to look at them."""
    units = Counter(v.unit for v in verdicts)
    return {
        "compared": len(verdicts) - units[""],
        "experts": units[EXPERT.name],
        "blocks": units[BLOCK.name],
        "neurons": units[NEURON.name],
        "in_place": sum("in place" in v.places for v in verdicts),
        "tables": sum(v.tables > 0 for v in verdicts),
        "identical": sum(v.difference == 0 for v in verdicts),
        "differ": [v.family for v in verdicts if "DIFFERS" in v.verdict],
        "failed": [v.family for v in verdicts if "FAILED" in v.verdict],
        "not_compared": [v.family for v in verdicts if not v.unit],
        "device": str(mx.default_device()),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }


def page(verdicts: Sequence[Verdict]) -> str:
    """The table as a page of the documentation."""
    facts = summarise(verdicts)
    compared = [verdict.line() for verdict in verdicts if verdict.unit]
    others = [f"{v.family} ({v.verdict})" for v in verdicts if not v.unit]
    lines = "\n".join([*HEAD, *compared])
    return f"""# Families of models

{facts["compared"]} models compared: {facts["experts"]} with experts,
{facts["blocks"]} in blocks, {facts["neurons"]} in neurons.

`mlx-flash bench families --write docs/families.md` wrote this. For each family a tiny
random checkpoint, slots for a quarter of each layer's units, a prompt of {PROMPT}
tokens ({DENSE_PROMPT} for dense models) and {DECODED} steps of decoding; the largest
difference of any logit to the same model in memory (mlx-lm's, or ours where it has
none), 0 being identical to the bit. float32, MLX {facts["mlx"]} on its CPU backend,
mlx-lm {facts["mlx_lm"]}. All were streamed from converted folders, {facts["in_place"]}
of those with experts also in place: from the layout that mlx-lm saves. Which layouts of
published checkpoints run in place is in [commands.md](commands.md#mixtures-of-experts).
Layers are those that have such FFNs: Gemma 3n's
sparse ones are no sums over their neurons, and stay in memory. {facts["tables"]} models
looked their embeddings up on flash, with {ROWS} slots a table; those of the others give
the logits, too.

{lines}

Not compared: {"; ".join(others) or "none"}.
"""
