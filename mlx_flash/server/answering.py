"""One answer: from tokens of a prompt to events, with a KV cache that may be kept."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ..errors import FlashError
from ..generation import stream_generate
from .conversations import Conversations
from .events import Done, Event, Progress, Token, Usage
from .fields import Limits
from .pieces import Pieces
from .request import Request, Sampling
from .settings import Settings


class ClientLeft(Exception):
    """Nobody waits for this answer any more."""


@dataclass(eq=False)
class Job:
    """A request that can be answered.

    Attributes:
        request: What is asked.
        tokens: Of the prompt.
        state: What the answer begins with, see `encoding.encode`.
        send: Takes events, and the error that ends them.
        left: Whether nobody waits for the answer any more.
    """

    request: Request
    tokens: list[int]
    state: str | None
    send: Callable[[Event | FlashError], None]
    left: bool = False
    begin_time: float = field(default_factory=time.monotonic)


class Answering:
    """Generates answers with one model, one at a time.

    Args:
        model, tokenizer: From `mlx_flash.load`.
        limits: Of the model.
        settings: What holds where a request says nothing.
        conversations: Where KV caches come from and go to.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        limits: Limits,
        settings: Settings,
        conversations: Conversations,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._limits = limits
        self._settings = settings
        self._conversations = conversations
        self._special = tokenizer.encode("\n") + list(tokenizer.eos_token_ids)

    def events(self, job: Job) -> Generator[Event, None, None]:
        """All events of an answer.

        Raises:
            ClientLeft: If nobody waits for it any more.
            FlashError: If it cannot be finished.
        """
        request, tokens = job.request, list(job.tokens)
        pieces = Pieces(self._tokenizer, request.stop, job.state, request.tools)
        if request.sampling.seed is not None:
            mx.random.seed(request.sampling.seed)
        cache, n_read = self._conversations.begin(tokens, anew=_penalises(request))
        first_s: float | None = None
        finish: Any = None
        n_reasoning = 0
        try:
            with contextlib.closing(self._steps(job, cache, n_read)) as steps:
                for step in steps:
                    if first_s is None:
                        first_s = time.monotonic() - job.begin_time
                    tokens.append(step.token)
                    if job.left:
                        raise ClientLeft
                    self._conversations.grow(cache)
                    finish = step.finish_reason
                    yield from pieces.add(step.text, self._token(step, request))
                    n_reasoning += pieces.is_reasoning
                    if pieces.stop_text is not None:
                        finish = "stop"
                        break
        except ClientLeft:  # it may ask again
            self._conversations.keep(tokens, cache)
            raise
        yield from pieces.end()
        self._conversations.keep(tokens, cache)
        if pieces.has_calls and finish == "stop":
            finish = "tool_calls"
        n_new = len(tokens) - len(job.tokens)
        figures = self._figures(first_s)
        usage = Usage(len(job.tokens), n_read, n_new, figures, n_reasoning)
        logging.info("Answered: %s", usage)
        yield Done(finish, usage, pieces.stop_text)

    def _steps(
        self, job: Job, cache: list[Any], n_read: int
    ) -> Generator[GenerationResponse, None, None]:
        """The tokens of an answer, of which `cache` has read the first ones."""
        settings, flash = self._settings, self._model.flash
        tokens = job.tokens
        asked = job.request.max_tokens or settings.max_tokens

        def note(done: int, total: int) -> None:
            if job.left:
                raise ClientLeft
            job.send(Progress(n_read + done, n_read + total))

        note(0, len(tokens) - n_read)  # it may have left while it waited
        options: dict[str, Any] = {}
        if flash.draft is None:
            options["prompt_progress_callback"] = note
        else:
            options["num_draft_tokens"] = settings.num_draft_tokens
            options["history"] = tokens[:n_read]
        return stream_generate(
            self._model,
            self._tokenizer,
            tokens[n_read:],
            max_tokens=min(asked, self._limits.tokens - len(tokens)),
            sampler=self._sampler(job.request.sampling),
            logits_processors=_processors(job.request.sampling),
            prompt_cache=cache,
            prefill_step_size=settings.prefill_step_size,
            **settings.kv_options,
            **options,
        )

    def _sampler(self, asked: Sampling) -> Callable[[mx.array], mx.array]:
        ours = self._settings
        return make_sampler(
            _either(asked.temperature, ours.temperature),
            top_p=_either(asked.top_p, ours.top_p),
            top_k=_either(asked.top_k, ours.top_k),
            min_p=_either(asked.min_p, ours.min_p),
            xtc_probability=asked.xtc_probability,
            xtc_threshold=asked.xtc_threshold,
            xtc_special_tokens=self._special,
        )

    def _token(self, step: GenerationResponse, request: Request) -> Token | None:
        """What is told of a token, if its log probability is wanted."""
        if request.top_logprobs is None or step.finish_reason == "stop":
            return None
        top: tuple[tuple[int, str, float], ...] = ()
        if n := request.top_logprobs:
            likeliest = mx.argpartition(-step.logprobs, kth=n - 1)[:n]
            logprobs: Any = step.logprobs[likeliest].tolist()
            ids: Any = likeliest.tolist()
            found = zip(ids, logprobs, strict=True)
            ordered = sorted(found, key=lambda pair: -pair[1])
            top = tuple((i, self._tokenizer.decode([i]), p) for i, p in ordered)
        # To its types, `item` may give a complex number.
        logprob: Any = step.logprobs[step.token].item()
        text = self._tokenizer.decode([step.token])
        return Token(step.token, text, logprob, top)

    def _figures(self, first_s: float | None) -> dict[str, Any]:
        """Of the last answer, for `Usage.flash`."""
        flash = self._model.flash
        report, run = flash.report(), flash.run
        return {
            "first_token_s": first_s,
            "prompt_tokens_per_s": report.prompt_tokens_per_s,
            "tokens_per_s": report.tokens_per_s,
            "hit_rate": report.hit_rate,
            "bytes_read": run.last_stats.bytes_read - run.before.bytes_read,
            "peak_bytes": report.peak_memory_bytes,
            "budget_bytes": report.memory_budget_bytes,
        }


def _either(asked: Any, ours: Any) -> Any:
    return ours if asked is None else asked


def _penalises(request: Request) -> bool:
    """Whether the whole prompt has to be read: penalties count what a call reads."""
    asked = request.sampling
    return any(
        (asked.repetition_penalty, asked.presence_penalty, asked.frequency_penalty)
    )


def _processors(asked: Sampling) -> list[Callable[[mx.array, mx.array], mx.array]]:
    return make_logits_processors(
        asked.logit_bias or None,
        asked.repetition_penalty,
        asked.repetition_context_size,
        asked.presence_penalty,
        asked.presence_context_size,
        asked.frequency_penalty,
        asked.frequency_context_size,
    )
