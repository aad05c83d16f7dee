"""Draw reports, profiles and replays. Only this module asks for matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FlashError
from ..planning.machine import machine
from ..traces.replay import OPTIMUM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..profile import Profile
    from ..traces.trace import Trace
    from .report import Report, Row

CURVES = ("sweep", "memory")  # reports whose rows are budgets
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
    rows = [row for row in report.rows if not row.more.get("error")]
    if not rows:
        raise FlashError(f"{path} was not drawn: no row could be measured.")
    axes = _curves(rows) if report.benchmark in CURVES else _bars(rows)
    subject = report.facts.get("model") or report.benchmark
    _title(axes, f"{subject} on {machine()[0]}")
    _save(axes, path)


def plot_reads(profile: Profile, path: Path) -> None:
    """Draw the throughput over the length of a read, a line for each queue depth."""
    (axes,) = _axes(7, 4.5)
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
    axes.set(xlabel="bytes of a read", ylabel="GB/s (GB is 1e9)", ylim=(0, None))
    axes.set_title(f"{profile.device}\n{profile.source}", fontsize=9)
    axes.legend()
    _save(axes, path)


def plot_hit_rates(
    trace: Trace, shares: Sequence[float], rates: dict[str, list[float]], path: Path
) -> None:
    """Draw a curve for each policy over the share of the units in memory.

    Args:
        shares, rates: As `replay.compare` took and gave them.

    Raises:
        FlashError: If `path` cannot be written.
    """
    (axes,) = _axes(6, 4)
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
    _save(axes, path)


def _axes(width: float, height: float, count: int = 1) -> Sequence[Axes]:
    """`count` axes side by side in a new figure of so many inches."""
    from matplotlib.figure import Figure  # no pyplot: no display, no state

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure.subplots(1, count, squeeze=False)[0]


def _title(axes: Axes, text: str) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None  # `_axes` made it
    figure.suptitle(text, fontsize=9, wrap=True)


def _save(axes: Axes, path: Path) -> None:
    try:
        figure = axes.get_figure(root=True)
        assert figure is not None  # `_axes` made it
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise FlashError(f"{path} could not be written: {error.strerror}.") from error


def _curves(rows: list[Row]) -> Axes:
    rows = sorted(rows, key=lambda row: row.more["budget_bytes"])
    small = rows[-1].more["budget_bytes"] < 1e9
    scale_bytes, unit = (1e6, "MB") if small else (1e9, "GB")
    budgets = [row.more["budget_bytes"] / scale_bytes for row in rows]
    drawn = {
        "tokens_per_s": (1, "tokens/s"),
        "bytes_per_token": (1e6, "MB read per token"),
        "hit_rate": (0.01, "hit rate, %"),
    }
    all_axes = _axes(9, 3.2, len(drawn))
    for axes, (key, (scale, label)) in zip(all_axes, drawn.items(), strict=True):
        axes.plot(budgets, [_scaled(row, key, scale) for row in rows], marker="o")
        axes.set(xlabel=f"memory budget, {unit}", ylabel=label)
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
        axes.grid(alpha=0.3)
    return axes


def _scaled(row: Row, key: str, scale: float) -> float:
    value = row.get(key)
    return float("nan") if value is None else value / scale


def _bars(rows: list[Row]) -> Axes:
    """Time per token, split where its parts were measured, with the figure beside."""
    (axes,) = _axes(8, 3.6)
    names = [row.name for row in rows]
    left = [0.0] * len(rows)
    parts = TIMES if any(row.io_ms is not None for row in rows) else {"total_ms": ""}
    for key, label in parts.items():
        values = [row.get(key) or 0.0 for row in rows]
        if any(values):
            axes.barh(names, values, left=left, label=label)
            left = [a + b for a, b in zip(left, values, strict=True)]
    for i, row in enumerate(rows):
        axes.annotate(f" {row.total_ms:,.0f}", (row.total_ms, i), va="center")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.12 * max(left)), xlabel="ms per token")
    if len(parts) > 1:
        axes.legend()
    return axes
