"""What stops on rank 0 alone does not leave the others in the middle."""

from conftest import save_tokenizer
from machines.launched import HERE, launch
from stock_checkpoints import QWEN3, write_checkpoint


def test_ranks_go_on_after_what_was_stopped(tmp_path):
    model = write_checkpoint(tmp_path / "model", QWEN3 | {"num_experts": 16})
    save_tokenizer(model)
    text = launch(2, HERE / "stopped.py", model, timeout_s=120)
    closed = "This model was closed. Load it again to use it."
    assert text.count("the main thread loads the first model") == 4, text
    assert text.count("a thread has loaded") == 1
    assert text.count("no tokens are refused True") == 3, text
    assert "a prompt nobody waits for is left True" in text
    assert text.count("a report is interrupted True") == 3
    assert f"closed in between: {closed}" in text
    assert f"closed before: {closed}" in text
    assert "loaded again True" in text
