"""OPT against transformers: stored goldens, every kind of cache, and a live comparison.

Differences are relative: largest absolute difference by largest expected logit.
"""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm import batch_generate, generate
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.utils import load_model

from mlx_flash.models import opt

GOLDENS = Path(__file__).parents[1] / "goldens" / "opt"
VARIANTS = ["pre_ln", "post_ln_proj", "no_bias_untied"]
TOLERANCE = 1e-4  # float32; measured about 1e-6


def relative_diff(actual, expected):
    return (mx.abs(actual - expected).max() / mx.abs(expected).max()).item()


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    diff = relative_diff(actual, expected)
    assert diff < tolerance, f"{diff=}"


def load_opt(folder):
    def classes(config):
        return opt.Model, opt.ModelArgs

    return load_model(Path(folder), get_model_classes=classes)[0]


def random_model(seed=0, attention=0.3, **changes):
    """An OPT wide enough to quantise (head width 32), with weights that matter.

    Sharp attention and small embeddings make greedy decoding vary: a tied head with
    large ones repeats its token for ever, and a wrong cache would go unseen.
    """
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 96,
        "max_position_embeddings": 64,
    }
    model = opt.Model(opt.ModelArgs.from_dict({**sizes, **changes}))
    mx.random.seed(seed)

    def draw(name, p):
        mean = 1.0 if name.endswith("layer_norm.weight") else 0.0
        scale = 0.1 if "embed_tokens" in name else 0.3
        if "q_proj" in name or "k_proj" in name:
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


@pytest.fixture(params=VARIANTS)
def golden(request):
    folder = GOLDENS / request.param
    expected = mx.load(str(folder / "expected.safetensors"))
    return SimpleNamespace(model=load_opt(folder), **expected)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def tokenizer():
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


# What transformers computes


def test_prefill_of_two_prompts_matches_transformers(golden):
    assert_close(golden.model(golden.tokens), golden.logits)


def test_one_prompt_matches_transformers(golden):
    cache = make_prompt_cache(golden.model)
    assert all(type(c) is KVCache for c in cache)
    assert_close(golden.model(golden.tokens[:1], cache=cache), golden.logits[:1])


@pytest.mark.parametrize("batch", [1, 2])
def test_decode_step_by_step_matches_transformers(golden, batch):
    cache = make_prompt_cache(golden.model)
    steps = [
        golden.model(golden.tokens[:batch, i : i + 1], cache=cache)
        for i in range(golden.tokens.shape[1])
    ]
    assert_close(mx.concatenate(steps, axis=1), golden.logits[:batch])


def test_chunked_prefill_matches_transformers(golden):
    cache = make_prompt_cache(golden.model)
    chunks = mx.split(golden.tokens, [5, 6, 10], axis=1)
    logits = [golden.model(chunk, cache=cache) for chunk in chunks]
    assert_close(mx.concatenate(logits, axis=1), golden.logits)


def test_left_padded_batch_matches_transformers(golden):
    padded = golden.logits_after_padding
    pad = golden.tokens.shape[1] - padded.shape[0]
    cache = [BatchKVCache([0, pad]) for _ in golden.model.layers]
    logits = golden.model(golden.tokens, cache=cache)
    assert_close(logits[0], golden.logits[0])
    assert_close(logits[1, pad:], padded)
    assert_close(golden.model(golden.tokens[1:, pad:])[0], padded)


def test_input_embeddings_stand_for_tokens(golden):
    embeddings = golden.model.model.decoder.embed_tokens(golden.tokens)
    empty = mx.zeros((2, 0), mx.int32)
    logits = golden.model(empty, input_embeddings=embeddings)
    assert_close(logits, golden.logits)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays_half(golden, dtype):
    """Measured 0.002 in float16 and 0.02 in bfloat16."""
    golden.model.set_dtype(dtype)
    logits = golden.model(golden.tokens, cache=make_prompt_cache(golden.model))
    assert logits.dtype == dtype
    assert_close(logits.astype(mx.float32), golden.logits, 0.1)


def test_goldens_keep_some_neurons_silent(golden):
    """Without both zeros and non-zeros the goldens would not see a lost ReLU."""
    mlp = golden.model.layers[0].mlp
    active = mlp.activation(mlp.fc1(mx.random.normal((16, 24)))) > 0
    assert 0.2 < active.mean().item() < 0.8


