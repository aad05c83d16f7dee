"""Which models have neurons with gates that can stay in memory."""

import mlx.nn as nn

from ..errors import FlashError
from ..layers.dense import is_gated
from ..layers.kinds import EXPERT, GATED


def find_gated(model: nn.Module, config: dict, name: str) -> dict[str, nn.Module]:
    """The FFNs of a model whose neurons can be skipped, by path.

    Args:
        model: Without weights, as `config` describes it.
        name: The checkpoint's, for the error.

    Raises:
        FlashError: If it has none, or others beside them.
    """
    ffns = GATED.find(model)
    both = config | (config.get("text_config") or {})
    problem = ""
    if EXPERT.find(model):
        problem = "is a mixture of experts, which reads only some of them anyway"
    elif not ffns or not all(is_gated(ffn) for ffn in ffns.values()):
        problem = "has no gate projection whose activation decides about a neuron"
    elif both.get("quantization") or both.get("quantization_config"):
        problem = (
            "is quantised already, across neurons (bundles of neurons are made from "
            "float weights: quantise them with --bits)"
        )
    elif len(ffns) != len(model.layers):
        problem = f"has {len(ffns)} dense FFNs in {len(model.layers)} layers"
    if problem:
        raise FlashError(f"{name} {problem}. Leave out --skippable.")
    return ffns
