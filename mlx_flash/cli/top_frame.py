"""One picture of a server's state, as wide as the terminal."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..memory_size import UNITS
from .top_map import heat_map

BARS = "▁▂▃▄▅▆▇█"
RATE_S = 2.0
PAST = 60  # pictures in a line over time
BESIDE_ROWS = 16  # of a picture, beside its heat map
PARTS = (
    ("resident", "resident", "#35618f"),
    ("predictors", "predictors", "#57aaa5"),
    ("slots", "slots", "#4f93d6"),
    ("KV cache", "kv_cache", "#a88ad0"),
    ("workspace", "workspace", "#6d7178"),
    ("draft model", "draft", "#d77f9a"),
)


@dataclass
class Past:
    """What earlier pictures said, for lines over time."""

    states: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=PAST))
    lines: dict[str, deque[float]] = field(default_factory=dict)

    def add(self, state: dict[str, Any]) -> None:
        """Note one more state, and what changed since about two seconds before."""
        now, answer = state["at_s"], state["answer"] or {}
        before = state
        for earlier in self.states:
            if now - earlier["at_s"] >= RATE_S or before is state:
                before = earlier
        self.states.append(state)
        then = before["answer"] or {}
        span = now - before["at_s"]
        tokens = answer.get("tokens", 0)
        same = then.get("begun_s") == answer.get("begun_s")
        if same:
            tokens -= then.get("tokens", 0)
        decoding = same and then.get("tokens") and tokens > 0  # no waits of a prompt
        a, b = before["counters"], state["counters"]
        asked = b["hits"] + b["misses"] - a["hits"] - a["misses"]
        read_s = b["read_s"] - a["read_s"]
        rates = {
            "speed": tokens / span if span else 0.0,
            "hits": (b["hits"] - a["hits"]) / asked if asked else 0.0,
            "flash": (b["bytes_read"] - a["bytes_read"]) / read_s if read_s else 0.0,
            "waits": (b["waits"] - a["waits"]) / tokens if decoding else 0.0,
        }
        for name, rate in rates.items():
            self.lines.setdefault(name, deque(maxlen=PAST)).append(rate)


def frame(
    state: dict[str, Any], past: Past, console: Console, rows: int | None = None
) -> RenderableType:
    """All of a state, in so many rows at most if there are enough for anything."""
    past.add(state)
    width = max(console.width - 1, 40)
    most = len(state["layers"]) if rows is None else max(rows - BESIDE_ROWS, 4)
    plain = console.color_system is None
    return Group(
        _head(state, width),
        "",
        _figures(state, past, width),
        "",
        *heat_map(state, width, most, plain),
        "",
        *_memory(state["memory"], width, plain),
    )


def _head(state: dict[str, Any], width: int) -> Text:
    model, requests, answer = state["model"], state["requests"], state["answer"]
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(model["name"], "bold")
    text.append(
        f"  {say(model['bytes'])} in a budget of {say(state['memory']['budget'])}, "
        f"{model['layers']} layers of {model['unit']}s\n"
    )
    if requests["reading"]:
        done, total = requests["reading"]
        doing = f"reading a prompt, {done:,} of {total:,} tokens"
    elif requests["running"]:
        doing = f"answering, {answer['tokens'] if answer else 0:,} tokens so far"
    else:
        ended = requests["ended"]
        doing = f"idle, {ended:,} {'request' if ended == 1 else 'requests'} ended"
    waiting = f", {requests['waiting']:,} waiting" if requests["waiting"] else ""
    text.append(doing + waiting, "dim")
    return text


def _figures(state: dict[str, Any], past: Past, width: int) -> Table:
    answer = state["answer"] or {}
    speed = answer.get("read_gb_per_s")
    first, read = answer.get("first_token_s"), answer.get("bytes_per_token")
    unit = state["model"]["unit"]
    columns = (
        ("Speed", answer.get("tokens_per_s"), "tokens/s", "speed")
        + (f"first in {first:.3g} s" if first is not None else "",),
        ("Hits", _percent(answer.get("hit_rate")), "%", "hits", f"of {unit}s needed"),
        ("Flash", speed, "GB/s", "flash")
        + (f"{say(read)} per token" if read is not None else "",),
        ("Waits", answer.get("waits_per_token"), "per token", "waits")
        + ("of the host for MLX",),
    )
    table = Table.grid(expand=False, padding=(0, 2, 0, 0))
    for _ in columns:
        table.add_column(width=max(width // 4 - 2, 9), no_wrap=True)
    table.add_row(*(Text(title, "dim") for title, *_ in columns))
    table.add_row(
        *(Text.assemble((_figure(n), "bold"), " ", u) for _, n, u, *_ in columns)
    )
    table.add_row(*(Text(note, "dim") for *_, note in columns))
    room = max(width // 4 - 4, 8)
    lines = [_line(past.lines[name], room) for *_, name, _ in columns]
    table.add_row(*(Text(line, "#4f93d6") for line in lines))
    return table


def _memory(memory: dict[str, Any], width: int, plain: bool) -> list[RenderableType]:
    budget = max(memory["budget"], 1)
    bar, legend, filled = Text(no_wrap=True), Text(), 0.0
    for name, key, colour in PARTS:
        if memory[key]:
            begun = round(filled * width / budget)
            filled += memory[key]
            count = round(filled * width / budget) - begun
            bar.append(" " * count, Style(bgcolor=colour))
            legend.append("■ ", colour)
            legend.append(f"{name} ", "dim")
            legend.append(f"{say(memory[key])}   ")
    head = Text.assemble(
        ("Memory  ", "bold"),
        f"{say(memory['held'])} held, {say(memory['peak'])} at most, of ",
        say(budget),
    )
    pressure = ("short", "bold red") if memory["short"] else ("normal", "dim")
    machine = Text.assemble(
        ("The machine has ", "dim"),
        say(memory["available"]),
        (f" of {say(memory['machine'])} available, this process takes ", "dim"),
        say(memory["process"]),
        ("; memory pressure: ", "dim"),
        pressure,
    )
    return [head, legend, machine] if plain else [head, bar, legend, machine]


def say(nbytes: float) -> str:
    """An amount with three figures; unlike `say_memory`, to the nearest."""
    unit = next((u for u in ("TB", "GB", "MB", "KB") if nbytes >= UNITS[u]), "B")
    return f"{_figure(nbytes / UNITS[unit])} {unit}"


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    if not value:
        return "0"
    places = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{min(places, 3)}f}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _line(values: Sequence[float], room: int) -> str:
    shown = list(values)[-room:]
    most = max(shown, default=0.0)
    if most <= 0:
        return ""
    return "".join(BARS[round(7 * max(value, 0) / most)] for value in shown)
