"""A model whose FFNs are on flash computes what the resident one does.

Differences are relative: largest absolute difference by largest expected logit.
"""

import gc
import json
import os
import re
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import Says, load_resident, relative_diff
from mlx_lm.models.cache import make_prompt_cache

import mlx_flash
from mlx_flash.errors import FlashError
from mlx_flash.loading import load_model
from mlx_flash.memory.policies import Lru, Window
from mlx_flash.memory_size import parse_memory
from mlx_flash.storage.manifest_reading import read_manifest
from mlx_flash.storage.native_reader import _reader

TOLERANCE = 1e-4  # float32; measured 4e-7
CONTEXT = 8  # so few that slots are what the memory is for
SHARES = [0, 0.3, 0.5, 0.9, 1]  # of the slots: from the least to everything
SLOW = pytest.mark.slow
policies = pytest.mark.parametrize("policy", ["lru", "lrfu", "window"])
NATIVE = [
    pytest.param(
        True, marks=pytest.mark.skipif(_reader is None, reason="no C reader"), id="C"
    ),
    pytest.param(False, id="Python"),
]


def least(folder, **options):
    """The amount the refusal names."""
    with pytest.raises(FlashError) as error:
        load_model(folder, "1KB", **options)
    return re.search(r"--memory (\S+) ", str(error.value))[1]


def memory_for(folder, share):
    """An amount that gives about this share of the slots."""
    low = parse_memory(least(folder, context=CONTEXT))
    ffn = read_manifest(folder).ffn_bytes
    high = 2 * low + 2 * ffn  # more than enough for everything
    if share in (0, 1):
        return high if share else low
    return int(low + share * ffn)


def load(folder, share=0.5, memory=None, **options):
    memory = memory or memory_for(folder, share)
    model, _ = load_model(folder, memory, context=CONTEXT, **options)
    opened.append(model.flash)
    return model


opened = []


@pytest.fixture(autouse=True)
def no_model_left():
    yield
    while opened:
        opened.pop().close()


def random_tokens(*shape, seed=1):
    return mx.random.randint(4, 97, shape, key=mx.random.key(seed))


def assert_close(actual, expected, tolerance=TOLERANCE):
    diff = relative_diff(actual, expected)
    assert diff < tolerance, f"{diff=}"


@pytest.fixture(scope="module")
def wide(make_flash):
    """(checkpoint, flash folder) whose FFN is most of the model."""
    return make_flash(ffn_dim=512)


@pytest.fixture(scope="module")
def resident(wide):
    return load_resident(wide[0])


# Memory


def test_the_least_memory_works_and_less_does_not(wide, resident):
    amount = least(wide[1], context=CONTEXT)
    model = load(wide[1], memory=amount)
    assert not any(layer.slots.holds_all for layer in model.flash.layers)
    tokens = random_tokens(1, 9)
    assert_close(model(tokens), resident(tokens))
    with pytest.raises(FlashError, match=f"at least --memory {amount}"):
        load(wide[1], memory=int(0.9 * parse_memory(amount)))


def test_the_shares_tested_here_are_different_numbers_of_slots(wide):
    counts = [[x.slots.n_slots for x in load(wide[1], s).flash.layers] for s in SHARES]
    counts = [n for n, _ in counts]
    assert counts == sorted(set(counts))
    assert counts[0] < 512 // 16 and counts[-1] == 512


def test_the_slots_take_what_the_budget_says(wide):
    gc.collect()  # of models of other tests
    before = mx.get_active_memory()
    model = load(wide[1], 0.9)
    budget = model.flash.budget
    held = mx.get_active_memory() - before
    said = budget.resident_bytes + budget.predictor_bytes + budget.slot_bytes
    # MLX rounds each allocation up, to a page at most.
    assert said - 2 * 16384 * 2 <= held <= said + 16384 * 60


# Exactness


@policies
@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize(
    "share", [pytest.param(s, marks=() if s in (0, 0.5, 1) else SLOW) for s in SHARES]
)
def test_without_predictor_logits_are_those_of_the_resident_model(
    wide, resident, share, native, policy
):
    model = load(wide[1], share, native=native, policy=policy, predictor=False)
    prompts = random_tokens(2, 12)
    expected = resident(prompts)
    assert_close(model(prompts[:1]), expected[:1])
    assert_close(model(prompts), expected)

    cache = make_prompt_cache(model)
    steps = [model(prompts[:1, i : i + 1], cache=cache) for i in range(12)]
    assert_close(mx.concatenate(steps, axis=1), expected[:1])

    cache = make_prompt_cache(model)
    chunks = [model(c, cache=cache) for c in mx.split(prompts, [7, 9, 10], axis=1)]
    assert_close(mx.concatenate(chunks, axis=1), expected)


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_proj", "no_bias_untied"])
def test_every_golden_opt_is_exact(golden_checkpoint, tmp_path, variant):
    from mlx_flash.converters.convert import convert

    checkpoint = golden_checkpoint.parent / variant
    folder = convert(checkpoint, tmp_path / "flash", rank=0, progress=False)
    golden = mx.load(str(checkpoint / "expected.safetensors"))
    for share in (0, 1):
        model = load(folder, share)
        assert_close(model(golden["tokens"]), golden["logits"])


