"""Attention of a long prompt chunk, some rows of it at a time.

MLX's CPU backend keeps the attention scores of all tokens of a chunk, for all heads and
everything before them. A row of scores depends on no other row, so rows can be computed
one piece after the other, with the same result to the bit.

A model's attention classes call mlx-lm's function by its name. Here they get subclasses
in which that name means another function. Nobody else's model sees anything of it.
Shapes: B batch, H heads, L tokens of the chunk, S tokens with those before it.
"""

from functools import cache as remember
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import base

from ..memory.footprint import rows_of_scores

NAME = "scaled_dot_product_attention"
MARK = "scores_in_pieces"  # an attribute of classes whose attention is `attend`
# Names in code that makes scores itself, as far as mlx-lm's models go: its own softmax,
# latent attention, which hands over scores as a mask, and choosing what to attend to.
OWN_SCORES = {"softmax", "scores", "pe_scores"}


def attend(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's `scaled_dot_product_attention`, of a few rows at a time on a CPU.

    Args:
        queries: [B, H, L, D].
        keys, values: [B, h, S, D], or what a quantised cache has of them.
    """
    B, H, L, _ = queries.shape
    seen = (keys if isinstance(keys, mx.array) else keys[0]).shape[-2]
    rows = rows_of_scores(B * H, seen)
    whole: Any = base.scaled_dot_product_attention  # names no str, which is a mask too
    if L <= rows or mx.default_device() == mx.gpu:
        return whole(queries, keys, values, cache, scale, mask, sinks)
    done: list[mx.array] = []
    for start in range(0, L, rows):
        end = min(start + rows, L)
        piece = queries[:, :, start:end]
        if done:  # not before the scores of the last piece are gone
            piece = mx.depends([piece], done[-1:])[0]
        k, v, m = keys, values, mask
        if isinstance(mask, mx.array) and mask.shape[-2] == L:
            m = mask[..., start:end, :]
        elif isinstance(mask, str):  # causal: nothing looks beyond the piece
            k = _first(keys, seen - L + end)
            v = _first(values, seen - L + end)
        done.append(whole(piece, k, v, cache, scale, m, sinks))
    return mx.concatenate(done, axis=2)


def _first(arrays: Any, tokens: int) -> Any:
    return tree_map(lambda array: array[..., :tokens, :], arrays)


def in_pieces(model: nn.Module) -> bool:
    """Have a model's attention go in pieces where MLX keeps scores.

    Returns:
        Whether all of its scores come in pieces. Some models make scores themselves.
    """
    if mx.default_device() == mx.gpu:
        return False
    calling = making = False
    for module in model.modules():
        kind = type(module)
        functions = _functions(kind).values()
        calls = hasattr(kind, MARK) or any(_calls(f) for f in functions)
        takes = calls or any("cache" in f.__code__.co_varnames for f in functions)
        making |= takes and any(_makes_scores(f) for f in functions)
        calling |= calls
        if calls and not hasattr(kind, MARK):
            module.__class__ = _subclass(kind)  # type: ignore[arg-type] # a class
    return calling and not making


def _functions(whole: type) -> dict[str, FunctionType]:
    """The functions of a class by name, those that it inherits too."""
    found: dict[str, FunctionType] = {}
    for parent in whole.__mro__:
        for name, value in vars(parent).items():
            if isinstance(value, FunctionType):
                found.setdefault(name, value)
    return found


def _calls(function: FunctionType) -> bool:
    """Whether it calls mlx-lm's function by its name."""
    known = function.__globals__.get(NAME)
    return NAME in function.__code__.co_names and (
        known is base.scaled_dot_product_attention
    )


def _makes_scores(function: FunctionType) -> bool:
    names = {*function.__code__.co_names, *function.__code__.co_varnames}
    return bool(names & OWN_SCORES) or {"fast", NAME} <= names


@remember
def _subclass(whole: type) -> type[nn.Module]:
    """The same class, but that `NAME` is `attend` in the functions that call it."""
    changed: dict[str, Any] = {MARK: True}
    for name, function in _functions(whole).items():
        if _calls(function):
            known = function.__globals__ | {NAME: attend}
            copy = FunctionType(
                function.__code__,
                known,
                function.__name__,
                function.__defaults__,
                function.__closure__,
            )
            copy.__kwdefaults__ = function.__kwdefaults__
            changed[name] = copy
    return type(whole.__name__, (whole,), changed)
