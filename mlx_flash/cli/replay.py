"""`mlx-flash replay`: which cache would have served a recorded run best."""

import json
from pathlib import Path

import click

from .common import json_option, plot_option


@click.command()
@click.argument("trace", type=click.Path(path_type=Path), metavar="TRACE.npz")
@json_option
@plot_option("the hit rates")
def replay(trace, as_json, plot):
    """Say what share of TRACE each cache policy would have found in memory.

    Budgets are shares of each layer's neurons or experts; `optimum` knows the future.

    \b
    Example:
      mlx-flash trace "Once upon a time" -o story.npz
      mlx-flash replay story.npz --plot story.png
    """
    if plot:
        from ..bench.plots import check_plot

        check_plot(plot)
    from ..traces.replay import SHARES, compare, table
    from ..traces.trace import read_trace

    recorded = read_trace(trace)
    rates = compare(recorded)
    if plot:
        from ..bench.plots import plot_hit_rates

        plot_hit_rates(recorded, SHARES, rates, plot)
    if as_json:
        facts = {"model": recorded.model, "unit": recorded.unit}
        click.echo(json.dumps(facts | {"shares": SHARES, "hit_rates": rates}))
    else:
        click.echo(table(SHARES, rates))
