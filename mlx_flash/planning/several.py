"""What a model takes and how fast it is on several machines that share its units.

Each machine has its share of every layer's units on its own disk and in its own memory,
and computes with these; everything else is on every machine. One sum over all machines
for each FFN on flash adds up what they computed. All machines are like that of the
profile, which is asked what one with a share of the units costs. Everything here is
modelled.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import FlashError
from ..layers.kinds import EXPERT, kind_of, value_bytes
from ..machines.shares import owned, parse_shares
from ..profile import Profile
from .outline import Outline, outline
from .plan import Plan, plan_of

LINK_S = 0.3e-3  # a small message from one machine to the next, TCP over Ethernet
LINK_BYTES_PER_S = 1e9  # of 10 Gbit/s, or of a slower Thunderbolt bridge
CALL_MESSAGES = 3  # rank 0's call, the room that the others have, and "go"
SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Several:
    """What to expect of several machines. Pairs are (least, most).

    Attributes:
        memory_bytes, least_bytes: Given to each machine, and the least that each needs.
        held_share: Of all FFN units, in the memories of all machines together.
        bytes_per_token: Of the machine that reads most.
        sums_per_token, bytes_per_sum: One sum for each FFN on flash.
        sum_ms: Of all sums of a token, the waits for MLX that they bring included.
        call_ms: In which machines agree on a call.
        ms_per_token, tokens_per_s: None without a profile.
        assumed: What the figures rest on.
    """

    machines: int
    shares: tuple[int, ...]
    memory_bytes: int
    least_bytes: int
    held_share: float
    bytes_per_token: tuple[float, float]
    sums_per_token: int
    bytes_per_sum: int
    link_s: float
    link_bytes_per_s: float
    sum_ms: float
    call_ms: float
    ms_per_token: tuple[float, float] | None
    tokens_per_s: tuple[float, float] | None
    assumed: tuple[str, ...]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def plan_several(
    name: str | Path,
    memory: int | float | str,
    profile: Profile | None,
    machines: int,
    shares: str | None = None,
    link: str | None = None,
    *,
    revision: str | None = None,
    context: int | None = None,
    prompt_tokens: int = 128,
    hit_rate: float | None = None,
) -> tuple[Plan, Several]:
    """The plan of one machine, and what several like it would do.

    Args:
        name, memory, profile: As `make_plan` has them; the memory is that of each.
        shares: As `--shares` takes them; None for the same on each machine.
        link: What a message takes from one machine to the next, such as "2ms".
        revision, context, prompt_tokens, hit_rate: As `make_plan` has them. A hit rate
            is that of every machine.

    Raises:
        FlashError: As `make_plan`, and if shares or link cannot be understood, or a
            machine would have no unit of a layer.
    """
    link_s = LINK_S if link is None else parse_link(link)
    parts = (1,) * machines if shares is None else parse_shares(shares, machines)
    found = whole_of(outline(name, revision))
    beside = (profile, context, prompt_tokens, hit_rate)
    one = plan_of(found, name, memory, *beside)
    plans = [
        plan_of(part_of(found, parts, rank), name, one.memory_bytes, *beside)
        for rank in range(machines)
    ]
    return one, together(found, plans, parts, link_s, profile)


def parse_link(text: str) -> float:
    """Seconds, as "2ms" has them.

    Raises:
        FlashError: If it is no time, or none above zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(us|µs|ms|s)", text.strip().lower())
    seconds = float(found[1]) * SECONDS[found[2]] if found else 0.0
    if seconds <= 0:
        raise FlashError(f"{text!r} is no time that a message takes. Try 0.3ms.")
    return seconds


def whole_of(found: Outline) -> Outline:
    """A model with all of its units, also where the folder holds a share of them."""
    manifest = found.manifest
    whole = replace(manifest, layers=manifest.whole_layers, share=None)
    return replace(found, manifest=whole)


