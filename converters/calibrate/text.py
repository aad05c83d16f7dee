"""Tokens for calibration: from a text file, or sampled from the model itself."""

from collections.abc import Callable, Iterable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from ...errors import FlashError
from ...loading import load_tokenizer
from ..arrays import release
from ..source import Source
from .layerwise import LayerwiseModel

SEQUENCE_TOKENS = 128
SAMPLED_CACHE_BYTES = 256_000_000  # KV cache of the text sampled from the model


def text_tokens(source: Source, file: Path, count: int) -> np.ndarray:
    """About `count` tokens of a text file as sequences [n, SEQUENCE_TOKENS].

    Windows are spread over the whole file; each begins as the tokenizer begins a text.
    """
    tokenizer = load_tokenizer(source.folder)
    length = _sequence_tokens(source)
    start = tokenizer.encode("", add_special_tokens=True)[:1]
    body = length - len(start)
    count = max(count, 2 * length)
    # Tokenising is slow; four times what is needed still spreads the windows well.
    ids = [
        token
        for piece in _pieces(file, 4 * count * 8)
        for token in tokenizer.encode(piece, add_special_tokens=False, verbose=False)
    ]
    windows = len(ids) // body
    if windows < 2:
        raise FlashError(
            f"{file} has only {len(ids)} tokens; calibration needs at least "
            f"{2 * body}, better {count:,}."
        )
    if max(ids) >= source.config["vocab_size"]:
        raise FlashError(
            f"The tokenizer of {source.name} is not this model's: it has token "
            f"{max(ids)}, the vocabulary ends at {source.config['vocab_size'] - 1}."
        )
    chosen = np.linspace(0, windows - 1, min(windows, count // length))
    rows = [start + ids[i * body : (i + 1) * body] for i in chosen.astype(int)]
    # A window's neighbours tell about it: shuffled, held-out text is spread as well.
    return np.random.default_rng(0).permutation(np.array(rows, np.int32))


def _pieces(file: Path, nbytes: int) -> list[str]:
    """About `nbytes` of a text file in sixteen pieces from all over it."""
    try:
        starts = np.linspace(0, file.stat().st_size, 17).astype(int)
        with open(file, "rb") as text:
            pieces = []
            for start, end in zip(starts[:-1], starts[1:], strict=True):
                text.seek(start)
                pieces.append(text.read(min(end - start, nbytes // 16)))
    except OSError as error:
        raise FlashError(f"{file} cannot be read: {error.strerror}.") from error
    if any(b"\0" in piece for piece in pieces):
        raise FlashError(f"{file} is no text file. Give plain text in UTF-8.")
    # A cut may fall into a character.
    return [piece.decode("utf-8", errors="replace") for piece in pieces]


def sample_tokens(
    model: LayerwiseModel, count: int, bars: Callable[..., Iterable]
) -> np.ndarray:
    """About `count` tokens of text sampled from the model itself, [n, length].

    Every layer is loaded once per position, for all sequences together; so many run
    side by side as their KV cache has room. `bars` is that of a `Job`.
    """
    config, source = model.source.config, model.source
    length = min(_sequence_tokens(source), 64)
    token_bytes = 2 * config["num_hidden_layers"] * config["hidden_size"]
    token_bytes *= model.dtype.size
    fitting = SAMPLED_CACHE_BYTES // (token_bytes * length)
    n = int(min(max(fitting, 4), max(count // length, 2)))
    caches = [KVCache() for _ in model.layers]
    for cache in caches:
        cache.step = length  # mlx-lm would set memory for 256 tokens aside
    first = config.get("bos_token_id")
    key = mx.random.key(0)
    tokens = mx.full((n, 1), 0 if first is None else first, mx.int32)
    rows = [np.array(tokens)]
    model.load_outer()
    for _ in bars(range(length - 1), "sampling text", unit="token"):
        h, args, kwargs = model.embed(tokens, caches[:1])
        for i, cache in enumerate(caches):
            layer = model.load_layer(i)
            own = [cache if a is caches[0] else a for a in args]
            named = {k: cache if a is caches[0] else a for k, a in kwargs.items()}
            h = layer(h, *own, **named)
            mx.eval(h, cache.state)
            release(layer)
        key, now = mx.random.split(key)
        logits = model.logits(h, tokens)[:, -1]
        tokens = mx.random.categorical(logits, key=now)[:, None].astype(mx.int32)
        rows.append(np.array(tokens))
    release(model.model)
    return np.concatenate(rows, axis=1)


def _sequence_tokens(source: Source) -> int:
    positions = source.config.get("max_position_embeddings") or SEQUENCE_TOKENS
    return min(SEQUENCE_TOKENS, positions)
