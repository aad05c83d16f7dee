"""Configs of transformers 5: one model, whichever names its rotary embedding has."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as mlx_load_model
from stock_checkpoints import LLAMA, make_weights, save

import mlx_flash
from mlx_flash.bench.families.configs import make_config
from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError
from mlx_flash.models.registry import get_model_classes
from mlx_flash.models.rope import with_older_names

TOKENS = mx.array([[5, 17, 3, 60, 41, 8, 22, 9] * 6])
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SPLIT = ["sliding_attention", "full_attention"]


def old(family, **changes):
    return make_config(family) | changes


def new(config, parameters, *gone):
    """The config as transformers 5 writes it."""
    left = {k: v for k, v in config.items() if k not in gone}
    return left | {"rope_parameters": parameters}


FLAT = old("llama", rope_theta=2e3)
SCALED = old("llama", rope_theta=2e3, rope_scaling=LLAMA3)
NEOX = old("gpt_neox", rotary_emb_base=700, rotary_pct=0.25)
STABLE = old("stablelm", rope_theta=900.0, partial_rotary_factor=0.25)
GEMMA = old("gemma3_text", rope_theta=7e4, rope_local_base_freq=300.0)
NESTED = old("gemma3")
NESTED["text_config"] |= {"rope_theta": 7e4, "rope_local_base_freq": 300.0}
NAMED = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")

PAIRS = {
    "llama": (FLAT, new(FLAT, {"rope_theta": 2e3, "rope_type": "default"}, *NAMED)),
    "llama3": (SCALED, new(SCALED, LLAMA3 | {"rope_theta": 2e3}, *NAMED)),
    "both": (FLAT, new(FLAT | {"rope_theta": 1e6}, {"rope_theta": 2e3})),
    "gpt_neox": (
        NEOX,
        new(
            NEOX,
            {"rope_theta": 700, "partial_rotary_factor": 0.25},
            "rotary_emb_base",
            "rotary_pct",
        ),
    ),
    "stablelm": (
        STABLE,
        new(STABLE, {"rope_theta": 900.0, "partial_rotary_factor": 0.25}, *NAMED),
    ),
    "layer types": (
        GEMMA,
        new(
            GEMMA,
            {
                "sliding_attention": {"rope_theta": 300.0, "rope_type": "default"},
                "full_attention": {"rope_theta": 7e4, "rope_type": "default"},
            },
            *NAMED,
        ),
    ),
    "text_config": (
        NESTED,
        NESTED
        | {
            "text_config": new(
                NESTED["text_config"],
                {
                    "sliding_attention": {"rope_theta": 300.0, "rope_type": "default"},
                    "full_attention": {"rope_theta": 7e4, "rope_type": "default"},
                },
                *NAMED,
            )
        },
    ),
}


def logits(config, weights):
    model_class, args_class = get_model_classes(config)
    model = model_class(args_class.from_dict(config))
    model.load_weights(weights)
    model.eval()
    return np.array(model(TOKENS).astype(mx.float32))


@pytest.mark.parametrize("known", PAIRS)
def test_the_logits_are_those_of_the_older_config(known):
    before, after = PAIRS[known]
    model_class, args_class = get_model_classes(before)
    mx.random.seed(1)
    model = model_class(args_class.from_dict(before))
    weights = [
        (name, 0.15 * mx.random.normal(a.shape) if a.ndim > 1 else a)
        for name, a in tree_flatten(model.parameters())
    ]
    expected = logits(before, weights)
    assert np.ptp(expected) > 0
    assert np.array_equal(logits(after, weights), expected)


def test_what_a_model_knows_itself_is_left_to_it():
    config = new(old("qwen3"), {"rope_theta": 2e3, "rope_type": "default"}, *NAMED)
    assert with_older_names(config, get_model_classes(config)[1]) == config


def test_layers_that_the_model_cannot_tell_apart_are_refused():
    config = new(
        FLAT,
        {
            "sliding_attention": {"rope_theta": 300.0},
            "full_attention": {"rope_theta": 2e3},
        },
        *NAMED,
    )
    with pytest.raises(FlashError, match="layers of this llama different rope_param"):
        get_model_classes(config)[1].from_dict(config)


def test_a_converted_folder_has_the_older_names_too(tmp_path):
    """So that mlx-lm, which takes no notice of the new ones, reads them right."""
    before = LLAMA | {"rope_theta": 2e3}
    after = new(before, {"rope_theta": 2e3, "rope_type": "default"}, *NAMED)
    weights = dict(tree_flatten(make_weights(before).parameters()))
    expected = mlx_load_model(save(tmp_path / "before", before, weights))[0](TOKENS)
    source = save(tmp_path / "after", after, weights)
    flash = convert(source, tmp_path / "flash", progress=False)
    written = json.loads((flash / "config.json").read_text())
    assert written["rope_theta"] == 2e3
    assert written["rope_parameters"] == after["rope_parameters"]
    with mlx_flash.load_model(flash, "1GB") as (model, _):
        difference = mx.abs(model(TOKENS) - expected).max() / mx.abs(expected).max()
    assert difference.item() < 1e-5