def part_of(found: Outline, shares: Sequence[int], rank: int) -> Outline:
    """What one machine has of a whole model.

    Raises:
        FlashError: If it would have no unit of a layer.
    """
    manifest = found.manifest
    layers = []
    for layer in manifest.layers:
        units = len(owned(layer.units, layer.unit_bytes, shares, rank))
        if not units:
            raise FlashError(
                f"{layer.module} has {layer.units} {manifest.unit}s, too few for the "
                f"shares {':'.join(map(str, shares))}. Plan for fewer machines."
            )
        layers.append(replace(layer, units=units))
    part = replace(manifest, layers=tuple(layers))
    share = part.ffn_bytes / manifest.ffn_bytes
    return replace(found, manifest=part, share=share)


def sum_bytes(found: Outline) -> int:
    """Of what machines add up for one token and one FFN.

    The outputs of all of a token's experts, or one vector in float32.
    """
    width = found.shapes.width
    if kind_of(found.manifest) is EXPERT:
        return found.shapes.experts_per_token * width * value_bytes(found.manifest)
    return 4 * width


def sum_s(machines: int, nbytes: int, link_s: float) -> float:
    """Seconds of one sum in a ring.

    Every machine sends a part of the array to the next one, machines - 1 times to add
    up and as often again to pass the result on.
    """
    return 2 * (machines - 1) * (link_s + nbytes / machines / LINK_BYTES_PER_S)


def together(
    found: Outline,
    parts: Sequence[Plan],
    shares: Sequence[int],
    link_s: float,
    profile: Profile | None,
) -> Several:
    """What machines do together, from the plan of each one's part.

    Args:
        found: The whole model.
        link_s: Seconds that a message takes from one machine to the next.
    """
    count, sums = len(parts), len(found.manifest.layers)
    # MLX adds up on the CPU: a GPU has to finish before, and waits for the result.
    wait_s = profile.wait_s if profile else 0.0
    nbytes = sum_bytes(found)
    sum_ms = 1e3 * sums * (sum_s(count, nbytes, link_s) + wait_s)
    call_ms = 1e3 * CALL_MESSAGES * link_s
    times = [part.ms_per_token for part in parts if part.ms_per_token is not None]
    ms = speed = None
    if times:  # whoever is slowest, all wait for it
        least, most = (max(time[end] for time in times) for end in (0, 1))
        ms = least + sum_ms + call_ms, most + sum_ms + call_ms
        speed = 1e3 / ms[1], 1e3 / ms[0]
    held = sum(part.held_share * part.ffn_bytes for part in parts)
    return Several(
        machines=count,
        shares=tuple(shares),
        memory_bytes=max(part.memory_bytes for part in parts),
        least_bytes=max(part.least_bytes for part in parts),
        held_share=held / found.manifest.ffn_bytes,
        bytes_per_token=(
            max(part.bytes_per_token[0] for part in parts),
            max(part.bytes_per_token[1] for part in parts),
        ),
        sums_per_token=sums,
        bytes_per_sum=nbytes,
        link_s=link_s,
        link_bytes_per_s=LINK_BYTES_PER_S,
        sum_ms=sum_ms,
        call_ms=call_ms,
        ms_per_token=ms,
        tokens_per_s=speed,
        assumed=tuple(_assumed(found, count, link_s)),
    )


def _assumed(found: Outline, machines: int, link_s: float) -> list[str]:
    lines = [
        f"a message takes {1e3 * link_s:g} ms from one machine to the next, at "
        f"{LINK_BYTES_PER_S / 1e9:g} GB/s; a sum takes {2 * (machines - 1)} of them "
        f"one after the other, and a token {CALL_MESSAGES} more",
        "all machines are like this one; prompts are not modelled on several",
    ]
    if kind_of(found.manifest) is EXPERT:
        lines.append(
            "each machine has its share of every token's experts; chance gives one of "
            "them more, for which the others wait"
        )
    return lines
