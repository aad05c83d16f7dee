"""What a model is made of, found from its configuration alone.

From a flash folder, a checkpoint's folder, or a repository on the hub of which no
weights have come: the model is built without weights, and lazy arrays have sizes.
"""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..assembly import empty_model, shapes_of
from ..checkpoints import weight_format
from ..checkpoints.config import make_model, read_config
from ..checkpoints.hub import (
    find_config,
    has_weights,
    remote_tensors,
    weight_sizes,
)
from ..checkpoints.in_place import runs_in_place
from ..checkpoints.tables import with_tables
from ..checkpoints.units import find_units
from ..layers.kinds import EXPERT, NEURON
from ..layers.lookup import large_tables, table_arrays
from ..layers.predictor import Predictor, default_rank, possible_bits
from ..layers.projections import count_neurons, known_projections
from ..memory.footprint import Shapes
from ..models.registry import get_model_classes
from ..storage.manifest import MANIFEST, Manifest
from ..storage.manifest_reading import parse_manifest


@dataclass(frozen=True)
class Outline:
    """A model before any weight of it is read.

    Attributes:
        kind: "flash folder" or "checkpoint".
        model, config, manifest, shapes: As after loading; the manifest of a checkpoint
            is made up, with the units that `convert` would write.
        download_bytes: Of weights that are still on the hub.
        disk_bytes: What it takes on disk besides the download, to be run.
        in_place: Whether experts are read where the checkpoint has them.
        share: Of each layer's units, in the manifest: on one of several machines.
    """

    kind: str
    model: nn.Module
    config: dict
    manifest: Manifest
    shapes: Shapes
    download_bytes: int
    disk_bytes: int = 0
    in_place: bool = False
    share: float = 1.0


def outline(name: str | Path, revision: str | None = None) -> Outline:
    """Find out what `name`, a folder or a hub name, is made of."""
    folder = find_config(name, revision)
    remote = folder.parent.name == "snapshots" and not Path(name).is_dir()
    sizes = weight_sizes(str(name), folder.name) if remote else {}
    config = read_config(folder)
    if (folder / MANIFEST).exists():
        manifest = parse_manifest(folder)
        # Some models keep what they compute in their first run: these are thrown away.
        shapes = shapes_of(
            empty_model(manifest, config, folder),
            config,
            [entry.module for entry in manifest.layers + manifest.blocks],
        )
        model = empty_model(manifest, config, folder)
        download_bytes = sum(sizes.values())
        return Outline("flash folder", model, config, manifest, shapes, download_bytes)
    return _of_checkpoint(str(name), folder, config, sizes)


def _of_checkpoint(
    name: str, folder: Path, config: dict, remote_sizes: dict[str, int]
) -> Outline:
    """Outline a checkpoint, whose weight files on the hub are `remote_sizes` long."""
    packing = weight_format.quantization(config, name)
    names = weight_format.indexed_names(folder)
    if not names and not remote_sizes:
        names = set(_header_tensors(folder))
    dtype = _dtype(name, folder, config, remote_sizes)

    def build() -> nn.Module:
        model = make_model(*get_model_classes(config), config, folder)
        if packing:
            weight_format.quantize(model, packing, names)
        model.set_dtype(getattr(mx, dtype))
        return model

    model = build()
    kind, modules, _ = find_units(model, config, name)
    layers = tuple(
        weight_format.layer_of(path, kind.split(module))
        for path, module in modules.items()
    )
    predictor_bytes = 0
    if kind is NEURON:
        predictor_bytes = _predictor_bytes(list(modules.values()), dtype)
    manifest = weight_format.manifest_of(
        name, model, config["model_type"], kind, dtype, layers, predictor_bytes
    )
    tables = large_tables(build()).items()
    manifest = with_tables(
        manifest,
        [weight_format.layer_of(path, table_arrays(table)) for path, table in tables],
    )
    # Of what is on the hub, only loading it will tell how it holds its experts.
    here = has_weights(folder)
    in_place = kind is EXPERT and (not here or runs_in_place(folder))
    return Outline(
        kind="checkpoint",
        model=model,
        config=config,
        manifest=manifest,
        shapes=shapes_of(build(), config, modules),
        download_bytes=sum(remote_sizes.values()),
        disk_bytes=0 if in_place else manifest.model_bytes + manifest.predictor_bytes,
        in_place=in_place,
    )


def _dtype(name: str, folder: Path, config: dict, remote_sizes: dict[str, int]) -> str:
    """What most weights are stored in: as config.json says, else as headers do."""
    if dtype := weight_format.named_dtype(config):
        return dtype
    # Of a repository, one shard's header is enough to know the dtype.
    shards = [file for file in remote_sizes if file.endswith(".safetensors")][:1]
    if remote_sizes:
        found = [remote_tensors(name, shard, folder.name) for shard in shards]
    else:
        found = [_header_tensors(folder)]
    sizes = [size for tensors in found for size in tensors.values()]
    return weight_format.main_dtype(sizes, folder / "config.json")


def _header_tensors(folder: Path) -> weight_format.Tensors:
    return weight_format.header_tensors(sorted(folder.glob("model*.safetensors")))


def _predictor_bytes(ffns: list[nn.Module], dtype: str) -> int:
    """Of the predictors that `convert` gives layers of neurons by default."""
    total = 0
    for index, ffn in enumerate(ffns):
        out = ffn[known_projections(ffn)[1]]
        neurons, dims = count_neurons(out), len(out.weight)
        rank = default_rank(index, len(ffns), dims)
        predictor = Predictor(dims, neurons, rank, possible_bits(dims, rank))
        predictor.set_dtype(getattr(mx, dtype))
        total += weight_format.weight_bytes(predictor)
    return total
