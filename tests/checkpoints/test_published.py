"""Checkpoints as they were published run in place, without being converted."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import qwen3_moe
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as mlx_load_model
from published import (
    ELSEWHERE,
    IN_PLACE,
    MLP,
    published_weights,
    taking_turns,
    write_published,
)
from stock_checkpoints import assert_same, save, stream

import mlx_flash
from mlx_flash.checkpoints import origins
from mlx_flash.checkpoints.in_place import describe_in_place, runs_in_place
from mlx_flash.checkpoints.stock import load_stock
from mlx_flash.errors import FlashError
from mlx_flash.layers import lookup
from mlx_flash.storage.reader import Extent, Places

FOUR_BITS = {"group_size": 32, "bits": 4}


def logits(model):
    """Of a prompt that mlx-lm sorts, and of three more tokens."""
    tokens = mx.array(np.random.default_rng(0).integers(3, 60, (1, 43)))
    cache = make_prompt_cache(model)
    outputs = []
    for step in mx.split(tokens, range(40, 43), axis=1):
        outputs.append(model(step, cache=cache))
        mx.eval(outputs[-1])
    return [np.array(y.astype(mx.float32)) for y in outputs]


def check_parity(folder):
    expected = logits(mlx_load_model(folder)[0])
    for slots in (1, 3, 8):  # of 8 experts
        model = stream(folder, slots)
        try:
            assert_same(logits(model), expected)
            assert model.flash.report().layers_held_whole == (
                0 if slots < 8 else len(model.flash.layers)
            )
        finally:
            model.flash.close()


@pytest.mark.parametrize("family", IN_PLACE)
def test_published_experts_give_the_bits_of_mlx_lm(family, tmp_path):
    folder = write_published(tmp_path / "model", family, IN_PLACE[family], shards=3)
    check_parity(folder)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v2"])
def test_quantised_experts_one_by_one(family, tmp_path):
    folder = write_published(
        tmp_path / "model", family, IN_PLACE[family], FOUR_BITS, shards=2
    )
    names = mx.load(str(folder / "model-00001-of-00002.safetensors"))
    assert any(".experts.7." in name and name.endswith(".scales") for name in names)
    check_parity(folder)


def test_rows_of_embeddings_beside_published_experts(tmp_path, monkeypatch):
    monkeypatch.setattr(lookup, "LEAST_TABLE_BYTES", 1)
    folder = write_published(tmp_path / "model", "qwen3_moe", MLP, shards=3)
    check_parity(folder)
    model = stream(folder, 3)
    assert [table.module for table in model.flash.manifest.tables] == [
        "model.embed_tokens"
    ]
    model.flash.close()


def test_experts_one_by_one_become_tables_of_every_shard(tmp_path):
    folder = write_published(tmp_path / "model", "qwen3_moe", MLP, shards=3)
    manifest, extents = describe_in_place(load_stock(folder))
    assert [part.name for part in manifest.layers[0].parts] == [
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
    ]
    for layer in extents:
        assert all(isinstance(extent, Places) for extent in layer)
        assert len({extent.path for extent in layer}) == 3


def test_gates_and_ups_in_one_tensor_are_one_read(tmp_path):
    lay_out = IN_PLACE["qwen3_5_moe"]
    folder = write_published(tmp_path / "model", "qwen3_5_moe", lay_out)
    _, extents = describe_in_place(load_stock(folder))
    both, down = extents[0]
    assert isinstance(both, Extent) and isinstance(down, Extent)
    assert [index for index, _, _ in both.parts] == [0, 1]
    assert both.stride == sum(size for _, _, size in both.parts)


def test_gates_and_ups_in_one_tensor_for_each_expert(tmp_path, monkeypatch):
    """No family of mlx-lm's has it: parts that begin within tensors of their own."""
    real = qwen3_moe.Model.sanitize

    def sanitize(self, weights):
        for name in [n for n in weights if "gate_up_proj" in n]:
            gate, up = mx.split(weights.pop(name), 2, axis=0)
            weights[name.replace("gate_up_proj", "gate_proj")] = gate
            weights[name.replace("gate_up_proj", "up_proj")] = up
        return real(self, weights)

    monkeypatch.setattr(qwen3_moe.Model, "sanitize", sanitize)
    config, weights = published_weights("qwen3_moe")
    published = MLP(weights)
    for name in [n for n in published if ".experts." in n and "gate_proj" in n]:
        up = published.pop(name.replace("gate_proj", "up_proj"))
        both = mx.concatenate([published.pop(name), up])
        published[name.replace("gate_proj", "gate_up_proj")] = both
    check_parity(save(tmp_path / "model", config, published))


