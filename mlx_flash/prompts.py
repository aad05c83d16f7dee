"""From what a person or a program says to the tokens that the model reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints.config import read_config
from .errors import FlashError, reason_of

EMPTY = "The prompt is empty. Give the text to continue."

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}, as templates take it


def encode_prompt(tokenizer, prompt) -> list[int]:
    """Token ids of a prompt given as text or as ids.

    Raises:
        FlashError: If it is empty.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise FlashError(EMPTY)
        bos = tokenizer.bos_token
        special = bos is None or not prompt.startswith(bos)
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    tokens = [int(token) for token in np.asarray(prompt).ravel()]
    if not tokens:
        raise FlashError(EMPTY)
    return tokens


def encode_messages(
    tokenizer,
    messages: Sequence[Message],
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation, as the tokenizer's chat template writes it.

    Where the last message is the assistant's, the answer goes on with its text. Else
    the answer is a message of its own.

    Args:
        messages: {"role": "user", "content": "…"} and so on, at least one.
        template_options: For the template, such as {"enable_thinking": False}.

    Raises:
        FlashError: If there is no template, or if it refuses the conversation.
    """
    return tokenizer.encode(
        write_messages(tokenizer, messages, template_options), add_special_tokens=False
    )


def write_messages(
    tokenizer,
    messages: Sequence[Message],
    template_options: Mapping[str, Any] | None = None,
) -> str:
    """The same as text."""
    check_messages(messages)
    if not getattr(tokenizer, "has_chat_template", False):
        raise FlashError(
            "This model's tokenizer has no chat template, so it takes no messages. "
            "Give a text to continue, or take an instruct model."
        )
    goes_on = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            continue_final_message=goes_on,
            add_generation_prompt=not goes_on,
            **(template_options or {}),
        )
    # A template is a program of the model's: it may raise anything.
    except Exception as error:
        raise FlashError(
            f"The model's chat template refuses this conversation: {reason_of(error)}."
        ) from error


def check_messages(messages: Sequence[Message]) -> None:
    """Raise a FlashError that names the first message that is none."""
    if isinstance(messages, (str, bytes, Mapping)) or not messages:
        raise FlashError(
            'Messages are a list such as [{"role": "user", "content": "Hello"}].'
        )
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or "content" not in message:
            raise FlashError(
                f'Message {i} is none. A message is {{"role": "user", "content": '
                '"Hello"}; roles are system, user and assistant.'
            )


def context_for(folder: Path, prompt_tokens: int, max_tokens: int) -> int | None:
    """Tokens of KV cache that a prompt and its answer need; None: the usual reserve.

    Raises:
        FlashError: If the model in `folder` has too few positions for the prompt.
    """
    positions = read_config(folder).get("max_position_embeddings")
    check_positions(prompt_tokens, positions)
    if max_tokens < 0:
        return None
    context = prompt_tokens + max_tokens
    return min(context, positions) if positions else context


def check_positions(tokens: int, positions: int | None) -> None:
    """Refuse a prompt that leaves no position for an answer."""
    if positions is not None and tokens >= positions:
        raise FlashError(
            f"The prompt has {tokens:,} tokens, the model {positions:,} positions for "
            "prompt and answer together. Shorten the prompt."
        )
