"""The engines: each loads a model and returns what runs a script on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .qwen3_gguf import write_gguf
from .script import Job, Script

ROWS_BYTES = 16_000_000  # neurostream's for rows in flight, beside its cache


def mlx_flash(job: Job, script: Script) -> Callable[[], dict]:
    """This package, through its own `stream_generate`."""
    import mlx_flash as flash

    model, tokenizer = flash.load(
        job.get("flash") or job["path"],
        memory=job["memory"],
        page_cache=job["page_cache"],
        context=len(script.prompt) + script.steps + 2,
    )

    def run() -> dict:
        options = {"max_tokens": script.steps, "sampler": script.sample}
        for _ in flash.stream_generate(model, tokenizer, script.prompt, **options):
            pass
        stats, budget = model.flash.stats, model.flash.budget
        return {
            "counted": stats.bytes_read,
            "hit_rate": stats.hit_rate,
            "slots": budget.slots,
            "chunk": budget.prefill_tokens,
        }

    return run


def mlx_lm(job: Job, script: Script) -> Callable[[], dict]:
    """mlx-lm with the whole model in memory."""
    from mlx_lm.utils import load

    model, tokenizer, *_ = load(job["path"])
    return lambda: _mlx_lm_loop(model, tokenizer, script)


def _mlx_lm_loop(model: Any, tokenizer: Any, script: Script, **options: Any) -> dict:
    from mlx_lm.generate import stream_generate

    options |= {"max_tokens": script.steps, "sampler": script.sample}
    tokenizer._eos_token_ids = set()  # a token of the script may be one
    for _ in stream_generate(model, tokenizer, script.prompt, **options):
        pass
    return {}


def mlx_vlm(job: Job, script: Script) -> Callable[[], dict]:
    """mlx-vlm's expert offload, on a copy of the checkpoint that it packed."""
    import mlx.core as mx
    from mlx_vlm.generate.ar import generate_step
    from mlx_vlm.utils import load_model

    packed = pack_once(job, "mlx-vlm", _pack_mlx_vlm)
    model = load_model(packed, expert_cache_gb=job["memory"] / 1e9)
    store = model.moe_offload_store

    def run() -> dict:
        steps = generate_step(
            mx.array([script.prompt]),
            model,
            None,
            None,
            max_tokens=script.steps,
            sampler=script.sample,
        )
        for _ in steps:
            pass
        return {"hit_rate": store.stats()["hit_rate"]}

    return run


def _pack_mlx_vlm(source: str, target: Path) -> None:
    from mlx_vlm.moe_offload import repack

    target.mkdir()
    repack(source, str(target))


def boyle(job: Job, script: Script) -> Callable[[], dict]:
    """boyle's runtime: its budget's capacities, its slots, mlx-lm's loop."""
    import fcntl

    import mlx.core as mx
    from boyle import _runtime, loader
    from boyle.budget import plan
    from mlx_lm.utils import load_model, load_tokenizer

    if not hasattr(fcntl, "F_NOCACHE"):
        # Its fast path asks macOS not to cache. Elsewhere the question does nothing.
        fcntl.F_NOCACHE = fcntl.F_GETFD  # type: ignore[attr-defined]
    folder = Path(job["path"])
    budget = plan(
        loader.read_anatomy(folder), job["memory"], len(script.prompt) + script.steps, 1
    )
    model, _ = load_model(folder, lazy=True)
    capacities = list(budget.capacities)
    colocated = pack_once(job, "boyle", _pack_boyle)
    wrapped = _runtime.apply_expert_offload(
        model, folder, capacity_plan=capacities, colo_dir=str(colocated)
    )
    assert wrapped == len(capacities), "not all layers are offloaded"
    mx.eval(model.parameters())
    tokenizer = load_tokenizer(folder)

    def run() -> dict:
        _mlx_lm_loop(model, tokenizer, script)
        stats = _runtime.offload_stats(model)
        experts, nbytes = loader.read_anatomy(folder).layers[0]
        return {
            "counted": stats["misses"] * nbytes // experts,
            "hit_rate": stats["hit_rate"],
            "slots": capacities,
        }

    return run


def _pack_boyle(source: str, target: Path) -> None:
    from boyle.build import build_store

    build_store(source, str(target))


def bigrig(job: Job, script: Script) -> Callable[[], dict]:
    """BigRig's streamed model on its packed experts, mlx-lm's loop in its steps."""
    from bigrig_engine import session, stream

    def pack(source: str, target: Path) -> None:
        stream.ensure_packed(source, str(target), verbose=False)

    blob = str(pack_once(job, "bigrig", pack))
    manifest = stream.load_manifest(blob)
    layers = manifest["layers"].values()
    experts = next(iter(layers))["n_experts"]
    capacity = job["memory"] * experts // manifest["total_bytes"]
    model, tokenizer, handle = stream.load_streaming(
        job["path"], blob, capacity=max(int(capacity), 1), verbose=False
    )
    owner = type("Owner", (), {})()  # what the method below asks of a session
    owner.config_dir, owner.packed = job["path"], True
    owner.plan = {"top_k": stream.model_top_k(job["path"], manifest)}
    step = session.Session._prefill_step(owner)

    def run() -> dict:
        _mlx_lm_loop(model, tokenizer, script, prefill_step_size=step)
        stats = handle.stats()
        hits = stats["hits"] / max(stats["hits"] + stats["misses"], 1)
        return {
            "counted": int(stats["fetch_gb"] * 1e9),
            "hit_rate": hits,
            "slots": capacity,
            "chunk": step,
        }

    return run


def neurostream(job: Job, script: Script) -> Callable[[], dict]:
    """neurostream on a GGUF of the checkpoint: a cache, and rows in flight."""
    from neurostream import NeuroStream

    packed = pack_once(job, "qwen3.gguf", write_gguf)
    model = NeuroStream.load(
        packed, mem_budget=ROWS_BYTES, ram_budget=job["memory"], device="cpu"
    )
    model._sample = lambda logits, *_: script.take(int(logits.argmax()))

    def run() -> dict:
        options = {"max_tokens": script.steps, "stop_on_eos": False}
        for _ in model.generate(script.prompt, **options):
            pass
        return {"counted": model.source.stats.bytes_read}

    return run


def pack_once(job: Job, name: str, write: Callable[[str, Path], None]) -> Path:
    """The engine's own copy of the weights, written where it is not there."""
    target = Path(job["scratch"]) / name
    if not target.exists():
        part = target.with_name(f"{name}.part")
        write(job["path"], part)
        for file in target.parent.glob(f"{name}.part*"):  # BigRig has two
            file.rename(target.parent / file.name.replace(".part", "", 1))
    return target


ENGINES = {
    engine.__name__: engine
    for engine in (mlx_flash, mlx_lm, mlx_vlm, boyle, bigrig, neurostream)
}
