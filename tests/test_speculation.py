"""Drafts change what is read, and no answer."""

import gc
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_resident, save_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from stock_checkpoints import LLAMA, NEMOTRON, QWEN3, stream, write_checkpoint

import mlx_flash
from mlx_flash.drafting import ModelDraft, NgramDraft
from mlx_flash.errors import FlashError, NotEnoughMemory
from mlx_flash.generation import stream_generate
from mlx_flash.layers import block
from mlx_flash.loading import load_tokenizer

PROMPT = [5, 17, 3, 80, 41, 9, 22, 60] * 2
RELU = LLAMA | {"hidden_act": "relu"}
KINDS = {  # config, converted, slots
    "blocks": (LLAMA, True, 2),
    "neurons": (RELU, True, 20),
    "experts": (QWEN3, False, 2),
}


def folder_of(base, config, converted, **options):
    stock = write_checkpoint(base / "stock", config)
    save_tokenizer(stock)
    if not converted:
        return stock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "BLOCK_BYTES", 16_000)
        return mlx_flash.convert(
            stock, base / "flash", rank=0, progress=False, **options
        )


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    config, converted, slots = KINDS[request.param]
    folder = folder_of(tmp_path_factory.mktemp("case"), config, converted)
    model, tokenizer = stream(folder, slots), load_tokenizer(folder)
    tokenizer.eos_token_ids = set()
    yield request.param, model, tokenizer
    model.flash.close()


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """(checkpoint, flash folder) of a dense model."""
    folder = folder_of(tmp_path_factory.mktemp("blocks"), LLAMA, True)
    return folder.parent / "stock", folder


def run(model, tokenizer, prompt=PROMPT, n=24, **options):
    list(stream_generate(model, tokenizer, prompt, max_tokens=n, **options))
    return model.flash.run.tokens


class Prophet:
    """A stand-in for a draft model: it knows the answer, and errs where told."""

    def __init__(self, answer, wrong=()):
        self.answer, self.wrong = answer, wrong

    def draft(self, known, most):
        at = len(known) - len(PROMPT)
        return [
            (token + (at + i in self.wrong)) % 97
            for i, token in enumerate(self.answer[at : at + most])
        ]


# Drafters


def test_ngrams_draft_what_followed_them_last():
    known = [1, 2, 3, 9, 2, 3, 7, 8, 5, 2, 3]
    assert NgramDraft(2).draft(known, 3) == [7, 8, 5]
    assert NgramDraft(3).draft([*known[:-2], 9, 2, 3], 2) == [7, 8], "the longest first"
    assert NgramDraft(3).draft([4, 1, 6, 2], 3) == [], "one token alone says little"
    assert NgramDraft(1).draft([4, 1, 6, 4], 2) == [1, 6]
    assert NgramDraft(2).draft([], 3) == NgramDraft(2).draft([1], 3) == []


