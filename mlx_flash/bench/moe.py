"""A mixture of experts larger than its memory, in place and converted.

The checkpoint has the shape of Qwen3-30B-A3B (48 layers, 128 experts of which a token
takes 8, 4 bits; a vocabulary of 2,048) and random weights. Every layer adds little to
what the embedding says, so that different tokens choose different experts: routing is
uniform, the worst case for any cache, and hit rate and bytes are not those of a trained
model. Scales are float32, because half-precision quantised products are many times
slower on MLX's CPU backend.
"""

import math
from pathlib import Path
from typing import Annotated

import mlx.core as mx

from . import alone
from .families.configs import make_config
from .options import Count, Folder, Memory, scratch
from .published import checkpoints
from .report import Column, Report, cache_state
from .synthetic import key_of, write_checkpoint

CONFIG = make_config("qwen3_moe") | {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "max_position_embeddings": 4096,
    "vocab_size": 2048,
    "quantization": {"group_size": 64, "bits": 4},
}
# The embedding large and what layers add small, for uniform routing (see above)
SPREAD = {"embed_tokens": 50.0, "o_proj": 0.02, "down_proj": 0.02}
COLUMNS = [
    Column("on disk, GB", "model_bytes", 1e9, 1),
    Column("budget GB", "budget_bytes", 1e9, 2),
    Column("growth of the process, GB", "growth_bytes", 1e9, 2),
    Column("slots %", "slot_share", 0.01),
    Column("prompt s", "prompt_s", 1, 1),
    Column("ms per token", "total_ms"),
    Column("I/O ms", "io_ms"),
    Column("cache ms", "cache_ms", 1, 1),
    Column("compute ms", "compute_ms"),
    Column("MB per token", "bytes_per_token", 1e6),
    Column("reads per token", "reads_per_token"),
    Column("hit rate %", "hit_rate", 0.01, 1),
]


def checkpoint(folder: Path, layers: int) -> Path:
    """The checkpoint in mlx-lm's layout, written if it is not there."""
    if not folder.exists():
        config = CONFIG | {"num_hidden_layers": layers}
        write_checkpoint(folder, config, packed_weights)
    return folder


def packed_weights(
    name: str, shape: tuple[int, ...], bits: int = 4
) -> dict[str, mx.array]:
    """A weight's arrays, packed in so many bits where mlx-lm would quantise it."""
    path = name.removesuffix(".weight")
    if len(shape) == 1:
        return {name: mx.ones(shape)}
    groups = (*shape[:-1], shape[-1] // 64)
    packed = (*shape[:-1], shape[-1] * bits // 32)
    # Values around the middle (7.5 of 4 bits), with a spread like 1/sqrt(inputs)
    scale = 3.2 * 2**-bits * shape[-1] ** -0.5
    middle = (2**bits - 1) / 2
    scale *= spread(name)
    return {
        # Keys are random words, too.
        name: mx.random.split(key_of(name), math.prod(packed) // 2).reshape(packed),
        f"{path}.scales": mx.full(groups, scale),
        f"{path}.biases": mx.full(groups, -middle * scale),
    }


def spread(name: str) -> float:
    """How much wider than others the values of a weight are spread."""
    path = name.removesuffix(".weight")
    return next((f for end, f in SPREAD.items() if path.endswith(end)), 1.0)


def run(
    folder: Folder = None,
    layers: Count = 48,
    memory: Memory = "6GB",
    prompt_tokens: Count = 16,
    tokens: Count = 8,
    convert: Annotated[bool, "Converted, too."] = False,
    published: Annotated[
        bool, "In float32, also with a tensor for each expert, as it is published."
    ] = False,
) -> Report:
    """A mixture of experts larger than its memory, of Qwen3-30B-A3B's shape.

    \b
    Examples:
      mlx-flash bench moe --convert
      mlx-flash bench moe --layers 4 --memory 600MB
      mlx-flash bench moe --layers 2 --memory 1.2GB --published --convert
    """
    notes = ["Random weights; routing is uniform, the worst case for a cache."]
    with scratch(folder) as place:
        if published:
            config = CONFIG | {"num_hidden_layers": layers}
            folders = checkpoints(place, config, spread)
        else:
            folders = {"in place": checkpoint(place / "moe", layers)}
        flash = place / f"{folders['in place'].name}-flash"
        if convert:
            if not flash.exists():
                found = alone.convert(folders["in place"], flash, progress=False)
                notes.append(
                    f"Converting took {found['seconds']:.0f} s and at most "
                    f"{found['peak_bytes'] / 1e9:.2f} GB; a layer's experts are "
                    f"{found['layer_bytes'] / 1e9:.2f} GB."
                )
            folders["converted"] = flash
        rows = [
            alone.generate(
                name, source, memory, prompt_tokens=prompt_tokens, tokens=tokens
            )
            for name, source in folders.items()
        ]
    notes[0] += f" Reads: {cache_state(all(r.more['direct_io'] for r in rows))}."
    return Report("experts", rows, COLUMNS, notes, {"routing": "uniform"})