def test_predictor_false_leaves_a_models_predictors_alone(
    golden_checkpoint, flash_folder
):
    tokens = random_tokens(1, 2)
    expected = load_resident(golden_checkpoint)(tokens)
    model = load(flash_folder, 0, predictor=False)
    assert_close(model(tokens), expected)
    assert relative_diff(load(flash_folder, 0)(tokens), expected) > TOLERANCE


# Against the resident model of the same dtype, which rounds at other places: a few
# units in the last place (float16 2**-11, bfloat16 2**-8), grown through two layers.
@pytest.mark.parametrize("dtype, tolerance", [("float16", 0.005), ("bfloat16", 0.04)])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_half_precision_is_as_close_as_its_rounding(
    make_flash, dtype, tolerance, share
):
    checkpoint, folder = make_flash(dtype, ffn_dim=512)
    model, tokens = load(folder, share), random_tokens(2, 6)
    expected = load_resident(checkpoint)(tokens)
    actual = model(tokens)
    assert actual.dtype == expected.dtype == getattr(mx, dtype)
    assert_close(actual, expected, tolerance)
    step = model(tokens[:1, :1])
    assert step.dtype == actual.dtype
    assert_close(step, load_resident(checkpoint)(tokens[:1, :1]), tolerance)


@policies
@pytest.mark.parametrize("predictor", [True, False])
@pytest.mark.parametrize("share", [0, 0.5])
def test_models_may_be_evaluated_late_and_in_any_order(
    golden_checkpoint, flash_folder, share, predictor, policy
):
    model = load(flash_folder, share, predictor=predictor, policy=policy)
    inputs = [random_tokens(1, 2, seed=seed) for seed in (1, 1, 2, 3, 1)]
    expected = []
    for tokens in inputs:
        logits = model(tokens)
        mx.eval(logits)
        expected.append(logits)
    lazy = [model(tokens) for tokens in inputs]
    mx.eval(lazy[::-1])
    for actual, wanted in zip(lazy, expected, strict=True):
        assert_close(actual, wanted, 1e-6)


# With predictors


def some(x):
    """A choice that depends on the token alone; rounded, as no sum is exact."""
    score = mx.round(x[:, :1] * 64) * mx.arange(1, 513) * 0.37
    return score % 1 > 0.8


def with_choice(model, choose):
    for layer in model.flash.layers:
        layer.predictor = Says(choose)
    return model


def test_a_tokens_logits_depend_on_nothing_but_the_choice(wide):
    """Not on the budget, the policy, what ran before, the batch or the chunk."""
    first, *rest = (
        with_choice(load(wide[1], share, policy=policy), some)
        for share, policy in [
            (0.5, "lru"),
            (0, "lru"),
            (0.9, "window"),
            (0, Window(1)),
            (0.3, Lru()),
        ]
    )
    tokens = random_tokens(1, 6)

    def read(model, widths):
        cache, start, logits = make_prompt_cache(model), 0, []
        for width in widths:
            logits.append(model(tokens[:, start : start + width], cache=cache))
            start += width
        return mx.concatenate(logits, axis=1)

    expected = read(first, [1] * 6)
    assert_close(read(first, [2, 2, 2]), expected)
    assert_close(read(first, [3, 1, 2]), expected)
    for model in rest:
        model(random_tokens(1, 5, seed=9))
        assert_close(read(model, [1] * 6), expected)
        assert_close(read(model, [2, 3, 1]), expected)
    pair = mx.concatenate([tokens[:, :1], random_tokens(1, 1, seed=4)])
    assert_close(first(pair)[:1], expected[:, :1])


def test_a_predictor_that_always_says_yes_is_the_resident_model(wide, resident):
    model = with_choice(load(wide[1], 0.5), lambda x: mx.ones((len(x), 512)) > 0)
    tokens = random_tokens(1, 3)
    assert_close(model(tokens), resident(tokens))


def test_a_predictor_that_always_says_no_leaves_the_bias(wide):
    model = with_choice(load(wide[1], 0.5), lambda x: mx.zeros((len(x), 512)) > 0)
    silent = load_resident(wide[0])
    for layer in silent.layers:
        layer.mlp.fc1.bias = layer.mlp.fc1.bias - 1e6
    tokens = random_tokens(1, 3)
    assert_close(model(tokens), silent(tokens))
    assert model.flash.stats.bytes_read == 0


