"""Rotary embeddings as transformers 5 writes them, for models that know older names.

transformers 5 puts all of them in one object, `rope_parameters`, with no `rope_theta`
beside it. A model of mlx-lm that does not know the object would take its default base
instead, and answer nonsense.
"""

import importlib
import sys
from dataclasses import is_dataclass
from typing import Any

from ..errors import FlashError

NEW = "rope_parameters"
# By each of these names some model knows the base, the rotated share of a head, and the
# base in layers with a sliding window.
THETA = ("rope_theta", "rotary_emb_base", "rope_embedding_base")
PARTIAL = ("partial_rotary_factor", "rotary_pct")
LOCAL_THETA = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
GLOBAL, LOCAL = "full_attention", "sliding_attention"


def with_older_names(config: dict, args_class: type) -> dict:
    """`config` with the names that `args_class` knows; the same if it lacks nothing.

    Args:
        config: As config.json has it.
        args_class: mlx-lm's, or ours, of this model type.

    Raises:
        FlashError: If layers differ in a way that the model has no names for.
    """
    module = sys.modules[args_class.__module__]
    filled = _filled(config, _fields(args_class), config.get("model_type"))
    for key, part in config.items():
        if isinstance(part, dict) and isinstance(part.get(NEW), dict):
            known = _fields_in(module) | _fields_in(_module(part.get("model_type")))
            filled = filled | {key: _filled(part, known, part.get("model_type"))}
    return filled


def reading_older_names(args_class: type[Any]) -> type[Any]:
    """The same class, with a `from_dict` that takes configs of transformers 5, too."""

    class Args(args_class):
        @classmethod
        def from_dict(cls, params):
            return super().from_dict(with_older_names(params, args_class))

    Args.__name__, Args.__qualname__ = args_class.__name__, args_class.__qualname__
    Args.__module__ = args_class.__module__
    return Args


def _filled(config: dict, known: set[str], model_type: Any) -> dict:
    """One level of a config; `known` are the names that the model may have."""
    new = config.get(NEW)
    if not isinstance(new, dict) or not new or NEW in known:
        return config
    local = None
    if any(isinstance(value, dict) for value in new.values()):
        layers = {k: v for k, v in new.items() if isinstance(v, dict)}
        local = layers.get(LOCAL)
        new = layers.get(GLOBAL) or next(iter(layers.values()))
        if unknown := layers.keys() - {GLOBAL, LOCAL}:
            _refuse_unlike(new, [layers[key] for key in unknown], model_type)
    found = _older(new, known)
    if local is not None:
        found |= _of_local_layers(local, new, known, model_type)
    return config | found


def _older(new: dict, known: set[str]) -> dict:
    found: dict[str, Any] = {}
    if (theta := new.get("rope_theta")) is not None:
        found |= dict.fromkeys(known.intersection(THETA), theta)
    if (partial := new.get("partial_rotary_factor")) is not None:
        found |= dict.fromkeys(known.intersection(PARTIAL), partial)
    kind = new.get("rope_type") or new.get("type") or "default"
    if kind != "default" and "rope_scaling" in known:
        rest = {k: v for k, v in new.items() if k not in ("rope_theta", PARTIAL[0])}
        found["rope_scaling"] = rest | {"type": kind, "rope_type": kind}
    return found


def _of_local_layers(local: dict, new: dict, known: set[str], model_type: Any) -> dict:
    theta = local.get("rope_theta")
    if theta is None:
        return {}
    if names := known.intersection(LOCAL_THETA):
        return dict.fromkeys(names, theta)
    if theta != new.get("rope_theta", theta):
        _refuse_unlike(new, [local], model_type)
    return {}


def _refuse_unlike(new: dict, others: list[dict], model_type: Any) -> None:
    """Layers that turn otherwise, in a model whose layers all turn alike."""
    if any(other != new for other in others):
        raise FlashError(
            f"config.json gives layers of this {model_type} different rope_parameters, "
            "which the installed mlx-lm does not know for this model type. Update "
            "mlx-lm, or take a version of the model made for it."
        )


def _fields(args_class: type) -> set[str]:
    return set(getattr(args_class, "__dataclass_fields__", ()))


def _fields_in(module: Any) -> set[str]:
    """The names that any of a module's arguments has."""
    classes = (
        [c for c in vars(module).values() if isinstance(c, type)] if module else []
    )
    return {field for c in classes if is_dataclass(c) for field in _fields(c)}


def _module(model_type: Any) -> Any:
    if not isinstance(model_type, str) or not model_type.isidentifier():
        return None
    try:
        return importlib.import_module(f"mlx_lm.models.{model_type}")
    except ImportError:
        return None
