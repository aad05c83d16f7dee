"""Draw the hit rates of a replay. Only this module of the folder needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import FlashError
from .replay import OPTIMUM
from .trace import Trace


def plot_hit_rates(
    trace: Trace, shares: Sequence[float], rates: dict[str, list[float]], path: Path
) -> None:
    """A curve for each policy over the share of the units in memory.

    Args:
        shares, rates: As `compare` took and gave them.

    Raises:
        FlashError: If the file cannot be written.
    """
    from matplotlib.figure import Figure  # no pyplot: no display, no state

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    percent = [100 * share for share in shares]
    for name, values in rates.items():
        style = "k--" if name == OPTIMUM else "o-"
        axes.plot(percent, [100 * v for v in values], style, label=name, markersize=4)
    axes.set(
        xlabel=f"{trace.unit}s in memory, % of each layer",
        ylabel="found in memory, %",
        title=f"{trace.model}, {sum(trace.units):,} {trace.unit}s",
        ylim=(0, 100),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise FlashError(f"{path} cannot be drawn: {error}.") from error
