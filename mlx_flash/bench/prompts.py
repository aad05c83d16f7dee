"""What a prompt reads and holds, through each of mlx-lm's entry points.

Small models with random weights, one of each unit kind. Every call of the model is
watched: what was read for it, and what memory did not hold meanwhile. A prompt of many
tokens is read in chunks of 2,048 at best, and each has to bring what is missing.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import click
import mlx.core as mx
import mlx_lm

from ..converters.convert import convert
from ..generation import stream_generate
from ..layers.kinds import BLOCK, EXPERT, NEURON
from ..loading import load
from ..memory.footprint import MAX_PREFILL
from .families.configs import make_config
from .options import Count, Memory
from .report import Column, Report, Row, progress
from .synthetic import plain_weights, write_checkpoint

ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
COMMON = ATTENTION | {"max_position_embeddings": 1 << 15, "vocab_size": 128}
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4}
FIT = {"rank": 16, "calibration_tokens": 128, "fit_steps": 3}
# How each model is converted; experts are read in place.
CONVERTED: dict[str, dict[str, Any]] = {
    "experts": {},
    "blocks": {"unit": BLOCK.name, "rank": 0},
    "neurons": {"unit": NEURON.name, **FIT},
}
ANSWER = 3  # tokens
COLUMNS = [
    Column("budget MB", "memory_bytes", 1e6),
    Column("tokens of a chunk", "chunk_tokens"),
    Column("MB without slots", "missing_bytes", 1e6),
    Column("MB read", "read_bytes", 1e6),
    Column("times what had no slot, per 2,048 tokens", "times_missing", 1, 2),
    Column("times the units asked for", "times_asked", 1, 2),
    Column("peak, % of the budget", "peak_share", 0.01),
    Column("with kept buffers, %", "held_share", 0.01),
    Column("CPU s", "cpu_s", 1, 1),
]


def lm_generate(model, tokenizer, prompt: list[int]) -> None:
    mlx_lm.generate(model, tokenizer, prompt, max_tokens=ANSWER)


def lm_stream(model, tokenizer, prompt: list[int]) -> None:
    for _ in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=ANSWER):
        pass


def lm_batch(model, tokenizer, prompt: list[int]) -> None:
    """Two prompts, of half the tokens each."""
    middle = len(prompt) // 2
    halves = [prompt[:middle], prompt[middle:]]
    mlx_lm.batch_generate(model, tokenizer, halves, max_tokens=ANSWER)


def drafted(model, tokenizer, prompt: list[int]) -> None:
    """With the draft model that the model was loaded with."""
    for _ in stream_generate(model, tokenizer, prompt, max_tokens=ANSWER):
        pass


THROUGH: dict[str, Callable] = {
    "generate": lm_generate,
    "stream_generate": lm_stream,
    "batch_generate": lm_batch,
    "draft model": drafted,
}


def run(
    kind: Annotated[
        tuple[str, ...],
        click.Choice(list(CONVERTED)),
        "Only this one; repeat it for more.",
    ] = (),
    through: Annotated[
        tuple[str, ...],
        click.Choice(list(THROUGH)),
        "Only this entry point; repeat it for more.",
    ] = (),
    tokens: Annotated[tuple[int, ...], click.IntRange(8), "Of the prompt."] = (
        600,
        5000,
    ),
    memory: Memory = "60%",
    layers: Count = 24,
    width: Annotated[int, click.IntRange(64)] = 256,
) -> Report:
    """What a prompt reads and holds, through each of mlx-lm's entry points."""
    rows = []
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        small = make_config("llama") | COMMON | {"num_hidden_layers": 2}
        draft = write_checkpoint(place / "draft", small, plain_weights("float32"))
        for name in kind or CONVERTED:
            folder = make_model(place / name, name, layers, width)
            runs = [(n, way) for n in tokens for way in through or THROUGH]
            for count, way in progress(runs, name, "run"):
                beside = draft if THROUGH[way] is drafted else None
                title = f"{name}, {count:,} tokens, {way}"
                rows.append(measure(title, folder, memory, count, way, beside))
    note = (
        f"Random weights in float32, {layers} layers of width {width}, {memory} "
        "memory, after a prompt of 4 tokens. What had no slot: while the prompt was "
        "read, when slots have given way to its chunks. The units that were asked for "
        "are read in pages, with small gaps between them."
    )
    return Report("prompt", rows, COLUMNS, [note])


