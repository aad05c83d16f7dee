"""Describe a stock checkpoint whose experts can be read from its shards as they lie.

mlx-lm's own files hold the experts of a layer in one tensor for each part, so that an
expert is a run of bytes at a fixed stride. Checkpoints as they were published have a
tensor for each expert and projection, or gates and ups in one: `origins.py` finds which
bytes of them mlx-lm would take for which expert.
"""

from collections import defaultdict
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import FlashError
from ..layers.kinds import EXPERT
from ..storage.extents import ABSENT, Extent, Places, Region
from ..storage.layout import dtype_name
from ..storage.manifest import Manifest
from ..storage.safetensors import DTYPES
from .origins import check, trace
from .stock import Place, Stock, load_stock
from .views import Unreadable, Value, whole
from .weight_format import layer_of, manifest_of


class NotInPlace(FlashError):
    """A checkpoint's experts do not lie in its files as they are multiplied."""


def describe_in_place(stock: Stock) -> tuple[Manifest, list[list[Region]]]:
    """The manifest that the checkpoint would have, and where each layer's experts lie.

    Raises:
        NotInPlace: If the model has no experts, or its files hold them otherwise.
    """
    switches = EXPERT.find(stock.model)
    folder = stock.folder
    if not switches:
        raise NotInPlace(
            f"{folder} has no flash.json, and no mixture-of-experts layers (SwitchGLU "
            "or SwitchMLP of mlx-lm) that could be streamed as they are. Convert it: "
            f"mlx-flash convert {folder} -o {folder.name}-flash"
        )
    arrays = {
        f"{module}.{name}": array
        for module, switch in switches.items()
        for name, array in EXPERT.arrays(switch).items()
    }
    values = _values(stock, arrays)
    layers, extents = [], []
    for module, switch in switches.items():
        parts = EXPERT.arrays(switch)
        of_layer = [
            (array, values[f"{module}.{name}"]) for name, array in parts.items()
        ]
        extents.append(_regions(of_layer, stock.places))
        layers.append(layer_of(module, parts, extents[-1][0].path.name))
    model_type, dtype = stock.config["model_type"], stock.dtype()
    manifest = manifest_of(
        folder.name, stock.model, model_type, EXPERT, dtype, tuple(layers)
    )
    return manifest, extents


def runs_in_place(folder: Path) -> bool:
    """Whether each expert of a checkpoint lies in its files as it is multiplied.

    Also true of a checkpoint that cannot be loaded: loading it says why.
    """
    try:
        describe_in_place(load_stock(folder))
    except NotInPlace:
        return False
    except FlashError:
        pass
    return True


def _values(stock: Stock, arrays: dict[str, mx.array]) -> dict[str, Value]:
    """Which bytes of the checkpoint's tensors each array is made of.

    Raises:
        NotInPlace: If the bytes of an expert's part do not lie side by side there.
    """
    made_names = {id(array): name for name, array in stock.made.items()}
    values: dict[str, Value] = {}
    moved: dict[str, str] = {}  # by the names that mlx-lm has for them
    name = ""
    try:
        for name, array in arrays.items():
            if dtype_name(array.dtype) not in DTYPES:
                raise Unreadable(f"its dtype is {dtype_name(array.dtype)}")
            tensor = stock.tensor(array)
            if tensor is not None and stock.places[tensor].bytes == array.nbytes:
                values[name] = (whole(tensor, array.shape, array.dtype.size),)
            elif id(array) in made_names:
                moved[made_names[id(array)]] = name
            else:
                raise Unreadable("mlx-lm packs it anew when it loads it")
        if moved:
            name = next(iter(moved.values()))
            sanitize = stock.sanitizer()
            traced = trace(sanitize, stock.raw, list(moved))
            values |= {moved[made]: value for made, value in traced.items()}
            for name in moved.values():
                _check_bytes(arrays[name], values[name], stock.places)
            check(sanitize, stock.raw, traced)
    except Unreadable as reason:
        raise NotInPlace(
            f"{stock.folder}: {name} cannot be read where it lies: {reason}. Convert "
            f"it: mlx-flash convert {stock.folder} -o {stock.folder.name}-flash"
        ) from None
    return values


def _check_bytes(array: mx.array, value: Value, places: dict[str, Place]) -> None:
    """Refuse what is no run of bytes for each expert, or not in the tensors."""
    unit_bytes = array.nbytes // len(array)
    units = 0
    for view in value:
        offsets = view.unit_offsets()
        units += len(offsets)
        inside = view.tensor in places and (
            max(offsets) + unit_bytes <= places[view.tensor].bytes
        )
        if not inside:
            raise Unreadable(f"{view.tensor} has other sizes than its header says")
    if units != len(array):
        raise Unreadable(f"{units} of {len(array)} experts were found")


def _regions(
    parts: list[tuple[mx.array, Value]], places: dict[str, Place]
) -> list[Region]:
    """Where the parts of a layer's experts lie in files.

    Args:
        parts: Each part of all experts, and the bytes that it is made of.
    """
    strides: dict[tuple[str, int], list[tuple[int, int, int]]] = defaultdict(list)
    scattered: dict[int, Value] = {}
    sizes = [array.nbytes // len(array) for array, _ in parts]
    for index, (_, value) in enumerate(parts):
        if len(value) == 1:
            view = value[0]
            stride = view.strides[0] or sizes[index]  # 0 of a single expert
            strides[view.tensor, stride].append((index, view.offset, sizes[index]))
        else:
            scattered[index] = value
    regions: list[Region] = []
    for (tensor, stride), cuts in strides.items():
        place = places[tensor]
        regions.append(Extent(place.file, place.offset, stride, tuple(cuts)))
    return regions + _tables(scattered, sizes, places)


def _tables(
    scattered: dict[int, Value], sizes: list[int], places: dict[str, Place]
) -> list[Region]:
    """A table for each file that parts with tensors of their own lie in."""
    files: dict[Path, dict[int, dict[int, int]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    units = 0
    for index, value in scattered.items():
        unit = 0
        for view in value:
            place = places[view.tensor]
            for at in view.unit_offsets():
                files[place.file][index][unit] = place.offset + at
                unit += 1
        units = unit
    regions: list[Region] = []
    for file, columns in files.items():
        offsets = np.full((units, len(columns)), ABSENT, np.int64)
        for column, found in enumerate(columns.values()):
            offsets[list(found), column] = list(found.values())
        cuts = tuple((index, 0, sizes[index]) for index in columns)
        regions.append(Places(file, cuts, offsets))
    return regions
