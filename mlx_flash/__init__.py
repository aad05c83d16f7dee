"""Run language models larger than the machine's memory, on MLX and mlx-lm.

`load` a folder that `convert` wrote and use the model with mlx-lm's own functions, or
with `generate` and `stream_generate` from here, which also measure what a run costs.
"""

import importlib
from typing import TYPE_CHECKING

from ._version import __version__
from .demo_models import DEMO_MODEL, DEMO_MOE
from .errors import FlashError, NotEnoughMemory
from .storage.open_files import check_limit

if TYPE_CHECKING:  # what editors and type checkers see of the names below
    from .conversation import Conversation
    from .converters.convert import convert
    from .generation import generate, stream_generate
    from .library.by_name import load, load_model
    from .load_options import LoadOptions

# Imported on first use, so that the command line answers --help without loading mlx.
# No module is called like one of these names: it would hide the function.
_LAZY = {
    "load": "library.by_name",
    "load_model": "library.by_name",
    "LoadOptions": "load_options",
    "generate": "generation",
    "stream_generate": "generation",
    "Conversation": "conversation",
    "convert": "converters.convert",
}

__all__ = [
    "DEMO_MODEL",
    "DEMO_MOE",
    "Conversation",
    "FlashError",
    "LoadOptions",
    "NotEnoughMemory",
    "__version__",
    "convert",
    "generate",
    "load",
    "load_model",
    "stream_generate",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    if name in _LAZY:
        try:
            module = importlib.import_module(f".{_LAZY[name]}", __name__)
        except ValueError:
            check_limit()  # which says in one line what mlx-lm failed at
            raise
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
