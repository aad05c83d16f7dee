"""`mlx-flash replay`: which cache would have served a recorded run best."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..errors import FlashError


@click.command()
@click.argument("trace", type=click.Path(path_type=Path), metavar="TRACE.npz")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png",
    help="Draw the hit rates (needs matplotlib).",
)
def replay(trace, as_json, plot):
    """Say what share of TRACE each cache policy would have found in memory.

    Budgets are shares of each layer's neurons or experts; `optimum` knows the future.

    \b
    Example:
      mlx-flash trace "Once upon a time" -o story.npz
      mlx-flash replay story.npz --plot story.png
    """
    from ..traces.replay import SHARES, compare, table
    from ..traces.trace import read_trace

    recorded = read_trace(trace)
    rates = compare(recorded)
    if plot:
        _draw(plot, recorded, SHARES, rates)
    if as_json:
        facts = {"model": recorded.model, "unit": recorded.unit}
        click.echo(json.dumps(facts | {"shares": SHARES, "hit_rates": rates}))
    else:
        click.echo(table(SHARES, rates))


def _draw(path: Path, recorded, shares, rates) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise FlashError(
            "--plot needs matplotlib. Install it: pip install matplotlib"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    x = [100 * share for share in shares]
    for name, values in rates.items():
        style = "k--" if name == "optimum" else "o-"
        axes.plot(x, [100 * v for v in values], style, label=name, markersize=4)
    axes.set(
        xlabel=f"{recorded.unit}s in memory, % of each layer",
        ylabel="found in memory, %",
        title=f"{recorded.model}, {sum(recorded.units):,} {recorded.unit}s",
        ylim=(0, 100),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise FlashError(f"{path} cannot be drawn: {error}.") from error
    plt.close(figure)