LIVE = {
    "pre_ln": {},
    "post_ln": {"do_layer_norm_before": False},
    "post_ln_proj": {"do_layer_norm_before": False, "word_embed_proj_dim": 40},
    "pre_ln_proj_untied": {"word_embed_proj_dim": 80, "tie_word_embeddings": False},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "galactica": {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
    },
}


@pytest.mark.parametrize("changes", LIVE.values(), ids=LIVE)
def test_fresh_weights_match_live_transformers(tmp_path, changes):
    reason = "the live comparison runs transformers' OPT, which needs torch"
    torch = pytest.importorskip("torch", reason=reason)
    from transformers import OPTConfig, OPTForCausalLM

    model = random_model(seed=2, num_hidden_layers=3, **changes)
    names = {}  # undo sanitize, so that its renaming is tested too
    for name, weight in tree_flatten(model.parameters()):
        names[name.replace(".mlp.", ".")] = weight
    config = {k: v for k, v in vars(model.args).items() if k != "model_type"}
    theirs = OPTForCausalLM(OPTConfig(**config)).eval()
    state = {name: torch.tensor(weight.tolist()) for name, weight in names.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.args.tie_word_embeddings else [])

    tokens = random_tokens(2, 20)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens.tolist())).logits
    expected = mx.array(logits.numpy())
    assert_close(model(tokens), expected)

    cache = make_prompt_cache(model)
    model(tokens[:, :12], cache=cache)
    steps = [model(tokens[:, i : i + 1], cache=cache) for i in range(12, 20)]
    assert_close(mx.concatenate(steps, axis=1), expected[:, 12:])

    theirs.save_pretrained(tmp_path)
    assert_close(load_opt(tmp_path)(tokens), expected)


# mlx-lm's caches and generators


@pytest.mark.parametrize("padding", [[0, 3], [5, 0], [2, 9]])
def test_left_padded_batch_equals_each_prompt_alone(model, padding):
    L, extra = 10, 4
    prompts = [random_tokens(L - pad + extra, seed=pad) for pad in padding]
    cache = [BatchKVCache(padding) for _ in model.layers]
    rows = [
        mx.concatenate([mx.zeros(pad, mx.int32), prompt])
        for pad, prompt in zip(padding, prompts, strict=True)
    ]
    tokens = mx.stack(rows)
    logits = [model(tokens[:, :6], cache=cache), model(tokens[:, 6:L], cache=cache)]
    logits += [model(tokens[:, i : i + 1], cache=cache) for i in range(L, L + extra)]
    logits = mx.concatenate(logits, axis=1)
    for row, (pad, prompt) in enumerate(zip(padding, prompts, strict=True)):
        assert_close(logits[row, pad:], model(prompt[None])[0], tolerance=1e-5)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.25)])
def test_quantised_kv_cache_is_close(bits, tolerance):
    """Measured 0.006 at 8 bits and 0.12 at 4 bits, in groups of 32."""
    model = random_model(attention=0.1)
    tokens = random_tokens(2, 20)
    cache = [QuantizedKVCache(group_size=32, bits=bits) for _ in model.layers]
    logits = [model(tokens[:, :15], cache=cache)]
    logits += [model(tokens[:, i : i + 1], cache=cache) for i in range(15, 20)]
    logits = mx.concatenate(logits, axis=1)
    expected = model(tokens)
    assert_close(logits, expected, tolerance)
    assert relative_diff(logits, expected) > TOLERANCE, "the cache was not quantised"


def test_rotating_cache_forgets_but_keeps_counting(model):
    tokens = random_tokens(1, 24)

    def run(cache):
        steps = [model(tokens[:, :8], cache=cache)]
        steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(8, 24)]
        return mx.concatenate(steps, axis=1)

    expected = model(tokens)
    assert_close(run([RotatingKVCache(max_size=24) for _ in model.layers]), expected)
    small = [RotatingKVCache(max_size=12) for _ in model.layers]
    logits = run(small)
    assert_close(logits[:, :12], expected[:, :12])
    assert relative_diff(logits[:, 12:], expected[:, 12:]) > 1e-2
    assert small[0].offset == 24


@pytest.mark.parametrize("prefill", [3, 2048])
def test_generate_step_matches_plain_decoding(model, prefill):
    prompt = random_tokens(9)
    steps = generate_step(prompt, model, max_tokens=12, prefill_step_size=prefill)
    expected = greedy(model, prompt.tolist(), 12)
    assert len(set(expected)) > 3
    assert [token for token, _ in steps] == expected


