"""Decide what becomes of a checkpoint's FFNs: neurons, experts or blocks."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn

from ..errors import FlashError
from ..layers.dense import gives_zeros
from ..layers.kinds import BLOCK, EXPERT, NEURON, UnitKind
from ..layers.projections import count_neurons, neuron_rows
from .source import Source


@dataclass(frozen=True)
class Choice:
    """The kind of unit, why it was chosen (a sentence), and what causes its zeros."""

    kind: UnitKind
    reason: str
    activation: str


def choose(source: Source, unit: str | None = None) -> Choice:
    """The kind for a checkpoint, found by the types of its modules and what they do.

    Args:
        unit: "neuron" or "block" if somebody asked for it.

    Raises:
        FlashError: If nothing of the model can be brought from flash, or not as `unit`.
    """
    model, name = source.make_model(), source.name
    experts = EXPERT.find(model)
    if experts:
        if unit:
            raise FlashError(
                f"{name} is a mixture of experts: each becomes a bundle. Leave out "
                f"--unit {unit}."
            )
        reason = f"{len(experts)} layers of experts."
        return Choice(EXPERT, reason, EXPERT.activation)
    ffns = BLOCK.find(model)
    if not ffns:
        raise FlashError(
            f"{name}: a model of type {source.config['model_type']!r} has no FFN that "
            "can be brought from flash: neither mixture-of-experts layers (SwitchGLU "
            "or SwitchMLP of mlx-lm), nor dense FFNs of two or three projections."
        )
    activation = _activation(source.config)
    why_not = _no_neurons(source, model, ffns)
    if unit == NEURON.name and why_not:
        raise FlashError(f"{name} {why_not}. It can become blocks: leave out --unit.")
    if unit == BLOCK.name or why_not:
        reason = f"{name} {why_not}" if why_not else "Blocks were asked for"
        reason += f": its {len(ffns)} FFNs become blocks."
        return Choice(BLOCK, reason, BLOCK.activation)
    reason = f"{len(ffns)} FFNs whose activation ({activation}) gives exact zeros."
    return Choice(NEURON, reason, activation)


def _no_neurons(
    source: Source, model: nn.Module, ffns: dict[str, nn.Module]
) -> str | None:
    """Why a model's FFNs cannot become neurons; None if they can."""
    first = next(iter(ffns.values()))
    if not gives_zeros(first):
        return (
            f"has the activation {_activation(source.config)!r}, which never gives "
            "exact zeros"
        )
    if "quantization" in source.config or "quantization_config" in source.config:
        return (
            "is quantised already, across neurons (bundles of neurons are made from "
            "float weights)"
        )
    way_in, *_, out = neuron_rows(first)
    if len(first[way_in].weight) > count_neurons(first[out]):
        return f"has gates and ups in one projection ({way_in}), which only blocks keep"
    if len(ffns) != len(model.layers):
        return f"has {len(ffns)} dense FFNs in {len(model.layers)} layers"
    return None


def _activation(config: dict) -> str:
    """The FFN's non-linearity, under whichever name a model type gives it."""
    for key in ("activation_function", "activation", "hidden_act"):
        if isinstance(config.get(key), str):
            return config[key]
    return "its model's own"