@pytest.mark.parametrize("family", ELSEWHERE)
def test_experts_that_are_no_runs_of_bytes_say_why(family, tmp_path):
    lay_out, why = ELSEWHERE[family]
    folder = write_published(tmp_path / "model", family, lay_out)
    assert not runs_in_place(folder)
    with pytest.raises(FlashError) as refusal:
        mlx_flash.load_model(folder)
    text = str(refusal.value)
    assert why in text and f"mlx-flash convert {folder}" in text and "_proj" in text
    flash = mlx_flash.convert(folder, tmp_path / "flash", progress=False)
    assert_same(logits(stream(flash, 3)), logits(mlx_load_model(folder)[0]))


def test_rows_that_take_turns_say_so(tmp_path):
    """gpt-oss has a row of the gate, then one of the up projection."""
    config, weights = published_weights("gpt_oss")
    published = {k: v for k, v in weights.items() if ".experts." not in k}
    for name, gate in weights.items():
        if ".experts.gate_proj." in name:
            up = weights[name.replace("gate_proj", "up_proj")]
            tail = "_bias" if name.endswith("bias") else ""
            path = name.split("gate_proj")[0]
            published[f"{path}gate_up_proj{tail}"] = (
                taking_turns(gate, up)
                if gate.ndim == 3
                else taking_turns(gate[..., None], up[..., None])[..., 0]
            )
        elif ".experts.down_proj." in name:
            tail = "_bias" if name.endswith("bias") else ".weight"
            published[f"{name.split('down_proj')[0]}down_proj{tail}"] = gate
    # mlx-lm gives `.weight` to packed ones alone.
    for name in [
        n for n in published if n.endswith(("gate_up_proj", "down_proj.weight"))
    ]:
        array = published.pop(name)
        if name.endswith("gate_up_proj"):
            name = f"{name}.weight"
        published[name] = array
    folder = save(tmp_path / "model", config, published)
    mlx_load_model(folder)
    with pytest.raises(FlashError, match="its rows lie apart in the files"):
        mlx_flash.load_model(folder)


def test_eight_bit_floats_say_so(tmp_path):
    """As DeepSeek publishes them: fp8 with a scale for each block."""
    config, weights = published_weights("deepseek_v3")
    published = {}
    for name, array in MLP(weights).items():
        if ".experts." in name:
            published[name] = mx.to_fp8(array)
            published[f"{name}_scale_inv"] = mx.ones((1, 1))
        else:
            published[name] = array
    folder = save(tmp_path / "model", config, published)
    mlx_load_model(folder)
    with pytest.raises(FlashError, match=r"8-bit floats \(fp8\), which mlx-lm unpacks"):
        mlx_flash.load_model(folder)
    assert not runs_in_place(folder)


def test_a_trace_that_is_wrong_is_found_before_it_is_believed(tmp_path, monkeypatch):
    """As if MLX's primitives meant something else than they do today."""
    folder = write_published(tmp_path / "model", "qwen3_moe", MLP)
    real = origins.move

    def reversed_order(primitive, arguments, values):
        made = real(primitive, arguments, values)
        if primitive == "Concatenate":
            made = [tuple(reversed(value)) for value in made]
        return made

    monkeypatch.setattr(origins, "move", reversed_order)
    with pytest.raises(FlashError, match="is not understood"):
        mlx_flash.load_model(folder)


def test_a_sanitize_that_looks_at_values_is_not_followed(tmp_path, monkeypatch):
    folder = write_published(tmp_path / "model", "qwen3_moe", MLP)
    real = qwen3_moe.Model.sanitize

    def sanitize(self, weights):
        name = "model.layers.0.mlp.experts.0.up_proj.weight"
        if mx.any(mx.isnan(weights[name])).item():
            raise AssertionError
        return real(self, weights)

    monkeypatch.setattr(qwen3_moe.Model, "sanitize", sanitize)
    with pytest.raises(FlashError, match="cannot be read where it lies: mlx-lm comp"):
        mlx_flash.load_model(folder)


def test_mlx_is_left_as_it_was(tmp_path):
    before = mx.contiguous
    folder = write_published(tmp_path / "model", "gemma4_text", IN_PLACE["gemma4_text"])
    stream(folder, 2).flash.close()
    assert mx.contiguous is before


def test_loading_evaluates_no_expert(tmp_path):
    folder = write_published(tmp_path / "model", "qwen3_moe", MLP)
    stock = load_stock(folder)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    manifest, _ = describe_in_place(stock)
    assert mx.get_peak_memory() - before < manifest.layers[0].nbytes


@pytest.mark.parametrize("how", ["short", "changed"])
def test_a_shard_that_is_not_what_it_was(how, tmp_path):
    folder = write_published(tmp_path / "model", "qwen3_moe", MLP, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    if how == "short":
        shard.write_bytes(shard.read_bytes()[:-10])
        with pytest.raises(FlashError, match="model-00002-of-00002"):
            mlx_flash.load_model(folder)
        return
    model = stream(folder, 1)
    logits(model)
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(FlashError, match="model-00002-of-00002.* changed"):
        logits(model)
    model.flash.close()
