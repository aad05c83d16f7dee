"""Falcon against transformers: stored goldens, every kind of cache, live comparison.

`FamilyTests` is what test_persimmon and test_relu_llama run too.
Differences are relative: largest absolute difference by largest expected logit.
"""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm import batch_generate, generate
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.utils import load_model

from mlx_flash.models import falcon

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = 1e-4  # float32; measured 4e-7 to 2e-6

# Head width 32, so that a cache of keys can be quantised.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def relative_diff(actual, expected):
    return (mx.abs(actual - expected).max() / mx.abs(expected).max()).item()


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    diff = relative_diff(actual, expected)
    assert diff < tolerance, f"{diff=}"


def load(module, folder):
    def classes(config):
        return module.Model, module.ModelArgs

    return load_model(Path(folder), get_model_classes=classes)[0]


def load_golden(module, name):
    """A stored checkpoint and what it gives: model, tokens, logits, a fresh copy."""
    folder = GOLDENS / name
    expected = mx.load(str(folder / "expected.safetensors"))
    return SimpleNamespace(
        model=load(module, folder), fresh=lambda: load(module, folder), **expected
    )


def random_model(module, config, seed=0, attention=0.3):
    """A model with weights that matter: its greedy decoding varies."""
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.random.seed(seed)

    def draw(name, p):
        is_norm = "norm" in name or ".ln_" in name
        mean = 1.0 if is_norm and name.endswith(".weight") else 0.0
        scale = 0.1 if "embed" in name else 0.3
        if any(part in name for part in ("query_key_value", "q_proj", "k_proj")):
            scale = attention
        return mx.random.normal(p.shape, loc=mean, scale=scale)

    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


def random_tokens(*shape, seed=1):
    return mx.random.randint(4, 97, shape, key=mx.random.key(seed))


