"""Tiny checkpoints with their experts as families publish them, before mlx-lm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from stock_checkpoints import make_weights, save

from mlx_flash.bench.families.configs import make_config

Arrays = dict[str, mx.array]


def one_by_one(
    switch: str, expert: str, names: dict[str, str] | None = None
) -> Callable[[Arrays], Arrays]:
    """A tensor for each expert: `switch` in a name becomes `expert` with its number.

    Args:
        names: What projections are called, where that is not mlx-lm's name.
    """

    def lay_out(weights: Arrays) -> Arrays:
        published: Arrays = {}
        for name, array in weights.items():
            if switch not in name:
                published[name] = array
                continue
            for old, new in (names or {}).items():
                name = name.replace(f".{old}.", f".{new}.")
            for i, one in enumerate(array):
                published[name.replace(switch, expert.format(i))] = one
        return published

    return lay_out


def gates_and_ups(
    switch: str, fused: str, down: str, merge: Callable[..., mx.array]
) -> Callable[[Arrays], Arrays]:
    """Gates and ups of all experts in one tensor, made by `merge` of both."""

    def lay_out(weights: Arrays) -> Arrays:
        published = {k: v for k, v in weights.items() if switch not in k}
        for name, gate in weights.items():
            if name.endswith(f"{switch}gate_proj.weight"):
                path = name.removesuffix(f"{switch}gate_proj.weight")
                up = weights[f"{path}{switch}up_proj.weight"]
                published[f"{path}{fused}"] = merge(gate, up)
                out = weights[f"{path}{switch}down_proj.weight"]
                published[f"{path}{down}"] = merge(out)
        return published

    return lay_out


def side_by_side(*arrays: mx.array) -> mx.array:
    return mx.concatenate(arrays, axis=1)


def transposed(*arrays: mx.array) -> mx.array:
    return mx.contiguous(mx.swapaxes(mx.concatenate(arrays, axis=1), 1, 2))


def taking_turns(*arrays: mx.array) -> mx.array:
    return mx.flatten(mx.stack(arrays, axis=2), 1, 2)


MLP = one_by_one(".switch_mlp.", ".experts.{}.")
W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
MIXTRAL = one_by_one(".switch_mlp.", ".experts.{}.", W123)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# Those whose experts are runs of bytes, by family
IN_PLACE = {
    "qwen3_moe": MLP,
    "qwen2_moe": MLP,
    "olmoe": MLP,
    "deepseek_v2": MLP,
    "deepseek_v3": MLP,
    "glm4_moe": MLP,
    "ernie4_5_moe": MLP,
    "hunyuan": MLP,
    "qwen3_next": MLP,
    "jamba": MLP,
    "mixtral": MIXTRAL,
    "phimoe": MIXTRAL,
    "minimax": MIXTRAL,
    "lfm2_moe": MIXTRAL,
    "nemotron_h": one_by_one(
        ".switch_mlp.", ".experts.{}.", {"fc1": "up_proj", "fc2": "down_proj"}
    ),
    "phixtral": one_by_one(".switch_mlp.", ".mlp.{}."),
    "gemma4_text": gates_and_ups(
        "switch_glu.", "gate_up_proj", "down_proj", side_by_side
    ),
    "granitemoe": gates_and_ups(
        "switch_mlp.", "input_linear.weight", "output_linear.weight", side_by_side
    ),
    "qwen3_5_moe": gates_and_ups("switch_mlp.", *EXPERTS, side_by_side),
}
# Those whose experts are none, and why
ELSEWHERE = {
    "llama4": (gates_and_ups("experts.", *EXPERTS, transposed), "transposed"),
    "qwen3_vl_moe": (gates_and_ups("switch_mlp.", *EXPERTS, transposed), "transposed"),
}


def published_weights(family: str, quantize: dict | None = None) -> tuple[dict, Arrays]:
    """(config, tensors) as `family` has them in mlx-lm."""
    config = make_config(family)
    model = make_weights(config)
    if quantize:
        nn.quantize(model, **quantize)
        config = config | {"quantization": quantize}
    return config, dict(tree_flatten(model.parameters()))


def write_published(
    folder: Path,
    family: str,
    lay_out: Callable[[Arrays], Arrays],
    quantize: dict | None = None,
    shards: int = 1,
) -> Path:
    """Write the checkpoint; with several shards, an expert's tensors lie in all."""
    config, weights = published_weights(family, quantize)
    names = sorted(lay_out(weights).items())
    return save(folder, config, *(dict(names[i::shards]) for i in range(shards)))
