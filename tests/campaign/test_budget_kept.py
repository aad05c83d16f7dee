"""What MLX allocates stays below the budget that a model was loaded with.

Models of 38 to 50 MB in 60 % of that: far enough from everything for rounding to be
nothing. What was there before a model is not counted, and neither is a draft model.
"""

import gc

import mlx.core as mx
import pytest
from conftest import save_tokenizer
from mlx_lm import batch_generate
from stock_checkpoints import LLAMA, QWEN3, make_weights, write_checkpoint

import mlx_flash

WIDE = dict(
    hidden_size=256, num_hidden_layers=6, intermediate_size=2048, head_dim=64
)  # 38 MB
RELU = LLAMA | WIDE | {"hidden_act": "relu"}
EXPERTS = QWEN3 | WIDE | {"moe_intermediate_size": 512, "num_hidden_layers": 4}  # 50 MB
PLAIN = {"rank": 0}
PREDICTED = {"rank": 16, "unit": "neuron", "calibration_tokens": 128, "fit_steps": 3}
# name → config, and how it is converted (None: it stays in place)
KINDS = {
    "neurons": (RELU, PLAIN | {"unit": "neuron"}),
    "predicted neurons": (RELU, PREDICTED),
    "blocks": (LLAMA | WIDE, PLAIN),
    "experts in place": (EXPERTS, None),
    "converted experts": (EXPERTS, PLAIN),
}
PROMPT = [3 + i % 90 for i in range(600)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(kind) → a folder of it, made once."""
    made = {}

    def make(name):
        if name not in made:
            config, options = KINDS[name]
            base = tmp_path_factory.mktemp("made")
            folder = write_checkpoint(base / "source", config)
            save_tokenizer(folder)
            if options is not None:
                folder = mlx_flash.convert(
                    folder, base / "flash", progress=False, **options
                )
            made[name] = folder
        return made[name]

    return make


class Meter:
    """The most that MLX held since the meter was made, beyond what it held before.

    `peak_bytes` is what arrays took, `cached_bytes` what they took together with
    buffers that MLX keeps to use again.
    """

    def __init__(self):
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        self.before = mx.get_active_memory()
        self.cached_bytes = 0

    @property
    def peak_bytes(self):
        return mx.get_peak_memory() - self.before

    def look(self):
        now = mx.get_active_memory() + mx.get_cache_memory() - self.before
        self.cached_bytes = max(self.cached_bytes, self.peak_bytes, now)


def load_alone(model, tokenizer, meter, draft):
    meter.look()


def answer(model, tokenizer, meter, prompt, tokens, **options):
    for _ in mlx_flash.stream_generate(
        model, tokenizer, prompt, max_tokens=tokens, **options
    ):
        meter.look()


def long_prompt(model, tokenizer, meter, draft):
    answer(model, tokenizer, meter, PROMPT, 1)


def many_tokens(model, tokenizer, meter, draft):
    answer(model, tokenizer, meter, PROMPT[:8], 200)


def short_answer(model, tokenizer, meter, draft):
    answer(model, tokenizer, meter, PROMPT[:100], 30)


def batch_of_four(model, tokenizer, meter, draft):
    prompts = [PROMPT[i : i + 100] for i in range(4)]
    batch_generate(model, tokenizer, prompts, max_tokens=20)
    meter.look()


def with_a_draft(model, tokenizer, meter, draft):
    answer(model, tokenizer, meter, PROMPT[:100], 50, draft_model=draft)


USES = load_alone, long_prompt, many_tokens, batch_of_four, with_a_draft
# What is known to take more than the budget, as a share of it: (kind, use) → share
# (mlx-lm reads the prompts of a batch in chunks of its own size; a predictor's choice
# is gathered into arrays of ever other sizes, and MLX keeps the buffers of all).
ABOVE_PEAK = {
    ("neurons", "batch_of_four"): 1.27,
    ("predicted neurons", "batch_of_four"): 1.34,
    ("blocks", "batch_of_four"): 1.20,
    ("experts in place", "batch_of_four"): 1.11,
    ("converted experts", "batch_of_four"): 1.12,
}
ABOVE_CACHED = ABOVE_PEAK | {
    ("predicted neurons", "long_prompt"): 1.31,
    ("predicted neurons", "many_tokens"): 1.42,
    ("predicted neurons", "with_a_draft"): 1.13,
}


def cases(above):
    """Every kind and use; those above the budget are expected to be."""
    for name in KINDS:
        for use in USES:
            share = above.get((name, use.__name__))
            reason = f"takes {share} of the budget"
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if share else []
            yield pytest.param(name, use, marks=marks, id=f"{name}-{use.__name__}")


@pytest.fixture(scope="module")
def measured(folders):
    """measured(kind, use) → (peak, peak with MLX's cache) as shares of the budget."""
    known = {}

    def measure(name, use):
        if (name, use) not in known:
            folder = folders(name)
            draft = make_weights(LLAMA)
            mx.eval(draft.parameters())
            meter = Meter()
            with mlx_flash.load(folder, "60%") as (model, tokenizer):
                use(model, tokenizer, meter, draft)
                meter.look()
                total = model.flash.budget.total_bytes
            shares = meter.peak_bytes / total, meter.cached_bytes / total
            known[name, use] = shares
            print(f"{name}, {use.__name__}: {shares[0]:.2f}, {shares[1]:.2f}")
        return known[name, use]

    return measure


@pytest.mark.parametrize("name", ["neurons", "experts in place"])
def test_a_short_answer_keeps_the_budget(name, measured):
    assert max(measured(name, short_answer)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name, use", list(cases(ABOVE_PEAK)))
def test_the_peak_keeps_the_budget(name, use, measured):
    peak, _ = measured(name, use)
    assert peak <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name, use", list(cases(ABOVE_CACHED)))
def test_the_cache_keeps_the_budget(name, use, measured):
    _, cached = measured(name, use)
    assert cached <= 1
