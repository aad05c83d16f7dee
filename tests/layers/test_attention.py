"""Attention in pieces: the same to the bit, in less memory, and only where asked."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base, llama
from mlx_lm.models.cache import BatchKVCache, QuantizedKVCache, make_prompt_cache
from stock_checkpoints import LLAMA, NEMOTRON, QWEN3, write_checkpoint
from stock_checkpoints import run as run_lengths

import mlx_flash
from mlx_flash.bench.families.configs import DENSE, EXPERTS, make_config
from mlx_flash.bench.synthetic import make_model
from mlx_flash.layers import attention
from mlx_flash.memory import footprint

pytestmark = pytest.mark.skipif(
    mx.default_device() == mx.gpu, reason="a GPU's kernels keep no scores"
)
TOKENS = mx.array([[3 + i * 7 % 90 for i in range(150)]])
WINDOWS = make_config("gpt_oss")  # rotating caches, and sinks
LATENT = make_config("deepseek_v3")  # gives scores as a mask
NO_METAL = ("bitnet", "muse_spark")  # their kernels run on Apple's GPUs alone


@pytest.fixture
def tiny(monkeypatch):
    """Pieces of eight rows."""
    monkeypatch.setattr(footprint, "SCORES_BYTES", 1)


def logits(model, cache=None, tokens=TOKENS):
    """Of two calls that share a cache."""
    cache = make_prompt_cache(model) if cache is None else cache
    parts = [model(x, cache=cache) for x in mx.split(tokens, [60], axis=1)]
    mx.eval(parts)
    return np.concatenate([np.array(x.astype(mx.float32)) for x in parts], axis=1)


def quantised(model):
    return [QuantizedKVCache(group_size=32, bits=8) for _ in model.layers]


def batched(model):
    return [BatchKVCache([0, 7]) for _ in model.layers]


@pytest.mark.parametrize(
    "config, make_cache",
    [
        (LLAMA, make_prompt_cache),
        (LLAMA | {"head_dim": 32}, quantised),
        (LLAMA, batched),
        (WINDOWS, make_prompt_cache),
        (LATENT, make_prompt_cache),
        (NEMOTRON, make_prompt_cache),
    ],
    ids=["causal", "quantised", "batch", "windows", "latent", "hybrid"],
)
def test_pieces_are_the_same_to_the_bit(tiny, config, make_cache):
    check_bits(config, make_cache, mx.float32)
    if config["model_type"] == "llama":  # a CPU multiplies experts in float32 alone
        check_bits(config, make_cache, mx.bfloat16)


def check_bits(config, make_cache, dtype):
    model = make_model(config)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    tokens = mx.concatenate([TOKENS, TOKENS + 1]) if make_cache is batched else TOKENS
    expected = logits(model, make_cache(model), tokens)
    attention.in_pieces(model)
    assert np.array_equal(logits(model, make_cache(model), tokens), expected)


def test_nobody_else_sees_it():
    ours, other = make_model(LLAMA), make_model(LLAMA)
    assert attention.in_pieces(ours) and attention.in_pieces(ours), "again, too"
    kind = type(ours.layers[0].self_attn)
    assert kind is not llama.Attention and issubclass(kind, llama.Attention)
    assert type(other.layers[0].self_attn) is llama.Attention
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention
    known = llama.Attention.__call__.__globals__[attention.NAME]
    assert known is base.scaled_dot_product_attention
    third = make_model(LLAMA)
    attention.in_pieces(third)
    assert type(third.layers[0].self_attn) is kind


def test_a_gpu_goes_without(monkeypatch):
    monkeypatch.setattr(attention.mx, "default_device", lambda: mx.gpu)
    model = make_model(LLAMA)
    assert not attention.in_pieces(model)
    assert type(model.layers[0].self_attn) is llama.Attention


@pytest.mark.parametrize("family", [f for f in EXPERTS | DENSE if f not in NO_METAL])
def test_who_makes_scores_is_known(family, monkeypatch):
    """Nothing is computed here: arrays have their shapes before."""
    masks = []

    def watch(queries, keys, values, cache, scale, mask, sinks=None):
        masks.append(mask)
        return base.scaled_dot_product_attention(
            queries, keys, values, cache, scale, mask, sinks
        )

    monkeypatch.setattr(attention, "attend", watch)
    attention._subclass.cache_clear()
    model = make_model(make_config(family))
    in_pieces = attention.in_pieces(model)
    model(TOKENS, cache=make_prompt_cache(model))
    attention._subclass.cache_clear()
    arrays = [mask for mask in masks if isinstance(mask, mx.array)]
    scores = any(mask.ndim == 4 and mask.shape[1] > 1 for mask in arrays)
    if in_pieces:
        assert masks and not scores, "scores are kept that nobody counts"


def test_pieces_take_less_memory():
    heads, L, seen = 4, 512, 4096
    q, k, v = (
        mx.random.normal((1, n, tokens, 64))
        for n, tokens in ((heads, L), (1, seen), (1, seen))
    )
    mx.eval(q, k, v)
    peaks = []
    for attend in (base.scaled_dot_product_attention, attention.attend):
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(attend(q, k, v, None, 0.125, "causal"))
        peaks.append(mx.get_peak_memory() - before)
    whole = heads * L * seen * 4
    counted = footprint.SCORES_AT_ONCE * footprint.SCORES_BYTES
    assert peaks[0] >= whole > 4 * counted
    # The result itself is there, too: in pieces and together.
    assert peaks[1] <= counted + 3 * q.nbytes


def test_from_flash_to_the_bit(tiny, tmp_path):
    folder = write_checkpoint(tmp_path / "stock", QWEN3)
    from mlx_lm.utils import load_model as load_resident

    expected = run_lengths(load_resident(folder)[0], 2)
    with mlx_flash.load_model(folder, "2MB", context=256) as (model, _):
        assert any(not layer.slots.holds_all for layer in model.flash.layers)
        assert model.flash.shapes.scores_in_pieces
        for actual, wanted in zip(run_lengths(model, 2), expected, strict=True):
            assert np.array_equal(actual, wanted)
