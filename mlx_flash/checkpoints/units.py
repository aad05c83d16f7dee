"""Which units a model's FFNs can be cut into, found by what its modules do."""

import mlx.nn as nn

from ..errors import FlashError
from ..layers.dense import gives_zeros
from ..layers.kinds import BLOCK, EXPERT, NEURON, UnitKind


def find_units(
    model: nn.Module, config: dict, name: str
) -> tuple[UnitKind, dict[str, nn.Module], str]:
    """The finest kind of unit, the modules to cut, and why no neurons ("" if they are).

    Args:
        model: Without weights, as `config` describes it.
        name: The checkpoint's, for the error.

    Raises:
        FlashError: If nothing of the model can be brought from flash.
    """
    if experts := EXPERT.find(model):
        return EXPERT, experts, "is a mixture of experts"
    ffns = BLOCK.find(model)
    if not ffns:
        raise FlashError(
            f"{name}: a model of type {config['model_type']!r} has no FFN that can be "
            "brought from flash: neither mixture-of-experts layers (SwitchGLU or "
            "SwitchMLP of mlx-lm), nor dense FFNs of two or three projections."
        )
    why_not = _no_neurons(model, list(ffns.values()), config)
    return BLOCK if why_not else NEURON, ffns, why_not


def _no_neurons(model: nn.Module, ffns: list[nn.Module], config: dict) -> str:
    if not gives_zeros(ffns[0]):
        return (
            f"has the activation {activation(config)!r}, which never gives exact zeros"
        )
    both = config | (config.get("text_config") or {})
    if not config.get("quantization") and (found := both.get("quantization_config")):
        return (
            f"is quantised in a way ({found.get('quant_method', 'unknown')}) that is "
            "not mlx-lm's own, and is not unpacked for bundles of neurons"
        )
    if len(ffns) != len(model.layers):
        return f"has {len(ffns)} dense FFNs in {len(model.layers)} layers"
    return ""


def activation(config: dict) -> str:
    """The FFN's non-linearity, under whichever name a model type gives it."""
    for key in ("activation_function", "activation", "hidden_act"):
        if isinstance(config.get(key), str):
            return config[key]
    return "its model's own"
