"""`generate` with drafts, quantised or bounded KV caches, and prompt caches."""

import json

import pytest
from conftest import save_tokenizer
from stock_checkpoints import LLAMA, NEMOTRON, write_checkpoint
from test_commands import refused, run

import mlx_flash
from mlx_flash.layers import block

WIDE_HEADS = LLAMA | {"head_dim": 32}  # as a quantised cache wants them
TEXT = "w5 w17 w3 w80 w41 w9 w5 w17 w3 w80 w41 w9"
MEMORY = ("--memory", "600KB")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("options") / "stock", WIDE_HEADS)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def flash(stock):
    return converted(stock)


def converted(stock):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "BLOCK_BYTES", 16_000)
        return mlx_flash.convert(stock, stock.parent / "flash", rank=0, progress=False)


def answer(flash, *options, text=TEXT, n=16, memory=MEMORY):
    args = "--model", flash, "-m", n, "--json", *memory, *options
    result = run("generate", text, *args)
    found = json.loads(result.stdout)
    return found | {"said": result.stderr}


# Drafts


def test_ngrams_give_the_same_text_in_fewer_calls(flash):
    plain = answer(flash, n=60)
    drafted = answer(flash, "--draft-ngrams", 3, "--num-draft-tokens", 6, n=60)
    assert drafted["tokens"] == plain["tokens"]
    stats = drafted["stats"]
    assert stats["tokens_per_call"] >= 1 and stats["plain_bytes_per_token"]
    assert plain["stats"]["tokens_per_call"] is None


def test_a_draft_model_counts_in_memory(flash, stock):
    plain = answer(flash)
    memory = "--memory", "2MB"
    drafted = answer(flash, "--draft-model", stock, memory=memory)
    assert drafted["tokens"] == plain["tokens"]
    stats = drafted["stats"]
    assert stats["draft_acceptance"] > 0.9 and stats["draft_bytes"] > 200_000
    assert stats["memory_budget_bytes"] == 2_000_000
    args = "--model", flash, *MEMORY, "--draft-model", stock
    assert "with the draft" in refused("generate", TEXT, *args)
    args = "--model", flash, *memory, "--draft-model", stock
    text = run("generate", TEXT, *args).stderr
    assert "of the drafted tokens were right" in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--draft-model", "x", "--draft-ngrams", 2], "Either"),
        (["--max-kv-size", 32, "--kv-bits", 4], "neither"),
        (["--max-kv-size", 32, "--prompt-cache", "x.safetensors"], "neither"),
        (["--draft-ngrams", 0], "range"),
        (["--kv-bits", 7], "'7' is not one of"),
    ],
)
def test_options_that_exclude_each_other(flash, options, message):
    assert message in refused("generate", TEXT, "--model", flash, *options, code=2)


def test_a_draft_that_does_not_exist(flash):
    assert "does not exist" in refused(
        "generate", TEXT, "--model", flash, *MEMORY, "--draft-model", "nowhere"
    )


# KV caches


def test_a_quantised_cache(flash):
    options = "--kv-group-size", 32, "--quantized-kv-start", 0
    plain = answer(flash)["tokens"]
    assert answer(flash, *options)["tokens"] == plain
    eight = answer(flash, "--kv-bits", 8, *options)["tokens"]
    two = answer(flash, "--kv-bits", 2, *options)["tokens"]
    assert len(eight) == len(two) == len(plain)
    assert two != plain
    drafted = answer(flash, "--kv-bits", 8, *options, "--draft-ngrams", 2)
    assert drafted["tokens"] == eight


def test_a_cache_that_cannot_be_quantised_so(flash):
    options = "--kv-bits", 4, "--kv-group-size", 128, "--quantized-kv-start", 0
    args = "--model", flash, *MEMORY, *options
    result = run("generate", TEXT, *args, code=1)
    assert "cannot be quantised" in result.stderr.splitlines()[-1]


