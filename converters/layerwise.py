"""Run a model one layer at a time, so that only one layer is ever in memory.

Works on any model that walks through `model.layers`: the list is exchanged for a probe
that notes what its first layer would have been given, or supplies what its last one
would have returned.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..errors import FlashError
from .source import Source


class _Stand(nn.Module):
    """In a layer's place, with what else a model may ask of its layers."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._layer = layer  # the underscore: no weights of its own

    def __getattr__(self, key: str):
        try:
            return super().__getattr__(key)
        except AttributeError:
            return getattr(super().__getattr__("_layer"), key)


class _Note(_Stand):
    def __call__(self, h, *args, **kwargs):
        self.seen = (h, args, kwargs)
        return h


class _Supply(_Stand):
    def __init__(self, layer: nn.Module, h: mx.array):
        super().__init__(layer)
        self._h = h

    def __call__(self, h, *args, **kwargs):
        return self._h


class LayerwiseModel:
    """A checkpoint's model whose layers get their weights when they are run.

    Args:
        source: The checkpoint.
        dtype: What to compute in.
    """

    def __init__(self, source: Source, dtype: mx.Dtype):
        self.source, self.dtype = source, dtype
        self.model = source.make_model()
        self.model.eval()
        self.layers = list(self.model.layers)
        first = next(n for n, m in self.model.named_modules() if m is self.layers[0])
        self._prefix = first.removesuffix("0")
        self._modules = dict(self.model.named_modules())

    def load_outer(self) -> None:
        """Load embeddings, final norm and head: all that belongs to no layer."""
        weights = self.source.weights().items()
        outer = [(n, w) for n, w in weights if not n.startswith(self._prefix)]
        self._load(self.model, outer)

    def load_layer(self, index: int) -> nn.Module:
        """Layer `index` with its weights; `release` it when it has run."""
        return self.load_module(self.layer_path(index).removesuffix("."))

    def layer_path(self, index: int) -> str:
        """Where layer `index` is in the module tree, with a dot at the end."""
        return f"{self._prefix}{index}."

    def load_module(self, path: str, dtype: mx.Dtype | None = None) -> nn.Module:
        """The module at `path` with its weights, in `dtype` or what is computed in."""
        weights = self.source.weights().items()
        prefix = path + "."
        own = [(n.removeprefix(prefix), w) for n, w in weights if n.startswith(prefix)]
        self._load(self._modules[path], own, dtype, strict=True)
        return self._modules[path]

    def release(self, module: nn.Module | None = None) -> None:
        """Let go of a module's weights (of all, without one)."""
        module = module or self.model
        # Unevaluated zeros keep shapes and occupy nothing.
        module.update(
            tree_map(lambda w: mx.zeros(w.shape, w.dtype), module.parameters())
        )

    def embed(self, tokens: mx.array, cache: list | None = None):
        """(h, args, kwargs): what the model hands to its first layer for `tokens`."""
        note = _Note(self.layers[0])
        self._call_with(note, tokens, cache)
        return note.seen

    def logits(self, h: mx.array, tokens: mx.array) -> mx.array:
        """The head's logits for the last layer's output h."""
        return self._call_with(_Supply(self.layers[-1], h), tokens, None)

    def _call_with(self, layer, tokens, cache):
        self.model.layers[:] = [layer]
        try:
            return self.model(tokens, cache=cache)
        finally:
            self.model.layers[:] = self.layers

    def _load(
        self,
        module: nn.Module,
        weights,
        dtype: mx.Dtype | None = None,
        strict: bool = False,
    ) -> None:
        dtype = dtype or self.dtype
        try:
            module.load_weights(
                [(n, w.astype(dtype)) for n, w in weights], strict=strict
            )
        except ValueError as error:
            raise FlashError(
                f"{self.source.name}: its weights do not fit its config.json "
                f"({str(error).splitlines()[0]})."
            ) from error
