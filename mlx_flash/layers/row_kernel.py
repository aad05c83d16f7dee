"""Multiply rows of a weight where they lie, chosen by their ids.

MLX has no product with some rows of a matrix: `weight[ids]` copies them first, and so
each weight crosses the memory three times instead of once. Here a kernel follows the
ids, on Metal or CUDA; its text is row_kernel.h. Elsewhere, and for what the kernel does
not take, MLX gathers and multiplies as ever. Nothing needs the kernel.
Shapes: T tokens, D model width, n rows of the weight, K ids.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from .projections import pack

# mx.fast.metal_kernel or mx.fast.cuda_kernel, and what they make.
Kernel = Callable[..., list[mx.array]]
Maker = Callable[..., Kernel]

# A kernel is compiled for each number of tokens and keeps that many sums in registers.
# For more tokens, one copy that serves them all is a smaller part of the work.
MOST_TOKENS = 8
LANES = 32  # threads that add up what they have: a simdgroup of Metal, a warp of CUDA
# How the work is divided. Nobody has tuned these numbers on any GPU.
RUN = 8  # values of a row that a thread takes at once: 16 bytes in half precision
OUTPUTS = 4  # ids that LANES threads multiply side by side
GROUPS = 4  # times LANES threads in one thread group
SPLIT = 64  # ids that a thread adds up on the way out

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
HEADER = Path(__file__).with_name("row_kernel.h")
# Metal has this variable, and gives it to a kernel whose body has its name.
CUDA_POSITION = """
const uint3 thread_position_in_grid = make_uint3(
    blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, 0);
"""
BODY = """
mlx_flash::{product}<TOKENS, D, RUN, {constants}>(
    x, mlx_flash::{rows}, ids, ids_shape[0], out,
    thread_position_in_grid.x, thread_position_in_grid.y);
"""


@dataclass(frozen=True)
class Rows:
    """Some rows of a weight.

    Attributes:
        arrays: The `weight` [n, D]. A packed one is packed along D, and has `scales`
            and, if its mode has them, `biases`.
        ids: uint32 [K], each below n, in any order.
        packing: How the weight is quantised, as `mx.quantized_matmul` takes it.
    """

    arrays: Mapping[str, mx.array]
    ids: mx.array
    packing: dict[str, Any] | None = None

    @property
    def stored(self) -> mx.Dtype:
        """What kind of numbers the weights are, or the scales of packed ones."""
        return self.arrays["scales" if self.packing else "weight"].dtype

    @property
    def width(self) -> int:
        """D."""
        if self.packing is None:
            return self.arrays["weight"].shape[-1]
        return self.arrays["scales"].shape[-1] * self.packing["group_size"]

    def result_type(self, x: mx.array) -> mx.Dtype:
        """Of a product with x. Two different kinds of numbers give float32 in MLX."""
        return x.dtype if x.dtype == self.stored else mx.float32

    def in_float32(self) -> "Rows":
        """The same numbers, for products without a rounding error of half precision."""
        arrays = {
            name: a if a.dtype == mx.uint32 else a.astype(mx.float32)
            for name, a in self.arrays.items()
        }
        return Rows(arrays, self.ids, self.packing)


def rows_into(x: mx.array, rows: Rows) -> mx.array:
    """x · rows.T, without copying the rows where there is a kernel for it.

    Args:
        x: [T, D].
        rows: [K, D].

    Returns:
        [T, K], of the type that MLX's own product has. The kernel sums in float32.
    """
    make = _maker_for(x, rows)
    return gathered_into(x, rows) if make is None else _kernel_into(make, x, rows)


def rows_out(h: mx.array, rows: Rows) -> mx.array:
    """h · rows, likewise.

    Args:
        h: [T, K].
        rows: [K, D].

    Returns:
        [T, D].
    """
    make = _maker_for(h, rows)
    return gathered_out(h, rows) if make is None else _kernel_out(make, h, rows)


def gathered_into(x: mx.array, rows: Rows) -> mx.array:
    """The same as `rows_into` in plain MLX: what the kernel is compared with."""
    return _gathered(x, rows, transpose=True)


def gathered_out(h: mx.array, rows: Rows) -> mx.array:
    """The same as `rows_out` in plain MLX."""
    return _gathered(h, rows, transpose=False)


def _gathered(x: mx.array, rows: Rows, transpose: bool) -> mx.array:
    a = {name: array[rows.ids] for name, array in rows.arrays.items()}
    if rows.packing is None:
        return x @ (a["weight"].T if transpose else a["weight"])
    return mx.quantized_matmul(
        x, a["weight"], a["scales"], a.get("biases"), transpose, **rows.packing
    )


def kernel_maker() -> Maker | None:
    """What compiles a kernel for the device in use, None if MLX has nothing for it."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    # MLX declares what they return as `object`.
    if mx.metal.is_available():
        return cast(Maker, mx.fast.metal_kernel)
    if mx.cuda.is_available():
        return cast(Maker, mx.fast.cuda_kernel)
    return None


