"""Call models in every way, on one rank or several, and keep what they give.

    same_logits.py OUT.npz SHARES TIMES FOLDER …

Each model gets TIMES the least memory that it works with.

Prompts, decoding, trimming, a copy of a cache, one that was saved and loaded, a
quantised one, batches, drafts, another budget in between: whatever is done to a cache
on rank 0 must reach the others.
"""

import copy
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

import mlx_flash
from mlx_flash.checkpoints.tokenizer import load_tokenizer

out, shares, times, *models = sys.argv[1:]
TOKENS = np.random.default_rng(3).integers(3, 97, 64).tolist()
found: dict[str, np.ndarray] = {}


def note(name: str, logits: mx.array) -> None:
    found[name] = np.array(logits.astype(mx.float32))


def call(model, tokens, cache=None):
    return model(mx.array(tokens), cache=cache)


def all_ways(name: str, model) -> None:
    note(f"{name} bare", call(model, [TOKENS[:9], TOKENS[9:18]]))
    cache = make_prompt_cache(model)
    note(f"{name} prompt", call(model, [TOKENS[:40]], cache))
    for i in range(40, 46):
        note(f"{name} {i}", call(model, [[TOKENS[i]]], cache))
    other = copy.deepcopy(cache)
    trim_prompt_cache(cache, 4)
    note(f"{name} trimmed", call(model, [TOKENS[50:52]], cache))
    note(f"{name} copied", call(model, [TOKENS[46:49]], other))
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "cache.safetensors")
        save_prompt_cache(file, cache)
        loaded = load_prompt_cache(file)
    note(f"{name} loaded", call(model, [[TOKENS[52]]], loaded))
    model.flash.resize(int(model.flash.budget.total_bytes * 1.1))
    note(f"{name} resized", call(model, [TOKENS[53:56]], cache))
    if other[0].keys.shape[-1] % 32 == 0:
        quantised = [entry.to_quantized(32, 8) for entry in other]
        note(f"{name} quantised", call(model, [TOKENS[49:51]], quantised))


def batch(name: str, model) -> None:
    generator = BatchGenerator(model, max_tokens=5)
    generator.insert([TOKENS[:12], TOKENS[20:25], TOKENS[30:47]])
    given: dict[int, list[int]] = {}
    for _ in range(40):
        prompts, answers = generator.next()
        for response in answers:
            given.setdefault(response.uid, []).append(response.token)
        if not prompts and not answers:
            break
    assert [len(tokens) for tokens in given.values()] == [5, 5, 5]
    for uid, tokens in given.items():
        found[f"{name} batch {uid}"] = np.array(tokens)


def drafted(name: str, model) -> None:
    tokenizer = load_tokenizer(model.flash.folder)
    steps = mlx_flash.stream_generate(
        model, tokenizer, TOKENS[:8] * 3, 12, draft_ngrams=2
    )
    found[f"{name} drafted"] = np.array([step.token for step in steps])


def load(folder: str):
    options = {"context": 512} | ({"shares": shares} if shares != "-" else {})
    if folder.endswith("skipped"):
        options["skip"] = 0.5
    memory = 1000.0
    while True:  # another rank may need more than this one
        try:
            return mlx_flash.load_model(folder, memory=int(memory), **options)[0]
        except mlx_flash.NotEnoughMemory as error:
            memory = max(error.least_bytes * float(times), memory * 1.01)


for folder in models:
    model = load(folder)
    name = Path(folder).name
    all_ways(name, model)
    batch(name, model)
    drafted(name, model)
    machines = model.flash.machines
    if machines is not None:
        mine = model.flash.stats.bytes_read
        reads = [mine, *(stats["bytes_read"] for stats in machines.stats())]
        found[f"reads of {name}"] = np.array(reads)
    model.flash.close()
np.savez(out, **found)
print("all ways done")
