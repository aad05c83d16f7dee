"""Cut a checkpoint as mlx-lm loads it: a bundle per expert, or per block of neurons.

mlx-lm loads, renames and stacks; the FFNs are found by their type or by what they do,
whatever the model. An expert's bundle is all arrays of its projections: weights,
scales, biases. A block's is a run of neurons, whose quantised weights keep their
packing bit for bit. Everything else stays resident.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..arrays import parameters
from ..checkpoints.stock import load_stock
from ..checkpoints.weight_format import packing_of
from ..errors import FlashError
from ..layers.kinds import BLOCK, UnitKind
from .arrays import finite, release
from .conversion import Cutter, Job
from .resident import quantize_modules

PACKING = (".scales", ".biases", ".global_scale")  # beside quantised weights


class TensorCutter(Cutter):
    """Cuts the stacked tensors of experts, or whole dense FFNs.

    Unquantised weights are cast to the `dtype` asked for; without one, each stays as
    it is.
    """

    def __init__(self, job: Job, kind: UnitKind):
        self.kind = kind
        self.activation = kind.activation
        if job.source.copied_bytes():
            raise FlashError(
                f"{job.source.name} has .bin files, which mlx-lm does not read. "
                "Convert them to safetensors first."
            )
        stock = load_stock(job.source.folder)
        self._model = stock.model
        self.dtype = job.options.dtype or stock.dtype()
        self._cast_to = getattr(mx, self.dtype) if job.options.dtype else None
        stock.forget()
        self.modules = kind.find(self._model)
        if job.options.blocks:
            blocks = BLOCK.find(self._model)
            if not blocks:
                raise FlashError(
                    f"--blocks would be ignored: {job.source.name} has no dense FFN "
                    "beside its experts. Leave it out."
                )
            self.modules |= blocks
            self.blocks = frozenset(blocks)
        if job.options.packing:
            _quantize(self.modules, job.options.packing, job.source.name)
        if job.options.resident_packing:
            before = packing_of(self._model)
            quantize_modules(self._model, self.modules, job.options.resident_packing)
            if packing_of(self._model) == before:
                raise FlashError(
                    f"--resident-bits would be ignored: {job.source.name} has nothing "
                    "that stays in memory and is not quantised already. Leave it out."
                )
        nbytes = sum(array.nbytes for array in parameters(self._model).values())
        ffn_bytes = sum(
            array.nbytes
            for path, module in self.modules.items()
            for array in self._kind(path).arrays(module).values()
        )
        job.check_disk(nbytes, ffn_bytes, len(self.modules))

    def resume(self, done: int) -> None:
        for index in range(done):
            self.finish(index)

    def cut(self, index: int) -> tuple[dict[str, mx.array], dict[str, Any]]:
        path, module = list(self.modules.items())[index]
        parts = {}
        for name, array in self._kind(path).split(module).items():
            parts[name] = self._cast(name, array)
            if mx.issubdtype(array.dtype, mx.floating):
                finite(f"{path}.{name}", parts[name])
        return parts, {}

    def finish(self, index: int) -> None:
        path, module = list(self.modules.items())[index]
        release(module, self._kind(path).arrays(module))

    def rest(self) -> tuple[dict[str, mx.array], dict[str, dict]]:
        bundled = {
            f"{path}.{name}"
            for path, module in self.modules.items()
            for name in self._kind(path).arrays(module)
        }
        kept = {
            name: self._cast(name, array)
            for name, array in parameters(self._model).items()
            if name not in bundled
        }
        packed = packing_of(self._model)
        release(self._model)  # it would hold what is evaluated for writing
        return kept, packed

    def _kind(self, path: str) -> UnitKind:
        return BLOCK if path in self.blocks else self.kind

    def _cast(self, name: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        if self._cast_to is None or not floating or name.endswith(PACKING):
            return array
        return array.astype(self._cast_to)


def _quantize(modules: dict[str, nn.Module], packing: dict, name: str) -> None:
    """Quantise the projections of every FFN of the checkpoint `name`."""
    for path, module in modules.items():
        for key, linear in module.children().items():
            if hasattr(linear, "bits"):
                raise FlashError(
                    f"The FFNs of {name} have {linear.bits} bits already: leave out "
                    "--bits, or convert the original checkpoint."
                )
            if hasattr(linear, "to_quantized"):
                try:
                    module[key] = linear.to_quantized(**packing)
                except ValueError as error:  # rows that are no whole groups, say
                    raise FlashError(
                        f"{path}.{key} cannot be quantised: {error} "
                        "Try --group-size 32."
                    ) from error
