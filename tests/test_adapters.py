"""Adapters of `mlx_lm.lora` do on flash what they do in memory."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from chat_models import TEMPLATE, write_template
from conftest import save_tokenizer, write_checkpoint
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from stock_checkpoints import LLAMA, QWEN3
from stock_checkpoints import write_checkpoint as write_stock

import mlx_flash
from mlx_flash.errors import FlashError
from mlx_flash.generation import stream_generate
from mlx_flash.layers import block, lookup
from mlx_flash.prompt_cache import model_identity

PROMPT = [11, 20, 21, 22, 13, 12]
ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]


def train(checkpoint, folder, keys=None, kind="lora", layers=2):
    """An adapter with random weights, as `mlx_lm.lora` writes it."""
    model, _ = mlx_lm.load(checkpoint)
    settings = {"rank": 4, "scale": 20.0, "dropout": 0.1}
    if keys:
        settings["keys"] = keys
    linear_to_lora_layers(model, layers, settings, use_dora=kind == "dora")
    mx.random.seed(5)
    names = ("lora_a", "lora_b", "m")
    weights = {
        name: mx.random.normal(array.shape) * 0.05
        for name, array in tree_flatten(model.parameters())
        if name.rsplit(".", 1)[-1] in names
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = write_stock(tmp_path_factory.mktemp("lora") / "stock", LLAMA)
    save_tokenizer(folder)
    write_template(folder, TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def flash(stock):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "BLOCK_BYTES", 16_000)
        return mlx_flash.convert(stock, stock.parent / "flash", rank=0, progress=False)


@pytest.fixture(scope="module")
def everywhere(stock):
    return train(stock, stock.parent / "everywhere")


@pytest.fixture(scope="module")
def attention(stock):
    return train(stock, stock.parent / "attention", ATTENTION)


def logits(model, tokens=PROMPT * 4):
    cache = make_prompt_cache(model)
    first = model(mx.array([tokens]), cache=cache)
    return first, model(mx.array([[30]]), cache=cache)


def difference(ours, theirs):
    return max(mx.abs(a - b).max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("memory", ["350KB", "5MB"], ids=["streamed", "held"])
@pytest.mark.parametrize("which", ["everywhere", "attention"])
def test_an_adapter_does_what_it_does_in_memory(stock, flash, request, which, memory):
    adapter = request.getfixturevalue(which)
    expected = logits(mlx_lm.load(stock, adapter_path=str(adapter))[0])
    plain = logits(mlx_lm.load(stock)[0])
    assert difference(expected, plain) > 0.1  # it matters
    options = {"adapter_path": adapter, "context": 64}
    with mlx_flash.load(flash, memory, **options) as (model, _):
        held = [layer.slots.holds_all for layer in model.flash.layers]
        assert all(held) == (memory == "5MB")
        assert difference(logits(model), expected) < 1e-4
        for layer in model.flash.layers:
            assert not layer.training


def test_quantised_ffns_and_one_matrix_for_gate_and_up(tmp_path):
    """Phi-3 has both rows of a neuron in one projection."""
    phi = LLAMA | {"model_type": "phi3", "rope_scaling": None}
    checkpoint = write_stock(tmp_path / "stock", phi)
    save_tokenizer(checkpoint)
    adapter = train(checkpoint, tmp_path / "adapter")
    expected = logits(mlx_lm.load(checkpoint, adapter_path=str(adapter))[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "BLOCK_BYTES", 16_000)
        folder = mlx_flash.convert(
            checkpoint, tmp_path / "flash", rank=0, progress=False
        )
    options = {"adapter_path": adapter, "context": 64}
    with mlx_flash.load(folder, "350KB", **options) as (model, _):
        assert difference(logits(model), expected) < 1e-4


def test_neurons_in_the_order_of_the_checkpoint(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "opt", ffn_dim=512)
    save_tokenizer(checkpoint)
    flash = mlx_flash.convert(
        checkpoint, tmp_path / "flash", unit="neuron", rank=0, progress=False
    )
    with mlx_flash.load(flash, "100%", context=32) as (model, _):
        layer = model.flash.manifest.layers[0].module
        before = logits(model, PROMPT)
        width = model.flash.layers[0].fc1.width
    mx.random.seed(3)
    weights = {
        f"{layer}.{name}.lora_{side}": mx.random.normal(shape) * 0.1
        for name, ins, outs in (("fc1", width, 512), ("fc2", 512, width))
        for side, shape in (("a", (ins, 4)), ("b", (4, outs)))
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    config = {"num_layers": 16, "lora_parameters": settings}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    results = []
    for memory in ("400KB", "100%"):
        options = {"adapter_path": adapter, "context": 32}
        with mlx_flash.load(flash, memory, **options) as (model, _):
            results.append(logits(model, PROMPT))
    assert difference(results[0], results[1]) < 1e-4
    assert difference(results[0], before) > 0.01


def test_dense_ffns_beside_experts(tmp_path):
    config = QWEN3 | dict(model_type="qwen2_moe", shared_expert_intermediate_size=256)
    source = write_stock(tmp_path / "stock", config)
    save_tokenizer(source)
    folder = mlx_flash.convert(source, tmp_path / "flash", blocks=True, progress=False)
    keys = [*ATTENTION, "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"]
    adapter = train(source, tmp_path / "shared", keys)
    theirs = logits(mlx_lm.load(source, adapter_path=str(adapter))[0])
    for memory in ("1MB", "1GB"):
        with mlx_flash.load_model(
            folder, memory, context=128, adapter_path=adapter
        ) as (
            model,
            _,
        ):
            ours = logits(model)
        assert difference(ours, theirs) < 1e-4 * mx.abs(theirs[0]).max().item()
    dora = train(source, tmp_path / "dora", keys, "dora")
    with pytest.raises(FlashError, match="which needs the weights themselves"):
        mlx_flash.load_model(folder, "1GB", adapter_path=dora)


def test_embeddings_on_flash_take_no_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(lookup, "LEAST_TABLE_BYTES", 1)
    source = write_stock(tmp_path / "stock", QWEN3)
    save_tokenizer(source)
    folder = train(source, tmp_path / "attention", ATTENTION)
    weights = mx.load(str(folder / "adapters.safetensors"))
    weights["model.embed_tokens.lora_a"] = mx.zeros((97, 4))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    with pytest.raises(FlashError, match="embeddings are on flash"):
        mlx_flash.load_model(source, "1GB", adapter_path=folder)


def test_experts_take_adapters_of_attention_alone(tmp_path):
    checkpoint = write_stock(tmp_path / "moe", QWEN3)
    save_tokenizer(checkpoint)
    adapter = train(checkpoint, tmp_path / "attention", ATTENTION)
    expected = logits(mlx_lm.load(checkpoint, adapter_path=str(adapter))[0])
    options = {"adapter_path": adapter, "context": 64}
    with mlx_flash.load(checkpoint, "800KB", **options) as (model, _):
        assert difference(logits(model), expected) < 1e-5
    whole = train(checkpoint, tmp_path / "whole")
    with pytest.raises(FlashError, match=r"layers\.\d\.mlp.*experts are on flash") as e:
        mlx_flash.load(checkpoint, "800KB", adapter_path=whole)
    assert "mlx_lm.fuse" in str(e.value)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: (f / "adapters.safetensors").unlink(), "has no adapters.safe"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "is damaged"),
        (
            lambda f: (f / "adapter_config.json").write_text(
                '{"num_layers": 2, "lora_parameters": {"rank": 4, "alpha": 2}}'
            ),
            "does not fit this model",
        ),
        (
            lambda f: (f / "adapter_config.json").write_text(
                '{"num_layers": 2, "lora_parameters": '
                '{"rank": 8, "scale": 2.0, "dropout": 0.0}}'
            ),
            "does not fit this model",
        ),
        (
            lambda f: (f / "adapter_config.json").write_text(
                '{"fine_tune_type": "full", "num_layers": 2}'
            ),
            "mlp, as full, which needs the weights",
        ),
    ],
)
def test_what_is_no_adapter(flash, stock, tmp_path, spoil, said):
    adapter = train(stock, tmp_path / "adapter")
    spoil(adapter)
    with pytest.raises(FlashError, match=said) as caught:
        mlx_flash.load(flash, "5MB", adapter_path=adapter)
    assert len(str(caught.value)) < 700


def test_an_adapter_counts_in_memory_and_in_prompt_caches(flash, everywhere):
    with mlx_flash.load(flash, "350KB", context=64) as (model, _):
        plain = model.flash.budget, model_identity(model.flash)
    options = {"adapter_path": everywhere, "context": 64}
    with mlx_flash.load(flash, "350KB", **options) as (model, tokenizer):
        adapted = model.flash.budget, model_identity(model.flash)
        list(stream_generate(model, tokenizer, PROMPT, max_tokens=4))
    assert adapted[0].slot_bytes < plain[0].slot_bytes
    assert adapted[1] != plain[1]
