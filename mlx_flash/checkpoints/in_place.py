"""Describe a stock checkpoint whose experts can be read from its shards as they lie.

mlx-lm's own files hold the experts of a layer in one tensor for each part, so that an
expert is a run of bytes at a fixed stride: one read for each part.
"""

import mlx.nn as nn

from ..errors import FlashError
from ..layers.kinds import EXPERT
from ..storage.layout import lay_out
from ..storage.manifest import Manifest
from ..storage.safetensors import DTYPES
from ..storage.extents import Extent
from .stock import Stock
from .weight_format import layer_of, manifest_of


def describe_in_place(stock: Stock) -> tuple[Manifest, list[list[Extent]]]:
    """The manifest that the checkpoint would have, and where each layer's experts lie.

    Raises:
        FlashError: If the model has no experts, or its files hold them otherwise.
    """
    switches = EXPERT.find(stock.model)
    folder = stock.folder
    if not switches:
        raise FlashError(
            f"{folder} has no flash.json, and no mixture-of-experts layers (SwitchGLU "
            "or SwitchMLP of mlx-lm) that could be streamed as they are. Convert it: "
            f"mlx-flash convert {folder} -o {folder.name}-flash"
        )
    layers, extents = [], []
    for module, switch in switches.items():
        extents.append(_extents(stock, module, switch))
        arrays = EXPERT.arrays(switch)
        layers.append(layer_of(module, arrays, extents[-1][0].path.name))
    model_type, dtype = stock.config["model_type"], stock.dtype()
    manifest = manifest_of(
        folder.name, stock.model, model_type, EXPERT, dtype, tuple(layers)
    )
    return manifest, extents


def _extents(stock: Stock, module: str, switch: nn.Module) -> list[Extent]:
    """Where the parts of a layer's experts lie."""
    extents = []
    arrays = EXPERT.arrays(switch)
    for index, (part, (name, array)) in enumerate(
        zip(lay_out(arrays), arrays.items(), strict=True)
    ):
        place = stock.place(array)
        if place is None or place.bytes != array.nbytes or part.dtype not in DTYPES:
            raise FlashError(
                f"{stock.folder}: {module}.{name} does not lie in the shards as mlx-lm "
                "uses it (experts stored one by one, or transposed). Convert it: "
                f"mlx-flash convert {stock.folder} -o {stock.folder.name}-flash"
            )
        whole = ((index, 0, part.bytes),)
        extents.append(Extent(place.file, place.offset, part.bytes, whole))
    return extents
