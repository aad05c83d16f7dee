"""`mlx-flash tune`: what memory buys a model on this machine."""

from pathlib import Path

import click

from .common import chosen_model, plot_option, yes_option

PROMPT = "The three most important things to know about the sea are"


@click.command()
@click.argument("model", required=False)
@click.option("--prompt", "-p", default=PROMPT, help="What the runs continue.")
@click.option(
    "--tokens", default=32, show_default=True, type=click.IntRange(2), help="Of a run."
)
@click.option(
    "--budgets",
    default=5,
    show_default=True,
    type=click.IntRange(2, 20),
    help="How many, from the least that works to what holds everything or is free.",
)
@click.option(
    "--repeats",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Runs at each budget, of which the median counts.",
)
@click.option(
    "--json",
    "as_json",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a report.",
)
@plot_option("speed, bytes and hit rate")
@yes_option
def tune(model, prompt, tokens, budgets, repeats, as_json, plot):
    """Measure what memory buys MODEL here, and say which --memory to use.

    Without MODEL, of the demo model.

    \b
    Examples:
      mlx-flash tune opt-6.7b-flash
      mlx-flash tune mlx-community/Qwen3-30B-A3B-4bit --budgets 6 --plot tune.png
    """
    if plot:
        from ..bench.plots import check_plot

        check_plot(plot)
    from ..bench.tune import run

    folder, _ = chosen_model(model, None)
    report = run(folder, prompt, tokens, budgets, repeats)
    click.echo(report.markdown())
    named = f" --model {model}" if model else ""
    click.echo(f'\nmlx-flash generate "…"{named} --memory {report.facts["knee"]}')
    if as_json:
        report.write(as_json)
    if plot:
        from ..bench.plots import draw

        draw(report, plot)
