"""The arrays of a module, or of any tree of lists and dictionaries, by their paths."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def parameters(module: nn.Module) -> dict[str, mx.array]:
    """A module's parameters by path, "mlp.up_proj.weight" for example."""
    return arrays_of(module.parameters())


def arrays_of(tree: Any) -> dict[str, mx.array]:
    """The arrays in a tree by path; whatever else is in it is left out."""
    found: dict[str, Any] = {}
    tree_flatten(tree, destination=found)
    return {path: a for path, a in found.items() if isinstance(a, mx.array)}
