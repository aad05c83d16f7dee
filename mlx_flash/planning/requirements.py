"""What a model within a budget asks of a machine, put as the cost model wants it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..memory.budget import Budget
from ..storage.manifest import Layer, Manifest
from ..storage.safetensors import DTYPES
from .cost import FlashLayer, Weights, Work
from .outline import Outline

# The paper's OPT 6.7B: a tenth of the neurons predicted; with 24 % of them in memory a
# token loads 2.4 %, so that 76 % of what it needs is there.
PAPER_PREDICTED = 0.10
# If a cache holds the share s, hits of 1 - (1 - s)^k: k is 1 where units are chosen by
# chance. Neurons: the paper's point above. Experts: replays of real routing against an
# LRU (512 experts a layer, kekzl/imp pull request 2061) hit 43.5 % at 93 of them.
LOCALITY = {"neuron": 5.2, "expert": 2.86}


@dataclass(frozen=True)
class Trace:
    """What tokens ask for: shares of a layer's units, and of these in memory.

    None means: as the manifest's predictors and the locality given say.
    """

    predicted_share: float | None = None
    hit_rate: float | None = None
    locality: float = 1.0


def make_work(found: Outline, budget: Budget, trace: Trace, context: int) -> Work:
    """The work of one token after `context` others."""
    manifest = found.manifest
    on_flash = {layer.module for layer in manifest.layers}
    resident = resident_weights(found.model, on_flash, manifest.dtype)
    if manifest.predictor_bytes:
        resident.append(_predictors(manifest))
    modules = dict(found.model.named_modules())
    layers = tuple(
        _flash_layer(found, layer, slots, modules[layer.module], trace)
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


def resident_weights(model: nn.Module, on_flash: set[str], dtype: str) -> list[Weights]:
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
        values = arrays["weight"].size * (32 // bits if bits else 1)
        if bits and 32 % bits:
            values = arrays["weight"].nbytes * 8 / bits
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            tables.append((len(arrays["weight"]), bits, nbytes, values))
            continue
        heads |= path.endswith("lm_head")
        _add(found, _name(arrays, dtype), bits, nbytes, values)
    if tables and not heads:
        _, bits, nbytes, values = max(tables)  # positions have a smaller table
        _add(found, dtype, bits, nbytes, values)
    return [
        Weights("matmul", kind, bits, nbytes, values)
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
    return str(scales.dtype).removeprefix("mlx.core.")


def _predictors(manifest: Manifest) -> Weights:
    """All predictors together, which compute in float32 on the CPU."""
    facts = [layer.predictor for layer in manifest.layers if layer.predictor]
    bits = facts[0].bits if facts else 4
    dtype = "float32" if mx.default_device() == mx.cpu else manifest.dtype
    nbytes = manifest.predictor_bytes
    size = bits / 8 if bits else DTYPES[manifest.dtype][1]
    return Weights("matmul", dtype, bits, nbytes, nbytes / size)


def _flash_layer(
    found: Outline, layer: Layer, slots: int, module: nn.Module, trace: Trace
) -> FlashLayer:
    manifest, units = found.manifest, layer.units
    bits = _bits(layer, module)
    part = {p.name.rsplit(".", 1)[-1]: p.dtype for p in layer.parts}
    dtype = part.get("scales", manifest.dtype)
    if dtype not in ("float32", "float16", "bfloat16"):
        dtype = manifest.dtype
    packed = sum(p.bytes for p in layer.parts if p.dtype == "uint32")
    plain = sum(p.bytes for p in layer.parts) / DTYPES[manifest.dtype][1]
    values = units * (packed * 8 / bits if bits else plain)

    selected, random = float(units), False
    if manifest.unit == "expert":
        selected, random = float(min(found.shapes.experts_per_token, units)), True
    elif manifest.unit == "neuron" and (share := _predicted(found, layer, trace)):
        selected, random = share * units, True
    kernel = {"expert": "experts", "neuron": "gathered"}.get(manifest.unit, "matmul")
    computed = selected
    if manifest.unit == "neuron" and (slots == units or 2 * selected > slots):
        kernel, computed = "matmul", float(slots)  # all slots, where they lie
    if not random:
        kernel, computed = "matmul", float(units)
    share = slots / units
    hits = 1 - (1 - share) ** trace.locality if random else share
    if random and trace.hit_rate is not None:
        hits = trace.hit_rate
    return FlashLayer(
        weights=Weights(kernel, dtype, bits, layer.nbytes, values),
        units=units,
        unit_bytes=layer.unit_bytes,
        slots=slots,
        pieces=len(layer.parts) if found.in_place else 1,
        selected=selected,
        hit_rate=hits,
        computed=computed,
        random=random,
        in_place=found.in_place,
        # Of neurons' reading a tenth was hidden when measured: left out.
        overlap=manifest.unit != "neuron",
    )


def _predicted(found: Outline, layer: Layer, trace: Trace) -> float | None:
    """The share of a layer's neurons that is predicted for a token."""
    if trace.predicted_share is not None:
        return trace.predicted_share
    if layer.predictor:
        return layer.predictor.predicted_share
    return PAPER_PREDICTED if found.kind == "checkpoint" else None


def _bits(layer: Layer, module: nn.Module) -> int:
    """The width of packed units, 0 for others."""
    if not any(part.dtype == "uint32" for part in layer.parts):
        return 0
    named = (getattr(m, "bits", 0) for _, m in module.named_modules())
    return next((bits for bits in named if bits), 4)
