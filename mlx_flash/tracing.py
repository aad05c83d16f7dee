"""Run a model to record a trace: on a prompt that it continues, or along a text."""

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .errors import FlashError
from .generation import stream_generate
from .traces.recording import record
from .traces.trace import Trace

PIECE_TOKENS = 128  # of a text read token by token


def record_prompt(model, tokenizer, prompt, max_tokens: int, **options) -> Trace:
    """The trace of continuing a prompt; its figures count from the first new token."""
    with record(model.flash) as recorder:
        steps = stream_generate(
            model, tokenizer, prompt, max_tokens=max_tokens, **options
        )
        for i, _ in enumerate(steps):
            if i == 0:
                recorder.mark_warm()
        return recorder.trace()


def record_text(model, tokenizer, text: str, tokens: int) -> Trace:
    """The trace of reading a text token by token, each piece with an empty KV cache.

    Raises:
        FlashError: If the text has no token.
    """
    pieces = cut_text(tokenizer, text, tokens)
    if not pieces:
        raise FlashError("The text is empty. Give some to read.")
    with record(model.flash) as recorder:
        for piece in pieces:
            cache = make_prompt_cache(model)
            for token in piece:
                mx.eval(model(mx.array([[token]]), cache=cache))
        return recorder.trace()


def cut_text(tokenizer, text: str, tokens: int | None = None) -> list[list[int]]:
    """A text, or its first `tokens`, as pieces of up to PIECE_TOKENS token ids.

    Each piece begins as the tokenizer begins a text.
    """
    start = tokenizer.encode("", add_special_tokens=True)[:1]
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)[:tokens]
    body = PIECE_TOKENS - len(start)
    return [start + ids[i : i + body] for i in range(0, len(ids), body)]
