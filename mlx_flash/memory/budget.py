"""Divide the memory a run may hold between weights, slots, KV cache and workspace.

The budget covers what MLX allocates for the model. Python, MLX and the tokenizer come
on top: `python -c "import mlx_lm"` alone is about 300 MB on Linux.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import NotEnoughMemory
from ..memory_size import parse_memory, say_memory
from ..storage.manifest import Manifest
from . import system
from .footprint import GATHERED, MAX_PREFILL, MIN_PREFILL, PREFILL_SHARE, Footprint

LEAST_CONTEXT = 128  # tokens, where nobody named any

# (bytes of a slot of each layer, room for all slots, the least slots) → slots
Divide = Callable[[Sequence[int], float, Sequence[int]], tuple[int, ...]]


@dataclass(frozen=True)
class Budget:
    """Bytes of each use; `slots[i]` is the number of slots of FFN layer i.

    `kv_bytes` was reckoned for `context` tokens, `workspace_bytes` for prompt chunks of
    `prefill_tokens`.
    """

    total_bytes: int
    resident_bytes: int
    predictor_bytes: int
    kv_bytes: int
    workspace_bytes: int
    slot_bytes: int
    slots: tuple[int, ...]
    prefill_tokens: int
    context: int


def make_budget(
    memory: int | str,
    footprint: Footprint,
    folder: Path,
    divide: Divide | None = None,
    least_context: int | None = None,
) -> Budget:
    """Divide `memory` for a run of at most `footprint.context` tokens.

    Args:
        memory: Bytes, "7GB", "50%" (of the model's own bytes) or "auto": what the
            machine has free with a tenth kept back, at most what the model can use.
        folder: The model's, for the error.
        divide: Gives slots to layers, as `divide.divide` after its curves. None gives
            every layer the same share.
        least_context: Where the model does not fit, the context is halved, but not
            below so many tokens. None leaves it as it is.

    Raises:
        NotEnoughMemory: If even the least number of slots does not fit.
    """
    manifest, least = footprint.manifest, footprint.least_slots
    layers = manifest.layers
    total = _total(memory, footprint)
    per_token = footprint.per_token_bytes
    prefill = min(max(int(PREFILL_SHARE * total / per_token), MIN_PREFILL), MAX_PREFILL)
    workspace = footprint.logits_bytes + prefill * per_token
    room: float = total - footprint.fixed_bytes - workspace - footprint.page_bytes
    share_room = room
    if room < manifest.ffn_bytes:  # then rows of one layer may be gathered
        share_room = room / (1 + GATHERED / len(layers))
    share = min(share_room / manifest.ffn_bytes, 1.0)
    slots = tuple(int(share * layer.units) for layer in layers)
    if any(n < m for n, m in zip(slots, least, strict=True)):
        half = footprint.context // 2
        if least_context is None or half < least_context:
            raise _too_little(total, footprint, folder)
        smaller = replace(footprint, context=half)
        return make_budget(memory, smaller, folder, divide, least_context)
    slots = _spread_rest(slots, manifest, share * manifest.ffn_bytes)
    if divide is not None and share < 1:
        slots = _divided(divide, manifest, room, least) or slots
    slot_bytes = footprint.page_bytes + sum(
        n * sum(p.bytes for p in layer.parts)
        for n, layer in zip(slots, layers, strict=True)
    )
    return Budget(
        total_bytes=total,
        resident_bytes=manifest.resident.bytes,
        predictor_bytes=manifest.predictor_bytes,
        kv_bytes=footprint.kv_bytes,
        workspace_bytes=total - footprint.fixed_bytes - slot_bytes,
        slot_bytes=slot_bytes,
        slots=slots,
        prefill_tokens=prefill,
        context=footprint.context,
    )


def _total(memory: int | str, footprint: Footprint) -> int:
    wanted = parse_memory(memory)
    if wanted is None:
        return min(footprint.most_bytes, system.usable_memory_bytes())
    if isinstance(wanted, float):
        return int(wanted * footprint.manifest.model_bytes)
    return wanted


def _too_little(total: int, footprint: Footprint, folder: Path) -> NotEnoughMemory:
    manifest, need = footprint.manifest, footprint.least_bytes
    return NotEnoughMemory(
        f"{folder} needs at least --memory {say_memory(need)} for "
        f"{footprint.context:,} tokens of context, {total / 1e6:,.1f} MB were given: "
        f"{manifest.resident.bytes / 1e6:,.1f} MB of resident weights, "
        f"{manifest.predictor_bytes / 1e6:,.1f} MB of predictors, "
        f"{footprint.kv_bytes / 1e6:,.1f} MB of KV cache, the rest workspace and "
        "slots.",
        least_bytes=need,
    )


def _spread_rest(
    slots: Sequence[int], manifest: Manifest, room: float
) -> tuple[int, ...]:
    """Give what rounding down left over to the first layers, a slot each."""
    spread = list(slots)
    rest = room - sum(
        n * x.unit_bytes for n, x in zip(spread, manifest.layers, strict=True)
    )
    for i, layer in enumerate(manifest.layers):
        if spread[i] < layer.units and rest >= layer.unit_bytes:
            spread[i] += 1
            rest -= layer.unit_bytes
    return tuple(spread)


def _divided(
    divide: Divide, manifest: Manifest, room: float, least: Sequence[int]
) -> tuple[int, ...] | None:
    """Slots by `divide`, with room kept to gather rows of the largest layer."""
    sizes = [sum(p.bytes for p in layer.parts) for layer in manifest.layers]
    for_slots = room
    for _ in range(8):  # the largest layer may be another one after a first try
        slots = divide(sizes, for_slots, least)
        taken = [n * size for n, size in zip(slots, sizes, strict=True)]
        excess = sum(taken) + GATHERED * max(taken) - room
        if excess <= 0:
            return slots
        for_slots -= excess
    return None
