"""Generating with flash is generating with mlx-lm, and the figures are true."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from conftest import load_resident, save_tokenizer, write_checkpoint
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

import mlx_flash
from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError
from mlx_flash.generation import generate, stream_generate
from mlx_flash.prompts import context_for, encode_prompt

PROMPT = [5, 17, 3, 80, 41, 9]
TEXT = "w5 w17 w3 w80 w41 w9"
POSITIONS = 64
FIGURES = {
    "model_bytes",
    "resident_bytes",
    "predictor_bytes",
    "slot_bytes",
    "memory_budget_bytes",
    "peak_memory_bytes",
    "layers_from_flash",
    "layers_total",
    "prompt_tokens_per_s",
    "tokens_per_s",
    "ms_per_token",
    "bytes_per_token",
    "reads_per_token",
    "read_gb_per_s",
    "hit_rate",
    "predictor_recall",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model whose greedy answers vary, with a tokenizer of one word a token."""
    folder = write_checkpoint(tmp_path_factory.mktemp("g") / "c", seed=4, ffn_dim=512)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(checkpoint):
    return convert(
        checkpoint,
        checkpoint.parent / "flash",
        unit="neuron",
        rank=8,
        calibration_tokens=256,
        progress=False,
    )


@pytest.fixture(params=[True, False], ids=["predicted", "exact"])
def loaded(request, folder):
    with load(folder, predictor=request.param) as both:
        yield both


def load(folder, memory="400KB", **options):
    loaded = mlx_flash.load(
        folder, memory, context=POSITIONS, page_cache=True, **options
    )
    assert not any(layer.slots.holds_all for layer in loaded[0].flash.layers)
    loaded[1].eos_token_ids = set()  # answers of a known length
    return loaded


def run(model, tokenizer, prompt=PROMPT, n=12, **options):
    """The token ids of an answer."""
    list(stream_generate(model, tokenizer, prompt, max_tokens=n, **options))
    return model.flash.run.tokens


# As mlx-lm does it


def test_answers_are_those_of_mlx_lm_on_the_same_model(loaded):
    model, tokenizer = loaded
    tokens = run(model, tokenizer)
    assert len(set(tokens)) > 4, "an answer that repeats itself proves little"
    theirs = list(mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=12))
    assert tokens == [response.token for response in theirs]
    text = generate(model, tokenizer, PROMPT, max_tokens=12)
    assert text == mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=12)
    assert text == generate(model, tokenizer, TEXT, max_tokens=12)
    assert text == model.flash.run.text == tokenizer.decode(tokens)


def test_exact_answers_are_those_of_the_resident_model(checkpoint, folder):
    model, tokenizer = load(folder, predictor=False)
    theirs = mlx_lm.stream_generate(
        load_resident(checkpoint), tokenizer, PROMPT, max_tokens=20
    )
    assert run(model, tokenizer, n=20) == [response.token for response in theirs]
    model.flash.close()


def test_a_chunked_prompt_gives_the_same_answer(folder):
    model, tokenizer = load(folder, predictor=False)
    whole = run(model, tokenizer, PROMPT * 4)
    for step in (1, 5, 7):
        assert run(model, tokenizer, PROMPT * 4, prefill_step_size=step) == whole
    model.flash.close()


def test_a_long_prompt_has_slots_give_way_until_it_is_read(loaded, monkeypatch):
    """Chunks longer than the usual workspace holds, so that units are read less."""
    model, tokenizer = loaded
    widths, flash = [], model.flash
    layer = type(flash.layers[0])
    call = layer.__call__

    def note(self, x):
        widths.append((x.shape[1], sum(ffn.slots.n_slots for ffn in flash.layers)))
        return call(self, x)

    monkeypatch.setattr(layer, "__call__", note)
    run(model, tokenizer, PROMPT * 8, n=2)
    usual = sum(flash.budget.slots)
    longest, slots = max(widths)
    assert longest > flash.budget.prefill_tokens and slots < usual
    assert widths[-1] == (1, usual)


