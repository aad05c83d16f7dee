"""Stock checkpoints: where their tensors lie, found without reading them."""

import json

import mlx.core as mx
import pytest
import stock_checkpoints as moe

from mlx_flash.checkpoints import stock
from mlx_flash.checkpoints.stock import load_stock
from mlx_flash.layers.expert import switch_layers, switch_parts

SHARDS = 3


@pytest.fixture
def sharded(tmp_path):
    """A mixture of experts whose tensors are dealt out to several shards."""
    folder = moe.write_checkpoint(tmp_path / "model", moe.QWEN3)
    whole = folder / "model.safetensors"
    weights = mx.load(str(whole))
    mx.eval(weights)
    whole.unlink()
    names, files = sorted(weights), {}
    for i in range(SHARDS):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        part = {name: weights[name] for name in names[i::SHARDS]}
        mx.save_safetensors(str(folder / file), part)
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_every_expert_array_lies_where_the_file_has_its_bytes(sharded):
    loaded = load_stock(sharded)
    for module in switch_layers(loaded.model).values():
        for array in switch_parts(module).values():
            place = loaded.places[loaded.tensor(array)]
            with open(place.file, "rb") as file:
                file.seek(place.offset)
                assert file.read(place.bytes) == bytes(memoryview(array))


def test_an_array_of_nobody_has_no_place(sharded):
    assert load_stock(sharded).tensor(mx.zeros(3)) is None


def test_each_header_is_parsed_once(sharded, monkeypatch):
    seen = []
    real = stock.read_header

    def counted(path):
        seen.append(path.name)
        return real(path)

    monkeypatch.setattr(stock, "read_header", counted)
    loaded = load_stock(sharded)
    for array in loaded.raw.values():
        assert loaded.tensor(array) in loaded.places
    assert sorted(seen) == sorted(f.name for f in sharded.glob("model-*.safetensors"))
