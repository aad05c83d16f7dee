"""Ranks that say that they compute on different chips, and choose differently.

Rank 1's router is turned round: alone, the ranks would add up different experts.
"""

import os
import sys

import mlx.core as mx
import numpy as np

import mlx_flash
from mlx_flash.layers.expert import ExpertFFN
from mlx_flash.machines import division

folder, out = sys.argv[1:]
if os.environ.get("MLX_RANK") == "1":
    division._chip = lambda: "another chip"
    choose = ExpertFFN.__call__

    def other(self, x, indices):
        return choose(self, x, (indices + 1) % self.experts)

    ExpertFFN.__call__ = other
model, _ = mlx_flash.load_model(folder, memory="3MB", context=128)
np.save(out, np.array(model(mx.array([[5, 6, 7, 8, 9]]))))
model.flash.close()
