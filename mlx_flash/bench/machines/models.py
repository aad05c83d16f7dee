"""The small models of the comparison, of random weights; one of each kind."""

from collections.abc import Callable
from pathlib import Path

from ...converters.convert import convert
from .. import moe, opt
from ..families.configs import make_config
from ..synthetic import plain_weights, write_checkpoint

WIDTH = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
}
EXPERTS = moe.CONFIG | WIDTH | {"num_experts": 64, "num_experts_per_tok": 4}
BLOCKS = make_config("llama") | WIDTH | {"intermediate_size": 4096, "dtype": "float32"}
NEURONS = opt.Shape(4, 1024, 8192, heads=8, vocab=2048, dtype="float32")


def experts(place: Path, memory: str) -> Path:
    """A mixture of experts at 4 bits, streamed as it lies."""
    folder = place / "experts"
    if not folder.exists():
        write_checkpoint(folder, EXPERTS, moe.packed_weights)
    return folder


def blocks(place: Path, memory: str) -> Path:
    """A dense Llama in float32, converted."""
    folder, source = place / "blocks", place / "llama"
    if not folder.exists():
        if not source.exists():
            write_checkpoint(source, BLOCKS, plain_weights("float32"))
        convert(source, folder, progress=False)
    return folder


def neurons(place: Path, memory: str) -> Path:
    """An OPT in float32, with predictors for `memory`."""
    return opt.flash_folder(place, NEURONS, memory)


MODELS: dict[str, Callable[[Path, str], Path]] = {
    "experts": experts,
    "blocks": blocks,
    "neurons": neurons,
}
