"""From what a client asks to the tokens that the model reads."""

from __future__ import annotations

import copy
from typing import Any

from mlx_lm.server import convert_chat, process_message_content

from ..prompts import encode_prompt
from .fields import Refused
from .request import Request


def encode(
    tokenizer: Any, request: Request, template_options: dict[str, Any]
) -> tuple[list[int], str | None]:
    """Token ids of a request, and what its answer begins with.

    Args:
        tokenizer: mlx-lm's.
        template_options: The server's own, below those of the request.

    Returns:
        The ids, and "normal" or "reasoning"; None for the continuation of a text, in
        which no mark means anything.

    Raises:
        Refused: If they cannot be encoded.
    """
    try:
        if request.messages is None:
            return encode_prompt(tokenizer, request.prompt), None
        # The chat template gets objects where clients send their JSON.
        messages = copy.deepcopy(request.messages)
        process_message_content(messages)
        if not tokenizer.has_chat_template:
            text = convert_chat(messages, request.role_mapping)
            tokens = list(tokenizer.encode(text))
        else:
            tokens = list(
                tokenizer.apply_chat_template(
                    messages,
                    tools=request.tools,
                    tokenize=True,
                    add_generation_prompt=True,
                    **(template_options | request.template_options),
                )
            )
    # Templates are programs: they raise whatever they like.
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(f"The prompt cannot be encoded: {text}") from error
    if not tokens:
        raise Refused("The prompt is empty.")
    return tokens, _first_state(tokenizer, tokens)


def _first_state(tokenizer: Any, tokens: list[int]) -> str:
    """Whether the prompt ends within reasoning, which the answer then goes on with."""
    state = "normal"
    if tokenizer.has_thinking:
        start = tokenizer.rfind_think_start(tokens)
        if start > tokenizer.rfind_think_end(tokens):
            state = "reasoning"
    return tokenizer.response_initial_state or state
