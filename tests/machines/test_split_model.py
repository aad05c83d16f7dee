"""Ranks that have a part of a split model each give what one gives with all of it."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_checkpoint as write_opt
from machines.few_logits import few_logits
from machines.launched import HERE, launch
from stock_checkpoints import LLAMA, QWEN3, write_checkpoint

from mlx_flash.converters.convert import convert
from mlx_flash.converters.split import split
from mlx_flash.layers import lookup

SCRIPT = HERE / "few_logits.py"
SLOW = pytest.mark.slow  # ranks that wait keep a core busy, and here are two
LEAST = 1.05


def whole_model(kind: str, folder: Path) -> Path:
    """A flash folder."""
    checkpoint, out = folder / "checkpoint", folder / "whole"
    options: dict = {"progress": False}
    if kind == "experts":
        write_checkpoint(checkpoint, QWEN3 | {"num_experts": 16})
    elif kind == "experts and rows":
        config = QWEN3 | {"num_experts": 16, "vocab_size": 2_000}
        write_checkpoint(checkpoint, config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lookup, "LEAST_TABLE_BYTES", 1)
            return convert(checkpoint, out, **options)
    elif kind == "experts and blocks":
        shared = {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 768}
        write_checkpoint(checkpoint, QWEN3 | shared | {"num_experts": 16})
        options["blocks"] = True
    elif kind == "blocks":
        write_checkpoint(checkpoint, LLAMA | {"intermediate_size": 768})
    else:
        write_opt(checkpoint, ffn_dim=1024)
        options |= {"unit": "neuron", "rank": 0}
    if kind == "predicted":
        options |= {"rank": 4, "calibration_tokens": 128, "fit_steps": 3}
    return convert(checkpoint, out, **options)


def run_ranks(ranks: int, folder: Path, out: Path, *shares: str):
    text = launch(ranks, SCRIPT, folder, LEAST, out, *shares)
    assert "all called" in text, text
    with np.load(out) as file:
        return dict(file)


@pytest.mark.parametrize(
    "kind, shares",
    [
        pytest.param("blocks", "2:1", marks=SLOW),
        pytest.param("neurons", "1:1", marks=SLOW),
        pytest.param("neurons", "1:1:2", marks=SLOW),
        pytest.param("experts", "1:1", marks=SLOW),
        pytest.param("experts and rows", "2:1", marks=SLOW),
        pytest.param("experts and blocks", "1:1", marks=SLOW),
    ],
)
def test_parts_give_what_the_whole_gives(tmp_path, kind, shares):
    whole = whole_model(kind, tmp_path)
    ranks = shares.count(":") + 1
    parts = split(whole, ranks, shares=shares, progress=False)
    one = few_logits(whole, LEAST)
    whole.rename(tmp_path / "away")  # no rank can fall back to it
    # Rank 0 is told its own part, and the others find theirs.
    several = run_ranks(ranks, parts[0], tmp_path / "out.npz")
    reads = several.pop("reads")
    assert len(reads) == ranks and all(reads > 0)
    for name, logits in several.items():
        if kind in ("experts", "experts and rows"):
            assert np.array_equal(logits, one[name]), name
        else:
            largest = np.abs(one[name]).max()
            assert np.abs(logits - one[name]).max() < 1e-5 * largest, name


@SLOW
def test_parts_give_to_the_bit_what_the_same_shares_of_the_whole_give(tmp_path):
    """Also where predictors choose, which depends on what each rank holds."""
    whole = whole_model("predicted", tmp_path)
    parts = split(whole, 2, shares="2:1", progress=False)
    expected = run_ranks(2, whole, tmp_path / "whole.npz", "2:1")
    several = run_ranks(2, parts[0], tmp_path / "parts.npz")
    # Not as much as is read: side by side, units are read in other runs.
    assert all(expected.pop("reads") > 0) and all(several.pop("reads") > 0)
    for name, array in expected.items():
        assert np.array_equal(several[name], array), name
