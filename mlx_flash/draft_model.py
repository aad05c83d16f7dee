"""A small model beside the large one, kept in memory whole, that drafts its tokens.

What it takes is known before any of its weights is read, so that the budget of the
large model can be made smaller by it.
"""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from .arrays import parameters
from .checkpoints.hub import find_model
from .checkpoints.stock import load_stock
from .checkpoints.tokenizer import check_vocabulary, load_tokenizer
from .errors import FlashError
from .memory.footprint import CACHED, KV_STEP, Shapes, find_shapes
from .resident import read_weights
from .storage.manifest import MANIFEST
from .storage.safetensors import DTYPES

CHUNK = 128  # tokens of a prompt that a draft reads at once


@dataclass(frozen=True)
class DraftModel:
    """A model that drafts.

    Attributes:
        folder: Where its checkpoint lies.
        model: mlx-lm's, its weights not yet read when it is opened.
        context: Tokens for which its KV cache counts in `nbytes`: beyond them it does
            not draft.
        nbytes: What it takes at most: weights, KV cache and workspace.
    """

    folder: Path
    model: nn.Module
    context: int
    nbytes: int

    def read(self) -> None:
        """Read its weights.

        Raises:
            FlashError: If they cannot be read.
        """
        read_weights(self.model, self.folder)


def open_draft(name: str | Path, folder: Path, context: int) -> DraftModel:
    """Open a checkpoint as a draft of the model in `folder`, reading no weights.

    Args:
        name: A checkpoint's folder or its hub name.
        folder: The large model's, whose tokenizer must be the same.
        context: Tokens of KV cache.

    Raises:
        FlashError: If there is no such checkpoint, if it is a flash folder, if it has
            another tokenizer, or if its cache cannot forget what was drafted wrongly.
    """
    found = find_model(name, checkpoint=True)
    if (found / MANIFEST).exists():
        raise FlashError(
            f"{found} is a flash folder, and a draft is kept in memory whole. Give the "
            "checkpoint that it was made of as --draft-model."
        )
    tokenizer = load_tokenizer(found)
    if tokenizer.get_vocab() != load_tokenizer(folder).get_vocab():
        raise FlashError(
            f"{found} has another tokenizer than {folder}, so it cannot draft for it. "
            "Take a draft of the same family, or --draft-ngrams."
        )
    stock = load_stock(found)
    stock.model.eval()
    if not can_trim_prompt_cache(make_prompt_cache(stock.model)):
        raise FlashError(
            f"{found} cannot draft: its cache cannot forget tokens that were drafted "
            "wrongly. Take a draft with plain attention, or --draft-ngrams."
        )
    shapes = find_shapes(stock.model, stock.config)
    check_vocabulary(tokenizer, found, shapes.vocabulary)
    positions = stock.config.get("max_position_embeddings")
    context = min(context, positions or context)
    weights = sum(array.nbytes for array in parameters(stock.model).values())
    nbytes = weights + _running_bytes(shapes, context, DTYPES[stock.dtype()][1])
    return DraftModel(found, stock.model, context, nbytes)


def _running_bytes(shapes: Shapes, context: int, value_bytes: int) -> int:
    """KV cache and workspace, with the buffers that MLX keeps of it."""
    tokens = -(-context // KV_STEP) * KV_STEP
    kv_bytes = shapes.kv_bytes_fixed + tokens * shapes.kv_bytes_per_token
    values = max(12 * shapes.width, 6 * shapes.width + 4 * shapes.widest)
    per_token = values * value_bytes
    if mx.default_device() != mx.gpu:  # MLX's CPU backend keeps attention scores
        per_token += 4 * shapes.heads * context
    chunk = min(CHUNK, context)
    logits = 4 * shapes.vocabulary * 4
    return int(kv_bytes + (1 + CACHED) * (chunk * per_token + logits))
