"""Turn a mixture-of-experts checkpoint into one bundle per expert.

mlx-lm loads the checkpoint, renames and stacks; every `SwitchGLU` and `SwitchMLP` it
built is found by its type, whatever the model. An expert's bundle is all arrays of its
projections: weights, scales, biases. Everything else stays resident.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoints.stock import Stock
from ..errors import FlashError
from ..layers.expert import switch_layers, switch_parts
from ..storage import manifest as format
from . import resident
from .bundles import write_bundles
from .source import Source, finite
from .workfolder import WorkFolder

PACKING = (".scales", ".biases", ".global_scale")  # beside quantised weights


class ExpertConversion:
    """One mixture-of-experts checkpoint, layer by layer.

    Args:
        source: The checkpoint.
        work: Where to write.
        dtype: What unquantised weights are cast to; None keeps each as it is.
        quantize: `group_size`, `bits` and `mode` for what goes to flash, or None.
        quantize_resident: The same for everything else.
        bars: Makes progress bars, as `tqdm.tqdm`.
    """

    unit = "expert"
    activation = "switch"  # whatever mlx-lm's module does
    # Modules that go to flash by path; of one, its arrays as they are and as units.
    find = staticmethod(switch_layers)
    arrays = staticmethod(switch_parts)
    split = staticmethod(switch_parts)

    def __init__(
        self,
        source: Source,
        stock: Stock,
        work: WorkFolder,
        dtype: mx.Dtype | None,
        quantize: dict | None,
        quantize_resident: dict | None,
        bars,
    ):
        self.source, self.work, self.dtype, self.bars = source, work, dtype, bars
        self.stock, self.found_dtype = stock, stock.dtype()
        stock.raw.clear()  # it would keep all that is ever evaluated
        self.modules = self.find(stock.model)
        if quantize:
            self._quantize(quantize)
        if quantize_resident:
            resident.quantize_modules(stock.model, self.modules, quantize_resident)
        self._check_disk()

    def run(self) -> None:
        done, total = len(self.work.layers), len(self.modules)
        modules = list(self.modules)
        for module in modules[:done]:
            self._release(module)
        for index in self.bars(
            range(done, total), "converting", initial=done, total=total, unit="layer"
        ):
            entry = self._convert_layer(index, modules[index])
            self.work.layers.append(dataclasses.asdict(entry))
            self.work.note()
        if self.source.fingerprint() != self.work.facts["source"]:
            raise self.work.source_changed()
        folder = self.work.folder
        dtype = self.found_dtype if self.dtype is None else _name(self.dtype)
        config = {"dtype": dtype} | resident.packing_config(
            resident.packing_of(self.stock.model)
        )
        held = resident.write_weights(folder / format.RESIDENT, self._resident())
        resident.copy_config(self.source, folder, config)
        resident.write_manifest(
            self.work,
            self.source,
            unit=self.unit,
            activation=self.activation,
            dtype=dtype,
            resident=held,
            predictors=None,
            calibration=None,
        )

    def _convert_layer(self, index: int, module: str) -> format.Layer:
        """Write the bundles of one layer, and let go of its weights."""
        parts = {}
        for name, array in self.split(self.modules[module]).items():
            parts[name] = self._cast(name, array)
            if mx.issubdtype(array.dtype, mx.floating):
                finite(f"{module}.{name}", parts[name])
        path = self.work.folder / f"ffn/layer_{index:02d}.safetensors"
        entry = write_bundles(path, module, parts)
        self._release(module)
        return entry

    def _release(self, module: str) -> None:
        # Unevaluated zeros keep shapes and occupy nothing.
        arrays = self.arrays(self.modules[module]).items()
        zeros = [(name, mx.zeros(w.shape, w.dtype)) for name, w in arrays]
        self.modules[module].update(tree_unflatten(zeros))

    def _resident(self) -> dict[str, mx.array]:
        """All weights that are in no bundle."""
        bundled = {
            f"{path}.{name}"
            for path, module in self.modules.items()
            for name in self.arrays(module)
        }
        return {
            name: self._cast(name, array)
            for name, array in tree_flatten(self.stock.model.parameters())
            if name not in bundled
        }

    def _cast(self, name: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        if self.dtype is None or not floating or name.endswith(PACKING):
            return array
        return array.astype(self.dtype)

    def _quantize(self, quantize: dict) -> None:
        for module, switch in self.modules.items():
            for name, linear in switch.children().items():
                if hasattr(linear, "bits"):
                    raise FlashError(
                        f"The FFNs of {self.source.name} have {linear.bits} bits "
                        "already: leave out --bits, or convert the original checkpoint."
                    )
                if hasattr(linear, "to_quantized"):
                    try:
                        switch[name] = linear.to_quantized(**quantize)
                    except ValueError as error:  # rows that are no whole groups, say
                        raise FlashError(
                            f"{module}.{name} cannot be quantised: {error} "
                            "Try --group-size 32."
                        ) from error

    def _check_disk(self) -> None:
        arrays = [a for _, a in tree_flatten(self.stock.model.parameters())]
        need = sum(a.nbytes for a in arrays)
        need *= 1 - len(self.work.layers) / len(self.modules)
        free = shutil.disk_usage(self.work.folder).free
        if free < need:
            raise FlashError(
                f"The conversion needs about {need / 1e9:.2f} GB, "
                f"{Path(self.work.dst).parent} has {free / 1e9:.2f} GB free. Free some "
                "space or choose another folder."
            )


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
