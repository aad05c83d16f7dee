"""Gated-ReLU Llamas: stored goldens, caches, and a live comparison.

transformers gives relu and relu2; for fatrelu and drelu, which it lacks, its Llama and
Mistral with the activation exchanged in torch (make_goldens.py).
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from models.test_falcon import (
    SIZES,
    TOLERANCE,
    FamilyTests,
    assert_close,
    compare_live,
    import_torch,
    load_golden,
    make_tokenizer,
    random_model,
    relative_diff,
)

from mlx_flash.models import relu_llama

VARIANTS = ["relu", "relu2", "fatrelu", "drelu"]
CONFIG = {
    **SIZES,
    "model_type": "llama",
    "hidden_act": "relu",
    "intermediate_size": 96,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request):
    return load_golden(relu_llama, f"relu_llama/{request.param}")


@pytest.fixture(scope="module")
def model():
    return random_model(relu_llama, CONFIG)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class TestReluLlama(FamilyTests):
    module, config = relu_llama, CONFIG


OTHERS = {
    "silu": lambda gate, up: nn.silu(gate) * up,  # mlx-lm's
    "relu": relu_llama.make_activation("relu"),
    "relu2": relu_llama.make_activation("relu2"),
    "fatrelu": relu_llama.make_activation("fatrelu", 0.4),
    "drelu": relu_llama.make_activation("drelu"),
    "relu_on_up": lambda gate, up: gate * nn.relu(up),
    "another_threshold": relu_llama.make_activation("fatrelu", 0.2),
}


def test_goldens_tell_the_activations_apart(golden):
    model = golden.fresh()
    for name, other in OTHERS.items():
        for layer in model.layers:
            layer.mlp.activation = other
        diff = relative_diff(model(golden.tokens), golden.logits)
        same = name == golden.model.args.activation
        assert diff < TOLERANCE if same else diff > 1e-2, f"{name}: {diff=}"


def test_goldens_keep_some_neurons_silent(golden):
    """Without both zeros and non-zeros the goldens would not see a lost ReLU."""
    mlp = golden.model.layers[0].mlp
    x = mx.random.normal((16, 24))
    active = mlp.activation(mlp.gate_proj(x), mlp.up_proj(x)) != 0
    assert 0.15 < active.mean().item() < 0.8


REFERENCE = {
    "relu": lambda gate, up: np.maximum(gate, 0) * up,
    "relu2": lambda gate, up: np.maximum(gate, 0) ** 2 * up,
    "fatrelu": lambda gate, up: np.where(gate > 0.25, gate, 0) * up,
    "drelu": lambda gate, up: np.maximum(gate, 0) * np.maximum(up, 0),
}


@pytest.mark.parametrize("act", REFERENCE)
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_matches_numpy(act, bias):
    config = {**CONFIG, "hidden_act": act, "hidden_act_param": 0.25, "mlp_bias": bias}
    mlp = random_model(relu_llama, config).layers[0].mlp
    x = mx.random.normal((3, 5, 64))

    def linear(layer, x):
        weight = np.array(layer.weight, np.float64)
        return x @ weight.T + (np.array(layer.bias, np.float64) if bias else 0)

    wide = np.array(x, np.float64)
    hidden = REFERENCE[act](linear(mlp.gate_proj, wide), linear(mlp.up_proj, wide))
    expected = linear(mlp.down_proj, hidden)
    assert_close(mlp(x), mx.array(expected.astype(np.float32)))


def test_the_threshold_itself_is_silent():
    gate = mx.array([-1.0, 0.0, 0.5, 0.75])
    fatrelu = relu_llama.make_activation("fatrelu", 0.5)
    assert fatrelu(gate, mx.full(4, 2.0)).tolist() == [0, 0, 0, 1.5]
    assert fatrelu(gate.astype(mx.bfloat16), gate).dtype == mx.float32
    assert fatrelu(*[gate.astype(mx.bfloat16)] * 2).dtype == mx.bfloat16


LIVE = {
    "ReluLLaMA": {},
    "relu2": {"hidden_act": "relu2", "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "rope_theta": 300.0},
    "biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "v5": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "v5_llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 300.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"model_type": "mistral", "sliding_window": 4096},
}


@pytest.mark.parametrize("changes", LIVE.values(), ids=LIVE)
def test_fresh_weights_match_live_transformers(tmp_path, changes):
    import_torch()
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    config = {**CONFIG, "num_hidden_layers": 3, **changes}
    ours = random_model(relu_llama, config, seed=2)
    given = {k: v for k, v in config.items() if k != "model_type"}
    if config["model_type"] == "mistral":
        theirs = MistralForCausalLM(MistralConfig(**given))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**given))
    compare_live(relu_llama, ours, theirs, tmp_path)


# Names and config


def test_the_mlp_alone_is_exchanged(model):
    stock = llama.Model(
        llama.ModelArgs.from_dict(CONFIG | {"tie_word_embeddings": False})
    )
    ours, theirs = tree_flatten(model.parameters()), tree_flatten(stock.parameters())
    assert {k: v.shape for k, v in ours} == {k: v.shape for k, v in theirs}
    assert {type(m) for _, m in model.named_modules()} == (
        {type(m) for _, m in stock.named_modules()} - {llama.MLP, llama.Model}
        | {relu_llama.MLP, relu_llama.Model}
    )
    names = {name for name, _ in model.named_modules()}
    assert {f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")} < names
    assert (len(model.layers), model.model_type) == (2, "llama")


def test_sanitize_drops_predictors_and_rotary_tables(model):
    ours = dict(tree_flatten(model.parameters()))
    stored = {
        **ours,
        "model.layers.0.mlp.predictor.fc1.weight": mx.zeros((8, 64)),
        "model.layers.0.mlp.predictor.fc2.weight": mx.zeros((96, 8)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros(16),
    }
    clean = model.sanitize(stored)
    assert clean.keys() == ours.keys()
    assert all(clean[k] is ours[k] for k in ours)


# As config.json on the hub has it, sizes left out: hidden_act, … → what is computed
HUB = {
    "ReluLLaMA-7B": ({"model_type": "llama", "hidden_act": "relu"}, "relu"),
    "prosparse-llama-2-7b": (
        {
            "model_type": "sparsellama",
            "hidden_act": "fatrelu",
            "hidden_act_param": 0.01,
        },
        "fatrelu",
    ),
    "Bamboo-base-v0_1": (
        {"model_type": "bamboo", "hidden_act": "relu", "sliding_window": 4096},
        "drelu",
    ),
    "fatrelu said by a llama": (
        {"model_type": "llama", "hidden_act": "fatrelu", "hidden_act_param": 0},
        "fatrelu",
    ),
    "drelu said by a mistral": (
        {"model_type": "mistral", "hidden_act": "drelu"},
        "drelu",
    ),
}


@pytest.mark.parametrize(("says", "activation"), HUB.values(), ids=HUB)
def test_configs_that_belong_here(says, activation):
    config = CONFIG | says
    assert relu_llama.is_relu_llama(config)
    args = relu_llama.ModelArgs.from_dict(config)
    assert args.activation == activation
    assert not args.tie_word_embeddings  # where config.json says nothing


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "hidden_act": "silu"},
        {"model_type": "llama"},
        {"model_type": "mistral", "hidden_act": None},
        {"model_type": "qwen2", "hidden_act": "relu"},
        {"model_type": "opt", "hidden_act": "relu"},
        {},
    ],
)
def test_configs_that_belong_elsewhere(config):
    assert not relu_llama.is_relu_llama(config)


FATRELU = {"model_type": "sparsellama", "hidden_act": "fatrelu"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (FATRELU, "needs its threshold as hidden_act_param, .*; found None"),
        (FATRELU | {"hidden_act_param": "0.1"}, "needs its threshold .* found '0.1'"),
        (FATRELU | {"hidden_act_param": -0.1}, "needs its threshold .* found -0.1"),
        (FATRELU | {"hidden_act_param": float("nan")}, "threshold .* found nan"),
        (FATRELU | {"hidden_act": "silu"}, "sparsellama with hidden_act 'silu' is not"),
        (FATRELU | {"hidden_act": "shiftrelu"}, "'shiftrelu' is not supported; known"),
        ({"model_type": "bamboo", "hidden_act": "relu2"}, "bamboo with .* known: relu"),
        ({"model_type": "qwen2"}, "qwen2 with hidden_act 'relu' .* known: none"),
        ({"hidden_act": "gelu"}, "llama with hidden_act 'gelu' is not supported"),
    ],
)
def test_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        relu_llama.ModelArgs.from_dict(CONFIG | changes)


@pytest.mark.parametrize("model_type", ["sparsellama", "bamboo"])
def test_a_family_of_ours_is_never_left_to_mlx_lm(model_type):
    """Whatever it says: here it is refused with a reason, there it is unknown."""
    assert relu_llama.is_relu_llama({"model_type": model_type, "hidden_act": "silu"})
    config = {k: v for k, v in CONFIG.items() if k != "hidden_act"}
    with pytest.raises(ValueError, match=f"{model_type} with hidden_act 'silu'"):
        relu_llama.ModelArgs.from_dict(config | {"model_type": model_type})
