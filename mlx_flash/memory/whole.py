"""Hold layers whole where that saves more waiting than it costs reading.

A layer whose units are chosen has the host wait for MLX before it can read, also where
nearly everything is in memory; a layer that is held whole is never asked. The slots
that make it whole are missing elsewhere. Both are counted in bytes of reading: a wait
is worth what flash reads meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from ..profile import Profile, measured_here
from ..storage.manifest import Layer
from .divide import Curve, Divide, divide

# k, where slots for the share s of a layer's units have 1 - (1 - s)^k of the hits.
# Neurons: with 24 % of OPT 6.7B's in memory, the paper's tokens find 76 % there.
# Experts: 512 of them a layer against an LRU (kekzl/imp pull request 2061), 43.5 % of
# hits with 93 in memory. Blocks: all are needed.
# Gated neurons: 44 % of hits with slots for 37 %, half skipped (SmolLM2-135M).
LOCALITY = {"neuron": 5.2, "gated neuron": 1.25, "expert": 2.86, "block": 1.0}
POINTS = 64  # of a curve
DEPTH = 32  # reads in flight


@dataclass(frozen=True)
class Speeds:
    """What the division of slots has to know of a machine.

    Attributes:
        wait_s: Of the host for MLX, beyond what is computed meanwhile.
        flash_bytes_per_s: Of random reads of units.
        memory_bytes_per_s: At which weights are multiplied.
    """

    wait_s: float
    flash_bytes_per_s: float
    memory_bytes_per_s: float


# Where nothing was measured. Published of waits: 0.40 ms on an M1 Max (qwisp pull
# request 4), 0.2 to 0.35 ms on an M4 (mlx-lm issue 1438); of flash: 2.4 GB/s on an M4
# Air, 3.3 on an M3, 4 on an M5 Max. Apple's chips have 100 to 400 GB/s of memory.
APPLE = Speeds(wait_s=3e-4, flash_bytes_per_s=3e9, memory_bytes_per_s=2e11)
# On MLX's CPU backend the host is what computes. Of other GPUs nothing is known.
OTHERS = Speeds(wait_s=0.0, flash_bytes_per_s=1e9, memory_bytes_per_s=1e10)


@dataclass(frozen=True)
class Ask:
    """What a token asks of a layer: how many of its units, None for all, in order."""

    units: int
    unit_bytes: int
    asked: float | None


class Chooses(Protocol):
    """What a unit kind says of a token's choice; see `layers.kinds.UnitKind`."""

    name: str
    gathered: float

    def asked(
        self, layer: Layer, experts_per_token: int, predicted: float | None
    ) -> float | None: ...


def asks_of(
    kind: Chooses,
    layers: Sequence[Layer],
    experts_per_token: int,
    predicted: float | None = None,
) -> list[Ask]:
    """What a token asks of a model's layers.

    Args:
        predicted: The share of neurons where a layer has no predictor yet.
    """
    asks = []
    for layer in layers:
        share = layer.predictor.predicted_share if layer.predictor else predicted
        asked = kind.asked(layer, experts_per_token, share)
        asks.append(Ask(layer.units, layer.unit_bytes, asked))
    return asks


def kind_rewards(
    kind: Chooses, asks: Sequence[Ask], profile: Profile | None = None
) -> list[float]:
    """`rewards` for a model, on the machine of a profile or on this one."""
    profile = profile or measured_here(mx.default_device().type.name)
    speeds = machine_speeds(max(ask.unit_bytes for ask in asks), profile)
    # Of slots that are gathered from, a layer held whole multiplies all.
    return rewards(asks, speeds, multiplies_all=kind.gathered > 0)


def machine_speeds(unit_bytes: float, profile: Profile | None) -> Speeds:
    """As `mlx-flash probe` measured them, else the defaults for the device in use."""
    if profile is None:
        return APPLE if on_metal() else OTHERS
    flash = profile.read_bytes_per_s(unit_bytes, DEPTH)
    return Speeds(profile.wait_s, flash, profile.memory_bytes_per_s)


def on_metal() -> bool:
    """Whether MLX computes on Apple's GPU."""
    return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu


def rewards(
    asks: Sequence[Ask], speeds: Speeds, multiplies_all: bool = False
) -> list[float]:
    """What each layer saves of a token's reading if it is held whole, in bytes.

    Besides its misses, and never less than nothing. Where all units are needed in
    order, nobody waits.

    Args:
        multiplies_all: Whether a layer that is held whole multiplies every unit, and
            one that is not only those asked for.
    """
    found = []
    for ask in asks:
        saved_s = 0.0
        if ask.asked is not None:
            saved_s = speeds.wait_s
            if multiplies_all:
                more_bytes = (ask.units - ask.asked) * ask.unit_bytes
                saved_s -= more_bytes / speeds.memory_bytes_per_s
        found.append(max(saved_s, 0.0) * speeds.flash_bytes_per_s)
    return found


def hit_share(share: float, locality: float) -> float:
    """What a cache finds that holds `share` of the units."""
    return 1 - (1 - share) ** locality


def divide_by(
    asks: Sequence[Ask], locality: float, reward_bytes: Sequence[float]
) -> Divide | None:
    """How to divide slots of which no trace is known.

    Every layer gets slots up to the share from where the hits that another one brings
    are worth less than a part of a wait; then one layer after the other gets the rest.
    Where there is less than that, equal shares are best.

    Args:
        locality: As LOCALITY has it.
        reward_bytes: As `rewards` gives them.

    Returns:
        None if no layer is worth holding whole.
    """
    if not any(reward_bytes):
        return None
    curves = []
    for ask, reward in zip(asks, reward_bytes, strict=True):
        n = ask.units
        slots = sorted({round(i * n / POINTS) for i in range(POINTS + 1)})
        curve = Curve(tuple(slots), tuple(hit_share(i / n, locality) for i in slots))
        read_bytes = ask.unit_bytes * (n if ask.asked is None else ask.asked)
        curves.append(curve.scaled(read_bytes).rewarded(reward))

    def divide_whole(
        unit_bytes: Sequence[int], room_bytes: float, least: Sequence[int]
    ) -> tuple[int, ...] | None:
        slots = divide(curves, unit_bytes, room_bytes, least)
        whole = (n == ask.units for n, ask in zip(slots, asks, strict=True))
        return slots if any(whole) else None

    return divide_whole
