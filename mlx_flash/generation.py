"""Generate with mlx-lm's own loop, and say afterwards what the run cost."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.generate import stream_generate as mlx_stream_generate
from mlx_lm.models.cache import KVCache, make_prompt_cache

from .checkpoints.config import read_config
from .errors import FlashError
from .memory.budget import KV_STEP
from .memory.stats import Stats
from .memory.system import peak_process_bytes


def stream_generate(
    model: nn.Module, tokenizer, prompt, max_tokens: int = 256, **options
) -> Generator[GenerationResponse, None, None]:
    """mlx-lm's `stream_generate`, with prompts judged first and the cost measured.

    mlx-lm's own function works on the same model; this one reads prompts in chunks
    that fit the budget's workspace, stops at the model's last position, and leaves
    what the run cost in `model.flash.run`.

    Args:
        model: From `mlx_flash.load`.
        tokenizer: From the same call.
        prompt: Text, or token ids.
        max_tokens: At most so many new tokens; -1 for as many as positions allow.
        options: As mlx-lm's `generate_step` takes them (`sampler`, `prompt_cache`, …).

    Raises:
        FlashError: If the prompt is empty or longer than the model's positions, or a
            read fails.
    """
    flash = model.flash
    flash.check_open()
    prompt = encode_prompt(tokenizer, prompt)
    if flash.positions is not None:
        cache = options.get("prompt_cache") or []
        used = len(prompt) + max((getattr(c, "offset", 0) for c in cache), default=0)
        room = flash.positions - used
        if room < 1:
            raise FlashError(
                f"The prompt has {used:,} tokens, the model {flash.positions:,} "
                "positions for prompt and answer together. Shorten the prompt."
            )
        max_tokens = room if max_tokens < 0 else min(max_tokens, room)
    options.setdefault("prefill_step_size", flash.budget.prefill_tokens)
    if "draft_model" not in options and "max_kv_size" not in options:
        options.setdefault("prompt_cache", exact_cache(model))
    run = flash.run = Run(flash.stats.copy())
    for response in mlx_stream_generate(
        model, tokenizer, prompt, max_tokens=max_tokens, **options
    ):
        run.note(response, flash.stats)
        yield response


def generate(model: nn.Module, tokenizer, prompt, verbose=False, **options) -> str:
    """The whole text of `stream_generate`; `verbose` prints it as it comes.

    Args:
        options: As for `stream_generate`.
    """
    text = ""
    for response in stream_generate(model, tokenizer, prompt, **options):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print("", summary(model.flash), sep="\n")
    return text


def encode_prompt(tokenizer, prompt) -> list[int]:
    """Token ids of a prompt given as text or as ids.

    Raises:
        FlashError: If it is empty.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise FlashError("The prompt is empty. Give the text to continue.")
        bos = tokenizer.bos_token
        special = bos is None or not prompt.startswith(bos)
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    tokens = prompt.tolist() if isinstance(prompt, mx.array) else list(prompt)
    if not tokens:
        raise FlashError("The prompt is empty. Give the text to continue.")
    return tokens


def exact_cache(model) -> list:
    """mlx-lm's caches, made to grow by the budget's step instead of 256 tokens."""
    caches = make_prompt_cache(model)
    for cache in caches:
        if type(cache) is KVCache:
            cache.step = KV_STEP
    return caches


def context_for(folder: Path, prompt_tokens: int, max_tokens: int) -> int | None:
    """Tokens of KV cache that a prompt and its answer need; None: the usual reserve."""
    if max_tokens < 0:
        return None
    positions = read_config(folder).get("max_position_embeddings")
    context = prompt_tokens + max_tokens
    return min(context, positions) if positions else context


@dataclass
class Run:
    """What one generation did, kept up to date while it runs.

    Decoding is measured from the first new token on, so that reading the prompt does
    not count as a token.
    """

    before: Stats
    begin_time: float = field(default_factory=time.perf_counter)
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    last: GenerationResponse | None = None
    first_stats: Stats | None = None
    last_stats: Stats | None = None
    first_time: float = 0.0
    last_time: float = 0.0

    def note(self, response: GenerationResponse, stats: Stats) -> None:
        self.last_time, self.last_stats = time.perf_counter(), stats.copy()
        if self.first_stats is None:
            self.first_time, self.first_stats = self.last_time, self.last_stats
        if response.generation_tokens > len(self.tokens):
            self.tokens.append(response.token)
        self.text += response.text
        self.last = response


