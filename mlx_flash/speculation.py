"""Generate with drafts: the model verifies several tokens in one call.

A call reads what its tokens need together. For a model in blocks that is the same for
one token as for eight; for experts and neurons it is their union.

Drafts change no answer. Every token is drawn from the model's own logits by the
caller's sampler, one after the other and as often as without drafts, and a draft is
right if it is the token that was drawn.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import (
    DEFAULT_QUANTIZED_KV_START,
    GenerationResponse,
    generation_stream,
    maybe_quantize_kv_cache,
    wired_limit,
)
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .drafting import Drafter
from .errors import FlashError
from .run import DraftStats

Sampler = Callable[[mx.array], mx.array]
# One call of 16 has no draft, so that the report can compare.
PLAIN_EVERY, FIRST_PLAIN = 16, 4


@dataclass
class Verifier:
    """A model with its cache, which reads tokens and draws the next ones.

    Attributes:
        cache: mlx-lm's, of which every entry can be trimmed.
        sampler, processors: As mlx-lm's `generate_step` takes them.
        quantise: (start, group size, bits) of the KV cache; no bits is none.
    """

    model: nn.Module
    cache: list[Any]
    sampler: Sampler
    processors: Sequence[Callable]
    quantise: tuple[int, int, int | None]

    def read(self, tokens: Sequence[int]) -> mx.array:
        """Lazy logits [len(tokens), V], after the tokens are in the cache."""
        with mx.stream(generation_stream):
            logits = self.model(mx.array(list(tokens))[None], cache=self.cache)
            maybe_quantize_kv_cache(self.cache, *self.quantise)
        return logits[0]

    def read_prompt(self, tokens: Sequence[int], step: int) -> None:
        """Bring tokens into the cache, `step` of them in a call."""
        for start in range(0, len(tokens), step):
            self.read(tokens[start : start + step])
            mx.eval([entry.state for entry in self.cache])
            mx.clear_cache()

    def draw(self, logits: mx.array, known: Sequence[int]) -> tuple[int, mx.array]:
        """The token that follows `known`, and log probabilities [V]."""
        with mx.stream(generation_stream):
            row = logits[None]
            for processor in self.processors:
                row = processor(mx.array(list(known)), row)
            logprobs = row - mx.logsumexp(row, keepdims=True)
            token = self.sampler(logprobs)
            mx.eval(token, logprobs)
        return int(np.asarray(token).item()), logprobs[0]

    def forget(self, tokens: int) -> None:
        if tokens > 0:
            trim_prompt_cache(self.cache, tokens)


@dataclass
class Drafts:
    """Who drafts, and what came of it.

    Attributes:
        drafter: Guesses tokens.
        most: Tokens of a draft.
        stats: What was drafted and accepted.
        history: Tokens before the prompt, which the cache holds already.
        bytes_read: The model's counter.
        compare: Whether to make some calls without drafts.
    """

    drafter: Drafter
    most: int
    stats: DraftStats
    history: list[int]
    bytes_read: Callable[[], int]
    compare: bool

    def next(self, known: Sequence[int], left: int) -> list[int]:
        """A draft for the next call, after which `left` tokens may come at most."""
        if self.compare and self.stats.calls % PLAIN_EVERY == FIRST_PLAIN:
            return []
        known = self.history + list(known)
        return self.drafter.draft(known, min(self.most, left - 1))


def check_trimmable(cache: Sequence[Any], tokens: int | None) -> None:
    """Refuse caches that cannot forget what was drafted wrongly.

    Args:
        tokens: Of prompt and answer, None if there is no limit: a cache that rotates
            can be trimmed as long as it does not.

    Raises:
        FlashError: If one of them cannot.
    """
    for entry in cache:
        most = getattr(entry, "max_size", None)
        held = getattr(entry, "offset", 0)
        turns = most and (tokens is None or held + tokens > most)
        if turns or not can_trim_prompt_cache([entry]):
            raise FlashError(
                f"This model cannot verify drafts: its cache ({type(entry).__name__}) "
                "cannot forget wrong ones in so long a text. Leave out --draft-model "
                "and --draft-ngrams."
            )


def stream_drafted(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    max_tokens: int,
    drafts: Drafts,
    *,
    sampler: Sampler,
    logits_processors: Sequence[Callable] | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = 2048,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
) -> Generator[GenerationResponse, None, None]:
    """As mlx-lm's `stream_generate`, whose options these are, with drafts.

    Args:
        prompt: Token ids, at least one.
        max_tokens: At most so many new tokens; below 0 there is no limit.
        drafts: Who drafts, and what came of it.

    Raises:
        FlashError: If the model's cache cannot be trimmed.
    """
    if max_tokens == 0:
        raise ValueError(
            "Maximum number of tokens must be non-zero (use -1 for no limit)."
        )
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    cache = prompt_cache or make_prompt_cache(model)
    check_trimmable(cache, len(prompt) + max_tokens if max_tokens > 0 else None)
    quantise = quantized_kv_start, kv_group_size, kv_bits
    processors = logits_processors or ()
    verifier = Verifier(model, cache, sampler, processors, quantise)
    # What the caller's cache lacks at the end, the caller cannot know.
    keep = prompt_cache is not None
    ends = tokenizer.eos_token_ids
    verifying = _tokens(
        verifier, drafts, prompt, max_tokens, ends, prefill_step_size, keep
    )
    detokenizer = tokenizer.detokenizer
    begin = time.perf_counter()
    count, prompt_tps = 0, 0.0
    token, logprobs, drafted = 0, mx.array(0.0), False
    finish = "length"

    def response(reason: str | None) -> GenerationResponse:
        return GenerationResponse(
            text=detokenizer.last_segment,
            token=token,
            logprobs=logprobs,
            from_draft=drafted,
            prompt_tokens=len(prompt),
            prompt_tps=prompt_tps,
            generation_tokens=count,
            generation_tps=count / max(time.perf_counter() - begin, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
        )

    streams: Any = [generation_stream]  # mlx-lm names another type than it takes
    with wired_limit(model, streams):
        for step in verifying:
            token, logprobs, drafted = step  # for `response`
            if not count:
                prompt_tps = len(prompt) / (time.perf_counter() - begin)
                begin = time.perf_counter()
            count += 1
            if token in ends:
                finish = "stop"
                continue  # the last one
            detokenizer.add_token(token)
            if count != max_tokens:
                yield response(None)
        detokenizer.finalize()
        yield response(finish)


def _tokens(
    verifier: Verifier,
    drafts: Drafts,
    prompt: list[int],
    max_tokens: int,
    ends: set[int],
    step: int,
    keep: bool,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """Tokens with their log probabilities, and whether they were drafted.

    Args:
        ends: Tokens that end the answer.
        step: Tokens of the prompt in a call.
        keep: Whether the cache shall hold the whole answer at the end. Its last token
            takes another call.
    """
    known = list(prompt)
    verifier.read_prompt(known[:-1], step)
    unread = known[-1:]
    while True:
        left = max_tokens - (len(known) - len(prompt)) if max_tokens > 0 else 1 << 30
        before = drafts.bytes_read()
        draft = drafts.next(known, left)
        logits = verifier.read(unread + draft)
        drawn = []
        for i, guess in enumerate([*draft, None]):
            token, logprobs = verifier.draw(logits[i], known)
            known.append(token)
            drawn.append((token, logprobs, token == guess))
            if token != guess or token in ends:
                break
        # Of what was drafted, the cache keeps the tokens that were drawn.
        right = sum(drafted for _, _, drafted in drawn)
        verifier.forget(len(draft) - right)
        nbytes = drafts.bytes_read() - before
        if len(known) > len(prompt) + len(drawn):  # the first call is the prompt's
            drafts.stats.count(len(draft), right, len(drawn), nbytes)
        done = known[-1] in ends or len(drawn) >= left
        held = right  # of what was drawn, in the cache
        if done and keep and right < len(drawn):
            verifier.read_prompt(known[-1:], 1)
            held += 1
        said = 0
        try:
            for item in drawn:
                said += 1
                yield item
        finally:  # somebody who stops here may go on with the cache
            verifier.forget(held - said)
        if done:
            return
        unread = known[-1:]
