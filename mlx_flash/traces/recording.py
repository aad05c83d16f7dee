"""Record which units a run asks for, so that caches can be judged without the model.

What a layer asks for does not depend on what memory holds (a layer that memory holds
as a whole asks for nothing), so one recording serves for every policy and budget.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import FlashError
from ..storage.manifest import Manifest
from .trace import Trace


class Recorded(Protocol):
    """What can be recorded: `model.flash` is one."""

    folder: Path
    manifest: Manifest
    layers: Any  # each with its `slots`


class Recorder:
    """Listens to the layers of a loaded model, from `record`."""

    def __init__(self, flash: Recorded):
        self._flash = flash
        # Of each layer and step: units asked for and to keep, both packed, and tokens.
        self._steps: list[list[tuple[np.ndarray, np.ndarray, int]]]
        self._steps = [[] for _ in flash.layers]
        self._soon: list[list[np.ndarray]] = [[] for _ in flash.layers]
        self._warm = [0] * len(flash.layers)

    def mark_warm(self) -> None:
        """What came so far was the prompt: it fills caches and counts as no hit."""
        self._warm = [len(steps) for steps in self._steps]

    def trace(self) -> Trace:
        """What was heard so far.

        Raises:
            FlashError: If a layer asked for nothing, which one held whole does.
        """
        manifest = self._flash.manifest
        heard = [len(t) - w for t, w in zip(self._steps, self._warm, strict=True)]
        if not heard or min(heard) < 1:
            raise FlashError(
                f"{heard.count(0)} of {len(heard)} FFN layers asked for nothing: they "
                "are held in memory whole, or nothing was generated. Give less "
                "--memory, or more --max-tokens."
            )
        bits, keep, tokens = zip(
            *(zip(*steps, strict=True) for steps in self._steps), strict=True
        )
        return Trace(
            model=self._flash.folder.name,
            unit=manifest.unit,
            units=tuple(layer.units for layer in manifest.layers),
            unit_bytes=tuple(layer.unit_bytes for layer in manifest.layers),
            bits=tuple(np.stack(marks) for marks in bits),
            keep=tuple(np.stack(marks) for marks in keep),
            tokens=tuple(np.array(counts, np.int32) for counts in tokens),
            warm=tuple(self._warm),
            soon=self._all_soon(),
        )

    def _all_soon(self) -> tuple[np.ndarray, ...]:
        """What was expected at every step; () where some step had nothing expected."""
        pairs = zip(self._soon, self._steps, strict=True)
        if not all(len(soon) == len(steps) for soon, steps in pairs):
            return ()
        return tuple(np.stack(soon) for soon in self._soon)

    def _listener(self, index: int, units: int):
        def packed(ids: np.ndarray | None) -> np.ndarray:
            marks = np.zeros(units, bool)
            if ids is not None:
                marks[ids] = True
            return np.packbits(marks)

        def hear(
            asked: np.ndarray,
            tokens: int,
            keep: np.ndarray | None,
            soon: np.ndarray | None,
        ) -> None:
            self._steps[index].append((packed(asked), packed(keep), tokens))
            if soon is not None:
                self._soon[index].append(soon.astype(np.float16))

        return hear


@contextmanager
def record(flash: Recorded) -> Iterator[Recorder]:
    """Listen to `model.flash` for the time of a `with`.

    >>> with record(model.flash) as recorder:
    ...     mlx_flash.generate(model, tokenizer, "Once upon a time")
    >>> recorder.trace().save("trace.npz")
    """
    recorder = Recorder(flash)
    all_slots = [layer.slots for layer in flash.layers]
    for i, slots in enumerate(all_slots):
        slots.listener = recorder._listener(i, flash.manifest.layers[i].units)
    try:
        yield recorder
    finally:
        for slots in all_slots:
            slots.listener = None
