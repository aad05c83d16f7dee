"""Several threads may call one model: each gets the logits it would get alone."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from stock_checkpoints import stream
from test_interruptions import KINDS, make_folder

THREADS, ROUNDS, STEPS = 3, 4, 6


def talk(model, seed):
    """Logits of a prompt and of some steps, with a KV cache of its own."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 97, 8 + STEPS)
    cache, found = make_prompt_cache(model), []
    for piece in (tokens[:8], *tokens[8:, None]):
        logits = model(mx.array(piece[None]), cache=cache)
        mx.eval(logits)
        found.append(np.array(logits[0, -1]))
    return found


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_threads_do_not_disturb_each_other(name, look_ahead, tmp_path):
    kind = KINDS[name]
    if look_ahead not in kind.look_ahead:
        pytest.skip("blocks and neurons without predictors have nothing to guess")
    folder = make_folder(name, tmp_path)
    alone = stream(folder, kind.slots[-1])
    expected = [talk(alone, seed) for seed in range(THREADS)]
    model = stream(folder, kind.slots[0], look_ahead=look_ahead)
    faults = []

    def work(seed):
        try:
            for _ in range(ROUNDS):
                for got, want in zip(talk(model, seed), expected[seed], strict=True):
                    diff = np.abs(got - want).max() / np.abs(want).max()
                    if not diff <= kind.tolerance:
                        faults.append(f"wrong by {diff:.1g}")
        except Exception as error:  # told in the thread that can fail the test
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    model.flash.close()
    alone.flash.close()
