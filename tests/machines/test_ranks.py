"""Several ranks on this machine give what one gives."""

from pathlib import Path

import numpy as np
import pytest
from conftest import save_tokenizer
from conftest import write_checkpoint as write_opt
from machines.launched import HERE, launch, run_alone
from stock_checkpoints import LLAMA, QWEN3, write_checkpoint

from mlx_flash.converters.convert import convert

SCRIPT = HERE / "same_logits.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of each unit kind, by name, with a budget at which it has to read."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "experts", QWEN3 | {"num_experts": 16})
    packed = {"group_size": 32, "bits": 4}
    write_checkpoint(folder / "packed", QWEN3 | {"num_experts": 16}, packed)
    opt = write_opt(folder / "opt")
    fit = {"rank": 4, "calibration_tokens": 128, "fit_steps": 3}
    convert(opt, folder / "neurons", unit="neuron", progress=False, **fit)
    convert(opt, folder / "all-neurons", unit="neuron", rank=0, progress=False)
    llama = write_checkpoint(folder / "llama", LLAMA | {"intermediate_size": 192})
    convert(llama, folder / "blocks", progress=False)
    gated = {"skippable": True, "calibration_tokens": 256}
    convert(llama, folder / "skipped", progress=False, **gated)
    names = "experts", "packed", "neurons", "all-neurons", "blocks", "skipped"
    for name in names:
        save_tokenizer(folder / name)
    return [folder / name for name in names]


def given(out: Path) -> dict[str, np.ndarray]:
    with np.load(out) as file:
        return dict(file)


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """What one process gives, by memory."""
    found = {}

    def run(memory: float) -> dict[str, np.ndarray]:
        if memory not in found:
            out = tmp_path_factory.mktemp("alone") / "out.npz"
            words = [memory, *models]
            run_alone(SCRIPT, out, "-", *words)
            found[memory] = given(out)
        return found[memory]

    return run


SLOW = pytest.mark.slow  # ranks that wait keep a core busy, and here are two


@pytest.mark.parametrize(
    ("shares", "memory"),
    [
        ("1:1", 1.05),
        pytest.param("2:1:1", 1.05, marks=SLOW),
        pytest.param("1:1:1:1", 1.05, marks=SLOW),
        pytest.param("1:1", 1.5, marks=SLOW),
        pytest.param("1:1:1", 8.0, marks=SLOW),
    ],
)
def test_ranks_give_what_one_gives(models, alone, tmp_path, shares, memory):
    ranks = shares.count(":") + 1
    out = tmp_path / "out.npz"
    words = [memory, *models]
    text = launch(ranks, SCRIPT, out, shares, *words)
    assert out.exists(), text
    assert "all ways done" in text
    together = given(out)
    expected = alone(memory)
    assert len(expected) > 60
    for name, array in expected.items():
        exact = name.startswith(("experts", "packed")) or array.dtype == np.int64
        if exact:
            assert np.array_equal(together[name], array), name
        else:
            largest = np.abs(array).max()
            assert np.abs(together[name] - array).max() < 1e-5 * largest, name
    reads = [array for name, array in together.items() if name.startswith("reads")]
    assert len(reads) == len(models)
    assert all(len(array) == ranks for array in reads)
