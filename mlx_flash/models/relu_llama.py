"""Llama-like models whose gate is a ReLU, which mlx-lm would run as SiLU.

mlx-lm's Llama never reads `hidden_act`. Here all of it but the activation is used:

    relu     relu(gate) * up              ReluLLaMA
    relu2    relu(gate)² * up
    fatrelu  (gate if gate > t) * up      ProSparse; t is hidden_act_param
    drelu    relu(gate) * relu(up)        Bamboo, TurboSparse-Mistral

Sources: the config.json files on the hub; transformers' Llama for relu and relu2;
Bamboo's published MLP for drelu; for fatrelu ProSparse's paper and vLLM's kernel, which
are one but at gate == t. No released checkpoint was run.

Two things are not as in the models' own code. TurboSparse-Mistral brings predictors,
and its code zeroes neurons that they do not choose; they are left out, and every
neuron counts. Bamboo's attention window of 4096 tokens is left out as mlx-lm leaves out
Mistral's, which longer contexts would notice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

GATED = ("relu", "relu2", "fatrelu", "drelu")
# model_type → what its config.json may say as hidden_act
FAMILIES = {
    "llama": GATED,
    "mistral": GATED,
    "sparsellama": GATED,
    # config.json says relu, and the remote code applies it to both projections
    "bamboo": ("relu", "drelu"),
}
# mlx-lm runs these with SiLU; the other families it does not know at all
STOCK = ("llama", "mistral")


def is_relu_llama(config: dict) -> bool:
    """Whether a config belongs to this module rather than to mlx-lm."""
    model_type = config.get("model_type")
    if model_type in STOCK:
        return config.get("hidden_act") in FAMILIES[model_type]
    return model_type in FAMILIES


@dataclass
class ModelArgs(llama.ModelArgs):
    hidden_act: str = "silu"
    hidden_act_param: float | None = None
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = False  # transformers' default, mlx-lm's is True

    def __post_init__(self):
        super().__post_init__()
        known = FAMILIES.get(self.model_type, ())
        if self.hidden_act not in known:
            raise ValueError(
                f"{self.model_type} with hidden_act {self.hidden_act!r} is not "
                f"supported; known: {', '.join(known) or 'none'}."
            )
        if self.activation == "fatrelu" and not _is_threshold(self.hidden_act_param):
            raise ValueError(
                "hidden_act 'fatrelu' needs its threshold as hidden_act_param, a "
                f"number from 0 on; found {self.hidden_act_param!r}."
            )
        if self.rope_parameters:  # how transformers 5 writes theta and scaling
            self.rope_theta = self.rope_parameters.get("rope_theta", self.rope_theta)
            self.rope_scaling = self.rope_parameters

    @property
    def activation(self) -> str:
        """What is computed: one of GATED."""
        return "drelu" if self.model_type == "bamboo" else self.hidden_act


def _is_threshold(value) -> bool:
    """Below 0 the activation would not be zero where ReLU is."""
    return type(value) in (int, float) and 0 <= value < float("inf")


def make_activation(name: str, threshold: float = 0.0) -> Callable:
    """The function (gate, up) → hidden of one of the activations."""

    def fatrelu(gate: mx.array, up: mx.array) -> mx.array:
        return mx.where(gate > threshold, gate, 0) * up

    return {
        "relu": lambda gate, up: nn.relu(gate) * up,
        "relu2": lambda gate, up: nn.relu2(gate) * up,
        "drelu": lambda gate, up: nn.relu(gate) * nn.relu(up),
        "fatrelu": fatrelu,
    }[name]


class MLP(llama.MLP):
    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.activation = make_activation(args.activation, args.hidden_act_param or 0.0)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x)))


class Model(llama.Model):
    def __init__(self, args: ModelArgs):
        super().__init__(args)
        for layer in self.layers:
            layer.mlp = MLP(args)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """As mlx-lm, and without the predictors of TurboSparse."""
        kept = {k: v for k, v in weights.items() if ".mlp.predictor." not in k}
        return super().sanitize(kept)
