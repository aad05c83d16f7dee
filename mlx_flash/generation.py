"""Generate with mlx-lm's own loop, and note what the run costs."""

import math
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.generate import stream_generate as mlx_stream_generate

from .drafting import Drafter, ModelDraft, NgramDraft
from .errors import FlashError, reason_of
from .flash import Flash
from .kv_cache import rotating_cache
from .layers.kinds import BLOCK
from .layers.neuron import SWEEP_TOKENS
from .memory.stats import Stats
from .prompts import Message, check_positions, encode_messages, encode_prompt
from .run import DraftStats, Run
from .speculation import Drafts, stream_drafted
from .stop_texts import StopTexts

NUM_DRAFT_TOKENS = 3  # mlx-lm's number
# Functions of mlx-lm in which an error is about quantising a KV cache.
QUANTISING = {"maybe_quantize_kv_cache", "to_quantized", "scaled_dot_product_attention"}


def stream_generate(
    model: nn.Module,
    tokenizer,
    prompt=None,
    max_tokens: int = 256,
    *,
    messages: Sequence[Message] | None = None,
    template_options: Mapping[str, Any] | None = None,
    stop: Sequence[str] = (),
    draft_model: nn.Module | Drafter | None = None,
    num_draft_tokens: int = NUM_DRAFT_TOKENS,
    draft_ngrams: int = 0,
    history: Sequence[int] = (),
    **options,
) -> Generator[GenerationResponse, None, None]:
    """mlx-lm's `stream_generate`, with prompts judged first and the cost measured.

    mlx-lm's own function works on the same model; this one stops at the model's last
    position, and leaves what the run cost in `model.flash.run`.

    Args:
        model: From `mlx_flash.load`.
        tokenizer: From the same call.
        prompt: Text to continue, or token ids.
        max_tokens: At most so many new tokens; -1 for as many as positions allow.
        messages: A conversation in the place of a prompt, which the tokenizer's chat
            template writes: [{"role": "user", "content": "Hello"}]. If the last one is
            the assistant's, the answer goes on with it.
        template_options: For the chat template, such as {"enable_thinking": False}.
        stop: Texts that end the answer, and are not part of it.
        draft_model: A model that drafts, beside the budget, or any object that does
            what `drafting.Drafter` says. A model that was named to `mlx_flash.load`
            counts in the budget, and drafts without being named here.
        num_draft_tokens: Tokens of a draft; 0 does without. A model whose neurons
            are chosen takes 2 at most: more would be computed as a prompt is.
        draft_ngrams: Draft what followed the last so many tokens where they stood
            before; 0 does not.
        history: Tokens that `prompt_cache` holds already, for who drafts to know, and
            for penalties on what was said before.
        options: As mlx-lm's `generate_step` takes them (`sampler`, `prompt_cache`, …).

    Raises:
        FlashError: If the prompt is empty, longer than the model's positions or not
            of the model's tokens, if a read fails, if logits are no numbers, or if
            the KV cache cannot be quantised or trimmed as it would have to be.
    """
    flash = model.flash
    flash.check_open()
    if (prompt is None) == (messages is None):
        raise FlashError("Give either a prompt or messages.")
    if messages is not None:
        prompt = encode_messages(tokenizer, messages, template_options)
    prompt = encode_prompt(tokenizer, prompt)
    _check_tokens(prompt, flash.vocabulary)
    if flash.positions is not None:
        cache = options.get("prompt_cache") or []
        used = len(prompt) + max((getattr(c, "offset", 0) for c in cache), default=0)
        check_positions(used, flash.positions)
        room = flash.positions - used
        max_tokens = room if max_tokens < 0 else min(max_tokens, room)
    max_kv_size = options.pop("max_kv_size", None)
    if max_kv_size and not options.get("prompt_cache"):
        options["prompt_cache"] = rotating_cache(model, max_kv_size)
    drafter = _drafter(flash, draft_model, draft_ngrams) if num_draft_tokens else None
    if any(layer.sparse for layer in flash.layers):
        # More tokens would be computed as a prompt is.
        num_draft_tokens = min(num_draft_tokens, SWEEP_TOKENS - 2)
    assert flash.pool is not None
    flash.pool.hold_logits(num_draft_tokens + 1 if drafter else 1)
    flash.limits.make_room()
    if note := options.get("prompt_progress_callback"):
        options["prompt_progress_callback"] = _by_chunks(flash, note)
    run = flash.run = Run(flash.stats.copy())
    options["sampler"] = _noting(run, flash.stats, options.get("sampler"))
    if history and options.get("logits_processors"):
        options["logits_processors"] = _remembering(
            options["logits_processors"], history
        )
    if drafter is None:
        steps = mlx_stream_generate(
            model, tokenizer, prompt, max_tokens=max_tokens, **options
        )
    else:
        options.pop("prompt_progress_callback", None)
        run.drafts = DraftStats()
        drafts = Drafts(
            drafter,
            num_draft_tokens,
            run.drafts,
            list(history),
            lambda: flash.stats.bytes_read,
            compare=flash.kind is not BLOCK,
        )
        steps = stream_drafted(model, tokenizer, prompt, max_tokens, drafts, **options)
    ends = StopTexts([stop] if isinstance(stop, str) else stop)
    try:
        for response in steps:
            _check_numbers(response)
            text = ends.take(response.text, last=response.finish_reason is not None)
            reason = "stop" if ends.found else response.finish_reason
            response = replace(response, text=text, finish_reason=reason)
            run.note(response, flash.stats)
            yield response
            if ends.found:
                return
    except (ValueError, NotImplementedError) as error:
        if options.get("kv_bits") is None or not _of_quantising(error):
            raise
        raise FlashError(
            f"This model's KV cache cannot be quantised so: {reason_of(error)}. Try "
            "another --kv-group-size, or leave out --kv-bits."
        ) from error
    finally:
        flash.told_of_prompt = lambda tokens: None
        steps.close()


