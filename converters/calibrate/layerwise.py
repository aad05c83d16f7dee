"""Run a model one layer at a time, so that only one layer is ever in memory.

Works on any model that walks through `model.layers`: the list is exchanged for a probe
that notes what its first layer would have been given, or supplies what its last one
would have returned. What is kept between layers are the hidden states of all of the
text, [sequences, length, D], and nothing of the weights.
"""

from collections.abc import Iterable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ...errors import FlashError
from ..arrays import finite, release
from ..source import Source

BATCH_TOKENS = 1024


class _Probe(nn.Module):
    """In a layer's place: notes what it is given, returns `answer` if there is one."""

    def __init__(self, layer: nn.Module, answer: mx.array | None = None):
        super().__init__()
        # The underscores: these are no weights of its own.
        self._layer, self._answer = layer, answer

    def __call__(self, h: mx.array, *args, **kwargs) -> mx.array:
        self._seen = (h, args, kwargs)
        return h if self._answer is None else self._answer

    def __getattr__(self, key: str):
        """What else a model may ask of its layers."""
        try:
            return super().__getattr__(key)
        except AttributeError:
            return getattr(super().__getattr__("_layer"), key)


class Recorder(nn.Module):
    """Stands in for an FFN and keeps what it was given."""

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self.ffn = ffn
        self.inputs: list[np.ndarray] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.inputs.append(np.array(x.reshape(-1, x.shape[-1]).astype(mx.float32)))
        return self.ffn(x)


class LayerwiseModel:
    """A checkpoint's model whose layers get their weights when they are run."""

    def __init__(self, source: Source, dtype: mx.Dtype):
        self.source, self.dtype = source, dtype
        self.model = source.make_model()
        self.model.eval()
        self.layers = list(self.model.layers)
        first = next(n for n, m in self.model.named_modules() if m is self.layers[0])
        self._prefix = first.removesuffix("0")
        self._modules = dict(self.model.named_modules())
        # The list that is walked through, of which some models' `layers` is a copy.
        self._walked = next(
            value
            for module in self.model.modules()
            for value in module.values()
            if isinstance(value, list) and value and value[0] is self.layers[0]
        )

    def load_outer(self) -> None:
        """Load embeddings, final norm and head: all that belongs to no layer."""
        weights = self.source.weights().items()
        outer = [(n, w) for n, w in weights if not n.startswith(self._prefix)]
        self._load(self.model, outer)

    def load_layer(self, index: int) -> nn.Module:
        """Layer `index` with its weights; release them when it has run."""
        return self.load_module(f"{self._prefix}{index}")

    def load_module(self, path: str, dtype: mx.Dtype | None = None) -> nn.Module:
        """The module at `path` with its weights, in `dtype` or what is computed in."""
        weights = self.source.weights().items()
        prefix = path + "."
        own = [(n.removeprefix(prefix), w) for n, w in weights if n.startswith(prefix)]
        self._load(self._modules[path], own, dtype, strict=True)
        return self._modules[path]

    def module(self, path: str) -> nn.Module:
        """The module at `path`, as it is."""
        return self._modules[path]

    def embed_text(self, tokens: np.ndarray) -> np.ndarray:
        """Hidden states [n, length, D] that the first layer gets, float32."""
        self.load_outer()
        states = [
            np.array(self.embed(batch)[0].astype(mx.float32))
            for batch in _batches(tokens)
        ]
        release(self.model)
        return np.concatenate(states)

    def run_text(
        self, index: int, ffn: str, hidden: np.ndarray, tokens: np.ndarray
    ) -> np.ndarray:
        """Take `hidden` [n, length, D] through layer `index`, in place.

        Args:
            ffn: Path of the layer's FFN.

        Returns:
            What its FFN was given, float32 [n·length, D], in the order of the tokens.
        """
        layer = self.load_layer(index)
        recorder = Recorder(self._modules[ffn])
        self.walk(index, ffn, recorder, hidden, tokens)
        release(layer)
        return np.concatenate(recorder.inputs)

    def walk(
        self,
        index: int,
        ffn: str,
        stand_in: nn.Module,
        hidden: np.ndarray,
        tokens: np.ndarray,
    ) -> None:
        """Take `hidden` [n, length, D] through a layer that has its weights, in place.

        Args:
            ffn: Path of the layer's FFN.
            stand_in: Called in its place.
        """
        layer, own = self.layers[index], self._modules[ffn]
        name = ffn.removeprefix(f"{self._prefix}{index}.")
        layer.update_modules(tree_unflatten([(name, stand_in)]))
        done = 0
        for batch in _batches(tokens):
            n = batch.shape[0]
            # The mask and all else that goes with the tokens; embeddings do not matter.
            _, args, kwargs = self.embed(batch)
            h = mx.array(hidden[done : done + n]).astype(self.dtype)
            h = finite(f"the output of layer {index}", layer(h, *args, **kwargs))
            hidden[done : done + n] = np.array(h.astype(mx.float32))
            done += n
        layer.update_modules(tree_unflatten([(name, own)]))

    def embed(
        self, tokens: mx.array, cache: list | None = None
    ) -> tuple[mx.array, tuple, dict]:
        """(h, args, kwargs): what the model hands to its first layer for `tokens`."""
        probe = _Probe(self.layers[0])
        self._call_with(probe, tokens, cache)
        return probe._seen

    def logits(self, h: mx.array, tokens: mx.array) -> mx.array:
        """The head's logits for the last layer's output h."""
        return self._call_with(_Probe(self.layers[-1], h), tokens)

    def _call_with(
        self, probe: _Probe, tokens: mx.array, cache: list | None = None
    ) -> mx.array:
        self._walked[:] = [probe]
        try:
            return self.model(tokens, cache=cache)
        finally:
            self._walked[:] = self.layers

    def _load(
        self,
        module: nn.Module,
        weights: Iterable[tuple[str, mx.array]],
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


def _batches(tokens: np.ndarray) -> Iterator[mx.array]:
    step = max(BATCH_TOKENS // tokens.shape[1], 1)
    for start in range(0, len(tokens), step):
        yield mx.array(tokens[start : start + step])
