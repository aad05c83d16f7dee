"""Answer one request after the other, in a thread of its own.

Requests wait for each other: the budget is promised to one answer at a time, and what
it leaves of the KV cache's reserve is kept for conversations that may go on. What is
wrong with a request is found before it waits; what fails later (a read, for example)
fails that request alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import Empty, Queue
from threading import Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream

from ..errors import FlashError
from .answering import Answering, ClientLeft, Job
from .conversations import Conversations
from .encoding import encode
from .events import Done, Event, Progress
from .facts import facts_of
from .fields import Limits, Refused
from .request import Request
from .settings import Settings

MAX_WAITING = 64  # requests, with the one that is being answered
KEEPALIVE_S = 10.0  # after which a client that waits hears that it still does
IDLE_S = 0.5  # between two looks whether memory has to give way


class Worker:
    """A `Service` on one model.

    Attributes:
        model, tokenizer: From `mlx_flash.load`.
        limits, facts: Of the model.
        settings: Of the server.
        conversations: Whose KV caches are kept.
        waiting: Requests that wait or are being answered.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        limits: Limits,
        settings: Settings,
        conversations: Conversations,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits
        self.facts = facts_of(model, tokenizer)
        self.settings = settings
        self.conversations = conversations
        self._answering = Answering(model, tokenizer, limits, settings, conversations)
        self._jobs: Queue[Job | None] = Queue()
        self._live: set[Job] = set()
        self.waiting = 0
        self._stopping = False
        # Tokenizers change while they encode: one text at a time.
        self._encoder = ThreadPoolExecutor(1, "mlx-flash encoder")
        self._encodings: set[Future[Any]] = set()
        model.flash.pool.caches.add_holder(conversations.drop)
        self._thread = Thread(target=self._run, name="mlx-flash worker", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are still answered."""
        return self._thread.is_alive() and not self._stopping

    async def answer(self, request: Request) -> AsyncIterator[Event]:
        """See `Service.answer`."""
        if self.waiting >= MAX_WAITING:
            raise Refused(
                f"{self.waiting} requests wait already. Try again in a moment.", 503
            )
        self.waiting += 1
        try:
            tokens, state = await self._encoded(request)
            self._check_length(tokens)
            arrived: asyncio.Queue[Event | FlashError] = asyncio.Queue()
            job = Job(request, tokens, state, _sender(arrived))
            self._live.add(job)
            self._jobs.put(job)
            try:
                async for event in self._events(job, arrived):
                    yield event
            finally:
                job.left = True
                self._live.discard(job)
        finally:
            self.waiting -= 1

    async def count_tokens(self, request: Request) -> int:
        """See `Service.count_tokens`."""
        tokens, _ = await self._encoded(request)
        return len(tokens)

    def end_answers(self) -> None:
        """Fail what waits or is being answered, and answer nothing more."""
        self._stopping = True
        for job in list(self._live):
            job.left = True
            job.send(FlashError("The server was stopped."))

    def stop(self, timeout_s: float) -> bool:
        """End the threads, between two tokens or pieces of a prompt.

        Returns:
            Whether they ended in `timeout_s` seconds.
        """
        end_time = time.monotonic() + timeout_s
        self.end_answers()
        self._jobs.put(None)
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout_s)
        left_s = max(end_time - time.monotonic(), 0)
        still = wait(set(self._encodings), left_s).not_done
        if self._thread.is_alive() or still:
            return False
        self.conversations.drop()
        return True

    async def _encoded(self, request: Request) -> tuple[list[int], str | None]:
        """Token ids of a request, and what its answer begins with.

        Raises:
            Refused: If they cannot be encoded.
        """
        if not self.is_healthy:
            raise FlashError("The server was stopped.")
        coming = self._encoder.submit(
            encode, self.tokenizer, request, self.settings.template_options
        )
        self._encodings.add(coming)
        coming.add_done_callback(self._encodings.discard)
        return await asyncio.wrap_future(coming)

    def _check_length(self, tokens: list[int]) -> None:
        if len(tokens) >= self.limits.tokens:
            raise Refused(
                f"The prompt has {len(tokens):,} tokens; this server has room for "
                f"{self.limits.tokens:,}, prompt and answer together. Shorten it, or "
                "start the server with a larger --context if the model allows it."
            )

    async def _events(
        self, job: Job, arrived: asyncio.Queue[Event | FlashError]
    ) -> AsyncIterator[Event]:
        """What the thread sends, and signs of life while it sends nothing."""
        progress = Progress(0, len(job.tokens))
        yield progress
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_S):
                    event = await arrived.get()
            except TimeoutError:
                if not self._thread.is_alive():
                    raise FlashError("Nobody answers: start the server anew.") from None
                yield progress
                continue
            if isinstance(event, FlashError):
                raise event
            if isinstance(event, Progress):
                progress = event
            yield event
            if isinstance(event, Done):
                return

    def _run(self) -> None:
        """The thread: answer jobs until `stop`."""
        while not self._stopping:
            try:
                job = self._jobs.get(timeout=IDLE_S)
            except Empty:
                try:
                    self.model.flash.pool.take_over()
                except Exception:  # requests may still be answered
                    logging.exception("The budget could not be changed.")
                continue
            if job is None:
                break
            if not job.left:
                self._answer(job)
        # Its stream ends with this thread: nothing may be under way on it.
        mx.synchronize(generation_stream)

    def _answer(self, job: Job) -> None:
        try:
            with contextlib.closing(self._answering.events(job)) as events:
                for event in events:
                    job.send(event)
            self.conversations.save()
        except ClientLeft:
            logging.info("A client left before its answer was complete.")
        except Exception as error:
            known = isinstance(error, FlashError)
            logging.error("A request failed: %s", error, exc_info=not known)
            # A new error: this one's traceback would hold the KV cache.
            job.send(FlashError(str(error) or type(error).__name__))
        mx.clear_cache()


def _sender(
    arrived: asyncio.Queue[Event | FlashError],
) -> Callable[[Event | FlashError], None]:
    """Puts into a queue of the loop that runs now, from any thread."""
    loop = asyncio.get_running_loop()

    def send(event: Event | FlashError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(arrived.put_nowait, event)

    return send
