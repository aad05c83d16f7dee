"""Divide the memory a run may hold between weights, slots, KV cache and workspace.

The budget covers what MLX allocates for the model. Python, MLX and the tokenizer come
on top: `python -c "import mlx_lm"` alone is about 300 MB on Linux.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import NotEnoughMemory
from ..memory_size import parse_memory, say_memory
from ..storage.manifest import Manifest
from . import system
from .beside import (
    blocks_first,
    bytes_beside,
    least_beside,
    more_beside,
    tables_last,
)
from .divide import Divide
from .footprint import CACHED, MAX_PREFILL, Footprint

LEAST_CONTEXT = 128  # tokens, where nobody named any
WORKSPACE_SHARE = 0.03  # of the budget, for the activations of a prompt chunk


@dataclass(frozen=True)
class Budget:
    """Bytes of each use; `slots[i]` is the number of slots of FFN layer i.

    `beside_slots` are those of what `memory.beside` is about; they take `beside_bytes`.

    `kv_bytes` was reckoned for `context` tokens, `workspace_bytes` for prompt chunks of
    `prefill_tokens` that FFNs multiply `batch_tokens` at a time. `cache_bytes` of the
    workspace are for freed buffers that MLX keeps.
    """

    total_bytes: int
    resident_bytes: int
    predictor_bytes: int
    kv_bytes: int
    workspace_bytes: int
    slot_bytes: int
    slots: tuple[int, ...]
    prefill_tokens: int
    batch_tokens: int
    context: int
    beside_slots: tuple[int, ...] = ()
    beside_bytes: int = 0

    @property
    def cache_bytes(self) -> int:
        return int(self.workspace_bytes * CACHED / (1 + CACHED))


def make_budget(
    memory: int | float | str,
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
        divide: Gives slots to layers, as `divide.divide` after its curves, or as
            `whole.divide_by`. None gives every layer the same share.
        least_context: Where the model does not fit, the context is halved, down to so
            many tokens. None leaves it as it is.

    Raises:
        NotEnoughMemory: If even the least number of slots does not fit.
    """
    total = total_bytes(memory, footprint)
    while (budget := _fit(total, footprint, divide)) is None:
        if least_context is None or footprint.context <= least_context:
            raise _too_little(total, footprint, folder)
        fewer = max(footprint.context // 2, least_context)
        footprint = replace(footprint, context=fewer)
    return budget


def least_bytes(footprint: Footprint) -> int:
    """The smallest budget that works for `footprint.context` tokens."""
    low, high = 0, footprint.most_bytes
    while _fit(high, footprint) is None:  # the least slots of rounded-up layers
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _fit(middle, footprint) is None:
            low = middle
        else:
            high = middle
    return high


def _fit(
    total: int, footprint: Footprint, divide: Divide | None = None
) -> Budget | None:
    """`total` bytes divided, or None if they are too few."""
    room = total - footprint.fixed_bytes
    share = min(max(room / footprint.manifest.ffn_bytes, 0.0), 1.0)
    budget = _fit_for(total, replace(footprint, share=share), divide)
    if budget is None or divide is None:
        return budget
    units = [layer.units for layer in footprint.manifest.layers]
    most = max(n / m for n, m in zip(budget.slots, units, strict=True))
    if most <= share:
        return budget
    # A layer with more slots than its share has more hidden values at once.
    return _fit_for(total, replace(footprint, share=1.0), divide) or _fit_for(
        total, replace(footprint, share=share), None
    )


def _fit_for(total: int, footprint: Footprint, divide: Divide | None) -> Budget | None:
    """The same, with a workspace for `footprint.share` of a layer's units at most."""
    room = total - footprint.fixed_bytes
    for workspace_room in (WORKSPACE_SHARE * total, 0):
        tokens, batch = footprint.chunk(workspace_room)
        whole_call = min(footprint.context, MAX_PREFILL)  # as mlx-lm cuts prompts
        waiting = whole_call if whole_call > tokens else 0
        workspace = footprint.workspace_bytes(tokens, batch, waiting)
        if all_slots(room - workspace, footprint) is not None:
            # Only a long prompt has logits wait: it will take slots for them.
            workspace = footprint.workspace_bytes(tokens, batch)
            given = all_slots(room - workspace, footprint, divide)
            break
    else:
        return None
    assert given is not None  # with less workspace there are no fewer
    manifest, (slots, beside) = footprint.manifest, given
    slot_bytes = bytes_of_slots(slots, footprint)
    used = footprint.fixed_bytes + slot_bytes + more_beside(manifest, beside)
    return Budget(
        total_bytes=total,
        resident_bytes=manifest.resident.bytes,
        predictor_bytes=manifest.predictor_bytes,
        kv_bytes=footprint.kv_bytes,
        workspace_bytes=total - used,
        slot_bytes=slot_bytes,
        slots=slots,
        prefill_tokens=tokens,
        batch_tokens=batch,
        context=footprint.context,
        beside_slots=beside,
        beside_bytes=bytes_beside(manifest, beside),
    )


def all_slots(
    room: float, footprint: Footprint, divide: Divide | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Slots of each layer, and of what is on flash beside them.

    Args:
        room: Bytes for all slots, but for the least ones beside the layers.

    Returns:
        None if a layer would get fewer than it works with.
    """
    manifest, layers = footprint.manifest, footprint.manifest.layers
    slots = share_slots(room, footprint, divide)
    if slots is None:
        return None
    if not manifest.beside:
        return slots, ()
    beside = blocks_first(
        manifest, room - bytes_of_slots(footprint.least_slots, footprint)
    )
    rest = room - more_beside(manifest, beside)
    shared = share_slots(rest, footprint, divide)
    if shared is None:  # layers of many sizes want more than their least slots
        beside, rest, shared = least_beside(manifest), room, slots
    whole = all(n == layer.units for n, layer in zip(shared, layers, strict=True))
    if whole:
        beside = tables_last(manifest, beside, rest - bytes_of_slots(shared, footprint))
    return shared, beside


def bytes_of_slots(slots: Sequence[int], footprint: Footprint) -> int:
    """What so many slots of each layer take, pages included."""
    layers = footprint.manifest.layers
    return footprint.page_bytes + sum(
        n * sum(p.bytes for p in layer.parts)
        for n, layer in zip(slots, layers, strict=True)
    )


def share_slots(
    room: float, footprint: Footprint, divide: Divide | None = None
) -> tuple[int, ...] | None:
    """Slots of each layer for `room` bytes, which also have to do for gathered rows.

    Returns:
        None if a layer would get fewer than it works with.
    """
    manifest, least = footprint.manifest, footprint.least_slots
    layers, room = manifest.layers, room - footprint.page_bytes
    share_room = room
    if room < manifest.ffn_bytes:  # then rows of one layer may be gathered
        largest = max(layer.units * layer.unit_bytes for layer in layers)
        share_room /= 1 + footprint.gathered_share * largest / manifest.ffn_bytes
    share = min(share_room / manifest.ffn_bytes, 1.0)
    slots = tuple(max(int(share * layer.units), 0) for layer in layers)
    slots = _spread_rest(slots, manifest, share * manifest.ffn_bytes)
    if any(n < m for n, m in zip(slots, least, strict=True)):
        return None
    if divide is not None and share < 1:
        return _divided(divide, footprint, room) or slots
    return slots


def total_bytes(memory: int | float | str, footprint: Footprint) -> int:
    """An amount of memory as `make_budget` takes it, in bytes."""
    wanted = parse_memory(memory)
    if wanted is None:
        return min(footprint.most_bytes, system.usable_memory_bytes())
    if isinstance(wanted, float):
        return int(wanted * footprint.manifest.model_bytes)
    return wanted


def _too_little(total: int, footprint: Footprint, folder: Path) -> NotEnoughMemory:
    manifest, need = footprint.manifest, least_bytes(footprint)
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
    divide: Divide, footprint: Footprint, room: float
) -> tuple[int, ...] | None:
    """Slots by `divide`, with room kept to gather rows of the largest layer.

    None for equal shares.
    """
    layers, least = footprint.manifest.layers, footprint.least_slots
    sizes = [sum(p.bytes for p in layer.parts) for layer in layers]
    for_slots = room
    for _ in range(8):  # the largest layer may be another one after a first try
        slots = divide(sizes, for_slots, least)
        if slots is None:
            return None
        taken = [n * size for n, size in zip(slots, sizes, strict=True)]
        excess = sum(taken) + footprint.gathered_share * max(taken) - room
        if excess <= 0:
            return slots
        for_slots -= excess
    return None
