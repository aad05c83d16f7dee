"""What a model within a budget asks of a machine, put as the cost model wants it."""

from collections import Counter
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..layers.kinds import EXPERT, NEURON, kind_of, value_bytes
from ..memory.budget import Budget
from ..memory.whole import LOCALITY, Ask, asks_of, hit_share
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
        return hit_share(held_share, self.locality)


BY_CHANCE = Selection()
PAPER_PREDICTED = 0.10  # of the neurons of the paper's OPT 6.7B
MEASURED = {
    "neuron": Selection(LOCALITY["neuron"], "the paper's OPT 6.7B"),
    "expert": Selection(LOCALITY["expert"], "published replays of real routing"),
}
# Operations that a layer has more where its units are chosen than where it is held
# whole. Counted in the graphs of small models, views left out.
LAUNCHES = 6


def make_work(
    found: Outline, budget: Budget, selection: Selection, context: int
) -> Work:
    """The work of one token after `context` others."""
    manifest = found.manifest
    on_flash = {entry.module for entry in manifest.layers + manifest.blocks}
    resident = resident_matrices(found.model, on_flash, manifest.dtype)
    if manifest.predictor_bytes:
        resident.append(_predictors(manifest))
    modules = dict(found.model.named_modules())
    pairs = list(zip(manifest.layers, budget.slots, strict=True))
    layers = tuple(
        _flash_layer(found, layer, slots, ask.asked, modules[layer.module], selection)
        for (layer, slots), ask in zip(pairs, asks_of_token(found), strict=True)
    )
    beside = list(zip(manifest.beside, budget.beside_slots, strict=True))
    kept = sum(layer.nbytes for layer, n in pairs + beside if n == layer.units)
    count = len(manifest.blocks)
    shapes = found.shapes
    return Work(
        resident=tuple(resident),
        layers=layers,
        blocks=tuple(
            _flash_layer(found, block, slots, None, modules[block.module], selection)
            for block, slots in beside[:count]
        ),
        rows=tuple(_rows(found, table, slots) for table, slots in beside[count:]),
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
    nbytes: Counter[tuple[str, int]] = Counter()
    values: Counter[tuple[str, int]] = Counter()
    tables, heads = [], False
    for path, module in model.named_modules():
        if any(path == top or path.startswith(f"{top}.") for top in on_flash):
            continue
        arrays = {k: a for k, a in module.items() if isinstance(a, mx.array)}
        if "weight" not in arrays or arrays["weight"].ndim < 2:
            continue
        bits = getattr(module, "bits", 0)
        taken = sum(arrays[k].nbytes for k in arrays if k != "bias")
        weight = arrays["weight"]
        size = weight.nbytes * 8 // bits if bits else weight.size
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            tables.append((len(weight), bits, taken, size))
            continue
        heads |= path.endswith("lm_head")
        nbytes[_name(arrays, dtype), bits] += taken
        values[_name(arrays, dtype), bits] += size
    if tables and not heads:
        _, bits, taken, size = max(tables)  # positions have a smaller table
        nbytes[dtype, bits] += taken
        values[dtype, bits] += size
    return [Matrices("matmul", *kind, nbytes[kind], values[kind]) for kind in nbytes]


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


def asks_of_token(found: Outline) -> list[Ask]:
    """What a token asks of each layer; where nothing is predicted yet, the paper's."""
    predicted = PAPER_PREDICTED if found.kind == "checkpoint" else None
    manifest, experts = found.manifest, found.shapes.experts_per_token
    return asks_of(kind_of(manifest), manifest.layers, experts, predicted)


def _flash_layer(
    found: Outline,
    layer: Layer,
    slots: int,
    asked: float | None,
    module: nn.Module,
    selection: Selection,
) -> FlashLayer:
    manifest, units = found.manifest, layer.units
    kind = kind_of(manifest)
    chosen = asked is not None and slots < units
    selected = float(units) if asked is None else asked
    computed, kernel = selected, "matmul"
    if kind is EXPERT and asked is not None and found.share < 1:
        # Of a token's experts other machines have the rest. Where nobody looks which
        # ones, because all are in memory, another is multiplied in place of each.
        chosen_of_all = float(found.shapes.experts_per_token)
        selected = chosen_of_all * found.share
        computed = selected if chosen else chosen_of_all
    hits = slots / units
    if asked is not None:
        kernel = KERNELS[kind.name]
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
        waits=1 if chosen else 0,
        launches=LAUNCHES if chosen else 0,
    )


def _rows(found: Outline, table: Layer, slots: int) -> FlashLayer:
    """A table of embeddings, of which a token asks for a row; nothing is multiplied."""
    return FlashLayer(
        weights=Matrices("matmul", found.manifest.dtype, 0, 0.0, 0.0),
        units=table.units,
        unit_bytes=table.unit_bytes,
        slots=slots,
        pieces=len(table.parts) if found.in_place else 1,
        selected=1.0,
        hit_rate=0.0,
        computed=0.0,
        in_place=found.in_place,
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
    bits = 0
    values = sum(part.bytes for part in layer.parts) / value_bytes(manifest)
    if packed_bytes:
        widths = (getattr(m, "bits", 0) for _, m in module.named_modules())
        bits = next((width for width in widths if width), 4)
        values = packed_bytes * 8 / bits
    return Matrices(kernel, dtype, bits, layer.nbytes, layer.units * values)
