"""A dense model that does not fit: other engines on the same weights."""

from ...converters.convert import convert
from ..families.configs import make_config
from ..options import Count, Folder, Memory, scratch
from ..report import Report
from ..synthetic import plain_weights, write_checkpoint
from . import engines
from .side_by_side import Only, Pythons, Rounds, make_job, report

CONFIG = make_config("qwen3") | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "vocab_size": 2048,
}


def run(
    folder: Folder = None,
    layers: Count = 6,
    memory: Memory = "50%",
    prompt_tokens: Count = 600,
    tokens: Count = 16,
    rounds: Rounds = 3,
    only: Only = (),
    python: Pythons = (),
) -> Report:
    """mlx-flash beside mlx-lm and neurostream: a dense model.

    A random Qwen3 in float32 reads a long prompt and decodes, in all engines with the
    same memory. Engines that no Python here has are left out, and the report says how
    to install them.

    \b
    Examples:
      mlx-flash bench peers-dense --python peers/bin/python
    """
    config = CONFIG | {"num_hidden_layers": layers}
    with scratch(folder) as place:
        model, flash, copies = place / "dense", place / "blocks", place / "copies"
        copies.mkdir(exist_ok=True)
        if not model.exists():
            write_checkpoint(model, config, plain_weights("float32"))
        if not flash.exists():
            convert(model, flash, rank=0, progress=False)
        job = make_job(model, copies, prompt_tokens, tokens, config["vocab_size"])
        job["flash"] = str(flash)
        what = (
            f"Random Qwen3, {layers} layers, float32; ours in blocks, neurostream's as "
            "GGUF"
        )
        return report(
            "dense", what, engines.DENSE, model, job, memory, rounds, only, python
        )
