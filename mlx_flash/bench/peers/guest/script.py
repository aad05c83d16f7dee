"""The tokens of a run, and what had been spent when each of them was known."""

import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

KIB = 1024
AHEAD = 4  # loops sample a token or two more than they yield
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
        ids = job.get("ids") or [drawn.randrange(3, job["vocab"]) for _ in range(count)]
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

        best = mx.argmax(logprobs, axis=-1).item()
        assert isinstance(best, int)
        return mx.array([self.take(best)])


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
