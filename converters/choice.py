"""Decide what becomes of a checkpoint's FFNs: neurons, experts or blocks."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoints.stock import Stock, load_stock
from ..errors import FlashError
from ..layers.dense import dense_ffns, gives_zeros
from ..layers.expert import switch_layers
from ..layers.projections import projections, rows_per_neuron
from .source import Source

# Mode → the one group size and the one number of bits that it allows, if it does so
PACKINGS = {
    "affine": (None, None),
    "mxfp4": (32, 4),
    "mxfp8": (32, 8),
    "nvfp4": (16, 4),
}
AFFINE_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Choice:
    """The unit, why it was chosen (a sentence), and what the config calls the zeros."""

    unit: str
    reason: str
    activation: str = "module"


def choose(source: Source, unit: str | None = None) -> Choice:
    """The unit for a checkpoint, found by the types of its modules and by what they do.

    Args:
        unit: "neuron" or "block" if somebody asked for it.

    Raises:
        FlashError: If nothing of the model can be brought from flash, or not as `unit`.
    """
    if unit not in (None, "neuron", "block"):
        raise FlashError(f"No unit {unit!r} can be chosen. Choose neuron or block.")
    model, name = source.make_model(), source.name
    experts = switch_layers(model)
    if experts:
        if unit:
            raise FlashError(
                f"{name} is a mixture of experts: each becomes a bundle. Leave out "
                f"--unit {unit}."
            )
        return Choice("expert", f"{len(experts)} layers of experts.")
    ffns = dense_ffns(model)
    if not ffns:
        raise FlashError(
            f"{name}: a model of type {source.config['model_type']!r} has no FFN that "
            "can be brought from flash: neither mixture-of-experts layers (SwitchGLU "
            "or SwitchMLP of mlx-lm), nor dense FFNs of two or three projections."
        )
    activation = _activation(source.config)
    why_not = _no_neurons(source, model, ffns)
    if unit == "neuron" and why_not:
        raise FlashError(f"{name} {why_not}. It can become blocks: leave out --unit.")
    if unit == "block" or why_not:
        reason = f"{name} {why_not}" if why_not else "Blocks were asked for"
        return Choice("block", f"{reason}: its {len(ffns)} FFNs become blocks.")
    return Choice(
        "neuron",
        f"{len(ffns)} FFNs whose activation ({activation}) gives exact zeros.",
        activation,
    )


def _no_neurons(source: Source, model, ffns: dict) -> str | None:
    """Why a model's FFNs cannot become neurons; None if they can."""
    if not gives_zeros(next(iter(ffns.values()))):
        return (
            f"has the activation {_activation(source.config)!r}, which never gives "
            "exact zeros"
        )
    if "quantization" in source.config or "quantization_config" in source.config:
        return (
            "is quantised already, across neurons (bundles of neurons are made from "
            "float weights)"
        )
    first = next(iter(ffns.values()))
    ins, out = projections(first)
    if rows_per_neuron(first, ins[0], out) > 1:
        return f"has gates and ups in one projection ({ins[0]}), which only blocks keep"
    if len(ffns) != len(model.layers):
        return f"has {len(ffns)} dense FFNs in {len(model.layers)} layers"
    return None


def _activation(config: dict) -> str:
    """The FFN's non-linearity, under whichever name a model type gives it."""
    for key in ("activation_function", "activation", "hidden_act"):
        if isinstance(config.get(key), str):
            return config[key]
    return "its model's own"


def stock_of(source: Source) -> Stock:
    """The checkpoint as mlx-lm loads it."""
    if source.copied_bytes():
        raise FlashError(
            f"{source.name} has .bin files, which mlx-lm does not read. Convert them "
            "to safetensors first."
        )
    return load_stock(source.folder)


def packing(bits: int | None, group_size: int | None, mode: str) -> dict | None:
    """What `mx.quantize` takes, or None for weights as they are.

    Raises:
        FlashError: If MLX has no such quantisation.
    """
    if mode not in PACKINGS:
        raise FlashError(
            f"No quantisation mode {mode!r}. Choose {', '.join(PACKINGS)}."
        )
    if bits is None and mode == "affine":
        return None
    only_size, only_bits = PACKINGS[mode]
    packing = {"group_size": group_size or only_size or 64, "bits": bits or only_bits}
    sound = only_size in (None, packing["group_size"]) and (
        packing["bits"] == only_bits if only_bits else packing["bits"] in AFFINE_BITS
    )
    if not sound or packing["group_size"] not in (16, 32, 64, 128):
        raise FlashError(
            f"MLX has no {mode} quantisation of {packing['bits']} bits in groups of "
            f"{packing['group_size']}. Try --bits 4 --group-size 64."
        )
    return packing | {"mode": mode}
