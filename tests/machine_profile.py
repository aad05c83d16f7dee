"""A made-up machine for tests of what is modelled."""

from mlx_flash.profile import (
    FlashPoint,
    Profile,
    Rate,
)


def point(block_bytes, threads, bytes_per_s):
    return FlashPoint(block_bytes, threads, bytes_per_s, bytes_per_s / block_bytes)


PROFILE = Profile(
    profile_version=1,
    device="a test",
    os="none",
    source="made up",
    cold=True,
    notes=("of no machine",),
    memory_bytes=8 * 10**9,
    flash=(
        point(4096, 1, 1e8),
        point(65536, 1, 4e8),
        point(4096, 16, 4e8),
        point(65536, 16, 16e8),
    ),
    sequential_bytes_per_s=3.2e9,
    memory_bytes_per_s=1e11,
    rates=(
        Rate("matmul", "float32", 0, 5e10, 1e12),
        Rate("matmul", "float32", 4, 2e10, 5e11),
        Rate("matmul", "float32", 8, 3e10, 5e11),
        Rate("gathered", "float32", 0, 1e10, 2e11),
    ),
    layer_s=1e-4,
    cache_layer_s=1e-5,
    cache_slot_s=1e-8,
    copy_bytes_per_s=0.0,
)
