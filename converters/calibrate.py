"""Text for calibration, and what every FFN sees when the model reads it.

The model runs through all of the text one layer at a time: what is kept between
layers are the hidden states, [sequences, length, D], and nothing of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import KVCache

from ..errors import FlashError
from ..loading import load_tokenizer
from .layerwise import LayerwiseModel
from .source import Source, finite

SEQUENCE_TOKENS = 128
SAMPLED_CACHE_BYTES = 256_000_000  # KV cache of the text sampled from the model
BATCH_TOKENS = 1024


def text_tokens(source: Source, file: Path, count: int) -> np.ndarray:
    """About `count` tokens of a text file as sequences [n, SEQUENCE_TOKENS].

    Windows are spread over the whole file; each begins as the tokenizer begins a text.

    Raises:
        FlashError: If the file cannot be read, is no text, or is shorter than two
            sequences.
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


def sample_tokens(model: LayerwiseModel, count: int, progress) -> np.ndarray:
    """About `count` tokens of text sampled from the model itself, [n, length].

    Every layer is loaded once per position, for all sequences together; so many run
    side by side as their KV cache has room.
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
    for _ in progress(range(length - 1), desc="sampling text", unit="token"):
        h, args, kwargs = model.embed(tokens, caches[:1])
        for i, cache in enumerate(caches):
            layer = model.load_layer(i)
            own = [cache if a is caches[0] else a for a in args]
            named = {k: cache if a is caches[0] else a for k, a in kwargs.items()}
            h = layer(h, *own, **named)
            mx.eval(h, cache.state)
            model.release(layer)
        key, now = mx.random.split(key)
        logits = model.logits(h, tokens)[:, -1]
        tokens = mx.random.categorical(logits, key=now)[:, None].astype(mx.int32)
        rows.append(np.array(tokens))
    model.release()
    return np.concatenate(rows, axis=1)


def _sequence_tokens(source: Source) -> int:
    positions = source.config.get("max_position_embeddings") or SEQUENCE_TOKENS
    return min(SEQUENCE_TOKENS, positions)


def embed_all(model: LayerwiseModel, tokens: np.ndarray) -> np.ndarray:
    """Hidden states [n, length, D] that the first layer gets, float32."""
    model.load_outer()
    states = [np.array(model.embed(t)[0].astype(mx.float32)) for t in _batches(tokens)]
    model.release()
    return np.concatenate(states)


class _Recorder(nn.Module):
    """Stands in for an FFN and keeps what it was given."""

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self.ffn = ffn
        self.inputs: list[np.ndarray] = []

    def __call__(self, x):
        self.inputs.append(np.array(x.reshape(-1, x.shape[-1]).astype(mx.float32)))
        return self.ffn(x)


def run_layer(
    model: LayerwiseModel, index: int, ffn: str, hidden: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    """Take `hidden` [n, length, D] through layer `index`, in place.

    Returns:
        What its FFN was given, float32 [n·length, D], in the order of the tokens.
    """
    layer = model.load_layer(index)
    recorder = _Recorder(dict(layer.named_modules())[ffn])
    layer.update_modules(tree_unflatten([(ffn, recorder)]))
    done = 0
    for batch in _batches(tokens):
        n = batch.shape[0]
        # The mask and all else that goes with the tokens; embeddings do not matter.
        _, args, kwargs = model.embed(batch)
        h = mx.array(hidden[done : done + n]).astype(model.dtype)
        h = finite(f"the output of layer {index}", layer(h, *args, **kwargs))
        hidden[done : done + n] = np.array(h.astype(mx.float32))
        done += n
    layer.update_modules(tree_unflatten([(ffn, recorder.ffn)]))
    model.release(layer)
    return np.concatenate(recorder.inputs)


def _batches(tokens: np.ndarray) -> Iterator[mx.array]:
    step = max(BATCH_TOKENS // tokens.shape[1], 1)
    for start in range(0, len(tokens), step):
        yield mx.array(tokens[start : start + step])
