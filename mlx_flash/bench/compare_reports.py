"""Two reports of one benchmark side by side: of two machines, versions or settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import click

from ..errors import FlashError
from .report import Column, Report, Row

FILE = click.Path(dir_okay=False, path_type=Path)
COLUMNS = [
    Column("A, tokens/s", "a_tokens_per_s", 1, 2),
    Column("B, tokens/s", "b_tokens_per_s", 1, 2),
    Column("B / A", "ratio", 1, 2),
    Column("A, MB per token", "a_bytes_per_token", 1e6, 2),
    Column("B, MB per token", "b_bytes_per_token", 1e6, 2),
    Column("A, hit rate %", "a_hit_rate", 0.01, 1),
    Column("B, hit rate %", "b_hit_rate", 0.01, 1),
    Column("A, budget GB", "a_budget_bytes", 1e9, 3),
    Column("B, budget GB", "b_budget_bytes", 1e9, 3),
]
KEYS = ("tokens_per_s", "bytes_per_token", "hit_rate", "budget_bytes")
# Of a report's machine and its state, what makes a difference.
FACTS = ("device", "os", "mlx_device", "versions", "LD_PRELOAD")
STATE = ("power", "thermal")


def run(
    a: Annotated[Path, FILE],
    b: Annotated[Path, FILE],
) -> Report:
    """Two reports of `bench report --json`, or of any other benchmark, side by side.

    \b
    Example:
      mlx-flash bench compare my-mac.json your-mac.json
    """
    first, second = _read(a), _read(b)
    if first["benchmark"] != second["benchmark"]:
        raise FlashError(
            f"{a} is of another benchmark ({first['benchmark']}) than {b} "
            f"({second['benchmark']}): compare two of one kind."
        )
    rows_a = {row["name"]: row for row in first["rows"]}
    rows_b = {row["name"]: row for row in second["rows"]}
    rows = [_row(name, rows_a[name], rows_b[name]) for name in rows_a if name in rows_b]
    if not rows:
        raise FlashError(
            f"{a} and {b} have no row in common: they measured models of other sizes."
        )
    notes = [f"A is {a.name}, B is {b.name}.", *_differences(first, second)]
    alone = [f"A alone: {n}" for n in rows_a if n not in rows_b]
    alone += [f"B alone: {n}" for n in rows_b if n not in rows_a]
    return Report(first["benchmark"], rows, COLUMNS, notes + alone)


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        names = [row["name"] for row in report["rows"]]
        report["benchmark"], report["machine"]["device"]
    except OSError as error:
        raise FlashError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FlashError(
            f"{path} is no report. Make one: mlx-flash bench report --json {path.name}"
        ) from error
    if not all(isinstance(name, str) for name in names):
        raise FlashError(f"{path} is no report: a row's name is no text.")
    return report


def _row(name: str, a: dict[str, Any], b: dict[str, Any]) -> Row:
    row = Row(name)
    for key in KEYS:
        row.more[f"a_{key}"], row.more[f"b_{key}"] = a.get(key), b.get(key)
    one, other = a.get("tokens_per_s"), b.get("tokens_per_s")
    row.more["ratio"] = other / one if one and other else None
    errors = [f"{x}: {r['error']}" for x, r in (("A", a), ("B", b)) if r.get("error")]
    if errors:
        row.more["error"] = "; ".join(errors)
    return row


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """A line for each fact that is not the same in both."""
    found = []
    for key in FACTS:
        one, other = a["machine"].get(key), b["machine"].get(key)
        if one != other:
            found.append(f"{key}: A {_say(one)}; B {_say(other)}")
    for key in STATE:
        one = (a.get("state_after") or {}).get(key)
        other = (b.get("state_after") or {}).get(key)
        if one != other:
            found.append(f"{key}: A {_say(one)}; B {_say(other)}")
    return found


def _say(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {v}" for name, v in value.items())
    return "not told" if value is None else str(value)