def test_generate_accepts_the_model(model, tokenizer):
    prompt = random_tokens(7).tolist()
    expected = greedy(model, prompt, 10)
    text = generate(model, tokenizer, prompt, max_tokens=10)
    if tokenizer.eos_token_id in expected:
        expected = expected[: expected.index(tokenizer.eos_token_id)]
    assert text.split() == tokenizer.decode(expected).split()


@pytest.mark.parametrize("max_kv_size", [None, 48])
def test_batch_generate_equals_each_prompt_alone(model, tokenizer, max_kv_size):
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


def test_speculative_decoding_matches_plain_decoding(model):
    prompt = random_tokens(9)
    draft = random_model(seed=3)
    steps = speculative_generate_step(prompt, model, draft, max_tokens=12)
    assert [token for token, _, _ in steps] == greedy(model, prompt.tolist(), 12)


@pytest.mark.parametrize("kind", ["plain", "quantised", "rotating"])
def test_saved_and_reloaded_cache_continues_alike(model, tmp_path, kind):
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


# The end of the position table


TOO_LONG = "has positions for 64 tokens, and 65 were asked for. Shorten the prompt"


def test_all_positions_can_be_used_and_none_beyond(model):
    tokens = random_tokens(1, 65)
    assert model(tokens[:, :64]).shape == (1, 64, 97)
    with pytest.raises(ValueError, match=TOO_LONG):
        model(tokens)

    for cache in (
        make_prompt_cache(model),
        make_prompt_cache(model, max_kv_size=16),
        [QuantizedKVCache(group_size=32) for _ in model.layers],
    ):
        model(tokens[:, :63], cache=cache)
        model(tokens[:, 63:64], cache=cache)
        with pytest.raises(ValueError, match=TOO_LONG):
            model(tokens[:, 64:], cache=cache)


@pytest.mark.parametrize("make", [BatchKVCache, lambda p: BatchRotatingKVCache(99, p)])
def test_a_batch_ends_with_its_longest_row(model, make):
    tokens = random_tokens(2, 70)
    cache = [make([4, 6]) for _ in model.layers]
    logits = model(tokens[:, :67], cache=cache)  # 63 and 61 tokens
    assert_close(logits[0, 4:], model(tokens[:1, 4:67])[0])
    logits = model(tokens[:, 67:68], cache=cache)
    assert_close(logits[1, -1], model(tokens[1:, 6:68])[0, -1])
    with pytest.raises(ValueError, match=TOO_LONG):
        model(tokens[:, 68:69], cache=cache)


@pytest.mark.parametrize("make", [KVCache, lambda: RotatingKVCache(max_size=99)])
@pytest.mark.parametrize("chunk", [10, 64])
def test_right_padding_beyond_the_table_is_no_overflow(model, make, chunk):
    """A long history with a short turn, batched with the opposite, as a server does."""
    old = random_tokens(1, 55, seed=5)
    turns = [random_tokens(3, seed=6), random_tokens(40, seed=7)]
    histories = [[make() for _ in model.layers] for _ in range(2)]
    model(old, cache=histories[0])
    cache = [type(a).merge([a, b]) for a, b in zip(*histories, strict=True)]
    for c in cache:
        c.prepare(lengths=[3, 40], right_padding=[37, 0])
    tokens = mx.stack([mx.pad(turns[0], (0, 37)), turns[1]])
    for start in range(0, 40, chunk):
        model(tokens[:, start : start + chunk], cache=cache)
    for c in cache:
        c.finalize()

    last = random_tokens(2, 1, seed=8)
    logits = model(last, cache=cache)
    alone = [mx.concatenate([old[0], turns[0], last[0]])]
    alone += [mx.concatenate([turns[1], last[1]])]
    for row in range(2):
        assert_close(logits[row, -1], model(alone[row][None])[0, -1])


@pytest.mark.parametrize("make", [KVCache, lambda: RotatingKVCache(max_size=99)])
@pytest.mark.parametrize("chunk", [10, 64])
def test_a_prompt_too_long_is_found_among_right_padded_ones(model, make, chunk):
    cache = [type(c).merge([c, make()]) for c in (make() for _ in model.layers)]
    for c in cache:
        c.prepare(lengths=[65, 5], right_padding=[0, 60])
    tokens = random_tokens(2, 65)
    with pytest.raises(ValueError, match=TOO_LONG):
        for start in range(0, 65, chunk):
            model(tokens[:, start : start + chunk], cache=cache)