def report(flash) -> dict:
    """The figures of a model's last run, under the names `generate --json` prints.

    Bytes are bytes, GB is 1e9, times are milliseconds per new token: `io` is waiting
    for reads, `cache` the bookkeeping of slots, `compute` all the rest. A prompt, with
    the first new token, is apart from them. What could not be measured (a run of one
    token has no time per token) is None.
    """
    run, budget, manifest = flash.run, flash.budget, flash.manifest
    stats: dict = {
        "model_bytes": manifest.model_bytes,
        "resident_bytes": budget.resident_bytes,
        "predictor_bytes": budget.predictor_bytes,
        "slot_bytes": budget.slot_bytes,
        "memory_budget_bytes": budget.total_bytes,
        "peak_memory_bytes": mx.get_peak_memory(),
        "peak_process_bytes": peak_process_bytes(),
        "layers_from_flash": len(flash.layers),
        "layers_total": len(manifest.layers),
        "layers_held_whole": sum(
            n == layer.units
            for n, layer in zip(budget.slots, manifest.layers, strict=True)
        ),
        "prompt_tokens_per_s": run.last.prompt_tps if run and run.last else None,
        "time_to_first_token_s": run.first_time - run.begin_time
        if run and run.last
        else None,
        "tokens_per_s": None,
        "ms_per_token": dict.fromkeys(("io", "cache", "compute", "total")),
        "bytes_per_token": None,
        "reads_per_token": None,
        "read_gb_per_s": None,
        "read_hidden_share": None,
        "early_precision": None,
        "hit_rate": None,
        "predictor_recall": None,
    }
    if run is None or run.last is None:
        return stats
    whole = run.last_stats - run.before
    if any("predictor" in layer for layer in flash.layers):
        stats["predictor_recall"] = whole.predictor_recall or _recorded_recall(manifest)
    steps = len(run.tokens) - 1
    if steps < 1:
        return stats
    decode = run.last_stats - run.first_stats
    total_s = (run.last_time - run.first_time) / steps
    io, cache = decode.io_s / steps, decode.cache_s / steps
    stats |= {
        "tokens_per_s": 1 / total_s,
        "ms_per_token": {
            "io": 1e3 * io,
            "cache": 1e3 * cache,
            "compute": 1e3 * (total_s - io - cache),
            "total": 1e3 * total_s,
        },
        "bytes_per_token": decode.bytes_read / steps,
        "reads_per_token": decode.reads / steps,
        "read_gb_per_s": decode.read_gb_per_s,
        "read_hidden_share": decode.read_hidden_share,
        "early_precision": decode.early_precision,
        "hit_rate": decode.hit_rate,
    }
    return stats


def _recorded_recall(manifest) -> float | None:
    """Mean recall on held-out text at conversion, where a run had no prompt sweep."""
    facts = [layer.predictor for layer in manifest.layers if layer.predictor]
    return sum(f.recall for f in facts) / len(facts) if facts else None


def summary(flash) -> str:
    """The figures of a model's last run as a few lines for a person."""
    run, s, unit = flash.run, report(flash), flash.manifest.unit
    if run is None or run.last is None:
        return "nothing was generated"
    lines = [
        f"prompt      {run.last.prompt_tokens} tokens, "
        f"{s['prompt_tokens_per_s']:.1f} tokens/s, first token after "
        f"{s['time_to_first_token_s']:.2f} s"
    ]
    if s["tokens_per_s"]:
        ms, hit = s["ms_per_token"], s["hit_rate"]
        lines += [
            f"generation  {len(run.tokens)} tokens, {s['tokens_per_s']:.1f} tokens/s, "
            f"{ms['total']:.2f} ms per token = {ms['io']:.2f} I/O + "
            f"{ms['cache']:.2f} cache + {ms['compute']:.2f} compute",
            f"flash       {s['bytes_per_token'] / 1e6:.3f} MB in "
            f"{s['reads_per_token']:.0f} reads per token"
            + (f", {s['read_gb_per_s']:.2f} GB/s" if s["read_gb_per_s"] else "")
            + (
                f", {s['read_hidden_share']:.0%} of that time hidden behind compute"
                if s["read_hidden_share"]
                else ""
            )
            + ("" if hit is None else f", {hit:.0%} of {unit}s were in memory"),
        ]
    if s["early_precision"] is not None:
        lines.append(
            f"look-ahead  {s['early_precision']:.0%} of the guesses were right"
        )
    lines += [
        f"memory      {s['peak_memory_bytes'] / 1e6:.1f} MB at most, budget "
        f"{s['memory_budget_bytes'] / 1e6:.1f} MB, model "
        f"{s['model_bytes'] / 1e6:.1f} MB (the process with Python and libraries "
        f"{s['peak_process_bytes'] / 1e6:.0f} MB)",
        f"layers      {s['layers_from_flash']} of {s['layers_total']} FFN layers from "
        f"flash, {s['layers_held_whole']} of them held whole",
    ]
    if s["predictor_recall"]:
        lines.append(
            f"predictor   found {s['predictor_recall']:.1%} of the active neurons"
        )
    return "\n".join(lines)
