"""Draw reports, profiles and replays. Only this module asks for matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FlashError
from ..traces.replay import OPTIMUM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..planning.profile import Profile
    from ..traces.trace import Trace
    from .report import Report, Row

TIMES = {"io_ms": "I/O", "cache_ms": "cache", "compute_ms": "compute"}


def check_plot(path: Path) -> None:
    """Judge before measuring whether a picture can be drawn there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FlashError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise FlashError(f"{path} is no name of a picture. Try {path.stem}.png.")
    if not path.absolute().parent.is_dir():
        raise FlashError(f"There is no folder {path.parent} for {path.name}. Make it.")


def draw(report: Report, path: Path) -> None:
    """Draw curves where the rows are budgets, else a bar for each row."""
    rows = [row for row in report.rows if row.total_ms is not None]
    if not rows:
        raise FlashError(f"{path} was not drawn: no row could be measured.")
    curves = report.benchmark == "sweep"
    figure = _figure((9, 3.2) if curves else (8, 3.6))
    (_curves if curves else _bars)(figure, rows)
    _save(figure, path)


def plot_reads(profile: Profile, path: Path) -> None:
    """Draw the throughput over the length of a read, a line for each queue depth."""
    figure = _figure((7, 4.5))
    axes = figure.add_subplot()
    for threads in sorted({p.threads for p in profile.flash}):
        points = sorted(
            (p.block_bytes, p.bytes_per_s / 1e9)
            for p in profile.flash
            if p.threads == threads
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{threads} at once")
    speed = profile.sequential_bytes_per_s / 1e9
    axes.axhline(speed, color="grey", linestyle="--", label="in order")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes of a read")
    axes.set_ylabel("GB/s (GB is 1e9)")
    axes.set_title(f"{profile.device}\n{profile.source}", fontsize=9)
    axes.legend()
    _save(figure, path)


def plot_hit_rates(
    trace: Trace, shares: Sequence[float], rates: dict[str, list[float]], path: Path
) -> None:
    """Draw a curve for each policy over the share of the units in memory.

    Args:
        shares, rates: As `replay.compare` took and gave them.

    Raises:
        FlashError: If `path` cannot be written.
    """
    figure = _figure((6, 4))
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
    _save(figure, path)


def _figure(inches: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: no display, no state

    return Figure(figsize=inches, layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise FlashError(f"{path} could not be written: {error.strerror}.") from error


def _curves(figure: Figure, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: row.more["budget_bytes"])
    gb = [row.more["budget_bytes"] / 1e9 for row in rows]
    for axis, key, scale, label in zip(
        figure.subplots(1, 3),
        ("tokens_per_s", "bytes_per_token", "hit_rate"),
        (1, 1e6, 0.01),
        ("tokens/s", "MB read per token", "hit rate, %"),
        strict=True,
    ):
        axis.plot(gb, [(row.get(key) or 0) / scale for row in rows], marker="o")
        axis.set(xlabel="memory budget, GB", ylabel=label)
        axis.set_ylim(0, 1.05 * axis.dataLim.ymax)
        axis.grid(alpha=0.3)


def _bars(figure: Figure, rows: list[Row]) -> None:
    """Time per token, split where its parts were measured, with the figure beside."""
    axis = figure.subplots()
    names = [row.name for row in rows]
    left = [0.0] * len(rows)
    parts = TIMES if any(row.io_ms is not None for row in rows) else {"total_ms": ""}
    for key, label in parts.items():
        values = [row.get(key) or 0.0 for row in rows]
        if any(values):
            axis.barh(names, values, left=left, label=label)
            left = [a + b for a, b in zip(left, values, strict=True)]
    for i, row in enumerate(rows):
        axis.annotate(f" {row.total_ms:,.0f}", (row.total_ms, i), va="center")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(row.total_ms or 0.0 for row in rows))
    axis.set_xlabel("ms per token")
    if len(parts) > 1:
        axis.legend()