@pytest.mark.parametrize("seed", [4, 5])
def test_speculative_decoding_gives_the_plain_answer(loaded, tmp_path, seed):
    """A draft that always agrees (the model itself), and one that seldom does."""
    model, tokenizer = loaded
    draft = load_resident(write_checkpoint(tmp_path / "draft", seed=seed, ffn_dim=512))
    plain = run(model, tokenizer)
    options = {"draft_model": draft, "num_draft_tokens": 2}
    assert run(model, tokenizer, **options) == plain
    steps = speculative_generate_step(
        mx.array(PROMPT), model, draft, max_tokens=12, num_draft_tokens=2
    )
    drafted = [(token, from_draft) for token, _, from_draft in steps]
    assert [token for token, _ in drafted] == plain
    assert any(from_draft for _, from_draft in drafted) or seed == 5


def test_a_flash_model_can_be_the_draft_of_a_flash_model(folder):
    model, tokenizer = load(folder, predictor=False)
    draft, _ = load(folder)
    plain = run(model, tokenizer)
    assert run(model, tokenizer, draft_model=draft, num_draft_tokens=3) == plain
    model.flash.close()
    draft.flash.close()


def test_a_saved_prompt_cache_goes_on_where_it_was(loaded, tmp_path):
    model, tokenizer = loaded
    plain = run(model, tokenizer)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([PROMPT[:-1]]), cache=cache))
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    for _ in range(2):
        again = load_prompt_cache(str(tmp_path / "cache.safetensors"))
        assert run(model, tokenizer, PROMPT[-1:], prompt_cache=again) == plain


def test_a_batch_gives_what_each_prompt_gives_alone(loaded):
    model, tokenizer = loaded
    prompts = [PROMPT, [9, 12, 77, 30, 8, 61, 44, 20]]
    alone = [run(model, tokenizer, prompt) for prompt in prompts]
    together = mlx_lm.batch_generate(
        model, tokenizer, prompts, max_tokens=12, return_token_ids=True
    )
    assert together.token_ids == alone


def test_an_end_token_ends_the_answer(folder):
    model, tokenizer = load(folder)
    plain = run(model, tokenizer)
    end = next(t for i, t in enumerate(plain) if i > 2 and t not in plain[:i])
    tokenizer.eos_token_ids = {end}
    cut = run(model, tokenizer)
    assert cut == plain[: plain.index(end) + 1]
    assert model.flash.run.text == tokenizer.decode(cut[:-1])
    assert model.flash.run.last.finish_reason == "stop"
    model.flash.close()


# Prompts


@pytest.mark.parametrize("prompt", ["", "  \n", [], mx.array([], mx.int32)], ids=repr)
def test_an_empty_prompt_is_refused(loaded, prompt):
    with pytest.raises(FlashError, match="prompt is empty"):
        generate(*loaded, prompt)


def test_prompts_in_any_form_are_the_same_tokens(loaded):
    tokenizer = loaded[1]
    for prompt in (TEXT, PROMPT, tuple(PROMPT), mx.array(PROMPT)):
        assert encode_prompt(tokenizer, prompt) == PROMPT


@pytest.mark.parametrize("length", [POSITIONS, POSITIONS + 1, 3 * POSITIONS])
def test_a_prompt_without_room_for_an_answer_is_refused(loaded, length):
    with pytest.raises(FlashError, match=f"prompt has {length} tokens.* 64 positions"):
        generate(*loaded, [7] * length)
    assert loaded[0].flash.stats.misses == 0, "something was read first"


@pytest.mark.parametrize("asked", [8, 100, -1])
def test_answers_end_at_the_last_position(loaded, asked):
    tokens = run(*loaded, [7] * (POSITIONS - 8), n=asked)
    assert len(tokens) == 8
    assert len(run(*loaded, [7] * (POSITIONS - 8), n=3)) == 3


def test_what_a_prompt_cache_holds_counts_as_prompt(loaded):
    model, tokenizer = loaded
    cache = make_prompt_cache(model)
    assert len(run(model, tokenizer, [7] * 50, n=4, prompt_cache=cache)) == 4
    held = cache[0].offset
    assert held >= 53
    assert len(run(model, tokenizer, [8], n=-1, prompt_cache=cache)) == 64 - held - 1
    with pytest.raises(FlashError, match="positions"):
        run(model, tokenizer, [8], n=-1, prompt_cache=cache)


