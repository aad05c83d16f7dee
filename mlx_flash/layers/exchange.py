"""Put modules over slots in the place of those that a manifest names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import FlashError
from ..storage.layout import dtype_name
from ..storage.manifest import MANIFEST, Layer, Manifest
from .base import FlashFFN, FromFlash
from .kinds import BLOCK, UnitKind, kind_of
from .lookup import TABLES, Lookup, table_arrays


def exchange(
    model: nn.Module, manifest: Manifest, predictor: bool, folder: Path
) -> list[FlashFFN]:
    """Put an FFN over slots in the place of every FFN of the manifest's layers.

    Args:
        predictor: Whether to use the predictors that layers have.
        folder: The model's, for errors.

    Raises:
        FlashError: If the manifest contradicts the model.
    """
    kind = kind_of(manifest)
    layers = [
        _make(kind, model, entry, manifest, predictor, folder)
        for entry in manifest.whole_layers
    ]
    _put(model, manifest.layers, layers)
    return layers


def exchange_beside(
    model: nn.Module, manifest: Manifest, folder: Path
) -> list[FromFlash]:
    """The same for what is on flash beside them: blocks, then tables of embeddings."""
    modules: list[FromFlash] = [
        _make(BLOCK, model, entry, manifest, False, folder) for entry in manifest.blocks
    ]
    for entry in manifest.tables:
        module = _module(model, entry, manifest, folder)
        arrays = table_arrays(module) if type(module) in TABLES else {}
        _check_parts(arrays, entry, "rows", folder)
        modules.append(Lookup(module))
    _put(model, manifest.beside, modules)
    return modules


def _make(
    kind: UnitKind,
    model: nn.Module,
    entry: Layer,
    manifest: Manifest,
    predictor: bool,
    folder: Path,
) -> FlashFFN:
    """The FFN over slots for one entry."""
    module = _module(model, entry, manifest, folder)
    arrays = kind.parts(module, entry.units, getattr(mx, manifest.dtype))
    _check_parts(arrays, entry, f"{kind.name}s", folder, kind.same_dtypes)
    try:
        return kind.make(module, entry, predictor)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        assert entry.predictor is not None  # nothing else can be impossible
        raise FlashError(
            f"{folder / MANIFEST}, {entry.module}: no predictor of rank "
            f"{entry.predictor.rank} and {entry.predictor.bits} bits is possible "
            f"({str(error).splitlines()[0]})."
        ) from error


def _module(
    model: nn.Module, entry: Layer, manifest: Manifest, folder: Path
) -> nn.Module:
    """The module of a model that an entry of its manifest takes the place of."""
    found = dict(model.named_modules())
    if entry.module not in found:
        raise FlashError(
            f"{folder}: the manifest exchanges {entry.module}, which a model of "
            f"type {manifest.model_type!r} does not have. Convert it again."
        )
    return found[entry.module]


def _put(
    model: nn.Module, entries: Sequence[Layer], modules: Sequence[nn.Module]
) -> None:
    names = [entry.module for entry in entries]
    model.update_modules(tree_unflatten(list(zip(names, modules, strict=True))))


def _check_parts(
    arrays: Mapping[str, mx.array],
    entry: Layer,
    units: str,
    folder: Path,
    same_dtypes: bool = False,
) -> None:
    """Hold the parts that a manifest describes against those of a module.

    Args:
        arrays: Of the module, like those parts of all its units; {} if it has none.
        units: What they are, for the message.
        same_dtypes: Whether their dtypes have to agree, too.
    """
    want = {k: (dtype_name(a.dtype), tuple(a.shape)) for k, a in arrays.items()}
    have = {p.name: (p.dtype, (entry.units, *p.shape)) for p in entry.parts}
    if not same_dtypes:
        want = {name: ("", shape) for name, (_, shape) in want.items()}
        have = {name: ("", shape) for name, (_, shape) in have.items()}
    if have != want:
        names = want.keys() | have.keys()
        some = sorted(name for name in names if want.get(name) != have.get(name))
        raise FlashError(
            f"{folder}: bundles of {entry.module} and its config.json disagree about "
            f"its {units} ({some[0]}). Convert the model again."
        )
