"""What happens inside of a loaded model, as one picture: for the page and for `top`."""

from __future__ import annotations

from dataclasses import dataclass

from ..memory.stats import Stats


@dataclass(frozen=True)
class Model:
    """What is served. `chat` is whether it has a chat template.

    `lossy` says in what its output is not the model's own, None if it is.
    """

    name: str
    unit: str
    bytes: int
    layers: int
    context: int
    page_cache: bool
    chat: bool
    lossy: str | None


@dataclass(frozen=True)
class Memory:
    """Bytes: the budget and its parts, what MLX holds of it, and the machine's.

    `short` is whether the kernel says that memory is short.
    """

    budget: int
    resident: int
    predictors: int
    slots: int
    kv_cache: int
    workspace: int
    draft: int
    held: int
    peak: int
    process: int
    available: int
    machine: int
    short: bool


@dataclass(frozen=True)
class Requests:
    """Of the server, since it started; `reading` is a prompt's (tokens read, all)."""

    waiting: int
    running: int
    ended: int
    prompt_tokens: int
    generated_tokens: int
    reading: tuple[int, int] | None


@dataclass(frozen=True)
class Answer:
    """The answer that is generated, or the last one. Times are in seconds.

    `begun_s` tells one answer from another. What is not known yet is None. `io_s`,
    `cache_s` and `compute_s` are those of decoding: after the first new token.
    """

    begun_s: float
    tokens: int
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    hit_rate: float | None = None
    bytes_per_token: float | None = None
    waits_per_token: float | None = None
    read_gb_per_s: float | None = None
    io_s: float | None = None
    cache_s: float | None = None
    compute_s: float | None = None


@dataclass(frozen=True)
class LayerState:
    """One FFN. `asked` and `held` are its row of the heat map, unit after unit.

    A row has a column for each unit, or 256 of about as many units each. Both are
    base64: `asked` of 32-bit integers, little endian (how often the units of a column
    were asked for, added up), `held` of bytes (the share of a column's units that is in
    memory; 255 is all).
    """

    module: str
    units: int
    slots: int
    held_units: int
    whole: bool
    asked: str
    held: str


@dataclass(frozen=True)
class State:
    """All of it; `at_s` counts from the start of the server."""

    at_s: float
    model: Model
    memory: Memory
    requests: Requests
    answer: Answer | None
    counters: Stats
    layers: list[LayerState]
