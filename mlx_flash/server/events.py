"""What happens while a request is answered, for every API to write in its own shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Token:
    """A token that was generated.

    Attributes:
        text: As the tokenizer writes it alone.
        top: Alternatives and their log probabilities, the likeliest first.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Progress:
    """The prompt is being read: so many of its tokens are done."""

    tokens: int
    total: int


@dataclass(frozen=True)
class Text:
    """A piece of the answer. `tokens` is empty unless log probabilities are wanted."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model wants to be called; `arguments` is a JSON object's text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: Of the whole prompt.
        cached_tokens: Of these, the ones that were in a kept KV cache.
        completion_tokens: Of the answer.
        flash: Figures of this answer: "first_token_s", "prompt_tokens_per_s",
            "tokens_per_s", "hit_rate", "bytes_read", "peak_bytes", "budget_bytes".
        reasoning_tokens: Of the answer's, the ones of reasoning.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    flash: dict[str, Any] = field(default_factory=dict)
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Done:
    """The last event of an answer that did not fail.

    Attributes:
        reason: Why it ended: a stop text or token, the number of tokens, or because
            tools are to be called.
        stop_text: The stop text that was found, if one was.
    """

    reason: Literal["stop", "length", "tool_calls"]
    usage: Usage
    stop_text: str | None = None


Event = Progress | Text | Reasoning | ToolCall | Done
