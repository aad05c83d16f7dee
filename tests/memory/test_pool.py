"""Slots give way to long prompts and long conversations, and come back."""

import gc

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import save_tokenizer
from mlx_lm.models.cache import make_prompt_cache
from stock_checkpoints import LLAMA, QWEN3, write_checkpoint

import mlx_flash

# Many layers, so that one is little beside the workspace, as in a real model
WIDE = dict(hidden_size=128, num_hidden_layers=16, num_attention_heads=2, head_dim=64)
EXPERTS = QWEN3 | WIDE | {"moe_intermediate_size": 256, "num_key_value_heads": 1}
DENSE = LLAMA | WIDE | {"intermediate_size": 1024, "num_key_value_heads": 1}
RELU = DENSE | {"hidden_act": "relu"}
PREDICTED = {"rank": 8, "unit": "neuron", "calibration_tokens": 64, "fit_steps": 1}
KINDS = {
    "experts": (EXPERTS, None),
    "blocks": (DENSE, {"rank": 0}),
    "neurons": (RELU, PREDICTED),
}
PROMPT = [3 + i * 7 % 90 for i in range(601)]


# Converting neurons takes as long as all tests with the other kinds.
SOME = [
    "experts",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("blocks", "neurons")),
]


@pytest.fixture(scope="module", params=SOME)
def folder(request, tmp_path_factory):
    config, options = KINDS[request.param]
    base = tmp_path_factory.mktemp(request.param)
    folder = write_checkpoint(base / "source", config)
    save_tokenizer(folder)
    if options is None:
        return folder
    return mlx_flash.convert(folder, base / "flash", progress=False, **options)


def ffn_bytes_missing(model):
    """Bytes of units that have no slot at the moment."""
    layers = model.flash.manifest.layers
    slots = [layer.slots.n_slots for layer in model.flash.layers]
    return sum((x.units - n) * x.unit_bytes for x, n in zip(layers, slots, strict=True))


def test_a_prompt_has_every_unit_read_once(folder):
    """Through mlx-lm's own loop, within the budget; 600 tokens are one chunk."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    seen = {}

    with mlx_flash.load(folder, "80%", context=640) as (model, tokenizer):
        for _ in mlx_lm.stream_generate(model, tokenizer, [5, 9, 17], max_tokens=6):
            pass
        model.flash.stats.reset()
        mx.reset_peak_memory()

        def note(done, total):
            if done == total - 1:
                seen["read"] = model.flash.stats.bytes_read
                seen["missing"] = ffn_bytes_missing(model)
                seen["tokens"] = model.flash.pool.division.tokens

        steps = mlx_lm.stream_generate(
            model, tokenizer, PROMPT, max_tokens=2, prompt_progress_callback=note
        )
        for _ in steps:
            pass
        assert mx.get_peak_memory() - before <= model.flash.budget.total_bytes
        assert model.flash.budget.prefill_tokens < 300, "nothing had to give way"
        assert seen["tokens"] == 600
        # What resized layers lost is read, too, and units in gaps between others.
        assert seen["read"] <= 1.3 * seen["missing"]
        counts = [layer.slots.n_slots for layer in model.flash.layers]
        assert counts == list(model.flash.pool.division.slots)
        assert sum(counts) >= sum(model.flash.budget.slots) - 1


def test_chunks_change_nothing_but_rounding(folder):
    """Many small chunks, by a budget that has no room for more."""
    tokens = mx.array([PROMPT[:200]])
    results = []
    for memory in ("60%", "2GB"):
        with mlx_flash.load_model(folder, memory, predictor=False) as (model, _):
            cache = make_prompt_cache(model)
            result = model(tokens, cache=cache)
            mx.eval(result)
            results.append(np.array(result))
            assert cache[0].offset == 200
    assert results[0].shape == results[1].shape == (1, 200, results[0].shape[-1])
    diff = np.abs(results[0] - results[1]).max() / np.abs(results[1]).max()
    assert diff < 1e-4


def test_caches_that_are_gone_give_their_memory_back(folder):
    with mlx_flash.load_model(folder, "60%", context=64) as (model, _):
        pool = model.flash.pool
        caches = [make_prompt_cache(model) for _ in range(4)]
        for cache in caches:
            model(mx.array([PROMPT[:60]]), cache=cache)
        assert pool.division.kv_bytes > model.flash.budget.kv_bytes
        assert sum(pool.division.slots) < sum(model.flash.budget.slots)
        del caches, cache
        gc.collect()
        model(mx.array([[5]]), cache=make_prompt_cache(model))
        assert pool.division.slots == model.flash.budget.slots


def test_a_conversation_that_cannot_fit_says_so_and_the_next_one_works(folder):
    with mlx_flash.load_model(folder, "60%", context=64) as (model, _):
        total = model.flash.budget.total_bytes
        cache = make_prompt_cache(model)
        per_token = 16 * 2 * 64 * 4
        many = mx.zeros((total // per_token // 512 + 1, 512), mx.int32)
        with pytest.raises(mlx_flash.FlashError, match="Begin a new conversation"):
            model(many, cache=cache)
        del cache
        result = model(mx.array([[5]]), cache=make_prompt_cache(model))
        assert mx.isfinite(result).all().item()


def test_slots_give_way_to_the_logits_of_drafts_and_come_back(folder):
    with mlx_flash.load_model(folder, "60%", context=64) as (model, _):
        pool = model.flash.pool
        usual, cache = pool.budget.slots, make_prompt_cache(model)
        vocabulary = model.flash.vocabulary
        model(mx.array([[5]]), cache=cache)
        assert pool.division.slots == usual
        tokens = int(0.1 * model.flash.budget.slot_bytes) // (4 * vocabulary)
        pool.hold_logits(tokens)
        model(mx.array([[5]]), cache=cache)
        layers = model.flash.manifest.layers
        given = sum(
            (n - layer.slots.n_slots) * x.unit_bytes
            for n, layer, x in zip(usual, model.flash.layers, layers, strict=True)
        )
        assert given >= 4 * vocabulary * tokens
        division = pool.division
        model(mx.array([[5]]), cache=cache)
        assert pool.division is division, "nothing is divided anew for every token"
        pool.hold_logits(1)
        model(mx.array([[5]]), cache=cache)
        assert pool.division.slots == usual
        before = pool.budget
        with pytest.raises(mlx_flash.FlashError, match="Draft fewer tokens"):
            pool.hold_logits(10**7)
        model(mx.array([[5]]), cache=cache)
        assert pool.division.slots == usual and pool.budget is before


def test_no_memory_is_kept_for_logits_that_nobody_waits_for(folder):
    """A prompt that is cut has logits wait; it takes the slots for them itself."""
    with mlx_flash.load_model(folder, "80%", context=640) as (model, _):
        pool, budget = model.flash.pool, model.flash.budget
        footprint = pool._footprint
        sizes = budget.prefill_tokens, budget.batch_tokens
        alone, waiting = (footprint.workspace_bytes(*sizes, n) for n in (0, 640))
        assert waiting > 1.1 * alone
        largest = max(x.unit_bytes for x in model.flash.manifest.layers)
        rows = max(x.units * x.unit_bytes for x in model.flash.manifest.layers)
        gathered = footprint.gathered_share * rows
        assert budget.workspace_bytes <= alone + gathered + 16 * largest
        model(mx.array([PROMPT]), cache=make_prompt_cache(model))
        assert sum(pool.division.slots) < sum(budget.slots)
