"""How often a token has the host wait for MLX, and what that costs Apple's chips.

Nothing is measured: waits are those that tests/test_waits.py counts, times are modelled
from published figures. Nobody has run mlx-flash on a Mac.
"""

from dataclasses import dataclass

from ..layers.kinds import KINDS
from ..memory.whole import (
    LOCALITY,
    Ask,
    Speeds,
    divide_by,
    hit_share,
    machine_speeds,
    rewards,
)
from ..profile import load_profile
from .paper import OPT
from .report import Column, Report, Row

# Waits: mlx-lm issue 1438 has 0.2 to 0.35 ms; flash of an M4 Air; Apple's memory.
M4 = Speeds(wait_s=2.75e-4, flash_bytes_per_s=2.4e9, memory_bytes_per_s=1.2e11)


@dataclass(frozen=True)
class Shape:
    """The FFNs of a model: `asked` of `units` in each of `count` layers."""

    name: str
    kind: str
    count: int
    units: int
    unit_bytes: int
    asked: float

    def asks(self) -> list[Ask]:
        return [Ask(self.units, self.unit_bytes, self.asked)] * self.count


# Three matrices of 2,048 × 768 in 4 bits, with float16 scales and biases of 64 values
QWEN3 = Shape("Qwen3-30B-A3B", "expert", 48, 128, 3 * 2048 * 768 * 9 // 16, 8)
OPT_6_7B = Shape(
    "OPT-6.7B", "neuron", OPT.layers, OPT.neurons, 4 * OPT.dims, 0.1 * OPT.neurons
)
# (what, layers, waits of a layer: at first, at first with look-ahead, now)
WAITS = (
    ("neurons, in part (OPT-6.7B)", OPT.layers, 2, 3, 1),
    ("experts, in part (Qwen3-30B-A3B)", QWEN3.count, 1, 1, 1),
    ("blocks, in part (Llama-3.1-8B)", 32, 0, 0, 0),
    ("any kind, held whole", 32, 0, 0, 0),
)
# Shares of the units in memory
DIVIDED = {QWEN3: (0.5, 0.8, 0.9, 0.95, 0.98), OPT_6_7B: (0.9,)}


def run() -> Report:
    """Waits per token by kind and residency, modelled for an M1 Max and an M4.

    Then whole layers beside equal shares. Nothing is measured.
    """
    paper = load_profile("m1-max-paper")
    assert paper is not None  # it is shipped
    rows = []
    for name, layers, *counts in WAITS:
        row = Row(name, more={"waits": " / ".join(str(n * layers) for n in counts)})
        for machine, wait_s in (("m1", paper.wait_s), ("m4", M4.wait_s)):
            ms = [f"{1e3 * wait_s * n * layers:.1f}" for n in counts]
            row.more[machine] = " / ".join(ms)
        rows.append(row)
    for shape, shares in DIVIDED.items():
        speeds = {"m1": machine_speeds(shape.unit_bytes, paper), "m4": M4}
        for held in shares:
            rows += _divisions(shape, held, speeds)
    columns = [
        Column("waits per token", "waits"),
        Column("M1 Max, ms", "m1"),
        Column("M4, ms", "m4"),
    ]
    notes = [
        "Modelled, not measured. Of each kind: before / before with look-ahead / now. "
        "Of a division of slots: waits (M1 Max / M4), and ms of waits + reading.",
        "A wait takes 0.40 ms on an M1 Max and 0.275 ms on an M4 (0.2 to 0.35). Hits "
        "are those of LRU caches in published replays of routing, and the paper's.",
    ]
    return Report("unit, residency", rows, columns, notes, {"measured": False})


def _divisions(shape: Shape, held: float, speeds: dict[str, Speeds]) -> list[Row]:
    """Equal shares of the slots, and whole layers where these pay."""
    asks = shape.asks()
    equal = (int(held * shape.units),) * shape.count
    rows = []
    for label in ("equal shares", "whole layers"):
        row = Row(f"{shape.name}, {held:.0%} in memory, {label}")
        waits = []
        for machine, speed in speeds.items():
            slots = equal
            if label == "whole layers":
                worth = rewards(asks, speed, KINDS[shape.kind].gathered > 0)
                divide = divide_by(asks, LOCALITY[shape.kind], worth)
                sizes = [shape.unit_bytes] * shape.count
                room = sum(n * b for n, b in zip(equal, sizes, strict=True))
                slots = divide and divide(sizes, room, [1] * shape.count) or equal
            row.more[machine] = _cost(shape, slots, speed)
            waits.append(str(sum(n < shape.units for n in slots)))
        row.more["waits"] = " / ".join(dict.fromkeys(waits))
        rows.append(row)
    return rows


def _cost(shape: Shape, slots: tuple[int, ...], speeds: Speeds) -> str:
    """Waits + reading = both, in ms."""
    waits_s = speeds.wait_s * sum(n < shape.units for n in slots)
    missed = sum(
        shape.asked * (1 - hit_share(n / shape.units, LOCALITY[shape.kind]))
        for n in slots
    )
    reading_s = missed * shape.unit_bytes / speeds.flash_bytes_per_s
    total_s = waits_s + reading_s
    return f"{1e3 * waits_s:.1f} + {1e3 * reading_s:.1f} = {1e3 * total_s:.1f}"
