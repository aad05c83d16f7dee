"""Of machines that may round differently, rank 0 chooses for all."""

import numpy as np
from machines.launched import HERE, launch, run_alone
from stock_checkpoints import QWEN3, write_checkpoint


def test_rank_0_chooses_experts_for_chips_that_differ(tmp_path):
    model = write_checkpoint(tmp_path / "model", QWEN3 | {"num_experts": 16})
    script = HERE / "unlike.py"
    run_alone(script, model, tmp_path / "alone.npy")
    text = launch(2, script, model, tmp_path / "two.npy", timeout_s=90)
    assert (tmp_path / "two.npy").exists(), text
    alone, two = (np.load(tmp_path / f"{name}.npy") for name in ("alone", "two"))
    assert np.array_equal(alone, two)