def test_other_errors_are_not_taken_for_one_of_the_cache(flash):
    def sampler(logprobs):
        raise ValueError("no such sampler")

    with mlx_flash.load(flash, "1GB", context=64) as (model, tokenizer):
        steps = mlx_flash.stream_generate(
            model, tokenizer, TEXT, 4, kv_bits=8, kv_group_size=32, sampler=sampler
        )
        with pytest.raises(ValueError, match="no such sampler"):
            list(steps)


def test_a_bounded_cache(flash):
    plain = answer(flash, n=60)
    wide = answer(flash, "--max-kv-size", 200, n=60)
    assert wide["tokens"] == plain["tokens"]
    narrow = answer(flash, "--max-kv-size", 16, n=60)
    assert narrow["tokens"][:2] == plain["tokens"][:2]
    assert narrow["tokens"] != plain["tokens"]
    stats = narrow["stats"]
    assert stats["slot_bytes"] >= wide["stats"]["slot_bytes"]


# Prompt caches


@pytest.mark.parametrize("config", [WIDE_HEADS, NEMOTRON], ids=["kv", "state"])
def test_a_prompt_goes_on_where_its_file_ends(tmp_path, config):
    stock = write_checkpoint(tmp_path / "stock", config)
    save_tokenizer(stock)
    flash, file = converted(stock), tmp_path / "cache.safetensors"
    memory = "--memory", "1MB"
    first = answer(flash, "--prompt-cache", file, memory=memory, n=6)
    assert first["cached_tokens"] == 0 and file.exists()
    said = " ".join(f"w{token}" for token in first["tokens"])
    longer = f"{TEXT} {said} w50 w60 w70"
    plain = answer(flash, text=longer, memory=memory)
    again = answer(flash, "--prompt-cache", file, text=longer, memory=memory)
    assert again["tokens"] == plain["tokens"]
    assert again["cached_tokens"] == 12 + 6
    assert again["prompt_tokens"] == 21 and again["stats"]["prompt_tokens"] == 3
    assert again["said"] == ""


@pytest.mark.parametrize("draft", [(), ("--draft-ngrams", 2)], ids=["plain", "drafts"])
def test_a_prompt_that_only_begins_like_the_file(flash, tmp_path, draft):
    file = tmp_path / "cache.safetensors"
    options = "--prompt-cache", file, *draft
    assert answer(flash, *options)["tokens"] == answer(flash)["tokens"]
    for text, cached in ((TEXT, 11), ("w5 w17 w3 w4 w4", 3), ("w9 w9", 0)):
        given = answer(flash, *options, text=text)
        assert given["tokens"] == answer(flash, text=text)["tokens"]
        assert given["cached_tokens"] == cached


def test_files_that_cannot_be_trusted_are_named_and_replaced(flash, tmp_path):
    file = tmp_path / "cache.safetensors"
    plain = answer(flash)["tokens"]

    def spoil():
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)

    def cut():
        file.write_bytes(file.read_bytes()[:200])

    def other_model():
        stock = write_checkpoint(tmp_path / "stock", WIDE_HEADS, seed=9)
        save_tokenizer(stock)
        answer(converted(stock), "--prompt-cache", file)

    for damage in (spoil, cut, other_model):
        answer(flash, "--prompt-cache", file)
        damage()
        given = answer(flash, "--prompt-cache", file)
        assert given["tokens"] == plain and given["cached_tokens"] == 0
        assert given["said"].startswith("Not used: ")
        assert len(given["said"].splitlines()) == 1
        assert answer(flash, "--prompt-cache", file)["said"] == ""
    quantised = "--kv-bits", 8, "--kv-group-size", 32
    other = answer(flash, "--prompt-cache", file, *quantised)
    assert "other settings" in other["said"]


def test_names_that_cannot_be_written_are_refused_first(flash, tmp_path):
    args = "generate", TEXT, "--model", flash, "--prompt-cache"
    assert "must end in .safetensors" in refused(*args, tmp_path / "cache.npz")
    assert "is no folder" in refused(*args, tmp_path / "none" / "c.safetensors")