def make_model(place: Path, name: str, layers: int, width: int) -> Path:
    """A model whose FFNs are most of it, as it can be streamed."""
    family = {"experts": "qwen3_moe", "neurons": "llama, ReLU"}.get(name, "llama")
    config = make_config(family) | COMMON | {"num_hidden_layers": layers}
    config |= EXPERTS | {"hidden_size": width, "moe_intermediate_size": width // 2}
    config["intermediate_size"] = 12 * width
    source = write_checkpoint(place / "stock", config, plain_weights("float32"))
    if name == EXPERT.name + "s":
        return source
    return convert(source, place / "flash", progress=False, **CONVERTED[name])


class Watch:
    """Every call of a model's pool, and the most that MLX held."""

    def __init__(self, model: Any):
        self.model, self.pool = model, model.flash.pool
        self.ask: Callable[..., int] = self.pool.prepare
        self.before_bytes = mx.get_active_memory()
        self.held_bytes = 0
        # (tokens, of a chunk, bytes without slots, bytes read before, units asked)
        self.calls: list[tuple[int, int, int, int, int]] = []
        self.pool.prepare = self.prepare

    def prepare(self, sequences: int, tokens: int, cache: Sequence[Any]) -> int:
        """The pool's own answer, noted."""
        self.look()
        size = self.ask(sequences, tokens, cache)
        slots = self.pool.division.slots
        layers = self.model.flash.manifest.layers
        missing = sum(
            (layer.units - n) * layer.unit_bytes
            for layer, n in zip(layers, slots, strict=True)
        )
        stats = self.model.flash.stats
        chunk = min(size, sequences * tokens)
        read = stats.bytes_read, stats.misses
        self.calls.append((sequences * tokens, chunk, missing, *read))
        return size

    def look(self) -> None:
        held = mx.get_active_memory() + mx.get_cache_memory()
        self.held_bytes = max(self.held_bytes, held)


def measure(
    name: str, folder: Path, memory: str, tokens: int, way: str, draft: Path | None
) -> Row:
    """One prompt through one entry point, by a model that was just loaded."""
    gc.collect()
    mx.clear_cache()
    base_bytes = mx.get_active_memory()
    context = tokens + 2 * ANSWER + 2
    loaded = load(folder, memory, page_cache="off", context=context, draft_model=draft)
    with loaded as (model, tokenizer):
        lm_stream(model, tokenizer, [5, 9, 17, 33])
        prompt = [3 + i * 7 % 90 for i in range(tokens)]
        watch = Watch(model)
        mx.reset_peak_memory()
        begin = time.process_time()
        THROUGH[way](model, tokenizer, prompt)
        cpu_s = time.process_time() - begin
        watch.look()
        budget = model.flash.budget.total_bytes + model.flash.draft_bytes
        unit_bytes = model.flash.manifest.layers[0].unit_bytes
        peak = mx.get_peak_memory() - base_bytes
        held = max(watch.held_bytes - base_bytes, peak)
    # The prompt's calls, and the one that follows them.
    first = next(i for i, call in enumerate(watch.calls) if call[0] <= 2)
    of_prompt, after = watch.calls[:first], watch.calls[first]
    read = after[3] - of_prompt[0][3]
    asked = (after[4] - of_prompt[0][4]) * unit_bytes
    missing = [call[2] for call in of_prompt]
    least = sum(-(-call[0] // MAX_PREFILL) * call[2] for call in of_prompt)
    more = {
        "chunk_tokens": max(call[1] for call in of_prompt),
        "missing_bytes": max(missing),
        "read_bytes": read,
        "times_missing": read / least if least else None,
        "times_asked": read / asked if asked else None,
        "peak_share": peak / budget,
        "held_share": held / budget,
        "cpu_s": cpu_s,
    }
    return Row(name, memory_bytes=budget, tokens=1, more=more)
