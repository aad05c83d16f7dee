"""What OPT, Falcon and Persimmon have in common: attention, the layers, the head.

Shapes: B batch, H heads, L tokens, D model width, N neurons.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.rope_utils import initialize_rope

from ..layers import attention

ACTIVATIONS = {"gelu": nn.gelu, "relu": nn.relu, "relu2": nn.relu2}
# Scalings that do not depend on the length: each row of a batch can have its own.
ROPE_TYPES = ("default", "linear")


def check_sizes(name: str, args: Any, field: str, known: tuple[str, ...]) -> None:
    """Refuse an activation (in `field`) or a number of heads that cannot be run."""
    if getattr(args, field) not in known:
        raise ValueError(
            f"{name} with {field} {getattr(args, field)!r} is not supported; "
            f"known: {', '.join(known)}."
        )
    if args.hidden_size % args.num_attention_heads:
        raise ValueError(
            f"hidden_size {args.hidden_size} cannot be divided among "
            f"num_attention_heads {args.num_attention_heads}."
        )


def read_rope(name: str, args: Any) -> None:
    """Take the rotary parameters as transformers 5 writes them; refuse unknown ones.

    Those are refused that were not compared with transformers.
    """
    if given := args.rope_parameters:
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in given:
                setattr(args, key, given[key])
        args.rope_scaling = given
    scaling = args.rope_scaling or {}
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    if kind == "linear" and not scaling.get("factor"):
        raise ValueError(f"{name}'s linear rotary scaling needs a factor: {scaling}.")
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{name} with rotary scaling {kind!r} is not supported; "
            f"known: {', '.join(ROPE_TYPES)}."
        )


def make_rope(dims: int, args: Any) -> nn.Module:
    """Rotary positions for the first `dims` values of each head."""
    positions = args.max_position_embeddings
    return initialize_rope(dims, args.rope_theta, False, args.rope_scaling, positions)


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: Any,
    cache: Any,
    rope: nn.Module | None = None,
) -> mx.array:
    """Queries, keys and values [B, H, L, D/H] of a layer to its attention [B, L, D]."""
    if rope is not None:
        offset = 0 if cache is None else cache.offset
        queries, keys = rope(queries, offset), rope(keys, offset)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    B, _, L, head_dim = queries.shape
    out = attention.attend(
        queries, keys, values, cache=cache, scale=head_dim**-0.5, mask=mask
    )
    return out.transpose(0, 2, 1, 3).reshape(B, L, -1)


class MLP(nn.Module):
    """The FFN of Falcon and Persimmon, under the names of their checkpoints."""

    def __init__(self, D: int, N: int, activation: str, bias: bool = True):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(D, N, bias=bias)
        self.dense_4h_to_h = nn.Linear(N, D, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))


class Decoder(nn.Module):
    """Everything below the head; `names` are the checkpoint's for its three parts."""

    names = ("embed_tokens", "layers", "final_layernorm")

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        embedding, layers, norm = (self[name] for name in self.names)
        h = embedding(inputs) if input_embeddings is None else input_embeddings
        return norm(run_layers(layers, h, cache))


def run_layers(layers: list, h: mx.array, cache: list[Any] | None) -> mx.array:
    """Take hidden states [B, L, D] through all layers."""
    cache = cache or [None] * len(layers)
    mask = create_attention_mask(h, cache[0])
    for layer, own in zip(layers, cache, strict=True):
        h = layer(h, mask, cache=own)
    return h


class CausalModel(nn.Module):
    """A decoder and its head, which is the embedding itself where they are tied.

    Args:
        width: Of what the head is given.
        body: The module that holds the decoder, by the checkpoint's name for it.
    """

    def __init__(self, args: Any, width: int, **body: nn.Module):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        for name, module in body.items():
            self.body = name
            self[name] = module
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(width, args.vocab_size, bias=False)

    @property
    def decoder(self) -> Decoder:
        """The module that maps tokens to hidden states."""
        return self[self.body]

    @property
    def embedding(self) -> nn.Module:
        return self.decoder[self.decoder.names[0]]

    @property
    def layers(self) -> list[nn.Module]:
        return self.decoder[self.decoder.names[1]]

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        out = self.decoder(inputs, cache, input_embeddings)
        if self.args.tie_word_embeddings:
            return self.embedding.as_linear(out)
        return self.lm_head(out)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Leave out the copy of a tied head, and rotary tables of old checkpoints."""
        tied = self.args.tie_word_embeddings
        return {
            name: weight
            for name, weight in weights.items()
            if not name.endswith(".inv_freq")
            and not (tied and name.startswith("lm_head."))
        }
