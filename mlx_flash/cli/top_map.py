"""The heat map of a server's state in a terminal: a row for each layer."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
from rich.color import Color
from rich.console import RenderableType
from rich.style import Style
from rich.text import Text

BESIDE = 14  # columns for the layer's number and the share that is held
Colour = tuple[int, int, int]
# As on the page in the dark: (asked for rarely, often).
HELD: tuple[Colour, Colour] = ((31, 58, 86), (165, 210, 255))
FLASH: tuple[Colour, Colour] = ((52, 44, 36), (245, 160, 74))
SHADES = "·░▒▓█"  # of the share that is held, where there are no colours


def heat_map(
    state: dict[str, Any], width: int, rows: int, plain: bool
) -> list[RenderableType]:
    """Colour says where units are, its depth how often they were asked for.

    Args:
        state: As `server.state.State` has it.
        width: Columns for all of it.
        rows: For layers, at most: if there are more layers, some are left out.
        plain: Without colours, where only the share that is held is shown.
    """
    layers = state["layers"]
    if not layers:
        return []
    every = math.ceil(len(layers) / rows)
    cells = max(width - BESIDE, 16)
    shown = [_Row(layer, cells) for layer in layers[::every]]
    most = max(row.asked.max() for row in shown)
    alike = most == min(row.asked.min() for row in shown)
    lines: list[RenderableType] = [_legend(plain)]
    for i, row in enumerate(shown):
        line = Text(f"{i * every:>4} ", "dim", no_wrap=True)
        for asked, held in zip(row.asked, row.held, strict=True):
            if plain:
                line.append(SHADES[math.ceil(held * (len(SHADES) - 1))])
                continue
            depth = 0.5 if alike or row.whole else math.log1p(99 * asked / most) / 4.61
            colours = _mix(FLASH, depth), _mix(HELD, depth)
            line.append(" ", _on(_mix(colours, held)))
        line.append(f" {100 * row.share:5.1f} %", "dim")
        lines.append(line)
    first = f"{state['model']['unit']} 0"
    last = f"{max(layer['units'] for layer in layers) - 1:,}"
    below = first + last.rjust(cells - len(first))
    lines.append(Text(f"     {below}    held", "dim", no_wrap=True))
    return lines


class _Row:
    """One layer in so many cells: how often its units were asked for, and held."""

    def __init__(self, layer: dict[str, Any], cells: int):
        asked = np.frombuffer(base64.b64decode(layer["asked"]), "<u4")
        held = np.frombuffer(base64.b64decode(layer["held"]), np.uint8)
        columns = len(asked)
        # Of each cell, its first column and the one after its last.
        begins = np.arange(cells) * columns // cells
        ends = np.maximum((np.arange(cells) + 1) * columns // cells, begins + 1)
        pairs = list(zip(begins, ends, strict=True))
        each = asked * (columns / layer["units"])
        self.asked = np.array([each[a:b].mean() for a, b in pairs])
        self.held = [float(held[a:b].mean()) / 255 for a, b in pairs]
        self.share = layer["held_units"] / layer["units"]
        self.whole = layer["whole"]


def _legend(plain: bool) -> Text:
    if plain:
        said = f"On flash {SHADES[0]}, in memory by shares {' '.join(SHADES[1:])}"
        return Text(said, "dim")
    legend = Text("Asked for rarely … often:  ", "dim")
    for name, ramp in (("in memory", HELD), ("on flash", FLASH)):
        for i in range(8):
            legend.append(" ", _on(_mix(ramp, i / 7)))
        legend.append(f" {name}   ", "dim")
    return legend


def _mix(ends: tuple[Colour, Colour], share: float) -> Colour:
    mixed = [round(x + (y - x) * share) for x, y in zip(*ends, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def _on(colour: Colour) -> Style:
    return Style(bgcolor=Color.from_rgb(*colour).name)