# Files that fail


def cut(path):
    data = path.read_bytes()
    os.truncate(path, 20_000)
    return data


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("predictor", [True, False])
def test_a_file_cut_in_the_middle_of_a_run_is_named_and_can_be_restored(
    golden_checkpoint, own_folder, native, predictor
):
    model = load(own_folder, 0, page_cache=True, native=native, predictor=predictor)
    tokens = [random_tokens(1, 2, seed=seed) for seed in range(4)]
    expected = [model(t) for t in tokens]
    mx.eval(expected)
    path = own_folder / "ffn" / "layer_01.safetensors"
    when = os.stat(path)
    sound = cut(path)
    for _ in range(2):
        with pytest.raises(FlashError, match=re.escape(str(path))):
            for t in tokens:
                model(t)
    with open(path, "r+b") as file:  # the file that is open, not another one
        file.write(sound)
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
    for t, wanted in zip(tokens, expected, strict=True):
        assert_close(model(t), wanted, 1e-6)


def test_a_file_that_fails_while_loading_leaves_nothing_open(own_folder, monkeypatch):
    from mlx_flash import attach

    before = resources()

    def fail(self):
        raise FlashError("no")

    monkeypatch.setattr(attach.UnitSlots, "read_all", fail)
    with pytest.raises(FlashError, match="no") as error:
        load(own_folder, 1)
    assert resources() == before
    assert error.traceback  # which holds the reader: nothing but closing helps


def test_weights_that_do_not_fit_the_config_are_refused(own_folder):
    config = own_folder / "config.json"
    changed = json.loads(config.read_text()) | {"num_hidden_layers": 3}
    config.write_text(json.dumps(changed))
    with pytest.raises(FlashError, match="do not fit its config.json"):
        load_model(own_folder)


def test_an_unknown_policy_is_refused(flash_folder):
    with pytest.raises(FlashError, match="Try lru, lrfu or window"):
        load_model(flash_folder, policy="mru")


# Closing


def resources():
    gc.collect()
    if sys.platform != "linux":
        return threading.active_count()
    links = Path("/proc/self/fd").iterdir()
    files = [os.readlink(fd) for fd in links if os.path.lexists(fd)]
    return sorted(f for f in files if "ffn" in f), len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("share", [0, 1])
def test_closing_leaves_no_file_and_no_thread(flash_folder, native, share):
    mx.eval(mx.zeros(1) + 1)  # MLX's own threads start with its first work
    before = resources()
    model = load(flash_folder, share, native=native)
    logits = model(random_tokens(1, 2))
    assert resources() != before
    model.flash.close()
    mx.eval(logits)  # what was computed before may still be looked at
    assert resources() == before
    model.flash.close()
    with pytest.raises(FlashError, match="This model was closed"):
        model(random_tokens(1, 2))
    with pytest.raises(FlashError, match="This model was closed"):
        model.flash.check_open()


def test_a_model_that_nobody_holds_is_closed(flash_folder):
    before = resources()
    model, _ = load_model(flash_folder, memory_for(flash_folder, 0), context=CONTEXT)
    mx.eval(model(random_tokens(1, 2)))
    del model
    assert resources() == before


def test_with_closes_also_after_an_error(flash_folder):
    with pytest.raises(KeyError):
        with load_model(flash_folder) as (model, config):
            assert config["model_type"] == "opt"
            assert not model.flash.closed
            raise KeyError
    assert model.flash.closed


def test_the_demo_model_loads_as_the_command_loads_it():
    """Its KV cache for all positions takes a third of half of its memory."""
    with mlx_flash.load(mlx_flash.DEMO_MODEL, memory="50%") as (model, tokenizer):
        budget = model.flash.budget
        assert budget.context == 128 and model.flash.positions == 512
        text = mlx_flash.generate(model, tokenizer, "Once upon a time", max_tokens=8)
        report = model.flash.report()
    assert text == ", there was a little girl named Lily"
    assert report.layers_from_flash == 4 and "8 tokens" in str(report)
    assert report.to_dict()["generation_tokens"] == 8


def test_the_least_is_a_number_that_works():
    with pytest.raises(mlx_flash.NotEnoughMemory) as error:
        mlx_flash.load_model(mlx_flash.DEMO_MODEL, 1_000_000)
    least = error.value.least_bytes
    with mlx_flash.load_model(mlx_flash.DEMO_MODEL, least) as (model, _):
        assert model.flash.budget.total_bytes == least
        assert model.flash.budget.context == 128
    with pytest.raises(mlx_flash.NotEnoughMemory, match="for 512 tokens"):
        mlx_flash.load_model(mlx_flash.DEMO_MODEL, least, context=512)