def test_no_tokens_are_refused_as_mlx_lm_does(loaded):
    with pytest.raises(ValueError, match="non-zero"):
        run(*loaded, n=0)


def test_the_context_to_reserve(folder):
    assert context_for(folder, 10, 20) == 30
    assert context_for(folder, 10, 200) == POSITIONS
    assert context_for(folder, 10, -1) is None


# Figures


class Count:
    """Counts what a reader is asked and what it says it did."""

    def __init__(self, flash, monkeypatch):
        self.bytes = self.reads = self.units = 0
        reader = flash._reader
        submit, wait = reader.submit, reader.wait

        def counted_submit(source, units, slots):
            self.units += len(units)
            return submit(source, units, slots)

        def counted_wait(ticket):
            result = wait(ticket)
            self.reads += result.reads
            self.bytes += result.bytes_read
            return result

        monkeypatch.setattr(reader, "submit", counted_submit)
        monkeypatch.setattr(reader, "wait", counted_wait)


@pytest.mark.parametrize("policy", ["lru", "window"])
@pytest.mark.parametrize("predictor", [True, False])
def test_bytes_and_reads_are_what_the_reader_was_asked(
    folder, monkeypatch, predictor, policy
):
    model, tokenizer = load(folder, predictor=predictor, policy=policy, window=2)
    count = Count(model.flash, monkeypatch)
    counts = []
    asked = model.flash.stats.hits + model.flash.stats.misses
    for _ in stream_generate(model, tokenizer, PROMPT, max_tokens=12):
        stats = model.flash.stats
        counts.append((count.bytes, count.reads, count.units, stats.hits))
    figures = model.flash.report().to_dict()
    (b0, r0, m0, h0), *_, (b1, r1, m1, h1) = counts
    assert b1 > b0 > 0 == asked
    assert figures["bytes_per_token"] == (b1 - b0) / 11
    assert figures["reads_per_token"] == (r1 - r0) / 11
    assert figures["hit_rate"] == (h1 - h0) / (h1 - h0 + m1 - m0)
    assert stats.bytes_read == b1 and stats.misses == m1
    # With what lies between units that one read brings
    assert b1 - b0 >= (m1 - m0) * model.flash.manifest.layers[0].unit_bytes
    if not predictor:
        assert figures["bytes_per_token"] <= model.flash.manifest.ffn_bytes
    model.flash.close()


def test_every_figure_is_there_before_and_after(loaded):
    model, tokenizer = loaded
    flash = model.flash
    for n in (0, 1, 2, 9):
        tokens = run(model, tokenizer, n=n) if n else []
        figures = flash.report().to_dict()
        assert figures.keys() >= FIGURES
        json.dumps(figures, allow_nan=False)
        assert figures["ms_per_token"].keys() == {"io", "cache", "compute", "total"}
        assert (figures["layers_from_flash"], figures["layers_total"]) == (2, 2)
        assert figures["memory_budget_bytes"] == 400_000
        assert figures["model_bytes"] == flash.manifest.model_bytes
        assert figures["resident_bytes"] == flash.manifest.resident.bytes
        assert figures["layers_held_whole"] == 0
        decoded = [
            figures[k] for k in ("tokens_per_s", "bytes_per_token", "reads_per_token")
        ]
        assert all(x is None for x in decoded) == (n < 2)
        assert (figures["prompt_tokens_per_s"] is None) == (n == 0)
        assert len(tokens) == n
        if n > 1:
            ms = figures["ms_per_token"]
            assert min(ms.values()) >= 0
            parts = ms["io"] + ms["cache"] + ms["compute"]
            assert parts == pytest.approx(ms["total"])
            assert figures["tokens_per_s"] == pytest.approx(1e3 / ms["total"])


def test_recall_is_measured_on_the_prompt_or_taken_from_the_conversion(folder):
    model, tokenizer = load(folder)
    run(model, tokenizer)
    stats = model.flash.stats
    assert model.flash.report().predictor_recall == stats.predictor_recall
    assert 0.3 < stats.predictor_recall <= 1
    run(model, tokenizer, PROMPT[:2])  # too short for a sweep
    recorded = [layer.predictor.recall for layer in model.flash.manifest.layers]
    assert model.flash.report().predictor_recall == sum(recorded) / 2
    model.flash.close()


