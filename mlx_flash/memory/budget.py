"""Divide the memory a run may hold between weights, slots, KV cache and workspace.

The budget covers what MLX allocates for the model. Python, MLX and the tokenizer come
on top: `python -c "import mlx_lm"` alone is about 300 MB on Linux.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..errors import FlashError
from ..memory_size import parse_memory, say_memory
from ..storage.manifest import Layer, Manifest
from ..storage.safetensors import DTYPES
from . import system
from .footprint import Shapes
from .slots import spare_bytes

KV_STEP = 64  # tokens by which `generation` lets the KV cache grow
MAX_PREFILL = 512
MIN_PREFILL = 8
PREFILL_SHARE = 0.03  # of the budget, for the activations of a prompt chunk
LEAST_SHARE = 64  # the least is one slot for every 64 neurons, or one expert


@dataclass(frozen=True)
class Budget:
    """Bytes of each use; `slots[i]` is the number of slots of FFN layer i.

    `prefill_tokens` is the prompt chunk for which `workspace_bytes` was reckoned.
    """

    total_bytes: int
    resident_bytes: int
    predictor_bytes: int
    kv_bytes: int
    workspace_bytes: int
    slot_bytes: int
    slots: tuple[int, ...]
    prefill_tokens: int


def make_budget(
    memory: int | str,
    manifest: Manifest,
    shapes: Shapes,
    context: int,
    folder: Path,
    divide: Callable | None = None,
) -> Budget:
    """Divide `memory` for a run of at most `context` tokens.

    Args:
        memory: Bytes, "7GB", "50%" (of the model's own bytes) or "auto": what the
            machine has free with a tenth kept back, at most what the model can use.
        divide: Gives slots to layers, as `division.divide` after its curves. None
            gives every layer the same share.

    Raises:
        FlashError: If even the least number of slots does not fit, with the numbers.
    """
    wanted = parse_memory(memory)
    kv_bytes = _kv_bytes(shapes, context)
    fixed = manifest.resident.bytes + manifest.predictor_bytes + kv_bytes
    per_token = _workspace_per_token(shapes, manifest, context)
    logits = _logits_bytes(shapes)
    layers = manifest.layers
    pages = _page_bytes(manifest)
    if wanted is None:
        everything = most_bytes(manifest, shapes, context)
        total = min(everything, system.usable_memory_bytes())
    elif isinstance(wanted, float):
        total = int(wanted * manifest.model_bytes)
    else:
        total = wanted
    prefill = min(max(int(PREFILL_SHARE * total / per_token), MIN_PREFILL), MAX_PREFILL)
    workspace = logits + prefill * per_token
    room = total - fixed - workspace - pages
    whole_room = room
    if room < manifest.ffn_bytes:
        # Gathered rows are a copy of at most half of one layer's slots.
        room /= 1 + 0.5 / len(layers)
    share = min(room / manifest.ffn_bytes, 1.0)
    slots = tuple(int(share * layer.units) for layer in layers)
    least = tuple(_least_slots(layer, manifest.unit) for layer in layers)
    if any(n < m for n, m in zip(slots, least, strict=True)):
        need = least_bytes(manifest, shapes, context)
        raise FlashError(
            f"{folder} needs at least --memory {say_memory(need)} for {context:,} "
            f"tokens of context, {total / 1e6:,.1f} MB were given: "
            f"{manifest.resident.bytes / 1e6:,.1f} MB of resident weights, "
            f"{manifest.predictor_bytes / 1e6:,.1f} MB of predictors, "
            f"{kv_bytes / 1e6:,.1f} MB of KV cache, the rest workspace and slots."
        )
    slots = _spread_rest(slots, manifest, share * manifest.ffn_bytes)
    if divide is not None and share < 1:
        slots = _divided(divide, manifest, whole_room, least) or slots
    slot_bytes = pages + sum(
        n * sum(p.bytes for p in layer.parts)
        for n, layer in zip(slots, layers, strict=True)
    )
    return Budget(
        total_bytes=total,
        resident_bytes=manifest.resident.bytes,
        predictor_bytes=manifest.predictor_bytes,
        kv_bytes=kv_bytes,
        workspace_bytes=total - fixed - slot_bytes,
        slot_bytes=slot_bytes,
        slots=slots,
        prefill_tokens=prefill,
    )


def least_bytes(manifest: Manifest, shapes: Shapes, context: int) -> float:
    """The smallest budget that works for `context` tokens."""
    layers = manifest.layers
    least = (_least_slots(layer, manifest.unit) for layer in layers)
    # One unit more of each layer makes up for rounding down in `make_budget`.
    share = max((m + 1) / x.units for m, x in zip(least, layers, strict=True))
    need = manifest.resident.bytes + manifest.predictor_bytes
    need += _kv_bytes(shapes, context) + _page_bytes(manifest) + _logits_bytes(shapes)
    need += share * manifest.ffn_bytes * (1 + 0.5 / len(layers))
    per_token = _workspace_per_token(shapes, manifest, context)
    return max(need + MIN_PREFILL * per_token, need / (1 - PREFILL_SHARE))


def most_bytes(manifest: Manifest, shapes: Shapes, context: int) -> int:
    """The budget beyond which more memory changes nothing."""
    everything = manifest.model_bytes + manifest.predictor_bytes
    everything += _kv_bytes(shapes, context) + _page_bytes(manifest)
    per_token = _workspace_per_token(shapes, manifest, context)
    return everything + _logits_bytes(shapes) + MAX_PREFILL * per_token


def _kv_bytes(shapes: Shapes, context: int) -> int:
    tokens = -(-context // KV_STEP) * KV_STEP
    return int(shapes.kv_bytes_fixed + tokens * shapes.kv_bytes_per_token)


def _logits_bytes(shapes: Shapes) -> int:
    return 4 * shapes.vocabulary * 4


def _page_bytes(manifest: Manifest) -> int:
    """What slots take to begin on pages."""
    return sum(spare_bytes(p.bytes) for layer in manifest.layers for p in layer.parts)


def _least_slots(layer: Layer, unit: str) -> int:
    return max(layer.units // LEAST_SHARE, 1) if unit == "neuron" else 1


def _spread_rest(slots, manifest: Manifest, room: float) -> tuple[int, ...]:
    """Give what rounding down left over to the first layers, a slot each."""
    slots = list(slots)
    rest = room - sum(
        n * x.unit_bytes for n, x in zip(slots, manifest.layers, strict=True)
    )
    for i, layer in enumerate(manifest.layers):
        if slots[i] < layer.units and rest >= layer.unit_bytes:
            slots[i] += 1
            rest -= layer.unit_bytes
    return tuple(slots)


def _divided(divide, manifest: Manifest, room: float, least) -> tuple[int, ...] | None:
    """Slots by `divide`, with room kept for half of the largest layer, gathered."""
    sizes = [sum(p.bytes for p in layer.parts) for layer in manifest.layers]
    for_slots = room
    for _ in range(8):  # the largest layer may be another one after a first try
        slots = divide(sizes, for_slots, least)
        taken = [n * size for n, size in zip(slots, sizes, strict=True)]
        excess = sum(taken) + max(taken) / 2 - room
        if excess <= 0:
            return slots
        for_slots -= excess
    return None


def _workspace_per_token(shapes: Shapes, manifest: Manifest, context: int) -> int:
    """Bytes that one token of a prompt chunk occupies while a layer is computed.

    Hidden values of all neurons with scores and masks, or of the token's experts; a
    dozen vectors of the model's width; and attention scores (which only MLX's CPU
    backend keeps).
    """
    size = DTYPES[manifest.dtype][1]
    if manifest.unit == "neuron":
        hidden = max(layer.units for layer in manifest.layers) * (3 * size + 3)
    elif manifest.unit == "block":
        rows = max(x.units * prod(x.parts[0].shape[:-1]) for x in manifest.layers)
        hidden = rows * 4 * size
    else:
        rows = max(p.shape[0] for x in manifest.layers for p in x.parts if p.shape)
        hidden = shapes.experts_per_token * rows * 5 * size
    return hidden + 12 * shapes.width * size + shapes.heads * context * 4