def greedy(model, prompt, n):
    """The next n tokens, each from a full forward pass: slow, and without a cache."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(model(mx.array([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


def step_by_step(model, tokens, start, cache):
    """Logits of all tokens: `start` at once, the others one by one."""
    logits = [model(tokens[:, :start], cache=cache)] if start else []
    for i in range(start, tokens.shape[1]):
        logits.append(model(tokens[:, i : i + 1], cache=cache))
    return mx.concatenate(logits, axis=1)


def import_torch():
    reason = "the live comparison runs transformers' model, which needs torch"
    return pytest.importorskip("torch", reason=reason)


def compare_live(module, ours, theirs, tmp_path):
    """Give transformers our weights; compare both, and what we load of theirs."""
    torch = import_torch()
    state = {
        name: torch.from_numpy(np.array(weight))
        for name, weight in tree_flatten(ours.parameters())
    }
    missing, unexpected = theirs.eval().load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if ours.args.tie_word_embeddings else [])

    tokens = random_tokens(2, 20)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens.tolist())).logits
    expected = mx.array(logits.numpy())
    assert_close(ours(tokens), expected)
    assert_close(step_by_step(ours, tokens, 12, make_prompt_cache(ours)), expected)
    theirs.save_pretrained(tmp_path)
    assert_close(load(module, tmp_path)(tokens), expected)


class FamilyTests:
    """What every family must do. Fixtures of the test's module: `golden`, `model`.

    `module` is the model file and `config` one of its configs, of head width 32.
    """

    module = config = None

    # What transformers computes

    def test_prefill_of_two_prompts_matches_transformers(self, golden):
        assert_close(golden.model(golden.tokens), golden.logits)

    @pytest.mark.parametrize("batch", [1, 2])
    def test_decode_step_by_step_matches_transformers(self, golden, batch):
        cache = make_prompt_cache(golden.model)
        assert all(type(c) is KVCache for c in cache)
        logits = step_by_step(golden.model, golden.tokens[:batch], 0, cache)
        assert_close(logits, golden.logits[:batch])

    def test_chunked_prefill_matches_transformers(self, golden):
        cache = make_prompt_cache(golden.model)
        chunks = mx.split(golden.tokens, [5, 6, 10], axis=1)
        logits = [golden.model(chunk, cache=cache) for chunk in chunks]
        assert_close(mx.concatenate(logits, axis=1), golden.logits)

    def test_left_padded_batch_matches_transformers(self, golden):
        padded = golden.logits_after_padding
        pad = golden.tokens.shape[1] - padded.shape[0]
        cache = [BatchKVCache([0, pad]) for _ in golden.model.layers]
        logits = golden.model(golden.tokens, cache=cache)
        assert_close(logits[0], golden.logits[0])
        assert_close(logits[1, pad:], padded)
        assert_close(golden.model(golden.tokens[1:, pad:])[0], padded)

    @pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
    def test_half_precision_stays_half(self, golden, dtype):
        """Measured up to 0.005 in float16 and 0.07 in bfloat16, by a threshold."""
        model = golden.fresh()
        model.set_dtype(dtype)
        logits = model(golden.tokens, cache=make_prompt_cache(model))
        assert logits.dtype == dtype
        assert_close(logits.astype(mx.float32), golden.logits, 0.15)

    def test_input_embeddings_stand_for_tokens(self, golden):
        inner = (
            golden.model.transformer if self.module is falcon else golden.model.model
        )
        embed = inner.word_embeddings if self.module is falcon else inner.embed_tokens
        empty = mx.zeros((2, 0), mx.int32)
        logits = golden.model(empty, input_embeddings=embed(golden.tokens))
        assert_close(logits, golden.logits)

    # mlx-lm's caches and generators

    @pytest.mark.parametrize("padding", [[0, 3], [5, 0], [2, 9]])
    def test_left_padded_batch_equals_each_prompt_alone(self, model, padding):
        L, extra = 10, 4
        prompts = [random_tokens(L - pad + extra, seed=pad) for pad in padding]
        cache = [BatchKVCache(padding) for _ in model.layers]
        rows = [
            mx.concatenate([mx.zeros(pad, mx.int32), prompt])
            for pad, prompt in zip(padding, prompts, strict=True)
        ]
        logits = step_by_step(model, mx.stack(rows), L, cache)
        for row, (pad, prompt) in enumerate(zip(padding, prompts, strict=True)):
            assert_close(logits[row, pad:], model(prompt[None])[0], tolerance=1e-5)

    @pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.04), (4, 0.4)])
    def test_quantised_kv_cache_is_close(self, bits, tolerance):
        """Measured up to 0.02 at 8 bits and 0.2 at 4 bits, in groups of 32."""
        model = random_model(self.module, self.config, attention=0.1)
        tokens = random_tokens(2, 20)
        cache = [QuantizedKVCache(group_size=32, bits=bits) for _ in model.layers]
        logits, expected = step_by_step(model, tokens, 15, cache), model(tokens)
        assert_close(logits, expected, tolerance)
        assert relative_diff(logits, expected) > TOLERANCE, "it was not quantised"

    def test_rotating_cache_forgets_but_keeps_counting(self, model):
        tokens = random_tokens(1, 24)

        def run(size):
            cache = [RotatingKVCache(max_size=size) for _ in model.layers]
            return step_by_step(model, tokens, 8, cache), cache[0].offset

        expected = model(tokens)
        assert_close(run(24)[0], expected)
        logits, offset = run(12)
        assert_close(logits[:, :12], expected[:, :12])
        assert relative_diff(logits[:, 12:], expected[:, 12:]) > 1e-2
        assert offset == 24

    @pytest.mark.parametrize("prefill", [3, 2048])
    def test_generate_step_matches_plain_decoding(self, model, prefill):
        prompt = random_tokens(9)
        steps = generate_step(prompt, model, max_tokens=12, prefill_step_size=prefill)
        expected = greedy(model, prompt.tolist(), 12)
        assert len(set(expected)) > 3
        assert [token for token, _ in steps] == expected

    def test_generate_accepts_the_model(self, model, tokenizer):
        prompt = random_tokens(7).tolist()
        expected = greedy(model, prompt, 10)
        text = generate(model, tokenizer, prompt, max_tokens=10)
        if tokenizer.eos_token_id in expected:
            expected = expected[: expected.index(tokenizer.eos_token_id)]
        assert text.split() == tokenizer.decode(expected).split()

    @pytest.mark.parametrize("max_kv_size", [None, 48])
    def test_batch_generate_equals_each_prompt_alone(
        self, model, tokenizer, max_kv_size
    ):
        prompts = [random_tokens(n, seed=n).tolist() for n in (3, 11, 6)]
        wrapped = SimpleNamespace(eos_token_ids=[], decode=tokenizer.decode)
        response = batch_generate(
            model,
            wrapped,
            prompts,
            max_tokens=8,
            return_token_ids=True,
            prefill_step_size=4,
            **({} if max_kv_size is None else {"max_kv_size": max_kv_size}),
        )
        assert response.token_ids == [greedy(model, prompt, 8) for prompt in prompts]

    def test_speculative_decoding_matches_plain_decoding(self, model):
        prompt = random_tokens(9)
        draft = random_model(self.module, self.config, seed=3)
        steps = speculative_generate_step(prompt, model, draft, max_tokens=12)
        expected = greedy(model, prompt.tolist(), 12)
        assert [token for token, _, _ in steps] == expected

    @pytest.mark.parametrize("kind", ["plain", "quantised", "rotating"])
    def test_saved_and_reloaded_cache_continues_alike(self, model, tmp_path, kind):
        make = {
            "plain": KVCache,
            "quantised": lambda: QuantizedKVCache(group_size=32, bits=8),
            "rotating": lambda: RotatingKVCache(max_size=32, keep=4),
        }[kind]
        tokens = random_tokens(1, 20)
        cache = [make() for _ in model.layers]
        model(tokens[:, :15], cache=cache)
        path = str(tmp_path / "prompt.safetensors")
        save_prompt_cache(path, cache)
        reloaded = load_prompt_cache(path)
        for i in range(15, 20):
            expected = model(tokens[:, i : i + 1], cache=cache)
            assert mx.array_equal(model(tokens[:, i : i + 1], cache=reloaded), expected)
        if kind != "quantised":
            assert_close(expected[:, -1], model(tokens)[:, -1])


def make_tokenizer():
    """One word per token, because generate wants a tokenizer that can decode."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<pad>": 1, "</s>": 2}
    vocab |= {f"w{i}": i for i in range(3, 97)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


# Falcon itself


VARIANTS = ["multi_query", "grouped", "relufied", "sequential"]
CONFIG = {**SIZES, "ffn_hidden_size": 96, "activation": "relu"}
GROUPED = {"new_decoder_architecture": True, "num_attention_heads": 8}


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request):
    return load_golden(falcon, f"falcon/{request.param}")


