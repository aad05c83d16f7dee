"""One program of the comparison: `run`, to be called in a process of its own.

It gives the seconds and the bytes read of each token, and what the process held. Tokens
are random, as the weights are, and the first ones are not counted.
"""

import sys
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import psutil

from ...memory.system import peak_process_bytes

Steps = Generator[Callable[[], object], None, None]


def mlx_flash(job: dict) -> Steps:
    """Generation from flash, as `generate` does it."""
    from ...loading import load_model

    context = job["prompt_tokens"] + job["warm_up"] + job["tokens"] + 2
    with load_model(
        job["path"],
        job["budget_bytes"],
        predictor=job["predictor"],
        context=context,
        page_cache="off",
    ) as (model, config):
        yield from _mlx_steps(model, config, job, model.flash.budget.prefill_tokens)


def mlx_lm(job: dict) -> Steps:
    """The whole model in memory: mlx-lm's own loader and loop."""
    from mlx_lm.utils import load_model

    from ...models.registry import get_model_classes

    model, config = load_model(Path(job["path"]), get_model_classes=get_model_classes)
    yield from _mlx_steps(model, config, job, 512)


def _mlx_steps(model, config, job: dict, prefill: int) -> Steps:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from ..decode import random_prompt, random_sampler

    vocabulary = config["vocab_size"]
    mx.random.seed(0)
    steps = generate_step(
        random_prompt(job["prompt_tokens"], vocabulary),
        model,
        max_tokens=job["warm_up"] + job["tokens"] + 2,
        sampler=random_sampler(vocabulary),
        prefill_step_size=prefill,
    )
    while True:
        yield lambda: next(steps)


def llama_cpp(job: dict) -> Steps:
    """llama.cpp with its weights mapped: the page cache is its memory."""
    from llama_cpp import Llama

    model = Llama(
        model_path=job["path"],
        n_ctx=job["prompt_tokens"] + job["warm_up"] + job["tokens"] + 2,
        n_batch=512,
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        use_mmap=True,
        use_mlock=False,
        verbose=False,
    )
    yield from _feed(model.eval, job)


def accelerate(job: dict) -> Steps:
    """transformers with accelerate's disk offload for what does not fit."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["path"],
        dtype=getattr(torch, job["dtype"]),
        device_map="auto",
        # what is offloaded comes back a layer at a time, the next before one goes
        max_memory={"cpu": job["budget_bytes"] - 2 * job["layer_bytes"]},
        offload_folder=job["offload_folder"],
    )
    places = list(getattr(model, "hf_device_map", {}).values())
    job["offloaded_modules"] = f"{places.count('disk')} of {len(places)}"
    cache = None

    def step(tokens: list[int]) -> None:
        nonlocal cache
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values

    yield from _feed(step, job)


KINDS = {f.__name__: f for f in (mlx_flash, mlx_lm, llama_cpp, accelerate)}


def _feed(step: Callable[[list[int]], object], job: dict) -> Steps:
    """Random tokens: the prompt at once, then one after the other."""
    import numpy as np

    prompt, count = job["prompt_tokens"], job["warm_up"] + job["tokens"]
    ids = np.random.default_rng(0).integers(3, job["vocab"], prompt + count).tolist()
    yield lambda: step(ids[:prompt])
    for token in ids[prompt:]:
        yield partial(step, [token])


def bytes_read() -> int | None:
    """What this process had read from disk until now; None where nobody counts."""
    process = psutil.Process()
    return process.io_counters().read_bytes if hasattr(process, "io_counters") else None


def held() -> dict:
    """Peak resident and swapped bytes of this process, where the system says."""
    found = {"peak_bytes": peak_process_bytes()}
    if sys.platform != "linux":
        return found | {"swap_bytes": None}
    memory = psutil.Process().memory_full_info()
    anonymous = memory.rss - memory.shared
    return found | {"anonymous_bytes": anonymous, "swap_bytes": memory.swap}


def run(kind: str, job: dict) -> dict:
    """Prompt, warm-up, then the tokens that count."""
    begin = time.perf_counter()
    steps = KINDS[kind](job)
    first = next(steps)
    load_s = time.perf_counter() - begin
    first()
    prompt_s = time.perf_counter() - begin - load_s
    for _ in range(job["warm_up"]):
        next(steps)()
    seconds: list[float] = []
    read: list[int | None] = []
    for _ in range(job["tokens"]):
        before, begin = bytes_read(), time.perf_counter()
        next(steps)()
        seconds.append(time.perf_counter() - begin)
        after = bytes_read()
        read.append(None if after is None or before is None else after - before)
    found = {
        "seconds": seconds,
        "bytes_read": read,
        "load_s": load_s,
        "prompt_s": prompt_s,
        **held(),
        **{k: job[k] for k in ("offloaded_modules",) if k in job},
    }
    steps.close()
    return found
