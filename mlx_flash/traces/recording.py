"""Record which units a run asked for, so that caches can be judged without the model.

What a layer asks for does not depend on what memory holds (a layer that memory holds
as a whole asks for nothing), so one recording serves for every policy and budget.
A file is NumPy's compressed npz: `facts`, JSON as uint8, and for layer i
    bits_i    uint8 [steps, ceil(units / 8)], as `np.packbits` packs them
    keep_i    the same of what was to stay in memory after a step in several waves
    tokens_i  int32 [steps]: how many tokens each step brought
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FlashError

VERSION = 1
PIECE_TOKENS = 128  # of a text read token by token


@dataclass(frozen=True)
class Trace:
    """The selections of one run.

    Attributes:
        model, unit: The flash folder's name, and what its units are.
        units, unit_bytes: Of each layer.
        bits, keep, tokens: Of each layer, as in the file.
        warm: How many steps of each layer came before figures count: the prompt.
    """

    model: str
    unit: str
    units: tuple[int, ...]
    unit_bytes: tuple[int, ...]
    bits: tuple[np.ndarray, ...]
    keep: tuple[np.ndarray, ...]
    tokens: tuple[np.ndarray, ...]
    warm: tuple[int, ...]

    def steps(self, layer: int) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """(sorted unit ids, tokens, ids to keep) of each step of a layer."""
        of_layer = self.bits[layer], self.tokens[layer], self.keep[layer]
        for bits, tokens, keep in zip(*of_layer, strict=True):
            asked, kept = (
                np.flatnonzero(np.unpackbits(b, count=self.units[layer]))
                for b in (bits, keep)
            )
            yield asked, int(tokens), kept

    def save(self, path: Path) -> None:
        facts = {
            "version": VERSION,
            "model": self.model,
            "unit": self.unit,
            "units": self.units,
            "unit_bytes": self.unit_bytes,
            "warm": self.warm,
        }
        arrays = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
        for i in range(len(self.units)):
            arrays[f"bits_{i}"] = self.bits[i]
            arrays[f"keep_{i}"] = self.keep[i]
            arrays[f"tokens_{i}"] = self.tokens[i]
        try:
            with open(path, "wb") as file:
                np.savez_compressed(file, **arrays)
        except OSError as error:
            raise FlashError(
                f"{path} cannot be written: {error.strerror}. Choose another -o."
            ) from error


def read_trace(path: Path) -> Trace:
    """Read a trace and check that its parts fit together.

    Raises:
        FlashError: If it is missing, damaged, newer, or no trace at all.
    """
    try:
        with open(path, "rb") as data, np.load(data, allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            if facts["version"] > VERSION:
                raise FlashError(
                    f"{path} is of version {facts['version']}, newer than this "
                    "mlx-flash reads. Update it, or record the trace again."
                )
            layers = range(len(facts["units"]))
            bits = tuple(file[f"bits_{i}"] for i in layers)
            keep = tuple(file[f"keep_{i}"] for i in layers)
            tokens = tuple(file[f"tokens_{i}"] for i in layers)
        for i, units in enumerate(facts["units"]):
            shape = len(tokens[i]), -(-units // 8)
            if any(b.dtype != np.uint8 or b.shape != shape for b in (bits[i], keep[i])):
                raise ValueError(f"layer {i} is not of {units} units")
            if units < 1 or not len(tokens[i]) > facts["warm"][i] >= 0:
                raise ValueError(f"layer {i} has no steps")
        if not layers:
            raise ValueError("it has no layers")
        names = ("units", "unit_bytes", "warm")
        lists = {name: tuple(int(n) for n in facts[name]) for name in names}
        if len({len(numbers) for numbers in lists.values()}) > 1:
            raise ValueError("its facts are of several numbers of layers")
        facts = str(facts["model"]), str(facts["unit"])
    except OSError as error:
        if error.strerror is None:  # NumPy's: neither zip nor pickle
            raise _no_trace(path, error) from error
        raise FlashError(f"{path} cannot be read: {error.strerror}.") from error
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        raise _no_trace(path, error) from error
    sizes = lists["units"], lists["unit_bytes"]
    return Trace(*facts, *sizes, bits, keep, tokens, lists["warm"])


def _no_trace(path: Path, error: Exception) -> FlashError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return FlashError(
        f"{path} is no whole trace ({reason}). "
        "Record one: mlx-flash trace PROMPT -o FILE"
    )


class Recorder:
    """Listens to the layers of a loaded model, from `record`."""

    def __init__(self, flash):
        self._flash = flash
        self._bits: list[list[np.ndarray]] = [[] for _ in flash.layers]
        self._keep: list[list[np.ndarray]] = [[] for _ in flash.layers]
        self._tokens: list[list[int]] = [[] for _ in flash.layers]
        self._warm = [0] * len(flash.layers)

    def mark_warm(self) -> None:
        """What came so far was the prompt: it fills caches and counts as no hit."""
        self._warm = [len(steps) for steps in self._tokens]

    def trace(self) -> Trace:
        """What was heard so far.

        Raises:
            FlashError: If a layer asked for nothing, which one held whole does.
        """
        manifest = self._flash.manifest
        heard = [len(t) - w for t, w in zip(self._tokens, self._warm, strict=True)]
        if not heard or min(heard) < 1:
            raise FlashError(
                f"{heard.count(0)} of {len(heard)} FFN layers asked for nothing: they "
                "are held in memory whole, or nothing was generated. Give less "
                "--memory, or more --max-tokens."
            )
        return Trace(
            model=self._flash.folder.name,
            unit=manifest.unit,
            units=tuple(layer.units for layer in manifest.layers),
            unit_bytes=tuple(layer.unit_bytes for layer in manifest.layers),
            bits=tuple(np.stack(bits) for bits in self._bits),
            keep=tuple(np.stack(bits) for bits in self._keep),
            tokens=tuple(np.array(tokens, np.int32) for tokens in self._tokens),
            warm=tuple(self._warm),
        )

    def _listener(self, index: int, units: int):
        def packed(ids: np.ndarray | None) -> np.ndarray:
            marks = np.zeros(units, bool)
            if ids is not None:
                marks[ids] = True
            return np.packbits(marks)

        def hear(asked: np.ndarray, tokens: int, keep: np.ndarray | None) -> None:
            self._bits[index].append(packed(asked))
            self._keep[index].append(packed(keep))
            self._tokens[index].append(tokens)

        return hear


@contextmanager
def record(flash) -> Iterator[Recorder]:
    """Listen to `model.flash` for the time of a `with`.

    >>> with record(model.flash) as recorder:
    ...     mlx_flash.generate(model, tokenizer, "Once upon a time")
    >>> recorder.trace().save("trace.npz")
    """
    recorder = Recorder(flash)
    stores = [layer.store for layer in flash.layers]
    for i, store in enumerate(stores):
        store.listener = recorder._listener(i, store.units)
    try:
        yield recorder
    finally:
        for store in stores:
            store.listener = None


def record_prompt(model, tokenizer, prompt, max_tokens: int, **options) -> Trace:
    """The trace of continuing a prompt; its figures count from the first new token."""
    from ..generation import stream_generate

    with record(model.flash) as recorder:
        steps = stream_generate(
            model, tokenizer, prompt, max_tokens=max_tokens, **options
        )
        for i, _ in enumerate(steps):
            if i == 0:
                recorder.mark_warm()
        return recorder.trace()


def record_text(model, tokenizer, text: str, tokens: int) -> Trace:
    """The trace of reading a text token by token, in pieces of PIECE_TOKENS.

    Each piece begins as the tokenizer begins a text, with an empty KV cache.

    Raises:
        FlashError: If the text has no token.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    start = tokenizer.encode("", add_special_tokens=True)[:1]
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)[:tokens]
    if not ids:
        raise FlashError("The text is empty. Give some to read.")
    body = PIECE_TOKENS - len(start)
    with record(model.flash) as recorder:
        for begin in range(0, len(ids), body):
            cache = make_prompt_cache(model)
            for token in start + ids[begin : begin + body]:
                mx.eval(model(mx.array([[token]]), cache=cache))
        return recorder.trace()
