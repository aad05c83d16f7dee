"""`mlx-flash plan`: what a model will take and how fast it will be, before it comes."""

import json

import click

from .common import json_option, memory_option, revision_option


@click.command()
@click.argument("model")
@memory_option("auto")
@click.option(
    "--profile",
    metavar="FILE",
    help="A machine's figures, or m1-max-paper.  [default: as probe stored them]",
)
@revision_option
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
@click.option(
    "--machines",
    type=click.IntRange(2),
    metavar="N",
    help="Beside one machine, N that share each layer's units (see mlx.launch).",
)
@click.option(
    "--link",
    metavar="TIME",
    help="Of a message between two of them.  [default: 0.3ms, assumed]",
)
@click.option(
    "--shares",
    metavar="2:1",
    help="How units are shared out over them.  [default: evenly]",
)
@json_option
def plan(model, memory, profile, machines, link, shares, as_json, **options):
    """Say what MODEL will take and how fast it will be, without its weights.

    MODEL is a flash folder, a checkpoint's folder or a hub name, of which only the
    configuration is downloaded. Times are modelled from what mlx-flash probe measured.

    \b
    Examples:
      mlx-flash plan mlx-community/Qwen3-30B-A3B-4bit --memory 8GB
      mlx-flash plan facebook/opt-6.7b --memory 50% --profile m1-max-paper
      mlx-flash plan mlx-community/Qwen3-30B-A3B-4bit --memory 8GB --machines 2
    """
    from ..library.opening import converted
    from ..planning.plan import make_plan
    from ..planning.several import plan_several
    from ..planning.text import plan_text, several_text
    from ..profile import load_profile

    if machines is None and (link or shares):
        raise click.UsageError("--link and --shares go with --machines.")
    if options["revision"] is None:
        model = converted(model) or model
    figures = load_profile(profile)
    if machines is None:
        result = make_plan(model, memory, figures, **options)
        click.echo(json.dumps(result.to_dict()) if as_json else plan_text(result))
        return
    one, several = plan_several(
        model, memory, figures, machines, shares, link, **options
    )
    if as_json:
        click.echo(json.dumps(one.to_dict() | {"several": several.to_dict()}))
    else:
        click.echo(f"{plan_text(one)}\n\n{several_text(one, several)}")
