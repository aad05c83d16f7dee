"""Cut a model with exact zeros in its FFNs: a bundle per neuron.

Neuron i is row i of the projections into the FFN and column i of the one out of it,
stored as a row. Biases stay resident: an element is 1/d_model of a row, and in the
bundle it would push the rows off their alignment. With the weights of no other layer
in memory, each layer is run on calibration text and gets a predictor fitted to it.
Shapes: D model width, N neurons.
"""

from typing import Any

import mlx.core as mx

from ..arrays import parameters
from ..checkpoints.units import activation
from ..errors import FlashError
from ..layers.kinds import NEURON
from ..layers.projections import neuron_rows, pack
from ..storage.safetensors import DTYPES
from .arrays import finite, release
from .calibrate.calibrator import Calibrator
from .calibrate.layerwise import LayerwiseModel
from .conversion import Cutter, Job
from .resident import check_names, packing_of, quantize_modules


class NeuronCutter(Cutter):
    """Cuts dense FFNs into neurons; all weights are cast to the job's `dtype`.

    `calibrator` fits the predictors; it is None if `rank` 0 asks for none.
    """

    kind = NEURON

    def __init__(self, job: Job):
        assert job.options.dtype is not None
        self.job = job
        self.activation = activation(job.source.config)
        self.dtype = job.options.dtype
        self._cast_to = getattr(mx, self.dtype)
        # float16 is emulated on MLX's CPU backend, many times slower than float32.
        on_cpu = mx.default_device() == mx.cpu
        self.model = LayerwiseModel(job.source, mx.float32 if on_cpu else self._cast_to)
        self.modules = self.kind.find(self.model.model)
        self._check_packing()
        values = sum(w.size for w in parameters(self.model.model).values())
        on_flash = sum(
            array.size
            for ffn in self.modules.values()
            for array in self.kind.arrays(ffn).values()
        )
        value_bytes = DTYPES[self.dtype][1]
        # A tenth for predictors and the states of the calibration text.
        job.check_disk(
            1.1 * values * value_bytes, on_flash * value_bytes, len(self.modules)
        )
        job.source.prepare(job.work)
        check_names(job.source, self.model.model)
        self.calibrator = self.make_calibrator()

    def make_calibrator(self) -> Calibrator | None:
        """What fits predictors, and finds an order for the neurons."""
        if self.job.options.rank == 0:
            return None
        return Calibrator(self.job, self.model, list(self.modules), self._cast_to)

    def resume(self, done: int) -> None:
        if self.calibrator:
            self.calibrator.resume(done)

    def cut(self, index: int) -> tuple[dict[str, mx.array], dict[str, Any]]:
        facts = self.calibrator.fit(index) if self.calibrator else None
        path = list(self.modules)[index]
        order = self._order(index)
        ffn = self.model.load_module(path, self._cast_to)
        for name, weight in parameters(ffn).items():
            finite(f"{path}.{name}", weight)
        rows = slice(None) if order is None else order
        on_flash = self.kind.arrays(ffn)
        parts = {
            f"{name}.{key}": array
            for name, weight in neuron_rows(ffn).items()
            if f"{name}.weight" in on_flash
            for key, array in pack(weight[rows], self.job.options.packing).items()
        }
        order_name = "checkpoint" if order is None else "coactivation"
        return parts, {"order": order_name, "predictor": facts}

    def finish(self, index: int) -> None:
        release(list(self.modules.values())[index])
        if self.calibrator:
            self.calibrator.finish(index)

    def rest(self) -> tuple[dict[str, mx.array], dict[str, dict]]:
        options = self.job.options
        on_flash = {
            f"{path}.{name}"
            for path, ffn in self.modules.items()
            for name in self.kind.arrays(ffn)
        }
        kept = {
            name: weight.astype(self._cast_to)
            for name, weight in self.job.source.weights().items()
            if name not in on_flash
        }
        for index, (path, ffn) in enumerate(self.modules.items()):
            order = self._order(index)
            *ins, _ = neuron_rows(ffn)
            for name in ins:
                bias = f"{path}.{name}.bias"
                if order is not None and bias in kept:
                    kept[bias] = kept[bias][order]
        names = sorted(name.removesuffix(".weight") for name in on_flash)
        packed = dict.fromkeys(names, options.packing) if options.packing else {}
        if options.resident_packing:
            model = self.job.source.make_model()
            model.load_weights(list(kept.items()), strict=False)
            quantize_modules(model, self.modules, options.resident_packing)
            packed |= packing_of(model)
            arrays = parameters(model).items()
            kept = {name: array for name, array in arrays if name not in on_flash}
        if self.calibrator:
            self.calibration = self.calibrator.facts()
        return kept, packed

    def predictors(self) -> dict[str, mx.array]:
        return self.calibrator.predictors() if self.calibrator else {}

    def _order(self, index: int) -> mx.array | None:
        """Which neuron lies where in a layer's bundles; None: as in the checkpoint."""
        return self.calibrator.order(index) if self.calibrator else None

    def _check_packing(self) -> None:
        group_size = (self.job.options.packing or {"group_size": 1})["group_size"]
        for path, ffn in self.modules.items():
            for name, rows in neuron_rows(ffn).items():
                if any(size % group_size for size in rows.shape):
                    raise FlashError(
                        f"{path}.{name} of {rows.shape[0]:,} neurons and width "
                        f"{rows.shape[1]:,} cannot be cut into groups of "
                        f"{group_size}. Try --group-size 32."
                    )