def _by_chunks(
    flash: Flash, note: Callable[[int, int], None]
) -> Callable[[int, int], None]:
    """`note`, which is told of every chunk: mlx-lm tells of 2,048 tokens at a time."""

    def told(done: int, total: int) -> None:
        note(done, total)
        flash.told_of_prompt = lambda tokens: note(min(done + tokens, total), total)

    return told


def _of_quantising(error: BaseException) -> bool:
    """Whether mlx-lm was quantising a KV cache, or using a quantised one."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name in QUANTISING for frame in frames)


def _drafter(
    flash: Flash, draft_model: nn.Module | Drafter | None, draft_ngrams: int
) -> Drafter | None:
    """Who drafts, if anybody does: what was given, n-grams, or our own model."""
    if isinstance(draft_model, nn.Module):
        return ModelDraft(draft_model, flash.vocabulary)
    if draft_model is not None:
        return draft_model
    if draft_ngrams:
        return NgramDraft(draft_ngrams)
    if flash.draft is not None:
        return ModelDraft(flash.draft.model, flash.vocabulary, flash.draft.context)
    return None


def _noting(
    run: Run, stats: Stats, sampler: Callable[[mx.array], mx.array] | None
) -> Callable[[mx.array], mx.array]:
    """`sampler`, which tells the run when it draws the first token.

    Only then has the prompt been read, and nothing else: mlx-lm's loop begins with the
    second token before it gives out the first.
    """

    def draw(logprobs: mx.array) -> mx.array:
        if run.prompt_stats is None:
            mx.eval(logprobs)
            run.note_prompt(stats)
        return sampler(logprobs) if sampler else mx.argmax(logprobs, axis=-1)

    return draw


def _remembering(
    processors: Sequence[Callable], history: Sequence[int]
) -> list[Callable]:
    """The same processors, which also see what the KV cache held from the beginning."""
    before = mx.array(list(history))

    def of(processor: Callable) -> Callable:
        return lambda tokens, logits: processor(
            mx.concatenate([before, tokens.astype(before.dtype)]), logits
        )

    return [of(processor) for processor in processors]


def _check_tokens(tokens: list[int], vocabulary: int) -> None:
    """MLX takes any token for a row of the embedding and reads what lies there."""
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise FlashError(
                f"The prompt has token {token:,}, the model knows {vocabulary:,} "
                "tokens: this is another model's tokenizer. Copy the tokenizer files "
                "of the original checkpoint into the model's folder."
            )


def _check_numbers(response: GenerationResponse) -> None:
    """A NaN or an infinity among the logits leaves no token a finite probability.

    The values are there already. On the CPU's stream nothing waits for the next token,
    which the GPU may have begun.
    """
    with mx.stream(mx.cpu):
        logprob = response.logprobs[response.token].item()
    if not math.isfinite(abs(logprob)):
        raise FlashError(
            "The model's logits are no numbers (NaN or infinite): its weights are "
            "damaged, or its dtype is too narrow. Check the folder with mlx-flash "
            "verify, or convert it with --dtype float32."
        )


def generate(
    model: nn.Module,
    tokenizer,
    prompt=None,
    verbose: bool = False,
    *,
    messages: Sequence[Message] | None = None,
    template_options: Mapping[str, Any] | None = None,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    **options,
) -> str:
    """The whole text of `stream_generate`.

    >>> mlx_flash.generate(model, tokenizer, "Once upon a time", max_tokens=20)
    >>> mlx_flash.generate(
    ...     model, tokenizer, messages=[{"role": "user", "content": "Hello"}]
    ... )

    Args:
        model: From `mlx_flash.load`.
        tokenizer: From the same call.
        prompt: Text to continue, or token ids.
        verbose: Print the text as it comes, and the figures of the run.
        messages: A conversation in the place of a prompt.
        template_options: For the chat template, such as {"enable_thinking": False}.
        max_tokens: At most so many new tokens; -1 for as many as positions allow.
        stop: Texts that end the answer, and are not part of it.
        options: As for `stream_generate`: `sampler`, `prompt_cache`, …

    Raises:
        FlashError: As `stream_generate`.
    """
    text = ""
    for response in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens,
        messages=messages,
        template_options=template_options,
        stop=stop,
        **options,
    ):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print("", model.flash.report(), sep="\n")
    return text
