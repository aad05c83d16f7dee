"""`mlx-flash replay`: which cache would have served a recorded run best."""

import json
from pathlib import Path

import click

from .common import json_option, plot_option
from .tables import markdown_option, print_table


@click.command()
@click.argument("trace", type=click.Path(path_type=Path), metavar="TRACE.npz")
@click.option(
    "--profile",
    metavar="FILE",
    help="Of the machine whose waits count, or m1-max-paper.  [default: this one]",
)
@json_option
@markdown_option
@plot_option("the hit rates")
def replay(trace, profile, as_json, markdown, plot):
    """Say what share of TRACE each cache policy would have found in memory.

    Budgets are shares of each layer's neurons or experts; `optimum` knows the future.
    The last columns divide as much memory as `generate --trace` would, by hits and by
    waits: layers that are held whole wait for nothing.

    \b
    Example:
      mlx-flash trace "Once upon a time" -o story.npz
      mlx-flash replay story.npz --plot story.png
    """
    if plot:
        from ..bench.plots import check_plot

        check_plot(plot)
    from ..layers.kinds import KINDS
    from ..memory.whole import Ask, kind_rewards
    from ..profile import load_profile
    from ..sizing import policy_named
    from ..traces.curves import divided_rates
    from ..traces.replay import SHARES, compare, table
    from ..traces.trace import read_trace

    recorded = read_trace(trace)
    kind, machine = KINDS[recorded.unit], profile and load_profile(profile)
    sizes = zip(recorded.units, recorded.unit_bytes, strict=True)
    asks = [Ask(*pair, recorded.asked(layer)) for layer, pair in enumerate(sizes)]
    rewards = kind_rewards(kind, asks, machine)
    rates = compare(recorded, half_life=kind.half_life)
    policy = policy_named(kind.policy, kind)
    divided = divided_rates(recorded, policy, rewards, SHARES)
    if plot:
        from ..bench.plots import plot_hit_rates

        plot_hit_rates(recorded, SHARES, rates, plot)
    if as_json:
        facts = {
            "model": recorded.model,
            "unit": recorded.unit,
            "shares": SHARES,
            "hit_rates": rates,
            "divided_by_trace": [
                {"hit_rate": rate, "whole_layers": whole} for rate, whole in divided
            ],
        }
        click.echo(json.dumps(facts))
    else:
        print_table(table(SHARES, rates, divided), markdown)
