"""A conversation: what was said, and the KV cache of what the model has read of it.

A turn has the new tokens read alone. Where the chat template rewrites earlier turns
(some leave out what the model thought), the KV cache is cut back to what is still the
same, and the rest is read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from .arrays import arrays_of
from .errors import FlashError
from .generation import stream_generate
from .kv_cache import rotating_cache
from .prompt_cache import common_tokens
from .prompts import Message, check_messages, encode_prompt, write_messages
from .storage.files import read_json, write_whole
from .storage.safetensors import write_error
from .thinking import Piece, Thinking


class Conversation:
    """A model that one talks with, turn by turn.

    >>> with mlx_flash.load("qwen3-30b-flash", memory="8GB") as (model, tokenizer):
    ...     talk = mlx_flash.Conversation(model, tokenizer)
    ...     for piece in talk.ask("Three uses for old slate?"):
    ...         print(piece.text, end="", flush=True)

    A model without a chat template continues the text of all turns.

    Attributes:
        system: What the model is told before everything else, or None.
        messages: The turns: {"role": "user", "content": …}, {"role": "assistant", …}.
        tokens: What the KV cache holds.
        cache: mlx-lm's caches; None before the first turn.
        cached_tokens: Of the last prompt, how many were in the cache.
        finish_reason: Of the last answer: "stop", "length", or None if it was broken
            off.
        kept: Whether the last turn is in `messages`. One that was broken off before
            any text came is not.
        progress: Called with (tokens read, tokens to read) while a prompt is read.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        system: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        max_kv_size: int | None = None,
        **options: Any,
    ):
        """
        Args:
            model: From `mlx_flash.load`.
            tokenizer: From the same call.
            system: What the model is told before everything else.
            template_options: For the chat template.
            max_kv_size: Keep the first 4 and the latest of so many tokens.
            options: For `stream_generate`: `max_tokens`, `sampler`, `stop`, …
        """
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.tokens: list[int] = []
        self.cache: list[Any] | None = None
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self.kept = True
        self.progress: Callable[[int, int], None] | None = None
        # Whether the KV cache may hold other tokens than `tokens`: an interrupt may
        # come while another one is dealt with.
        self._unsettled = False
        self._model = model
        self._tokenizer = tokenizer
        self._template_options = template_options
        self._max_kv_size = max_kv_size
        self._options = options

    def ask(self, text: str) -> Generator[Piece, None, None]:
        """Say `text`, and get the answer piece by piece.

        Broken off, by closing the generator or by an exception such as Ctrl-C's, the
        conversation goes on: what came of the answer is kept, and if nothing came, the
        turn is dropped. `kept` says which.

        Raises:
            FlashError: If the conversation does not fit the model's positions or its
                memory, or as `stream_generate`.
        """
        question = {"role": "user", "content": text}
        said, self.finish_reason, self.kept = "", None, False
        try:
            written, prompt = self._prompt(question)
            self.cached_tokens = self._reuse(prompt)
            thinking = Thinking(self._tokenizer, written)
            for response in self._generate(prompt):
                said += response.text
                self.finish_reason = response.finish_reason
                last = response.finish_reason is not None
                yield from thinking.take(response.text, last)
        finally:
            self.kept = bool(said) or self.finish_reason is not None
            if self.kept:
                self.messages += [question, {"role": "assistant", "content": said}]

    @property
    def has_template(self) -> bool:
        """Whether the model answers; else it continues the text of all turns."""
        return bool(getattr(self._tokenizer, "has_chat_template", False))

    def reset(self) -> None:
        """Begin anew, with the same system prompt and an empty KV cache."""
        self.messages.clear()
        self._forget()

    def restore(self, cache: list[Any], tokens: Sequence[int]) -> None:
        """Go on with a KV cache that has read `tokens`, as far as they are the same."""
        self.cache, self.tokens = cache, list(tokens)

    def save(self, path: str | Path) -> None:
        """Write what was said as JSON, the system prompt first.

        Raises:
            FlashError: If the system refuses.
        """
        try:
            text = json.dumps({"messages": self._all()}, indent=1, ensure_ascii=False)
            write_whole(Path(path).expanduser(), text + "\n")
        except OSError as error:
            raise write_error(Path(path), error) from error

    def load(self, path: str | Path) -> None:
        """Go on with what `save` wrote, or with a JSON list of messages.

        Raises:
            FlashError: If it is neither. The conversation is as before then.
        """
        try:
            found = read_json(Path(path).expanduser())
        except FileNotFoundError:
            raise FlashError(f"{path} does not exist. Name another file.") from None
        messages = found.get("messages") if isinstance(found, dict) else found
        if not isinstance(messages, list):
            raise FlashError(f"{path} is no saved conversation. Name another file.")
        if messages:
            check_messages(messages)
        if any(not isinstance(message["content"], str) for message in messages):
            raise FlashError(f"{path} has messages that are no text. Name another.")
        begins = bool(messages) and messages[0]["role"] == "system"
        self.system = messages[0]["content"] if begins else None
        self.messages = [dict(message) for message in messages[begins:]]

    def _all(self, *more: Message) -> list[Message]:
        if self.system is None:
            return [*self.messages, *more]
        return [{"role": "system", "content": self.system}, *self.messages, *more]

    def _prompt(self, question: Message) -> tuple[str, list[int]]:
        """The text and the tokens of all that was said until now, and of `question`."""
        tokenizer, flash = self._tokenizer, self._model.flash
        if getattr(tokenizer, "has_chat_template", False):
            text = write_messages(
                tokenizer, self._all(question), self._template_options
            )
            tokens = tokenizer.encode(text, add_special_tokens=False)
        else:
            if self.system is not None:
                raise FlashError(
                    "This model has no chat template, so a system prompt has no place. "
                    "Leave it out, or take an instruct model."
                )
            text = _joined(self._all(question))
            tokens = encode_prompt(tokenizer, text)
        if flash.positions is not None and len(tokens) >= flash.positions:
            raise FlashError(
                f"The conversation would have {len(tokens):,} tokens, and the model "
                f"has {flash.positions:,} positions. Begin a new one."
            )
        return text, tokens

    def _reuse(self, prompt: list[int]) -> int:
        """Cut the KV cache to what it has of `prompt`; how many tokens that is.

        At least one token is left to read: its output begins the answer.
        """
        if self._unsettled:
            self._forget()
        common = min(common_tokens(self.tokens, prompt), len(prompt) - 1)
        spare = len(self.tokens) - common
        if self.cache is None or (spare and not can_trim_prompt_cache(self.cache)):
            self._forget()
            common = 0
            if self._max_kv_size is None:
                self.cache = make_prompt_cache(self._model)
            else:
                self.cache = rotating_cache(self._model, self._max_kv_size)
        elif spare:
            trim_prompt_cache(self.cache, spare)
        self.tokens = prompt[:common]
        return common

    def _generate(self, prompt: list[int]) -> Generator[Any, None, None]:
        """The responses; the KV cache and `tokens` agree after it, however it ends."""
        held = self.cached_tokens
        steps = stream_generate(
            self._model,
            self._tokenizer,
            prompt[held:],
            prompt_cache=self.cache,
            history=prompt[:held],
            prompt_progress_callback=self.progress,
            **self._options,
        )
        run, answered = None, False
        self._unsettled = True
        try:
            for response in steps:
                run, answered = self._model.flash.run, True
                yield response
        except GeneratorExit:
            steps.close()
            self._settle(prompt + run.tokens if run else prompt, whole=answered)
            raise
        except BaseException:
            steps.close()
            self._settle(prompt + run.tokens if run else prompt[:held], whole=False)
            raise
        self._settle(prompt + run.tokens if run else prompt, whole=True)

    def _settle(self, known: list[int], whole: bool) -> None:
        """Cut the KV cache to what all layers have read of `known`.

        Args:
            whole: Whether a call of the model ended properly. Else some layers may have
                read more than others, and only plain caches tell how much.
        """
        assert self.cache is not None
        if not whole and not all(map(_is_sound, self.cache)):
            self._forget()
            return
        offsets = [getattr(entry, "offset", None) for entry in self.cache]
        counts = [n for n in offsets if type(n) is int]
        self.tokens = known[: min(counts, default=len(known))]
        for entry, count in zip(self.cache, offsets, strict=True):
            if type(count) is int and count > len(self.tokens):
                if not entry.is_trimmable():
                    self._forget()
                    return
                entry.trim(count - len(self.tokens))
        self._unsettled = False

    def _forget(self) -> None:
        self.cache, self.tokens = None, []
        self._unsettled = False


def _is_sound(entry: Any) -> bool:
    """Whether a cache is plain, and was not interrupted while it grew."""
    if type(entry) not in (KVCache, QuantizedKVCache):
        return False
    arrays = arrays_of([entry.keys, entry.values]).values()
    lengths = {array.shape[-2] for array in arrays}
    return len(lengths) < 2 and all(entry.offset <= n for n in lengths)


def _joined(messages: Sequence[Mapping[str, Any]]) -> str:
    """One text of all turns, in which each question begins a line."""
    text = ""
    for message in messages:
        if text and message["role"] == "user":
            text += "\n"
        text += message["content"]
    return text