def test_a_rotated_batch_is_longer_than_it_is_wide(model):
    caches = [[RotatingKVCache(max_size=16) for _ in model.layers] for _ in range(2)]
    for n, cache in zip((62, 20), caches, strict=True):
        model(random_tokens(1, n), cache=cache)
    cache = [RotatingKVCache.merge(list(c)) for c in zip(*caches, strict=True)]
    assert cache[0].size() == 16
    tokens = random_tokens(2, 3)
    for i in range(2):
        model(tokens[:, i : i + 1], cache=cache)
    with pytest.raises(ValueError, match=TOO_LONG):
        model(tokens[:, 2:], cache=cache)


def test_padding_reads_no_row_outside_the_table(model):
    decoder = model.model.decoder
    left = BatchKVCache([3, 0])
    assert decoder._positions(5, left).tolist() == [[2, 2, 2, 2, 3], [2, 3, 4, 5, 6]]
    right = SimpleNamespace(offset=mx.array([61]), _lengths=mx.array([62]))
    assert decoder._positions(4, right).tolist() == [[63, 64, 65, 65]]
    assert decoder.embed_positions.weight.shape[0] == 66


def test_offsets_of_a_batch_are_not_read_before_they_matter(model, monkeypatch):
    def refuse(*args):
        raise AssertionError("read the offsets")

    monkeypatch.setattr(opt, "_row_ends", refuse)
    cache = [BatchKVCache([0, 3]) for _ in model.layers]
    tokens = random_tokens(2, 65)
    model(tokens[:, :63], cache=cache)
    model(tokens[:, 63:64], cache=cache)
    with pytest.raises(AssertionError, match="read the offsets"):
        model(tokens[:, 64:65], cache=cache)


# Names, sizes and config


def test_sanitize_accepts_every_spelling_of_a_name(model):
    ours = dict(tree_flatten(model.parameters()))
    released = {k.replace(".mlp.", "."): v for k, v in ours.items()}
    assert "model.decoder.layers.1.fc2.bias" in released
    released["lm_head.weight"] = ours["model.decoder.embed_tokens.weight"]
    old = {k.removeprefix("model."): v for k, v in released.items()}
    old["decoder.version"] = mx.array([3.0])

    for weights in (released, old, ours):
        clean = model.sanitize(weights)
        assert clean.keys() == ours.keys()
        assert all(clean[k] is ours[k] for k in ours)
        assert model.sanitize(clean) == clean


def test_sanitize_keeps_an_untied_head():
    untied = random_model(tie_word_embeddings=False)
    weights = {"lm_head.weight": mx.zeros((97, 64))}
    assert untied.sanitize(weights) == weights
    assert untied.lm_head.weight.shape == (97, 64)


def test_module_names_are_the_checkpoint_names():
    proj = {"word_embed_proj_dim": 32}
    names = {k for k, _ in tree_flatten(random_model(**proj).parameters())}
    layer = "model.decoder.layers.0."
    parts = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
    parts += ["self_attn_layer_norm", "mlp.fc1", "mlp.fc2", "final_layer_norm"]
    expected = {f"{layer}{p}.{w}" for p in parts for w in ("weight", "bias")}
    assert {n for n in names if n.startswith(layer)} == expected
    assert {n for n in names if ".layers." not in n} == {
        "model.decoder.embed_tokens.weight",
        "model.decoder.embed_positions.weight",
        "model.decoder.project_in.weight",
        "model.decoder.project_out.weight",
        "model.decoder.final_layer_norm.weight",
        "model.decoder.final_layer_norm.bias",
    }


def test_config_defaults_and_unknown_keys():
    args = opt.ModelArgs.from_dict({"hidden_size": 48, "layerdrop": 0.0})
    assert (args.word_embed_proj_dim, args.activation_function) == (48, "relu")
    model = random_model()
    assert len(model.layers) == 2
    assert model.model_type == "opt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "tanh"}, "activation_function 'tanh' is not supp"),
        ({"num_attention_heads": 7}, "hidden_size 768 .* num_attention_heads 7"),
    ],
)
def test_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        opt.ModelArgs.from_dict(changes)
