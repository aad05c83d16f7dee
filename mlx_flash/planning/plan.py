"""Say before any weight is read what a model will take, and how fast it will be.

Sizes are exact, as the budget divides them. Times are modelled from a machine's profile
(see `cost`) as a range, from units selected by chance to units selected with the
locality that was measured of real models.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FlashError
from ..layers.kinds import BLOCK, NEURON, kind_of
from ..memory.budget import LEAST_CONTEXT, least_bytes, make_budget
from ..memory.divide import Divide
from ..memory.division import Divider, as_divided
from ..memory.footprint import Footprint
from ..memory.whole import LOCALITY, divide_by, kind_rewards
from ..profile import Profile
from ..sizing import DEFAULT_CONTEXT
from .cost import Cost, Work, load_s, token_bytes, token_cost
from .outline import Outline, outline
from .prompt import first_prompt
from .requirements import (
    BY_CHANCE,
    MEASURED,
    PAPER_PREDICTED,
    Selection,
    asks_of_token,
    make_work,
)


@dataclass(frozen=True)
class Plan:
    """What to expect of a run. Pairs are (least, most), modelled.

    Attributes:
        least_bytes, best_bytes: The smallest budget that works, and the one beyond
            which more changes nothing.
        held_share: Of the FFN units, in memory at any time.
        download_bytes, disk_bytes: Still to come, and to be written by `convert`.
        convert: Whether it has to be converted first.
        machine, cold: Of the profile; with the times below None without one.
        waits_per_token: Of the host for MLX: layers whose units are chosen.
        ms_of_slowest: The slower end's parts: io, cache, compute and wait.
        prompt_tokens: Of the prompt that `first_token_s`, `prompt_bytes` (read for it)
            and `prompt_s` (its parts, in seconds) are about.
        assumed: What the figures rest on.
        slow: Why it will be slow, if it will be.
    """

    model: str
    kind: str
    model_type: str
    unit: str
    dtype: str
    layers: int
    model_bytes: int
    resident_bytes: int
    predictor_bytes: int
    ffn_bytes: int
    table_bytes: int
    block_bytes: int
    least_bytes: int
    best_bytes: int
    memory_bytes: int
    slot_bytes: int
    kv_bytes: int
    held_share: float
    layers_held_whole: int
    context: int
    download_bytes: int
    disk_bytes: int
    convert: bool
    machine: str | None
    cold: bool | None
    bytes_per_token: tuple[float, float]
    waits_per_token: int
    ms_per_token: tuple[float, float] | None
    tokens_per_s: tuple[float, float] | None
    ms_of_slowest: dict[str, float] | None
    load_s: float | None
    first_token_s: float | None
    prompt_tokens: int
    prompt_bytes: float | None
    prompt_tokens_per_s: float | None
    prompt_s: dict[str, float] | None
    assumed: tuple[str, ...]
    slow: str | None

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def make_plan(
    name: str | Path,
    memory: int | float | str = "auto",
    profile: Profile | None = None,
    *,
    revision: str | None = None,
    context: int | None = None,
    prompt_tokens: int = 128,
    hit_rate: float | None = None,
) -> Plan:
    """Plan a run of a model, of which only the configuration is read.

    Args:
        name: A flash folder, a checkpoint's folder, or a hub name.
        memory: As `mlx_flash.load` takes it.
        profile: Of the machine; without one, sizes are told and no times.
        revision: Branch, tag or commit of a hub repository.
        context: Tokens of KV cache (default: as `load_model` reserves).
        prompt_tokens: For the time to the first token.
        hit_rate: Share of units found in memory, as an earlier run reported it.

    Raises:
        FlashError: If there is no such model, it is not supported, or does not fit.
    """
    found = outline(name, revision)
    return plan_of(found, name, memory, profile, context, prompt_tokens, hit_rate)


def plan_of(
    found: Outline,
    name: str | Path,
    memory: int | float | str,
    profile: Profile | None = None,
    context: int | None = None,
    prompt_tokens: int = 128,
    hit_rate: float | None = None,
) -> Plan:
    """`make_plan` of a model whose configuration was read before."""
    manifest = found.manifest
    if manifest.share is not None:
        raise FlashError(
            f"{name} holds {manifest.share} alone, and a plan is made from the whole "
            "model. Give the checkpoint, or the flash folder that was split."
        )
    positions = found.config.get("max_position_embeddings")
    wanted = context or min(DEFAULT_CONTEXT, positions or DEFAULT_CONTEXT)
    footprint = Footprint(
        manifest, found.shapes, kind_of(manifest), wanted, dense=BLOCK
    )
    least_context = None if context else LEAST_CONTEXT
    divide = _divide(found, profile)
    budget = make_budget(memory, footprint, Path(name), divide, least_context)
    footprint = dataclasses.replace(footprint, context=budget.context)
    if profile:  # units are read straight into their slots, unlike the paper's
        profile = dataclasses.replace(profile, copy_bytes_per_s=0.0)
    selections = _selections(manifest.unit, hit_rate)
    works = [make_work(found, budget, s, prompt_tokens) for s in selections]
    read = _range(token_bytes(work) for work in works)
    costs = []
    loading = first = prompt = None
    if profile:
        costs = [token_cost(profile, work) for work in works]
        loading = load_s(profile, works[-1])
        divider = Divider(budget, as_divided(footprint, budget), divide)
        prompt = first_prompt(found, divider, profile, selections[-1], prompt_tokens)
        first = loading + prompt.total_s
    pairs = list(zip(budget.slots, manifest.layers, strict=True))
    held = sum(n * layer.unit_bytes for n, layer in pairs) / manifest.ffn_bytes
    return Plan(
        model=str(name),
        kind=found.kind,
        model_type=manifest.model_type,
        unit=manifest.unit,
        dtype=manifest.dtype,
        layers=len(manifest.layers),
        model_bytes=manifest.model_bytes,
        resident_bytes=manifest.resident.bytes,
        predictor_bytes=manifest.predictor_bytes,
        ffn_bytes=manifest.ffn_bytes,
        table_bytes=manifest.table_bytes,
        block_bytes=manifest.beside_bytes - manifest.table_bytes,
        least_bytes=least_bytes(footprint),
        best_bytes=footprint.most_bytes,
        memory_bytes=budget.total_bytes,
        slot_bytes=budget.slot_bytes,
        kv_bytes=budget.kv_bytes,
        held_share=held,
        layers_held_whole=sum(n == layer.units for n, layer in pairs),
        context=budget.context,
        download_bytes=found.download_bytes,
        disk_bytes=found.disk_bytes,
        convert=found.kind == "checkpoint" and not found.in_place,
        machine=profile.device if profile else None,
        cold=profile.cold if profile else None,
        bytes_per_token=read,
        waits_per_token=sum(layer.waits for layer in works[0].layers),
        ms_per_token=_range(1e3 * c.total_s for c in costs) if costs else None,
        tokens_per_s=_range(c.tokens_per_s for c in costs) if costs else None,
        ms_of_slowest=_ms_of_slowest(costs),
        load_s=loading,
        first_token_s=first,
        prompt_tokens=prompt_tokens,
        prompt_bytes=prompt.bytes_read if prompt else None,
        prompt_tokens_per_s=prompt_tokens / prompt.total_s if prompt else None,
        prompt_s=_parts(prompt, 1.0) if prompt else None,
        assumed=tuple(_assumed(found, hit_rate, held)),
        slow=_slow(works[0], read[1], profile),
    )


def _divide(found: Outline, profile: Profile | None) -> Divide | None:
    """As loading divides slots, on the machine of `profile` or on this one."""
    kind, asks = kind_of(found.manifest), asks_of_token(found)
    return divide_by(asks, LOCALITY[kind.name], kind_rewards(kind, asks, profile))


def _selections(unit: str, hit_rate: float | None) -> list[Selection]:
    """The ends of the range, or the one selection that is known."""
    if hit_rate is not None:
        return [Selection(known_hit_rate=hit_rate)]
    if unit not in MEASURED:  # all units are needed
        return [BY_CHANCE]
    return [MEASURED[unit], BY_CHANCE]


def _range(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


def _ms_of_slowest(costs: list[Cost]) -> dict[str, float] | None:
    if not costs:
        return None
    return _parts(max(costs, key=lambda cost: cost.total_s), 1e3)


def _parts(cost: Cost, scale: float) -> dict[str, float]:
    parts = ("io", "cache", "compute", "wait")
    return {part: scale * getattr(cost, f"{part}_s") for part in parts}


def _assumed(found: Outline, hit_rate: float | None, held: float) -> list[str]:
    kind = kind_of(found.manifest)
    if kind.name not in MEASURED:
        return [f"every {kind.name} is needed for every token"]
    lines = []
    if kind is NEURON:
        facts = [x.predictor for x in found.manifest.layers if x.predictor]
        if facts:
            share = sum(f.predicted_share for f in facts) / len(facts)
            lines.append(f"{share:.1%} of the neurons predicted, as at conversion")
        elif found.kind == "checkpoint":
            lines.append(
                f"{PAPER_PREDICTED:.0%} of the neurons predicted, the paper's for OPT "
                "6.7B; known after conversion"
            )
        else:
            return ["no predictor: every neuron is needed for every token"]
    if hit_rate is not None:
        return [*lines, f"{hit_rate:.0%} of the units found in memory, as given"]
    measured = MEASURED[kind.name]
    return [
        *lines,
        f"hits between {held:.0%} (units chosen by chance) and "
        f"{measured.hit_rate(held):.0%} (the locality of {measured.source})",
    ]


def _slow(work: Work, nbytes: float, profile: Profile | None) -> str | None:
    """The reason in words, for models that need every weight for every token."""
    if not nbytes or any(layer.random for layer in work.layers):
        return None
    words = f"{nbytes / 1e9:,.2f} GB do not fit and are read for every token"
    if profile:
        speed = profile.sequential_bytes_per_s
        words += f", which takes {nbytes / speed:,.2f} s at {speed / 1e9:.1f} GB/s"
    return (
        f"it is dense: every token needs every weight; {words}. More memory, fewer "
        "bits, or a mixture of experts would help."
    )
