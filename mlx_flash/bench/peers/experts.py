"""A mixture of experts that does not fit: other engines on the same checkpoint."""

from functools import partial
from pathlib import Path
from typing import Annotated

from ...checkpoints.config import read_config
from .. import moe
from ..options import FOLDER, TEXT, Count, Folder, Memory, scratch
from ..report import Report
from ..synthetic import write_checkpoint
from . import engines
from .side_by_side import Only, Pythons, Rounds, make_job, report, text_ids

# A token takes a sixteenth of the experts, as in Qwen3-30B-A3B. In 8 bits, a prompt
# takes half the time of 4 bits for the same bytes on MLX's CPU backend.
BITS = 8
CONFIG = moe.CONFIG | {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 384,
    "quantization": {"group_size": 64, "bits": BITS},
}


def run(
    folder: Folder = None,
    layers: Count = 8,
    memory: Memory = "102MB",
    prompt_tokens: Count = 600,
    tokens: Count = 32,
    rounds: Rounds = 3,
    only: Only = (),
    python: Pythons = (),
    checkpoint: Annotated[
        Path | None,
        FOLDER,
        "Of a mixture of experts in mlx-lm's layout.  [default: random weights]",
    ] = None,
    text: Annotated[
        Path | None, TEXT, "That is read.  [default: random tokens]"
    ] = None,
) -> Report:
    """mlx-flash beside mlx-lm, mlx-vlm, boyle and BigRig: a mixture of experts.

    A random Qwen3-MoE in 8 bits reads a long prompt and decodes, in all engines at the
    same peak of MLX's memory. Engines that no Python here has are left out, and the
    report says how to install them.

    \b
    Examples:
      mlx-flash bench peers-moe --python peers/bin/python
      mlx-flash bench peers-moe --only mlx_flash --only mlx_lm --rounds 1
      mlx-flash bench peers-moe --checkpoint moe-4bit --text story.txt --memory 50%
    """
    with scratch(folder) as place:
        copies = place / "copies"
        copies.mkdir(exist_ok=True)
        if checkpoint is None:
            config = CONFIG | {"num_hidden_layers": layers}
            model = place / "moe"
            if not model.exists():
                write_checkpoint(model, config, partial(moe.packed_weights, bits=BITS))
            what = f"Random Qwen3-MoE, {layers} layers, 2 of 32 experts, {BITS} bits"
        else:
            model, config, what = checkpoint, read_config(checkpoint), checkpoint.name
        job = make_job(model, copies, prompt_tokens, tokens, config["vocab_size"])
        if text is not None:
            job["ids"] = text_ids(model, text, job)
            what += f", tokens of {text.name}"
        return report(
            "experts", what, engines.MOE, model, job, memory, rounds, only, python
        )
