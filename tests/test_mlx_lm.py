"""mlx-lm's own functions on models of every unit, with few slots, as if resident."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import save_tokenizer
from mlx_lm import batch_generate, stream_generate
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.utils import load_model as mlx_load_model
from stock_checkpoints import LLAMA, NEMOTRON, QWEN3, stream, write_checkpoint

import mlx_flash
from mlx_flash.layers import block
from mlx_flash.loading import load_tokenizer
from mlx_flash.models.registry import get_model_classes

PROMPT = list(range(5, 45))
FOUR_BITS = {"group_size": 32, "bits": 4}
WIDE_HEADS = LLAMA | {"head_dim": 32}  # as a quantised cache wants them
RELU = WIDE_HEADS | {"hidden_act": "relu"}
# name → config, quantisation of the checkpoint, whether it is converted, and slots
KINDS = {
    "neurons": (RELU, None, True, 20),
    "blocks": (WIDE_HEADS, None, True, 2),
    "experts in place": (QWEN3, FOUR_BITS, False, 2),
    "experts": (NEMOTRON, None, True, 2),
}


class Case:
    """One checkpoint: the model as mlx-lm has it, and streamed with few slots."""

    def __init__(self, base, config, quantize, converted, slots):
        self.stock = self.folder = write_checkpoint(base / "stock", config, quantize)
        self.exact = config in (QWEN3, NEMOTRON)  # to the bit: nothing is summed anew
        self.converted = converted
        save_tokenizer(self.stock)
        if converted:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(block, "BLOCK_BYTES", 16_000)
                self.folder = mlx_flash.convert(
                    self.stock, base / "flash", rank=0, progress=False
                )
        self.resident, _ = mlx_load_model(
            self.stock, get_model_classes=get_model_classes
        )
        self.model = stream(self.folder, slots)
        assert not any(layer.slots.holds_all for layer in self.model.flash.layers)
        self.tokenizer = load_tokenizer(self.folder)

    def same(self, run):
        """That `run(model)`, tokens and their log probabilities, is the same twice."""
        expected, actual = run(self.resident), run(self.model)
        tokens = [[t for t, _ in each] for each in (expected, actual)]
        assert tokens[0] == tokens[1] and len(set(tokens[0])) > 2
        scores = np.array([[s for _, s in each] for each in (expected, actual)])
        assert np.abs(scores[0] - scores[1]).max() <= (0 if self.exact else 2e-5)


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    made = Case(tmp_path_factory.mktemp("case"), *KINDS[request.param])
    yield made
    made.model.flash.close()


def tokens_of(model, tokenizer, **options):
    options = {"max_tokens": 12} | options
    responses = stream_generate(model, tokenizer, PROMPT, **options)
    return [(r.token, r.logprobs[r.token].item()) for r in responses]


def test_generate(case):
    texts = [
        mlx_lm.generate(m, case.tokenizer, PROMPT, max_tokens=12)
        for m in (case.resident, case.model)
    ]
    assert texts[0] == texts[1] and texts[0].split()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_step_size": 7},
        {"max_kv_size": 16},
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
    ],
    ids=["plain", "small chunks", "rotating cache", "quantised cache"],
)
def test_stream_generate(case, options):
    case.same(lambda model: tokens_of(model, case.tokenizer, **options))


def test_batch_generate(case):
    prompts = [PROMPT[:9], PROMPT, [7, 8, 9]]
    expected, actual = (
        batch_generate(
            m, case.tokenizer, prompts, max_tokens=10, return_token_ids=True
        ).token_ids
        for m in (case.resident, case.model)
    )
    assert actual == expected and all(expected)


def test_a_saved_prompt_cache_goes_on(case, tmp_path):
    def run(model):
        cache, path = make_prompt_cache(model), str(tmp_path / "cache.safetensors")
        mx.eval(model(mx.array([PROMPT]), cache=cache))
        save_prompt_cache(path, cache)
        again = load_prompt_cache(path)
        return tokens_of(model, case.tokenizer, prompt_cache=again)

    case.same(run)


def test_a_long_prompt_reads_a_byte_at_most_once_per_chunk(case):
    """And each layer's units are asked for once, however many tokens need them."""
    model, stats = case.model, case.model.flash.stats
    tokens = mx.array(np.random.default_rng(0).integers(3, 90, (1, 512)))
    layers = case.model.flash.manifest.layers
    held = sum(layer.slots.n_slots for layer in model.flash.layers)
    before = stats.copy()
    cache = make_prompt_cache(model)
    for chunk in mx.split(tokens, 2, axis=1):
        mx.eval(model(chunk, cache=cache))
    used = stats - before
    units = sum(layer.units for layer in layers)
    assert used.hits + used.misses <= 2 * units
    assert (
        used.misses >= 2 * (units - held) * 0.9
    )  # all neurons and blocks, most experts
    assert used.bytes_read == used.misses * layers[0].unit_bytes or not case.converted
    assert used.bytes_read <= 2 * sum(layer.nbytes for layer in layers)


@pytest.mark.parametrize("drafts", ["resident", "from flash"])
@pytest.mark.parametrize("kind", ["neurons", "blocks", "experts in place"])
def test_speculative_decoding(kind, drafts, tmp_path):
    """The draft is the model itself at another seed: some drafts fit, some do not."""
    case = Case(tmp_path, *KINDS[kind])
    config, quantize, _, slots = KINDS[kind]
    other = write_checkpoint(tmp_path / "draft", config, quantize, seed=2)
    if drafts == "resident":
        draft, _ = mlx_load_model(other, get_model_classes=get_model_classes)
    else:
        draft = case.model
    plain = [t for t, _ in tokens_of(case.resident, case.tokenizer)]
    drafted = tokens_of(case.model, case.tokenizer, draft_model=draft)
    assert [t for t, _ in drafted] == plain
    case.model.flash.close()


# ------------------------------------------------------------------- the server


def complete(port, prompt):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({"prompt": prompt, "max_tokens": 8, "temperature": 0}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


@pytest.mark.parametrize("kind", ["neurons", "experts in place"])
def test_the_server_answers_one_request_after_the_other(kind, tmp_path):
    case = Case(tmp_path, *KINDS[kind])
    case.model.flash.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_flash.cli", "serve", "--model"]
    command += [str(case.folder), "--context", "64", "--memory", "145%"]
    command += ["--port", str(port)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    log = open(tmp_path / "log", "w+")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    try:
        for prompt in ("w7 w8 w9 w10", "w30 w31 w32"):
            expected = mlx_lm.generate(
                case.resident, case.tokenizer, prompt, max_tokens=8
            )
            for _ in range(300):
                try:
                    text = complete(port, prompt)
                    break
                except OSError:
                    if server.poll() is not None:
                        raise AssertionError(open(log.name).read()) from None
                    time.sleep(0.1)
            assert text.split() == expected.split() and text.split()
    finally:
        server.kill()
        server.wait()
        log.close()
