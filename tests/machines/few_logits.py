"""Call a model on one rank or several, and keep what it gives and what was read.

few_logits.py FOLDER TIMES OUT.npz [SHARES]
"""

import sys

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

import mlx_flash

TOKENS = np.random.default_rng(3).integers(3, 97, 64).tolist()


def few_logits(folder, times, **options) -> dict[str, np.ndarray]:
    """Logits of a prompt, of tokens after it and of a batch; bytes read by each rank.

    Args:
        times: The least memory that the model works with, so many times.
    """
    model, memory = None, 1000.0
    while model is None:  # another rank may need more than this one
        try:
            model = mlx_flash.load_model(folder, int(memory), context=64, **options)[0]
        except mlx_flash.NotEnoughMemory as error:
            memory = max(error.least_bytes * times, memory * 1.01)
    cache = make_prompt_cache(model)
    calls = {"prompt": ([TOKENS[:40]], cache), "batch": ([TOKENS[:9], TOKENS[9:18]],)}
    calls |= {f"token {i}": ([[TOKENS[i]]], cache) for i in range(40, 46)}
    found = {}
    for name, (tokens, *rest) in calls.items():
        found[name] = np.array(model(mx.array(tokens), *rest).astype(mx.float32))
    machines = model.flash.machines
    others = machines.stats() if machines else []
    mine = model.flash.stats.bytes_read
    found["reads"] = np.array([mine, *(stats["bytes_read"] for stats in others)])
    model.flash.close()
    return found


if __name__ == "__main__":
    folder, times, out, *shares = sys.argv[1:]
    options = {"shares": shares[0]} if shares else {}
    np.savez(out, **few_logits(folder, float(times), **options))
    print("all called")