def test_without_predictor_there_is_no_recall(folder):
    model, tokenizer = load(folder, predictor=False)
    run(model, tokenizer)
    assert model.flash.report().predictor_recall is None
    model.flash.close()


def test_a_model_held_whole_reads_nothing(folder):
    with mlx_flash.load(folder, "20MB", context=POSITIONS) as (model, tokenizer):
        generate(model, tokenizer, PROMPT, max_tokens=3)
    figures = model.flash.report().to_dict()  # also after closing
    assert figures["layers_held_whole"] == figures["layers_from_flash"] == 2
    assert figures["bytes_per_token"] == 0
    assert figures["hit_rate"] is figures["read_gb_per_s"] is None
    assert "2 of them held whole" in str(model.flash.report())


def test_the_second_run_is_counted_on_its_own(loaded):
    model, tokenizer = loaded
    run(model, tokenizer, n=12)
    before = model.flash.stats.copy()
    run(model, tokenizer, [3], n=2)
    figures, stats = model.flash.report().to_dict(), model.flash.stats
    assert figures["bytes_per_token"] < stats.bytes_read - before.bytes_read
    assert model.flash.run.last.prompt_tokens == 1


def test_the_summary_says_what_the_report_says(loaded):
    model, tokenizer = loaded
    assert str(model.flash.report()) == "nothing was generated"
    run(model, tokenizer, n=1)
    assert "generation" not in str(model.flash.report())
    run(model, tokenizer, n=5)
    text, figures = str(model.flash.report()), model.flash.report().to_dict()
    assert "6 tokens" in text and "5 tokens" in text
    assert f"{figures['tokens_per_s']:.1f} tokens/s" in text
    assert "budget 0.4 MB" in text
    assert "2 of 2 FFN layers from flash" in text
    assert ("predictor" in text) == ("predictor" in model.flash.layers[0])


def test_verbose_prints_the_text_and_the_summary(loaded, capsys):
    text = generate(*loaded, PROMPT, max_tokens=4, verbose=True)
    assert capsys.readouterr().out == f"{text}\n{str(loaded[0].flash.report())}\n"


# The end


def test_a_closed_model_says_so(folder):
    with load(folder) as (model, tokenizer):
        generate(model, tokenizer, PROMPT, max_tokens=3)
    with pytest.raises(FlashError, match="This model was closed"):
        generate(model, tokenizer, PROMPT)
    with pytest.raises(FlashError, match="This model was closed"):
        mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=3)
    assert model.flash.report().tokens_per_s > 0
    assert "3 tokens" in str(model.flash.report())


def test_an_answer_left_half_way_can_be_started_again(loaded):
    model, tokenizer = loaded
    plain = run(model, tokenizer)
    for response in stream_generate(model, tokenizer, PROMPT, max_tokens=12):
        if response.generation_tokens == 3:
            break
    assert run(model, tokenizer) == plain


def test_a_read_error_in_an_answer_names_the_file(folder, tmp_path):
    import os
    import shutil

    own = shutil.copytree(folder, tmp_path / "own")
    with load(own) as (model, tokenizer):
        plain = run(model, tokenizer)
        path = own / "ffn" / "layer_00.safetensors"
        sound, when = path.read_bytes(), os.stat(path)
        os.truncate(path, 20_000)
        with pytest.raises(FlashError, match="layer_00.safetensors"):
            run(model, tokenizer)
        with open(path, "r+b") as file:
            file.write(sound)
        os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
        assert run(model, tokenizer) == plain


def test_a_folder_without_tokenizer_says_what_to_copy(flash_folder):
    with pytest.raises(FlashError, match="Copy the files"):
        mlx_flash.load(flash_folder)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_end_generation(loaded, value, dtype):
    """In the middle of an answer, and at whichever token the number is missing."""

    def spoil(tokens, logits):
        if len(tokens) == len(PROMPT) + 2:
            logits[:, 40] = value
        return logits.astype(dtype)

    model, tokenizer = loaded
    texts = []
    with pytest.raises(FlashError, match="no numbers"):
        for step in stream_generate(
            model, tokenizer, PROMPT, logits_processors=[spoil]
        ):
            texts.append(step.text)
    assert len(texts) == 2
