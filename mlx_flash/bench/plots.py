"""Draw a report. Matplotlib is optional: only this module asks for it."""

from __future__ import annotations

from pathlib import Path

from ..errors import FlashError
from .report import Report, Row

TIMES = {"io_ms": "I/O", "cache_ms": "cache", "compute_ms": "compute"}


def draw(report: Report, path: Path) -> None:
    """Write a PNG: curves where the rows are budgets, else a bar for each row.

    Raises:
        FlashError: If matplotlib is not there or nothing was measured.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no state
    except ImportError:
        raise FlashError(
            "Plots need matplotlib, which is not installed: pip install matplotlib"
        ) from None
    rows = [row for row in report.rows if row.total_ms is not None]
    if not rows:
        raise FlashError(f"{path} was not drawn: no row could be measured.")
    figure = Figure(figsize=(9, 3.2) if report.benchmark == "memory" else (8, 3.6))
    figure.set_layout_engine("constrained")
    (_curves if report.benchmark == "memory" else _bars)(figure, rows)
    figure.savefig(path, dpi=150, format="png")


def _curves(figure, rows: list[Row]) -> None:
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
        axis.set(xlabel="memory budget, GB", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)


def _bars(figure, rows: list[Row]) -> None:
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
    axis.margins(x=0.12)
    axis.set_xlabel("ms per token")
    if len(parts) > 1:
        axis.legend()
