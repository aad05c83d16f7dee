"""Ranks that do not have the same model refuse to start, each with one line."""

import platform

import pytest
from conftest import save_tokenizer
from conftest import write_checkpoint as write_opt
from machines.launched import HERE, launch

from mlx_flash.converters.convert import convert


def write_model(folder, seed):
    opt = write_opt(folder.parent / f"opt-{seed}", seed=seed)
    convert(opt, folder, unit="neuron", rank=0, progress=False)
    save_tokenizer(folder)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("other", "Rank 1 (HOST) has another model than Rank 0 (HOST)"),
        pytest.param(
            "none", "Rank 1 (HOST): model does not exist", marks=pytest.mark.slow
        ),
    ],
)
def test_another_model_is_refused_on_every_rank(tmp_path, second, said):
    write_model(tmp_path / "rank-0" / "model", 0)
    (tmp_path / "rank-1").mkdir()
    if second == "other":  # of the same shapes
        write_model(tmp_path / "rank-1" / "model", 1)
    text = launch(2, HERE / "mismatch.py", tmp_path, timeout_s=60)
    line = said.replace("HOST", platform.node())
    assert "all is well" not in text
    found = [x for x in text.splitlines() if line in x]
    assert len(found) == 2, text  # rank 0's error, and the line of the other
