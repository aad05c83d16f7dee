"""Persimmon against transformers: stored goldens, caches, and a live comparison."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from models.test_falcon import (
    SIZES,
    FamilyTests,
    compare_live,
    import_torch,
    load_golden,
    make_tokenizer,
    random_model,
)

from mlx_flash.models import persimmon

VARIANTS = ["base", "relu_no_qk_norm"]
CONFIG = {**SIZES, "intermediate_size": 96}


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request):
    return load_golden(persimmon, f"persimmon/{request.param}")


@pytest.fixture(scope="module")
def model():
    return random_model(persimmon, CONFIG)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class TestPersimmon(FamilyTests):
    module, config = persimmon, CONFIG


@pytest.mark.parametrize("variant", VARIANTS)
def test_goldens_keep_some_neurons_silent(variant):
    """Without both zeros and non-zeros the goldens would not see a lost ReLU."""
    mlp = load_golden(persimmon, f"persimmon/{variant}").model.layers[0].mlp
    active = mlp.activation(mlp.dense_h_to_4h(mx.random.normal((16, 24)))) > 0
    assert 0.2 < active.mean().item() < 0.8


LIVE = {
    "as_released": {"rope_theta": 25000.0, "rope_scaling": None},
    "no_qk_norm_tied": {"qk_layernorm": False, "tie_word_embeddings": True},
    "relu": {"hidden_act": "relu", "layer_norm_eps": 0.1},
    "gelu": {"hidden_act": "gelu", "num_attention_heads": 4},
    "quarter_rotary": {"partial_rotary_factor": 0.25},
    "scaled": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "v5": {
        "rope_parameters": {
            "rope_type": "linear",
            "rope_theta": 300.0,
            "factor": 2.0,
            "partial_rotary_factor": 0.75,
        }
    },
}


@pytest.mark.parametrize("changes", LIVE.values(), ids=LIVE)
def test_fresh_weights_match_live_transformers(tmp_path, changes):
    import_torch()
    from transformers import PersimmonConfig, PersimmonForCausalLM

    config = {**CONFIG, "num_hidden_layers": 3, **changes}
    if "rope_parameters" not in config:
        config.setdefault("rope_theta", 25000.0)  # the two have other defaults
    ours = random_model(persimmon, config, seed=2)
    theirs = PersimmonForCausalLM(PersimmonConfig(**config))
    compare_live(persimmon, ours, theirs, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_sanitize_drops_a_tied_head_and_rotary_tables(tied):
    model = random_model(persimmon, {**CONFIG, "tie_word_embeddings": tied})
    ours = dict(tree_flatten(model.parameters()))
    assert ("lm_head.weight" in ours) != tied
    stored = {"lm_head.weight": mx.zeros((97, 64)), **ours}
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros(8)
    clean = model.sanitize(stored)
    assert clean.keys() == ours.keys()
    assert all(clean[k] is ours[k] for k in ours)


def test_module_names_are_the_checkpoint_names(model):
    names = {k for k, _ in tree_flatten(model.parameters())}
    layer = "model.layers.0."
    parts = [f"self_attn.{p}" for p in ("query_key_value", "dense")]
    parts += ["self_attn.q_layernorm", "self_attn.k_layernorm"]
    parts += ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    parts += ["input_layernorm", "post_attention_layernorm"]
    expected = {f"{layer}{p}.{w}" for p in parts for w in ("weight", "bias")}
    assert {n for n in names if n.startswith(layer)} == expected
    assert {n for n in names if ".layers." not in n} == {
        "model.embed_tokens.weight",
        "model.final_layernorm.weight",
        "model.final_layernorm.bias",
        "lm_head.weight",
    }
    assert (len(model.layers), model.model_type) == (2, "persimmon")


def test_config_as_the_hub_has_it():
    args = persimmon.ModelArgs.from_dict(
        {
            "hidden_act": "relu2",
            "num_key_value_heads": 64,
            "hidden_dropout": 0.6,
            "rope_scaling": None,
        }
    )
    assert (args.partial_rotary_factor, args.rope_theta) == (0.5, 25000.0)
    small = persimmon.ModelArgs.from_dict({**CONFIG, "num_attention_heads": 1})
    assert persimmon.Attention(small).rope.dims == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act 'silu' is not supported; known: relu2"),
        ({"num_attention_heads": 7}, "hidden_size 64 .* num_attention_heads 7"),
        ({"rope_scaling": {"type": "dynamic"}}, "Persimmon with rotary .* 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling 'yarn' is not"),
    ],
)
def test_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        persimmon.ModelArgs.from_dict({**CONFIG, **changes})