@pytest.fixture(scope="module")
def model():
    return random_model(falcon, CONFIG)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class TestFalcon(FamilyTests):
    module, config = falcon, CONFIG


@pytest.mark.parametrize("variant", ["relufied", "sequential"])
def test_goldens_keep_some_neurons_silent(variant):
    """Without both zeros and non-zeros the goldens would not see a lost ReLU."""
    mlp = load_golden(falcon, f"falcon/{variant}").model.layers[0].mlp
    active = mlp.activation(mlp.dense_h_to_4h(mx.random.normal((16, 24)))) > 0
    assert 0.2 < active.mean().item() < 0.8


LIVE = {
    "7b": {"bias": False},
    "7b_every_head_its_key": {"multi_query": False, "activation": "gelu"},
    "7b_ffn_of_four_widths": {"ffn_hidden_size": None, "layer_norm_epsilon": 0.1},
    "40b": {**GROUPED, "num_kv_heads": 2, "tie_word_embeddings": False},
    "40b_all_kv_heads": {**GROUPED, "activation": "relu2", "bias": True},
    "40b_ignores_multi_query": {**GROUPED, "num_kv_heads": 4, "multi_query": False},
    "11b": {**GROUPED, "num_ln_in_parallel_attn": 1, "rope_theta": 500042.0},
    "rw": {"multi_query": False, "parallel_attn": False, "bias": True},
    "rw_multi_query": {"parallel_attn": False},
    "scaled": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "v5": {
        "rope_parameters": {
            "rope_type": "linear",
            "rope_theta": 300.0,
            "factor": 2.0,
        }
    },
}


