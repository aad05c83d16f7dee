"""Cut a model with exact zeros in its FFNs: a bundle per neuron.

Neuron i is row i of the projections into the FFN and column i of the one out of it,
stored as a row. Biases stay resident: an element is 1/d_model of a row, and in the
bundle it would push the rows off their alignment. What is quantised is unpacked layer
by layer, and packed along D in the bundles (`packings.py`). With the weights of no
other layer in memory, each layer is run on calibration text and gets a predictor fitted
to it.
Shapes: D model width, N neurons.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..arrays import parameters
from ..checkpoints.units import activation
from ..checkpoints.weight_format import packing_of
from ..errors import FlashError
from ..layers.kinds import NEURON
from ..layers.projections import PACKED, by_neuron, from_neurons, neuron_rows
from ..storage.safetensors import DTYPES
from .arrays import finite, release
from .calibrate.calibrator import Calibrator
from .calibrate.layerwise import LayerwiseModel
from .conversion import Cutter, Job
from .packings import Packings
from .resident import check_names, quantize_modules


class NeuronCutter(Cutter):
    """Cuts dense FFNs into neurons; all weights are cast to the job's `dtype`.

    `calibrator` fits the predictors; it is None if `rank` 0 asks for none.
    """

    kind = NEURON

    def __init__(self, job: Job):
        self.job = job
        self.activation = activation(job.source.config)
        self.dtype = job.options.dtype or job.source.dtype()
        self.packings = Packings(job.source, job.options)
        self._cast_to = getattr(mx, self.dtype)
        # float16 is emulated on MLX's CPU backend, many times slower than float32.
        on_cpu = mx.default_device() == mx.cpu
        self.model = LayerwiseModel(job.source, mx.float32 if on_cpu else self._cast_to)
        self.modules = self.kind.find(self.model.model)
        self._check_packing()
        nbytes, ffn_bytes = self._sizes()
        # A tenth for predictors and the states of the calibration text.
        job.check_disk(1.1 * nbytes, ffn_bytes, len(self.modules))
        job.source.prepare(job.work)
        check_names(job.source, self.model.model)
        self.calibrator = self.make_calibrator()

    def make_calibrator(self) -> Calibrator | None:
        """What fits predictors, and finds an order for the neurons."""
        if self.job.options.rank == 0:
            return None
        paths = list(self.modules)
        return Calibrator(self.job, self.model, paths, self._cast_to, self.packings)

    def resume(self, done: int) -> None:
        self._say_packing()
        if self.calibrator:
            self.calibrator.resume(done)

    def cut(self, index: int) -> tuple[dict[str, mx.array], dict[str, Any]]:
        facts = self.calibrator.fit(index) if self.calibrator else None
        path = list(self.modules)[index]
        order = self._order(index)
        ffn = self.model.load_module(path, self._cast_to)
        for name, weight in parameters(ffn).items():
            finite(f"{path}.{name}", weight)
        parts = self.packings.parts(path, ffn, self._cast_to, order)
        on_flash = self._on_flash(ffn)
        parts = {k: a for k, a in parts.items() if k.rpartition(".")[0] in on_flash}
        order_name = "checkpoint" if order is None else "coactivation"
        return parts, {"order": order_name, "predictor": facts}

    def finish(self, index: int) -> None:
        release(list(self.modules.values())[index])
        if self.calibrator:
            self.calibrator.finish(index)

    def rest(self) -> tuple[dict[str, mx.array], dict[str, dict]]:
        source, options = self.job.source, self.job.options
        projections = {
            f"{path}.{name}": self.packings.of(path, name)
            for path, ffn in self.modules.items()
            for name in self._on_flash(ffn)
        }
        on_flash = {f"{path}.{key}" for path in projections for key in PACKED}
        # What is packed in the checkpoint and stays in memory keeps its arrays.
        resident = {p: how for p, how in source.packing.items() if p not in projections}
        as_they_are = {f"{path}.{key}" for path in resident for key in PACKED}
        kept = {
            name: array if name in as_they_are else array.astype(self._cast_to)
            for name, array in source.stored().items()
            if name not in on_flash
        }
        for index, (path, ffn) in enumerate(self.modules.items()):
            order = self._order(index)
            *ins, _ = neuron_rows(ffn)
            for name in ins:
                bias = f"{path}.{name}.bias"
                if order is not None and bias in kept:
                    rows = by_neuron(ffn, name, kept[bias])[order]
                    kept[bias] = from_neurons(ffn, name, rows)
        packed = resident | {p: how for p, how in projections.items() if how}
        if options.resident_packing:
            model = source.make_model()
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
        source, options = self.job.source, self.job.options
        if options.resident_packing and source.packing:
            raise FlashError(
                f"--resident-bits would be ignored: {source.name} is quantised "
                "already, and what stays in memory stays as it is. Leave it out."
            )
        for path, ffn in self.modules.items():
            for name, rows in neuron_rows(ffn).items():
                how = self.packings.of(path, name)
                sizes = len(rows), rows.shape[-1]
                if how and any(n % how["group_size"] for n in sizes):
                    own = self.packings.own
                    remedy = "--dtype float16" if own else "--group-size 32"
                    raise FlashError(
                        f"{path}.{name} of {len(rows):,} neurons and width "
                        f"{rows.shape[-1]:,} cannot be cut into groups of "
                        f"{how['group_size']}. Try {remedy}."
                    )

    def _say_packing(self) -> None:
        """Tell what becomes of a packing that the checkpoint has."""
        if not self.job.source.packing:
            return
        if self.packings.own:
            self.job.say(
                "Its FFNs are quantised. Ways into the neurons keep their bits; the "
                "ways out of them, quantised across neurons, are quantised anew along "
                "the width, which is not the same to the bit (--dtype float16 keeps "
                "their values, in larger bundles)."
            )
        else:
            self.job.say("Its FFNs are quantised, and are unpacked for the bundles.")

    def _on_flash(self, ffn: nn.Module) -> list[str]:
        """The projections of which neurons' rows go to flash."""
        arrays = self.kind.arrays(ffn)
        return [name for name in neuron_rows(ffn) if f"{name}.weight" in arrays]

    def _sizes(self) -> tuple[float, float]:
        """(all bytes, those of the bundles) of what is going to be written."""
        value_bytes = DTYPES[self.dtype][1]
        names = {
            f"{path}.{name}.weight"
            for path, ffn in self.modules.items()
            for name in self._on_flash(ffn)
        }
        on_flash = rest = 0.0
        if self.packings.own:
            for name, array in self.job.source.stored().items():
                stem = name.rpartition(".")[0]
                mine = f"{stem}.weight" in names and not name.endswith(".bias")
                on_flash += array.nbytes * mine
                rest += array.nbytes * (not mine)
            return on_flash + rest, on_flash
        for name, weight in parameters(self.model.model).items():
            on_flash += weight.size * value_bytes * (name in names)
            rest += weight.size * value_bytes * (name not in names)
        return on_flash + rest, on_flash