def test_ngrams_go_around_where_a_text_turns_in_circles():
    assert NgramDraft(2).draft([1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]


def test_ngrams_take_in_what_came_since():
    draft, known = NgramDraft(2), [1, 2, 3]
    assert draft.draft(known, 2) == []
    known += [1, 2]
    assert draft.draft(known, 2) == [3, 1]
    known += [4, 1, 2]
    assert draft.draft(known, 1) == [4]


def test_a_model_drafts_what_it_would_say_whatever_was_rejected(blocks):
    model = load_resident(blocks[0])

    def says(known, most):
        known = list(known)
        for _ in range(most):
            known.append(mx.argmax(model(mx.array([known]))[0, -1]).item())
        return known[-most:]

    draft, known = ModelDraft(model, 97), list(PROMPT)
    rng = np.random.default_rng(0)
    for accepted in (0, 3, 1, 2, 0, 4, 3):
        drafted = draft.draft(known, 4)
        assert drafted == says(known, 4)
        known += [*drafted[:accepted], int(rng.integers(3, 97))]
    assert ModelDraft(model, 20).draft(PROMPT, 4) == []  # a token nobody knows
    assert ModelDraft(model, 97, context=16).draft(PROMPT, 1) == []


# Answers


@pytest.mark.parametrize("most", [1, 2, 8])
def test_ngrams_give_the_plain_answer(case, most):
    _, model, tokenizer = case
    plain = run(model, tokenizer, n=40)
    given = run(model, tokenizer, n=40, draft_ngrams=2, num_draft_tokens=most)
    assert given == plain
    assert model.flash.run.text == tokenizer.decode(plain)


@pytest.mark.parametrize("wrong", [(), {0}, {3, 4, 11}, range(99)], ids=str)
def test_drafts_give_the_plain_answer(case, wrong):
    kind, model, tokenizer = case
    plain = run(model, tokenizer)
    prophet = Prophet(plain, wrong)
    drafted = run(model, tokenizer, draft_model=prophet, num_draft_tokens=5)
    assert drafted == plain
    stats = model.flash.run.drafts
    assert stats.tokens >= 16 and stats.drafted
    if not wrong:
        assert stats.acceptance == 1 and stats.tokens_per_call > 3
    if len(wrong) == 99:
        assert stats.acceptance == 0 and stats.tokens_per_call == 1


@pytest.mark.parametrize("draft", ["ngrams", "prophet"])
def test_a_sampled_answer_is_the_one_of_the_same_seed(case, draft):
    _, model, tokenizer = case
    sampler = make_sampler(temp=0.6, top_p=0.9)
    mx.random.seed(3)
    plain = run(model, tokenizer, sampler=sampler)
    mx.random.seed(4)
    assert run(model, tokenizer, sampler=sampler) != plain
    options = {"draft_ngrams": 2}
    if draft == "prophet":
        prophet = Prophet(plain, {2, 7})
        options = {"draft_model": prophet}
    mx.random.seed(3)
    drafted = run(model, tokenizer, sampler=sampler, num_draft_tokens=4, **options)
    assert drafted == plain


def test_processors_see_what_they_would_see(case):
    _, model, tokenizer = case

    def processors():
        return make_logits_processors(repetition_penalty=1.5)

    plain = run(model, tokenizer, logits_processors=processors())
    assert plain != run(model, tokenizer)
    prophet = Prophet(plain, {5})
    options = {"draft_model": prophet, "num_draft_tokens": 4}
    assert run(model, tokenizer, logits_processors=processors(), **options) == plain


def test_a_real_draft_gives_the_plain_answer(blocks):
    checkpoint, folder = blocks
    with mlx_flash.load(folder, "400KB", context=64) as (model, tokenizer):
        tokenizer.eos_token_ids = set()
        plain = run(model, tokenizer)
        draft = load_resident(checkpoint)
        assert run(model, tokenizer, draft_model=draft, num_draft_tokens=4) == plain
        assert model.flash.run.drafts.acceptance > 0.9  # the same model
        assert run(model, tokenizer, draft_model=draft, num_draft_tokens=0) == plain
        assert model.flash.run.drafts is None


def test_an_end_token_within_a_draft_ends_the_answer(case):
    _, model, tokenizer = case
    plain = run(model, tokenizer)
    end = next(t for i, t in enumerate(plain) if i > 2 and t not in plain[:i])
    cut = plain[: plain.index(end) + 1]
    prophet = Prophet(plain)
    tokenizer.eos_token_ids = {end}
    try:
        assert run(model, tokenizer, draft_model=prophet, num_draft_tokens=8) == cut
        assert model.flash.run.text == tokenizer.decode(cut[:-1])
        assert model.flash.run.last.finish_reason == "stop"
    finally:
        tokenizer.eos_token_ids = set()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_so_many_tokens_and_no_more(case, n):
    _, model, tokenizer = case
    plain = run(model, tokenizer)
    prophet = Prophet(plain)
    assert (
        run(model, tokenizer, n=n, draft_model=prophet, num_draft_tokens=4)
        == (plain[:n])
    )
    assert model.flash.run.last.finish_reason == "length"
    assert model.flash.run.last.generation_tokens == n


# Caches


@pytest.mark.parametrize("stop", [None, 1, 3, 4, 9])
def test_a_cache_holds_what_was_said(case, stop):
    """Also when somebody stops in the middle of what one call brought."""
    _, model, tokenizer = case
    plain = run(model, tokenizer)
    prophet = Prophet(plain, {6})
    cache = make_prompt_cache(model)
    options = {"draft_model": prophet, "num_draft_tokens": 5, "prompt_cache": cache}
    steps = stream_generate(model, tokenizer, PROMPT, max_tokens=12, **options)
    said = []
    for response in steps:
        said.append(response.token)
        if len(said) == stop:
            steps.close()
            break
    held = cache[0].offset
    everything = len(PROMPT) + len(said)
    assert everything - 1 <= held <= everything
    assert held == everything or stop is not None
    going_on = [*(PROMPT + said)[held:], 33, 34]
    after = run(model, tokenizer, going_on, n=6, prompt_cache=cache)
    assert after == run(model, tokenizer, [*PROMPT, *said, 33, 34], n=6)


def test_caches_that_cannot_forget_are_refused(tmp_path):
    folder = folder_of(tmp_path, NEMOTRON, True)
    model, tokenizer = stream(folder, 2), load_tokenizer(folder)
    with pytest.raises(FlashError, match="cannot verify drafts.*ArraysCache"):
        run(model, tokenizer, draft_ngrams=2)
    model.flash.close()


def test_a_cache_that_rotates_is_refused(blocks):
    with mlx_flash.load(blocks[1], "400KB", context=64) as both:
        with pytest.raises(FlashError, match="cannot verify drafts.*Rotating"):
            run(*both, draft_ngrams=2, max_kv_size=32)
        assert run(*both, n=8, draft_ngrams=2, max_kv_size=32)


# Figures


def test_half_the_memory_and_good_drafts_save_reads(blocks):
    with mlx_flash.load(blocks[1], "360KB", context=64) as (model, tokenizer):
        tokenizer.eos_token_ids = set()
        assert not any(layer.slots.holds_all for layer in model.flash.layers)
        plain = run(model, tokenizer)
        before = model.flash.report()
        assert before.tokens_per_call is before.draft_acceptance is None
        prophet = Prophet(plain)
        run(model, tokenizer, draft_model=prophet, num_draft_tokens=3)
        report = model.flash.report()
        assert report.tokens_per_call > 3
        # The first steps of each find other units in memory.
        assert report.plain_bytes_per_token == pytest.approx(
            before.bytes_per_token, rel=0.1
        )
        assert report.bytes_per_token < before.bytes_per_token / 3
        assert "100% of the drafted tokens were right" in str(report)
        assert "does not pay" not in str(report)
        json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("options", [{}, {"draft_ngrams": 2}], ids=["plain", "drafts"])
def test_a_prompt_has_figures_of_its_own(case, options):
    """Not those of the second token, which mlx-lm begins before it gives the first."""
    kind, model, tokenizer = case
    stats = model.flash.stats
    run(model, tokenizer, n=3)  # nothing is left in memory that the first run lacked
    before = stats.copy()
    run(model, tokenizer, n=4, **options)
    report = model.flash.report()
    spent = stats - before
    assert 0 < report.prompt_bytes_read < spent.bytes_read
    if kind == "blocks" and not options:
        a_step = report.bytes_per_token
        assert report.prompt_bytes_read == spent.bytes_read - 4 * a_step
    parts = report.prompt_s
    assert min(parts.values()) >= 0
    assert parts["io"] + parts["cache"] + parts["compute"] == (
        pytest.approx(parts["total"])
    )
    assert report.prompt_tokens_per_s == pytest.approx(len(PROMPT) / parts["total"])
    assert parts["total"] <= report.time_to_first_token_s
    assert f"{report.prompt_bytes_read / 1e6:.1f} MB; first token" in str(report)


def test_the_report_says_where_drafts_do_not_pay(tmp_path):
    config = QWEN3 | {"num_experts": 32, "num_experts_per_tok": 2}
    folder = folder_of(tmp_path, config, False)
    model, tokenizer = stream(folder, 8), load_tokenizer(folder)
    tokenizer.eos_token_ids = set()
    plain = run(model, tokenizer, n=60)
    prophet = Prophet(plain, range(99))
    assert run(model, tokenizer, n=60, draft_model=prophet, num_draft_tokens=6) == plain
    report = model.flash.report()
    stats = model.flash.run.drafts
    assert stats.plain_calls == 5 and report.draft_acceptance == 0
    assert report.bytes_per_token > report.plain_bytes_per_token
    assert "does not pay here" in str(report)
    model.flash.close()


def test_predictors_keep_drafts_below_a_sweep(tmp_path):
    stock = write_checkpoint(tmp_path / "stock", RELU)
    save_tokenizer(stock)
    folder = mlx_flash.convert(
        stock, tmp_path / "flash", unit="neuron", rank=8, progress=False
    )
    model, tokenizer = stream(folder, 20), load_tokenizer(folder)
    tokenizer.eos_token_ids = set()
    assert "predictor" in model.flash.layers[0]
    plain = run(model, tokenizer, n=40)
    assert run(model, tokenizer, n=40, draft_ngrams=2, num_draft_tokens=8) == plain
    model.flash.close()


# The budget


def test_a_draft_counts_in_the_budget(blocks):
    checkpoint, folder = blocks
    options = {"context": 64, "draft_model": checkpoint}
    with mlx_flash.load(folder, "1GB", **options) as (model, _):
        draft_bytes = model.flash.draft_bytes
        weights = model.flash.draft.model.parameters()
        assert draft_bytes > sum(array.nbytes for _, array in tree_flatten(weights))
    with mlx_flash.load(folder, 400_000, context=64) as (alone, _):
        budget = alone.flash.budget
    del model, alone, weights
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory()
    memory = 400_000 + draft_bytes
    with mlx_flash.load(folder, memory, **options) as (model, tokenizer):
        tokenizer.eos_token_ids = set()
        flash = model.flash
        assert flash.budget == budget
        limit = mx.set_memory_limit(10**9)
        mx.set_memory_limit(limit)
        assert limit >= memory
        tokens = run(model, tokenizer, n=40)
        assert flash.run.drafts.acceptance > 0.9
        report = flash.report()
        assert report.memory_budget_bytes == memory
        assert report.peak_memory_bytes - others <= memory
        assert run(model, tokenizer, n=40, num_draft_tokens=0) == tokens
        flash.resize(memory + 100_000)
        assert flash.report().memory_budget_bytes == memory + 100_000
        assert flash.budget.total_bytes == 500_000
    with pytest.raises(NotEnoughMemory, match="with the draft") as caught:
        mlx_flash.load(folder, 450_000, **options)
    least = caught.value.least_bytes
    mlx_flash.load(folder, least, **options)[0].flash.close()


def test_a_share_of_the_model_includes_the_draft(blocks):
    checkpoint, folder = blocks
    options = {"context": 64, "draft_model": checkpoint}
    with mlx_flash.load(folder, "800%", **options) as (model, _):
        flash = model.flash
        total = flash.budget.total_bytes + flash.draft_bytes
        assert total == 8 * flash.manifest.model_bytes


def test_drafts_that_cannot_be_are_refused(blocks, tmp_path):
    checkpoint, folder = blocks
    with pytest.raises(FlashError, match="is a flash folder"):
        mlx_flash.load(folder, draft_model=folder)
    with pytest.raises(FlashError, match="no usable tokenizer"):
        bare = write_checkpoint(tmp_path / "bare", LLAMA)
        mlx_flash.load(folder, draft_model=bare)
    save_tokenizer(bare)
    words = bare / "tokenizer.json"
    words.write_text(words.read_text().replace('"w50"', '"v50"'))
    with pytest.raises(FlashError, match="another tokenizer"):
        mlx_flash.load(folder, draft_model=bare)
    state = write_checkpoint(tmp_path / "state", NEMOTRON)
    save_tokenizer(state)
    with pytest.raises(FlashError, match="cannot forget"):
        mlx_flash.load(folder, draft_model=state)
