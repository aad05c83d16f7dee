"""The C reader is optional: without a compiler the Python pool does its work."""

from setuptools import Extension, setup

SOURCES = ("_reader", "_read_plan", "_reads")

setup(
    ext_modules=[
        Extension(
            "mlx_flash.storage._reader",
            [f"mlx_flash/storage/{name}.c" for name in SOURCES],
            py_limited_api=True,
            depends=["mlx_flash/storage/_reads.h"],
            optional=True,
            extra_compile_args=["-O2", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