def _maker_for(x: mx.array, rows: Rows) -> Maker | None:
    """The maker of a kernel for this product, None where MLX has to gather."""
    make = kernel_maker()
    if make is None or rows.arrays["weight"].ndim != 2:
        return None
    if not 0 < len(x) <= MOST_TOKENS or rows.ids.size == 0:
        return None
    if x.dtype not in FLOATS or rows.stored not in FLOATS:
        return None
    bits, group = 0, 0
    if rows.packing is not None:
        bits, group = rows.packing["bits"], rows.packing["group_size"]
        if rows.packing["mode"] != "affine" or bits not in (4, 8) or group % RUN:
            return None
    return make if _agrees(make, x.dtype, rows.stored, bits, group) else None


@lru_cache
def _agrees(
    make: Maker, kind: mx.Dtype, stored: mx.Dtype, bits: int, group: int
) -> bool:
    """Whether the kernel is right for such numbers; tried once, with few of them.

    A compiler that refuses the kernel must not stop a model that runs without it.
    """
    packing = {"bits": bits, "group_size": group, "mode": "affine"} if bits else None
    keys = mx.random.split(mx.random.key(0), 3)
    weight = mx.random.normal((8, max(group, 64)), stored, key=keys[0])
    rows = Rows(pack(weight, packing), mx.array([5, 0, 7], mx.uint32), packing)
    x = mx.random.normal((1, weight.shape[-1]), kind, key=keys[1])
    h = mx.random.normal((1, rows.ids.size), kind, key=keys[2])
    exact = rows.in_float32()
    pairs = (
        (_kernel_into, x, gathered_into(x.astype(mx.float32), exact)),
        (_kernel_out, h, gathered_out(h.astype(mx.float32), exact)),
    )
    try:
        right = all(
            mx.allclose(multiply(make, values, rows), expected, 0.02, 0.1).item()
            for multiply, values, expected in pairs
        )
        problem = "its numbers are wrong"
    except (RuntimeError, ValueError) as error:
        right, problem = False, str(error)
    if not right:
        name = f"{bits}-bit weights" if bits else f"{stored} weights"
        warnings.warn(
            f"The kernel that multiplies rows of {name} cannot be used on this GPU, "
            f"and the rows are copied before each product: {problem}",
            stacklevel=2,
        )
    return right


def _kernel_into(make: Maker, x: mx.array, rows: Rows) -> mx.array:
    K, number = rows.ids.size, rows.result_type(x)
    groups = -(-K // OUTPUTS)
    (y,) = _kernel(make, "rows_into", ("OUTPUTS", "Number"), rows.packing is not None)(
        inputs=_inputs(x, rows),
        template=[*_sizes(x, rows), ("OUTPUTS", OUTPUTS), ("Number", number)],
        grid=(LANES, groups, 1),
        threadgroup=(LANES, min(GROUPS, groups), 1),
        output_shapes=[(len(x), K)],
        output_dtypes=[number],
    )
    return y


def _kernel_out(make: Maker, h: mx.array, rows: Rows) -> mx.array:
    columns = -(-rows.width // RUN)
    parts = -(-rows.ids.size // SPLIT)
    (y,) = _kernel(make, "rows_out", ("SPLIT",), rows.packing is not None)(
        inputs=_inputs(h, rows),
        template=[*_sizes(h, rows), ("SPLIT", SPLIT)],
        grid=(columns, parts, 1),
        threadgroup=(min(GROUPS * LANES, columns), 1, 1),
        output_shapes=[(parts, len(h), rows.width)],
        output_dtypes=[mx.float32],
    )
    return y.sum(axis=0).astype(rows.result_type(h))


def _names(packed: bool) -> tuple[str, ...]:
    return ("weight", "scales", "biases") if packed else ("weight",)


def _inputs(x: mx.array, rows: Rows) -> list[mx.array]:
    weights = (rows.arrays[name] for name in _names(rows.packing is not None))
    return [x, *weights, rows.ids.astype(mx.uint32)]


def _sizes(x: mx.array, rows: Rows) -> list[tuple[str, int]]:
    sizes = [("TOKENS", len(x)), ("D", rows.width), ("RUN", RUN)]
    if rows.packing is not None:
        sizes.append(("BITS", rows.packing["bits"]))
        sizes.append(("GROUP", rows.packing["group_size"]))
    return sizes


@lru_cache
def _kernel(
    make: Maker, product: str, constants: tuple[str, ...], packed: bool
) -> Kernel:
    """One of the four kernels. MLX compiles it for each set of types and constants."""
    access = (
        "packed_rows<D, RUN, BITS, GROUP>(weight, scales, biases)"
        if packed
        else "float_rows<D, RUN>(weight)"
    )
    body = BODY.format(product=product, constants=", ".join(constants), rows=access)
    return make(
        name=f"flash_{product}_packed" if packed else f"flash_{product}",
        input_names=["x", *_names(packed), "ids"],
        output_names=["out"],
        header=HEADER.read_text(),
        source=CUDA_POSITION + body if make is mx.fast.cuda_kernel else body,
    )
