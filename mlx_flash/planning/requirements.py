"""What a model within a budget asks of a machine, put as the cost model wants it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..layers.kinds import NEURON, kind_of, value_bytes
from ..memory.budget import Budget
from ..storage.layout import dtype_name
from ..storage.manifest import Layer, Manifest
from .cost import FlashLayer, Matrices, Work
from .outline import Outline

KERNELS = {"neuron": "gathered", "expert": "experts", "block": "matmul"}


@dataclass(frozen=True)
class Selection:
    """How tokens select units, and so how many of these memory holds.

    Attributes:
        locality: k, where a cache of the share s hits 1 - (1 - s)^k; 1 by chance.
        source: What the locality was measured on.
        known_hit_rate: As an earlier run reported it, whatever memory holds.
    """

    locality: float = 1.0
    source: str = ""
    known_hit_rate: float | None = None

    def hit_rate(self, held_share: float) -> float:
        if self.known_hit_rate is not None:
            return self.known_hit_rate
        return 1 - (1 - held_share) ** self.locality


BY_CHANCE = Selection()
# The paper's OPT 6.7B: a tenth of the neurons predicted; with 24 % of them in memory a
# token loads 2.4 %, so that 76 % of what it needs is there.
PAPER_PREDICTED = 0.10
MEASURED = {
    "neuron": Selection(5.2, "the paper's OPT 6.7B"),
    # 512 experts a layer against an LRU (kekzl/imp pull request 2061): 43.5 % of hits
    # with 93 of them in memory.
    "expert": Selection(2.86, "published replays of real routing"),
}


def make_work(
    found: Outline, budget: Budget, selection: Selection, context: int
) -> Work:
    """The work of one token after `context` others."""
    manifest = found.manifest
    on_flash = {layer.module for layer in manifest.layers}
    resident = resident_matrices(found.model, on_flash, manifest.dtype)
    if manifest.predictor_bytes:
        resident.append(_predictors(manifest))
    modules = dict(found.model.named_modules())
    layers = tuple(
        _flash_layer(found, layer, slots, modules[layer.module], selection)
        for layer, slots in zip(manifest.layers, budget.slots, strict=True)
    )
    kept = sum(
        layer.nbytes
        for layer, slots in zip(manifest.layers, budget.slots, strict=True)
        if slots == layer.units
    )
    shapes = found.shapes
    return Work(
        resident=tuple(resident),
        layers=layers,
        steps=len(getattr(found.model, "layers", layers)),
        kv_bytes=shapes.kv_bytes_fixed + context * shapes.kv_bytes_per_token,
        load_bytes=manifest.resident.bytes + manifest.predictor_bytes + kept,
    )


def resident_matrices(
    model: nn.Module, on_flash: set[str], dtype: str
) -> list[Matrices]:
    """The matrices outside the FFNs on flash that each token is multiplied with.

    A table of embeddings is only looked into, unless it gives the logits, too.
    """
    found: dict[tuple[str, int], list[float]] = {}
    tables, heads = [], False
    for path, module in model.named_modules():
        if any(path == top or path.startswith(f"{top}.") for top in on_flash):
            continue
        arrays = {k: a for k, a in module.items() if isinstance(a, mx.array)}
        if "weight" not in arrays or arrays["weight"].ndim < 2:
            continue
        bits = getattr(module, "bits", 0)
        nbytes = sum(arrays[k].nbytes for k in arrays if k != "bias")
        weight = arrays["weight"]
        values = weight.nbytes * 8 / bits if bits else weight.size
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            tables.append((len(weight), bits, nbytes, values))
            continue
        heads |= path.endswith("lm_head")
        _add(found, _name(arrays, dtype), bits, nbytes, values)
    if tables and not heads:
        _, bits, nbytes, values = max(tables)  # positions have a smaller table
        _add(found, dtype, bits, nbytes, values)
    return [
        Matrices("matmul", kind, bits, nbytes, values)
        for (kind, bits), (nbytes, values) in found.items()
    ]


def _add(found: dict, dtype: str, bits: int, nbytes: float, values: float) -> None:
    have = found.setdefault((dtype, bits), [0.0, 0.0])
    have[0] += nbytes
    have[1] += values


def _name(arrays: dict[str, mx.array], dtype: str) -> str:
    """The dtype that a module computes in: that of its scales, or the model's."""
    scales = arrays.get("scales")
    if scales is None or not mx.issubdtype(scales.dtype, mx.floating):
        return dtype
    return dtype_name(scales.dtype)


def _predictors(manifest: Manifest) -> Matrices:
    """All predictors together, which compute in float32 on the CPU."""
    facts = [layer.predictor for layer in manifest.layers if layer.predictor]
    bits = facts[0].bits if facts else 4
    dtype = "float32" if mx.default_device() == mx.cpu else manifest.dtype
    nbytes = manifest.predictor_bytes
    size = bits / 8 if bits else value_bytes(manifest)
    return Matrices("matmul", dtype, bits, nbytes, nbytes / size)


def _flash_layer(
    found: Outline, layer: Layer, slots: int, module: nn.Module, selection: Selection
) -> FlashLayer:
    manifest, units = found.manifest, layer.units
    kind = kind_of(manifest)
    per_token = found.shapes.experts_per_token
    asked = kind.asked(layer, per_token, _predicted_share(found, layer))
    if asked is None:
        selected, computed, kernel = float(units), float(units), "matmul"
        hits = slots / units
    else:
        selected, computed, kernel = asked, asked, KERNELS[kind.name]
        hits = selection.hit_rate(slots / units)
        if kind is NEURON and (slots == units or 2 * selected > slots):
            # So many neurons are not gathered: all slots are multiplied as they lie.
            computed, kernel = float(slots), "matmul"
    return FlashLayer(
        weights=_unit_matrices(layer, module, kernel, manifest),
        units=units,
        unit_bytes=layer.unit_bytes,
        slots=slots,
        pieces=len(layer.parts) if found.in_place else 1,
        selected=selected,
        hit_rate=hits,
        computed=computed,
        random=asked is not None,
        in_place=found.in_place,
        # A tenth of the reading of neurons was hidden when measured: left out.
        overlap=kind is not NEURON,
    )


def _unit_matrices(
    layer: Layer, module: nn.Module, kernel: str, manifest: Manifest
) -> Matrices:
    """The matrices of all units of a layer together."""
    dtypes = {part.name.rsplit(".", 1)[-1]: part.dtype for part in layer.parts}
    dtype = dtypes.get("scales", manifest.dtype)
    if dtype not in ("float32", "float16", "bfloat16"):
        dtype = manifest.dtype
    packed_bytes = sum(part.bytes for part in layer.parts if part.dtype == "uint32")
    bits = _bits(module) if packed_bytes else 0
    if bits:
        values = packed_bytes * 8 / bits
    else:
        values = sum(part.bytes for part in layer.parts) / value_bytes(manifest)
    return Matrices(kernel, dtype, bits, layer.nbytes, layer.units * values)


def _predicted_share(found: Outline, layer: Layer) -> float | None:
    """The share of a layer's neurons that is predicted for a token."""
    if layer.predictor:
        return layer.predictor.predicted_share
    return PAPER_PREDICTED if found.kind == "checkpoint" else None


def _bits(module: nn.Module) -> int:
    """The width of a module's packed weights."""
    named = (getattr(m, "bits", 0) for _, m in module.named_modules())
    return next((bits for bits in named if bits), 4)
