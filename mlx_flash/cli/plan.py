"""`mlx-flash plan`: what a model will take and how fast it will be, before it comes."""

from __future__ import annotations

import json

import click

from .common import Memory


@click.command()
@click.argument("model")
@click.option(
    "--memory",
    type=Memory(),
    default="auto",
    show_default=True,
    envvar="MLX_FLASH_MEMORY",
    help="All that the model may hold.",
)
@click.option(
    "--profile",
    metavar="FILE",
    help="A machine's figures, or m1-max-paper.  [default: as probe stored them]",
)
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Prompt and answer together.  [default: 2048 or the model's positions]",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="For the time to the first token.",
)
@click.option(
    "--hit-rate",
    type=click.FloatRange(0, 1),
    help="Share of units found in memory, if known.  [default: a range]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(model, memory, profile, as_json, **options):
    """Say what MODEL will take and how fast it will be, without its weights.

    MODEL is a flash folder, a checkpoint's folder or a hub name, of which only the
    configuration is downloaded. Times are modelled from what mlx-flash probe measured.

    \b
    Examples:
      mlx-flash plan mlx-community/Qwen3-30B-A3B-4bit --memory 8GB
      mlx-flash plan facebook/opt-6.7b --memory 50% --profile m1-max-paper
    """
    from ..planning.plan import make_plan
    from ..planning.profile import load_profile

    result = make_plan(model, memory, load_profile(profile), **options)
    click.echo(json.dumps(result.to_dict()) if as_json else text(result))


def text(p) -> str:
    """A plan for a person."""

    def size(nbytes: float) -> str:
        return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.1f} MB"

    def between(values, scale: float, digits: int) -> str:
        low, high = (f"{v * scale:,.{digits}f}" for v in values)
        return low if low == high else f"{low} to {high}"

    lines = [
        f"{p.model}: {p.kind}, {p.model_type}, {p.dtype}",
        "",
        f"model        {size(p.model_bytes)}: {size(p.resident_bytes)} stay in memory, "
        f"{size(p.ffn_bytes)} of FFNs on flash as {p.unit}s",
        f"memory       {size(p.memory_bytes)} given; the least is "
        f"{size(p.least_bytes)}, more than {size(p.best_bytes)} changes nothing "
        f"({p.context:,} tokens of context)",
        f"in memory    {p.held_share:.0%} of the {p.unit}s, {p.layers_held_whole} of "
        f"{p.layers} layers whole; predictors {size(p.predictor_bytes)}, KV cache "
        f"{size(p.kv_bytes)}",
    ]
    disk = []
    if p.download_bytes:
        disk.append(f"{size(p.download_bytes)} to download")
    if p.convert:
        disk.append(f"{size(p.disk_bytes)} for the flash folder")
    lines.append(f"disk         {' and '.join(disk) or 'nothing more'}")
    lines.append(
        f"flash        {between(p.bytes_per_token, 1e-6, 1)} MB read per token"
    )
    if p.tokens_per_s:
        parts = " + ".join(f"{v:,.1f} {k}" for k, v in p.ms_of_slowest.items())
        lines += [
            f"speed        {between(p.tokens_per_s, 1, 2)} tokens/s, modelled "
            f"({between(p.ms_per_token, 1, 1)} ms per token; at worst {parts})",
            f"first token  after about {p.first_token_s:,.1f} s with a prompt of "
            f"{p.prompt_tokens} tokens, {p.load_s:,.1f} s of it loading, modelled",
            f"machine      {p.machine}"
            + ("" if p.cold else "; flash figures not surely cold"),
        ]
    else:
        lines.append(
            "speed        not known: this machine has no profile yet. Make one: "
            "mlx-flash probe"
        )
    lines += [f"assumed      {line}" for line in p.assumed]
    if p.slow:
        lines += ["", f"This will be slow, because {p.slow}"]
    if p.convert:
        target = p.model.rstrip("/").split("/")[-1]
        lines += ["", f"Next: mlx-flash convert {p.model} -o {target}-flash"]
    return "\n".join(lines)
