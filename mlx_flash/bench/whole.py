"""What does the engine cost where everything fits in memory?

The same random checkpoint, as mlx-lm runs it and from flash with memory for all of it.
One model of neurons, one of blocks, one of experts, in float32.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import click
from mlx_lm.utils import load_model as load_resident

from ..converters.convert import convert
from ..layers.kinds import BLOCK, EXPERT, NEURON, UnitKind
from ..loading import load_model
from ..models.registry import get_model_classes
from .families.configs import make_config
from .report import Column, Report, Row
from .synthetic import plain_weights, write_checkpoint
from .turns import Turns

SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "num_experts": 16,
    "moe_intermediate_size": 512,
    "vocab_size": 2048,
}
MODELS: dict[UnitKind, dict] = {
    NEURON: make_config("llama, ReLU") | SIZES,
    BLOCK: make_config("llama") | SIZES,
    EXPERT: make_config("qwen3_moe") | SIZES,
}
WARM = 8  # the first tokens read pages for the first time
COLUMNS = [
    Column("mlx-lm, ms per token", "resident_ms", 1, 1),
    Column("from flash, all in memory", "median_ms", 1, 1),
    Column("ratio (quartiles)", "ratio"),
]


def run(tokens: Annotated[int, click.IntRange(12)] = 120) -> Report:
    """What the engine costs where everything fits in memory, beside mlx-lm."""
    rows = []
    for kind, config in MODELS.items():
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "stock"
            write_checkpoint(folder, config, plain_weights("float32"))
            plain, _ = load_resident(folder, get_model_classes=get_model_classes)
            if kind is not EXPERT:
                folder = convert(folder, Path(work) / "flash", rank=0, progress=False)
            with load_model(folder, "200%", context=tokens + 16) as (model, _):
                slots, layers = model.flash.budget.slots, model.flash.manifest.layers
                assert list(slots) == [layer.units for layer in layers], "not all fits"
                turns = Turns({"resident": plain, "flash": model}, WARM)
                turns.play(range(tokens))
        more = {
            "resident_ms": turns.median_ms("resident"),
            "median_ms": turns.median_ms("flash"),
            "ratio": turns.ratio_text("flash", "resident"),
        }
        rows.append(Row(f"{kind.name}s", tokens=tokens - WARM, more=more))
    note = (
        f"The same weights resident and from flash; medians of {tokens - WARM} tokens, "
        "in turn."
    )
    return Report("unit", rows, COLUMNS, [note], {"config": SIZES})
