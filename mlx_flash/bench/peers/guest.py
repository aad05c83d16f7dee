"""One engine reads a prompt and decodes, in a process and perhaps a Python of its own.

`python guest.py JOB` prints what it took as one line of JSON. The Python that runs it
need not have mlx-flash: a module of an engine is imported where the engine is asked
for. Every engine runs its own loop, and is given its next tokens by a sampler that also
looks at the clock; so all do the same work, and tokens have the same borders for all.
"""

import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KIB = 1024
AHEAD = 4  # loops sample a token or two more than they yield
ROWS_BYTES = 16_000_000  # neurostream's for rows in flight, beside its cache
GGUF_OUTER = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
Job = dict[str, Any]


class Script:
    """The tokens of a run, and what had been spent when each was known.

    Attributes:
        prompt: Token ids that the engine reads first.
        steps: Tokens to generate: the first, a warm-up, and those that count.
        marks: Seconds, CPU seconds and bytes, one entry a token, after one for the
            start.
        best: The likeliest token of each step, to compare engines by.
        held_bytes: Most that MLX had active and cached together at a mark.
    """

    def __init__(self, job: Job):
        drawn = random.Random(0)
        self.steps = 1 + job["warm_up"] + job["tokens"]
        count = job["prompt_tokens"] + self.steps + AHEAD
        ids = [drawn.randrange(3, job["vocab"]) for _ in range(count)]
        self.prompt, self._next = (
            ids[: job["prompt_tokens"]],
            ids[job["prompt_tokens"] :],
        )
        self.marks: list[dict[str, float]] = []
        self.best: list[int] = []
        self.held_bytes = 0

    def mark(self) -> None:
        self.held_bytes = max(self.held_bytes, mlx_bytes())
        self.marks.append({"s": time.perf_counter(), "cpu_s": cpu_s(), **bytes_read()})

    def take(self, best: int) -> int:
        """Note a step whose likeliest token is `best`; the token to go on with."""
        self.best.append(best)
        self.mark()
        return self._next[len(self.best) - 1]

    def sample(self, logprobs: Any) -> Any:
        """As mlx-lm and mlx-vlm call a sampler, with log probabilities [1, V]."""
        import mlx.core as mx

        return mx.array([self.take(mx.argmax(logprobs, axis=-1).item())])


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def bytes_read() -> dict[str, int]:
    """What the disk gave to this process, and what `read` gave it, cached or not."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:  # no Linux
        return {}
    counts = dict(line.split(": ") for line in lines)
    return {"disk": int(counts["read_bytes"]), "asked": int(counts["rchar"])}


def memory_kib(name: str) -> int | None:
    """A line of this process's status: VmRSS, or VmHWM for its peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(x.split()[1]) for x in lines if x.startswith(name + ":"))


def mlx_flash(job: Job, script: Script) -> Callable[[], dict]:
    """This package, through its own `stream_generate`."""
    import mlx_flash as flash

    model, tokenizer = flash.load(
        job.get("flash", job["path"]),
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

    model, tokenizer = load(job["path"])
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

    packed = _pack(job, "mlx-vlm", _pack_mlx_vlm)
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
    colocated = _pack(job, "boyle", _pack_boyle)
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

    blob = str(_pack(job, "bigrig", pack))
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

    packed = _pack(job, "qwen3.gguf", _pack_neurostream)
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


def _pack_neurostream(source: str, target: Path) -> None:
    """Write a dense Qwen3 as GGUF, in float32."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((Path(source) / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_merges(["t 0"])
    for file in sorted(Path(source).glob("*.safetensors")):
        for name, array in load_file(file).items():
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """What a tensor of a Qwen3 is called in a GGUF."""
    stem = name.removeprefix("model.").removesuffix(".weight")
    if stem in GGUF_OUTER:
        return f"{GGUF_OUTER[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{GGUF_LAYER[part.rpartition('.')[2]]}.weight"


def _pack(job: Job, name: str, write: Callable[[str, Path], None]) -> Path:
    """The engine's own copy of the weights, written where it is not there."""
    target = Path(job["scratch"]) / name
    if not target.exists():
        part = target.with_name(f"{name}.part")
        write(job["path"], part)
        for file in target.parent.glob(f"{name}.part*"):  # BigRig has two
            file.rename(target.parent / file.name.replace(".part", "", 1))
    return target


ENGINES = (mlx_flash, mlx_lm, mlx_vlm, boyle, bigrig, neurostream)


def run(job: Job) -> dict:
    """Import, load, prompt, decode: what each took, and what the process held."""
    engine = next(e for e in ENGINES if e.__name__ == job["engine"])
    script = Script(job)
    baseline = start(engine.__name__)
    begin = time.perf_counter()
    go = engine(job, script)
    load_s = time.perf_counter() - begin
    script.mark()
    found = go()
    return found | {
        "load_s": load_s,
        "marks": script.marks[: script.steps + 1],
        "best": script.best[: script.steps],
        **peaks(baseline, script.held_bytes),
    }


def start(name: str) -> int | None:
    """Import what the engine multiplies with; resident KiB from then on are its own."""
    if name == "neurostream":
        import neurostream  # noqa: F401
        import torch

        torch.ones(64, 64) @ torch.ones(64, 64)
    else:
        __import__(name if name != "bigrig" else "bigrig_engine.session")
        import mlx.core as mx
        import mlx_lm  # noqa: F401

        mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
        mx.reset_peak_memory()
    return memory_kib("VmRSS")


def mlx_bytes() -> int:
    """What MLX has allocated now, in use or kept for later."""
    mx = sys.modules.get("mlx.core")
    return mx.get_active_memory() + mx.get_cache_memory() if mx else 0


def peaks(baseline: int | None, held_bytes: int) -> dict:
    """Bytes at the peak: of MLX, and of the process above what it had imported."""
    found: dict = {}
    highest = memory_kib("VmHWM")
    if baseline is not None and highest is not None:
        found["growth_bytes"] = (highest - baseline) * KIB
    if "mlx.core" in sys.modules:
        # What was active at some moment, or active and cached between two tokens
        mx = sys.modules["mlx.core"]
        found["peak_bytes"] = max(mx.get_peak_memory(), held_bytes)
    return found


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
