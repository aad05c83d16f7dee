"""Generate for one request after the other, in a thread of its own.

mlx-lm's server generates for several requests at once. Here they wait for each other:
the budget is promised to one answer at a time, and what it leaves of the KV cache's
reserve is kept for conversations that may go on. What can be wrong with a request is
found by `Worker.prepare` in the thread of its connection; what fails later (a read, for
example) fails that request alone.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Lock
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import (
    GenerationResponse,
    TextStateMachine,
    generation_stream,
    make_text_state_machine,
)
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    ModelProvider,
    Response,
    ResponseGenerator,
    _format_top_logprobs,
    _make_logits_processors,
    _make_sampler,
)

from ..errors import FlashError
from ..generation import stream_generate
from ..prompts import encode_prompt
from .conversations import Conversations
from .fields import Limits, Refused
from .stop_text import StopText

POLL_S = 0.2  # between two looks whether a client that waits is still there


class ClientLeft(ConnectionError):
    """Nobody waits for this answer any more."""


@dataclass
class Job(CompletionRequest):
    """A request that was judged.

    Attributes:
        context: What mlx-lm's handler wants to know of an answer.
        stop_words: The texts that end the answer.
        gone: Says whether the client left.
        responses: What the worker puts there: (tokens read, all tokens) while it reads
            the prompt, a Response for each new token, an exception, None at the end.
    """

    context: GenerationContext
    stop_words: list[str]
    gone: Callable[[], bool]
    arguments: GenerationArguments | None = None
    responses: Queue[Any] = field(default_factory=Queue)


class Worker(ResponseGenerator):
    """What mlx-lm's handler asks for answers, in the place of mlx-lm's own.

    Attributes:
        model, tokenizer: From `mlx_flash.load`.
        limits: Of the model.
        conversations: Whose KV caches are kept.
    """

    def __init__(
        self,
        provider: ModelProvider,
        model: nn.Module,
        tokenizer: Any,
        limits: Limits,
        conversations: Conversations,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits
        self.conversations = conversations
        self._tokenizer_lock = Lock()  # tokenizers change while they encode
        super().__init__(provider, LRUPromptCache(0))

    def stop(self, timeout_s: float) -> bool:
        """End the thread, between two tokens or pieces of a prompt.

        Returns:
            Whether it ended in `timeout_s` seconds.
        """
        self._stop = True
        self.requests.put(None)
        self._generation_thread.join(timeout_s)
        return not self._generation_thread.is_alive()

    def prepare(
        self,
        request: CompletionRequest,
        stop_words: list[str],
        template_options: dict[str, Any] | None,
        gone: Callable[[], bool],
    ) -> Job:
        """Encode a request and judge its length.

        Raises:
            Refused: If it cannot be answered.
        """
        with self._tokenizer_lock:
            tokens, state = self._encode(request, template_options)
            machine = self._text_machine(stop_words)
        if len(tokens) >= self.limits.tokens:
            raise Refused(
                f"The prompt has {len(tokens):,} tokens; this server has room for "
                f"{self.limits.tokens:,}, prompt and answer together. Shorten it, or "
                "start the server with a larger --context if the model allows it."
            )
        tokenizer = self.tokenizer
        context = GenerationContext(
            has_tool_calling=tokenizer.has_tool_calling,
            has_thinking=tokenizer.has_thinking,
            tool_parser=tokenizer.tool_parser,
            text_sm=machine,
            initial_state=state,
            prompt=tokens,
        )
        return Job(**vars(request), context=context, stop_words=stop_words, gone=gone)

    def generate(self, request, generation_args, progress_callback=None):
        """As mlx-lm's, for a `Job`; what fails is raised while it is iterated."""
        request.arguments = generation_args
        return request.context, self._answer(request, progress_callback)

    def _encode(
        self, request: CompletionRequest, options: dict[str, Any] | None
    ) -> tuple[list[int], str]:
        """Token ids, and whether the answer begins with reasoning."""
        try:
            if request.request_type == "text":
                tokens = encode_prompt(self.tokenizer, request.prompt)
                return tokens, "normal"
            tokens, _, _, state, _ = self._tokenize(
                self.tokenizer, request, _TemplateOptions(options)
            )
        # Templates are programs: they raise whatever they like.
        except Exception as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise Refused(f"The prompt cannot be encoded: {text[0]}") from error
        if not tokens:
            raise Refused("The prompt is empty.")
        return list(tokens), state

    def _text_machine(self, stop_words: list[str]) -> TextStateMachine:
        try:
            return make_text_state_machine(self.tokenizer, stop_words)
        except ValueError as error:
            raise Refused(f"stop cannot be used: {error}.") from error

    def _answer(self, job: Job, progress: Callable[[int, int], None] | None):
        self.requests.put(job)
        try:
            while True:
                if job.gone():
                    raise ClientLeft("the client left")
                try:
                    response = job.responses.get(timeout=POLL_S)
                except Empty:
                    if not self.generation_available():
                        raise RuntimeError("the generation thread ended") from None
                    continue
                if response is None:
                    return
                if isinstance(response, Exception):
                    raise response
                if isinstance(response, tuple):
                    if progress is not None:
                        progress(*response)
                else:
                    yield response
        finally:
            job.context.stop()

    def _generate(self) -> None:
        """The thread: answer jobs until `stop`."""
        while (job := self.requests.get()) is not None and not self._stop:
            try:
                for response in self._responses(job):
                    job.responses.put(response)
                job.responses.put(None)
                self.conversations.save()
            except ClientLeft:
                logging.info("A client left before its answer was complete.")
            except Exception as error:
                known = isinstance(error, FlashError)
                logging.error("A request failed: %s", error, exc_info=not known)
                # A new error: this one's traceback would hold the KV cache.
                job.responses.put(FlashError(str(error) or type(error).__name__))
            mx.clear_cache()
        # Its stream ends with this thread: nothing may be under way on it.
        mx.synchronize(generation_stream)
        self.conversations.drop()

    def _responses(self, job: Job) -> Iterator[Response]:
        arguments, context = job.arguments, job.context
        assert arguments is not None  # `generate` gave them before it queued the job

        def note(done: int, total: int) -> None:
            if context._should_stop or self._stop:
                raise ClientLeft("the client left")
            job.responses.put((done, total))

        note(0, len(context.prompt))  # it may have left while it waited
        if arguments.seed is not None:
            mx.random.seed(arguments.seed)
        processors = _make_logits_processors(arguments)
        tokens = list(context.prompt)
        asked = arguments.logits
        # A penalty counts only the tokens that this call reads.
        penalties = (
            asked.repetition_penalty,
            asked.presence_penalty,
            asked.frequency_penalty,
        )
        cache, n_read = self.conversations.begin(tokens, anew=any(penalties))
        context.prompt_cache_count = n_read
        stop = StopText(job.stop_words)
        answer = stream_generate(
            self.model,
            self.tokenizer,
            tokens[n_read:],
            max_tokens=min(arguments.max_tokens, self.limits.tokens - len(tokens)),
            sampler=_make_sampler(arguments, self.tokenizer),
            logits_processors=processors,
            prompt_cache=cache,
            prompt_progress_callback=note,
            kv_bits=self.cli_args.kv_bits,
            kv_group_size=self.cli_args.kv_group_size,
            quantized_kv_start=self.cli_args.quantized_kv_start,
        )
        try:
            with contextlib.closing(answer):
                for step in answer:
                    tokens.append(step.token)
                    if context._should_stop or self._stop:
                        raise ClientLeft("the client left")
                    self.conversations.grow(cache)
                    reason = "stop" if stop.found else step.finish_reason
                    yield self._response(step, stop.cut(step.text), reason, arguments)
                    if reason is not None:
                        break
        except ClientLeft:  # it may ask again
            self.conversations.keep(tokens, cache)
            raise
        self.conversations.keep(tokens, cache)

    def _response(
        self,
        step: GenerationResponse,
        text: str,
        reason: str | None,
        arguments: GenerationArguments,
    ) -> Response:
        top = _format_top_logprobs(
            step.logprobs, arguments.top_logprobs, self.tokenizer
        )
        # To its types, `item` may give a complex number.
        logprob: Any = step.logprobs[step.token].item()
        return Response(text, step.token, logprob, reason, top)


@dataclass
class _TemplateOptions:
    """The part of GenerationArguments that mlx-lm's encoding of messages uses."""

    chat_template_kwargs: dict[str, Any] | None
