"""Experts and blocks, cut from a checkpoint as mlx-lm loads it."""

import os

import mlx.core as mx
import pytest
from conversions import interrupt
from opt_checkpoints import files_of
from stock_checkpoints import LLAMA, QWEN3, write_checkpoint

from mlx_flash.converters import conversion
from mlx_flash.converters.convert import convert
from mlx_flash.converters.workfolder import WorkFolder

DEEP = {"num_hidden_layers": 3}


@pytest.mark.parametrize("config", [QWEN3, LLAMA], ids=["experts", "blocks"])
@pytest.mark.parametrize(
    "owner, name, call, after, layers",
    [
        (conversion, "write_bundles", 1, False, 3),
        (conversion, "write_bundles", 2, True, 4),  # written, but not noted
        (WorkFolder, "note", 2, True, 3),  # between two layers
        (os, "replace", 3, False, 4),
        (conversion, "write_weights", 1, False, 3),
        (conversion, "write_weights", 1, True, 3),
        (conversion, "copy_config", 1, True, 3),
        (WorkFolder, "publish", 1, False, 3),
    ],
)
def test_interrupted_goes_on(
    tmp_path, monkeypatch, config, owner, name, call, after, layers
):
    src = write_checkpoint(tmp_path / "model", config | DEEP)
    options = {"bits": 4, "group_size": 32, "dtype": "float16", "progress": False}
    whole = files_of(convert(src, tmp_path / "whole", **options))
    written, real = [], conversion.write_bundles

    def count(path, *args):
        entry = real(path, *args)
        written.append(path.name)
        return entry

    monkeypatch.setattr(conversion, "write_bundles", count)
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, call, after)
        with pytest.raises(KeyboardInterrupt):
            convert(src, tmp_path / "flash", **options)
    assert not (tmp_path / "flash").exists()
    assert files_of(convert(src, tmp_path / "flash", **options)) == whole
    assert len(written) == layers and len(set(written)) == 3


def test_resident_weights_are_let_go_as_they_are_written(tmp_path, monkeypatch):
    """Not the model: attention of ten layers, and little on flash."""
    sizes = {"hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": 10}
    src = write_checkpoint(tmp_path / "model", LLAMA | sizes)
    real = conversion.write_weights
    grown = []

    def measured(path, arrays):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        held = real(path, arrays)
        grown.append((mx.get_peak_memory() - before) / held.bytes)
        return held

    monkeypatch.setattr(conversion, "write_weights", measured)
    convert(src, tmp_path / "flash", progress=False)
    assert len(grown) == 1 and grown[0] < 0.5


def test_an_option_that_does_not_exist(tmp_path):
    src = write_checkpoint(tmp_path / "model", LLAMA)
    with pytest.raises(TypeError, match="ranks"):
        convert(src, tmp_path / "flash", ranks=4)
