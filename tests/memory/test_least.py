"""The least memory that a refusal names works, and 2 % less does not."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from stock_checkpoints import LLAMA, QWEN3, write_checkpoint

import mlx_flash
from mlx_flash.converters.convert import convert
from mlx_flash.errors import NotEnoughMemory
from mlx_flash.storage.manifest_reading import read_manifest

PACKED = {"group_size": 32, "bits": 4}
PROMPT = mx.array([5 + i % 90 for i in range(100)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory, flash_folder):
    base = tmp_path_factory.mktemp("least")

    def blocks(name, packing=None):
        config = LLAMA | {"hidden_size": 128, "intermediate_size": 512}
        source = write_checkpoint(base / name, config, packing)
        return convert(source, base / f"{name}-flash", progress=False)

    return {
        "neurons": flash_folder,
        "experts": write_checkpoint(base / "experts", QWEN3),
        "blocks": blocks("blocks"),
        "blocks of 4 bits": blocks("packed", PACKED),
    }


@pytest.mark.parametrize("context", [None, 200])
@pytest.mark.parametrize("kind", ["neurons", "experts", "blocks", "blocks of 4 bits"])
def test_what_is_named_works_and_less_does_not(folders, kind, context):
    def load(memory):
        return mlx_flash.load_model(folders[kind], memory, context=context)

    with pytest.raises(NotEnoughMemory) as error:
        load("1KB")
    least = error.value.least_bytes
    for share in (0.98, 0.9, 0.7, 0.5):
        with pytest.raises(NotEnoughMemory):
            load(int(share * least))
    prompt = PROMPT[: (model_positions(folders[kind]) or 999) // 2]
    with load(least) as (model, _):
        steps = generate_step(prompt, model, max_tokens=4)
        assert all(np.isfinite(np.array(logprobs)).all() for _, logprobs in steps)


def model_positions(folder):
    with mlx_flash.load_model(folder, "1GB") as (model, _):
        return model.flash.positions


def test_small_quantised_layers_are_cut_into_blocks(folders):
    """So that they need not be held whole."""
    layers = read_manifest(folders["blocks of 4 bits"]).layers
    assert all(layer.units >= 8 for layer in layers)
    with mlx_flash.load_model(folders["blocks of 4 bits"], "1GB") as (whole, _):
        expected = whole(PROMPT[None])
    with pytest.raises(NotEnoughMemory) as error:
        mlx_flash.load_model(folders["blocks of 4 bits"], "1KB")
    least = error.value.least_bytes
    with mlx_flash.load_model(folders["blocks of 4 bits"], least) as (model, _):
        assert sum(model.flash.budget.slots) < sum(layer.units for layer in layers)
        difference = mx.abs(model(PROMPT[None]) - expected).max()
        assert difference.item() < 1e-4 * mx.abs(expected).max().item()