@pytest.mark.parametrize("changes", LIVE.values(), ids=LIVE)
def test_fresh_weights_match_live_transformers(tmp_path, changes):
    import_torch()
    from transformers import FalconConfig, FalconForCausalLM

    config = {**CONFIG, "num_hidden_layers": 3, **changes}
    ours = random_model(falcon, config, seed=2)
    theirs = FalconForCausalLM(FalconConfig(**config))
    compare_live(falcon, ours, theirs, tmp_path)


def test_sanitize_drops_a_tied_head_and_rotary_tables(model):
    ours = dict(tree_flatten(model.parameters()))
    stored = {
        **ours,
        "lm_head.weight": ours["transformer.word_embeddings.weight"],
        "transformer.h.0.self_attention.maybe_rotary.inv_freq": mx.zeros(16),
    }
    clean = model.sanitize(stored)
    assert clean.keys() == ours.keys()
    assert all(clean[k] is ours[k] for k in ours)
    assert model.sanitize(clean) == clean


def test_sanitize_keeps_an_untied_head():
    untied = random_model(falcon, {**CONFIG, "tie_word_embeddings": False})
    weights = {"lm_head.weight": mx.zeros((97, 64))}
    assert untied.sanitize(weights) == weights
    assert untied.lm_head.weight.shape == (97, 64)


NORMS = {
    "7b": ({}, {"input_layernorm"}),
    "40b": (GROUPED, {"ln_attn", "ln_mlp"}),
    "11b": ({**GROUPED, "num_ln_in_parallel_attn": 1}, {"input_layernorm"}),
    "rw": ({"parallel_attn": False}, {"input_layernorm", "post_attention_layernorm"}),
}


@pytest.mark.parametrize(("changes", "norms"), NORMS.values(), ids=NORMS)
def test_module_names_are_the_checkpoint_names(changes, norms):
    args = falcon.ModelArgs.from_dict({**CONFIG, **changes})
    model = falcon.Model(args)
    names = {k for k, _ in tree_flatten(model.parameters())}
    layer = "transformer.h.0."
    linears = {"self_attention.query_key_value", "self_attention.dense"}
    linears |= {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
    expected = {f"{layer}{n}.weight" for n in linears | norms}
    expected |= {f"{layer}{n}.bias" for n in norms}
    assert {n for n in names if n.startswith(layer)} == expected
    assert {n for n in names if ".h." not in n} == {
        "transformer.word_embeddings.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }
    assert (len(model.layers), model.model_type) == (2, "falcon")


def test_config_as_the_hub_has_it():
    seven = falcon.ModelArgs.from_dict({"num_kv_heads": 71, "hidden_dropout": 0.0})
    assert (seven.num_kv_heads, seven.ffn_hidden_size) == (1, 4 * 4544)
    assert (seven.activation, seven.tie_word_embeddings) == ("gelu", True)
    forty = falcon.ModelArgs.from_dict(
        {
            "new_decoder_architecture": True,
            "hidden_size": 8192,
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "parallel_attn": False,  # says nothing in this architecture
        }
    )
    assert (forty.num_kv_heads, forty.num_ln_in_parallel_attn) == (8, 2)
    assert forty.parallel_attn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alibi": True}, "Falcon with alibi .* is not supported, only rotary"),
        ({"activation": "silu"}, "activation 'silu' is not supported; known: gelu, re"),
        ({"num_attention_heads": 7}, "hidden_size 64 .* num_attention_heads 7"),
        ({**GROUPED, "num_kv_heads": 3}, "num_attention_heads 8 .* num_kv_heads 3"),
        ({**GROUPED, "num_kv_heads": 0}, "num_attention_heads 8 .* num_kv_heads 0"),
        ({**GROUPED, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn .* be 3"),
        ({"rope_scaling": {"type": "dynamic"}}, "rotary scaling 'dynamic' is not sup"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling 'yarn' is not"),
        ({"rope_scaling": {"type": "linear"}}, "linear rotary scaling needs a factor"),
    ],
)
def test_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        falcon.ModelArgs.from_dict({**CONFIG, **changes})
