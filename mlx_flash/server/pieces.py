"""Pieces of generated text as events: what is answer, reasoning, or a call of a tool.

mlx-lm knows by the tokenizer which marks begin and end reasoning and calls, and how a
call is read.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from ..stop_texts import StopTexts
from .events import Event, Reasoning, Text, Token, ToolCall


class Pieces:
    """The text of one answer on its way to the client.

    Attributes:
        has_calls: Whether a tool was called so far.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: tuple[str, ...],
        state: str | None,
        tools: list[dict[str, Any]] | None,
    ):
        """
        Args:
            tokenizer: mlx-lm's.
            stop: Texts that end the answer.
            state: What the answer begins with, "normal" or "reasoning"; None takes all
                of it as text.
            tools: That may be called.
        """
        self.has_calls = False
        self._stop = StopTexts(stop)
        self._parser = tokenizer.tool_parser
        self._tools = tools
        self._machine = None
        self._state = state
        self._call = ""
        self._tokens: list[Token] = []  # those that no event told yet
        if state is not None:
            self._machine = make_text_state_machine(tokenizer).make_state(state)

    @property
    def is_reasoning(self) -> bool:
        """Whether the last piece was."""
        return self._state == "reasoning"

    @property
    def stop_text(self) -> str | None:
        """The stop text that was found; nothing may be added then."""
        return self._stop.found

    def add(self, text: str, token: Token | None = None) -> Iterator[Event]:
        """The next piece; `token` is told with it."""
        if token is not None:
            self._tokens.append(token)
        yield from self._told(self._split(self._stop.take(text)))
        if self.stop_text is not None:
            self._tokens.clear()  # they are the stop text

    def end(self) -> Iterator[Event]:
        """What was held back in case that something follows."""
        segments = self._split(self._stop.take("", last=True))
        if self._machine is not None:
            self._machine, text, state = TextStateMachine.flush(self._machine)
            segments.append((state, text))
        yield from self._told(segments)
        if self._call:
            yield from self._called()
        if self._tokens:
            yield Text("", self._taken())

    def _split(self, text: str) -> list[tuple[str | None, str]]:
        """Texts, and what each of them is; some marks end all that is told."""
        if self._machine is None or self._machine[0] is None:
            return [(self._state, text)]
        self._machine, segments = TextStateMachine.split(self._machine, text)
        return segments

    def _told(self, segments: list[tuple[str | None, str]]) -> Iterator[Event]:
        for state, text in segments:
            if self._state == "tool" and state != "tool":
                yield from self._called()
            self._state = state
            if state == "tool":
                self._call += text
            elif not text:
                continue
            elif state == "reasoning":
                yield Reasoning(text, self._taken())
            elif state == "normal" or self._machine is None:
                yield Text(text, self._taken())

    def _taken(self) -> tuple[Token, ...]:
        tokens = tuple(self._tokens)
        self._tokens.clear()
        return tokens

    def _called(self) -> Iterator[Event]:
        """The calls that a text is; the text itself if it is none."""
        text, self._call = self._call, ""
        try:
            calls = self._parser(text, self._tools)
            found = [_tool_call(x) for x in (calls if type(calls) is list else [calls])]
        # Parsers meet whatever the model wrote, and fail in many ways.
        except Exception as error:
            logging.warning("A call of a tool could not be read: %s", error)
            yield Text(text, self._taken())
            return
        self.has_calls = True
        yield from found


def _tool_call(call: dict[str, Any]) -> ToolCall:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    name = call.get("id") or f"call_{uuid.uuid4().hex[:24]}"
    return ToolCall(str(name), str(call["name"]), arguments)
