"""What a client asks for, whichever API it speaks.

Each API of `apis/` makes a `Request` of a body and writes the events of the answer
(`events`) in its own shape. Nothing between the two knows of an API.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Names and defaults are those of mlx-lm's server.

    None leaves a value to the server's own options (`--temp` and the like).
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.0
    repetition_penalty: float = 0.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """One answer that is asked for; its fields were checked.

    Attributes:
        prompt: A text to continue, or its token ids; None for a conversation.
        messages: The conversation in OpenAI's shape, as chat templates take it: "role",
            "content" (text), and where there are any "tool_calls" (with arguments as
            the text of a JSON object), "tool_call_id", "name" and
            "reasoning_content". None for a prompt.
        tools: In OpenAI's shape, {"type": "function", "function": {"name", …}}.
        max_tokens: Of the answer; None leaves it to the server.
        stop: The texts that end the answer.
        top_logprobs: How many alternatives are told with each token; None for no
            log probabilities at all.
        role_mapping: What stands before the messages of each role, for models without a
            chat template; None takes mlx-lm's.
        template_options: For the chat template, such as {"enable_thinking": False}.
        sampling: How a token is chosen.
    """

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    role_mapping: dict[str, str] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    sampling: Sampling = Sampling()
