"""Cut a model whose neurons have gates: the gates stay in memory.

A bundle is the up row and the down column of a neuron. The gates are resident, in as
many bits as the bundles, or as the rest of what is resident where bundles are not
quantised. While the layers are cut, calibration text runs through them: each gets
thresholds for shares of its neurons to skip, and the perplexity of skipping them is
measured (calibrate/gates.py).
"""

from typing import Any

import mlx.core as mx

from ..layers.kinds import GATED
from ..layers.projections import known_projections, pack
from .calibrate.gates import GateCalibrator, gate_packing
from .conversion import Job
from .neurons import NeuronCutter


class GatedCutter(NeuronCutter):
    """Cuts dense FFNs into neurons without their gates."""

    kind = GATED

    def __init__(self, job: Job):
        super().__init__(job)
        self.gates = GateCalibrator(
            job, self.model, list(self.modules), self._cast_to, self.packings
        )

    def make_calibrator(self) -> None:
        """No predictor is needed, and neurons keep the order of the checkpoint."""

    def resume(self, done: int) -> None:
        self.gates.resume(done)

    def cut(self, index: int) -> tuple[dict[str, mx.array], dict[str, Any]]:
        thresholds = self.gates.fit_thresholds(index)
        parts, facts = super().cut(index)
        return parts, facts | {"thresholds": thresholds}

    def finish(self, index: int) -> None:
        super().finish(index)
        self.gates.finish(index)

    def rest(self) -> tuple[dict[str, mx.array], dict[str, dict]]:
        kept, packed = super().rest()
        for index, (path, ffn) in enumerate(self.modules.items()):
            kept[f"{path}.gains"] = self.gates.gains(index).astype(self._cast_to)
            packing = gate_packing(self.job.options, ffn)
            if packing is None:
                continue
            gate = f"{path}.{known_projections(ffn)[0][0]}"
            rows = kept.pop(f"{gate}.weight")
            kept |= {f"{gate}.{k}": a for k, a in pack(rows, packing).items()}
            packed[gate] = packing
        self.calibration = self.gates.facts()
        self.skipping = self.gates.measure()
        self.job.say(f"Measured {self.skipping.summary()}.")
        return kept, packed
