"""Divide a model's units over ranks, once all have said what they have."""

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from .._version import __version__
from ..assembly import Assembled
from ..checkpoints.digests import SHARDS
from ..errors import FlashError
from ..layers.part import Share
from ..profile import Profile, measured_here
from ..storage.digests import file_sha256, sample_sha256
from ..storage.manifest import MANIFEST, Layer, StoredShare
from .shares import fair_shares, owned, parse_shares, refuse_too_few

Divide = Callable[[Assembled, "Facts"], Assembled]
BYTES_PER_S = 50e9  # that a machine goes through, where nobody measured it
THREADS = 32  # at which a disk's rate counts, as reads are made


@dataclass(frozen=True)
class Facts:
    """What a rank has, for all to agree on how the model is divided.

    Attributes:
        version: Of mlx-flash.
        model: A digest of what the model is.
        unit: Its unit kind.
        share: The one that the folder holds, None if it holds all.
        memory_bytes: For units.
        on_flash_bytes: Of all units.
        disk_rate: Bytes per second of the reads that it makes, 0 if nobody measured.
        layer_s: What one token takes to be multiplied by a whole layer from memory.
        adapter: A digest of the adapter that is applied, None without one.
        computes_on: Chip and MLX's version: the same ones round alike.
    """

    version: str
    model: str
    unit: str
    share: StoredShare | None
    memory_bytes: int
    on_flash_bytes: int
    disk_rate: float
    layer_s: float
    adapter: str | None = None
    computes_on: str = ""

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict) -> "Facts":
        share = found.pop("share")
        if share is not None:
            lists = {k: tuple(v) for k, v in share.items() if isinstance(v, list)}
            share = StoredShare(**share | lists)
        return cls(share=share, **found)


def facts_of(
    parts: Assembled, folder: Path, memory_bytes: int, adapter: str | None
) -> Facts:
    """What this rank has of a model.

    Args:
        memory_bytes: What it has for units.
        adapter: As `Facts` has it.
    """
    manifest = parts.manifest
    profile = measured_here(mx.default_device().type.name)
    unit_bytes = manifest.layers[0].unit_bytes
    rate = profile.read_bytes_per_s(unit_bytes, THREADS) if profile else 0.0
    return Facts(
        version=__version__,
        model=identity(parts, folder),
        unit=manifest.unit,
        share=manifest.share,
        memory_bytes=max(memory_bytes, 1),
        on_flash_bytes=sum(x.nbytes for x in manifest.whole_layers),
        disk_rate=rate,
        layer_s=_layer_s(parts, profile),
        adapter=adapter,
        computes_on=f"{_chip()}, MLX {version('mlx')}",
    )


def _chip() -> str:
    if mx.default_device() == mx.cpu:
        return platform.processor() or platform.machine()
    return str(mx.device_info().get("device_name", "GPU"))


def _layer_s(parts: Assembled, profile: Profile | None) -> float:
    """Seconds for one token and the layer that takes longest."""
    bytes_per_s = profile.memory_bytes_per_s if profile else BYTES_PER_S
    experts = parts.shapes.experts_per_token
    times = []
    for layer in parts.manifest.whole_layers:
        share = layer.predictor.predicted_share if layer.predictor else None
        asked = parts.kind.asked(layer, experts, share)
        times.append((layer.units if asked is None else asked) * layer.unit_bytes)
    return max(times) / bytes_per_s


def held_by_all(
    ranks: Sequence[Facts], shares: Sequence[int], layers: int, sum_s: float
) -> int:
    """How many layers every rank holds whole, so that they need no sum.

    As many as fit beside the shares of all others, where multiplying what other ranks
    would have multiplied takes less time than adding up.

    Args:
        layers: Of the model.
        sum_s: Seconds of a sum.
    """
    total = sum(shares)
    fitting = [layers]
    for facts, share in zip(ranks, shares, strict=True):
        elsewhere = 1 - share / total
        if facts.share is not None or elsewhere * facts.layer_s >= sum_s:
            return 0
        spare = facts.memory_bytes - facts.on_flash_bytes * share / total
        fitting.append(int(spare / (facts.on_flash_bytes / layers * elsewhere)))
    return max(min(fitting), 0)


def identity(parts: Assembled, folder: Path) -> str:
    """A digest of what a model is, the same for a whole folder and its shares."""
    manifest = parts.manifest
    if manifest.share is not None:
        return manifest.share.model
    if (folder / MANIFEST).exists():
        entries = (*manifest.layers, *manifest.beside)
        return model_digest(folder, manifest.resident.sha256, entries)
    digest = hashlib.sha256(file_sha256(folder / "config.json").encode())
    for path in sorted(folder.glob(SHARDS)):
        digest.update(sample_sha256(path).encode())
    return digest.hexdigest()


def model_digest(folder: Path, resident_sha256: str, layers: Sequence[Layer]) -> str:
    """The digest of a whole flash folder's model.

    Args:
        layers: All of its layers, then what is beside them.
    """
    config = file_sha256(folder / "config.json")
    facts = [config, resident_sha256, *(layer.sha256 for layer in layers)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def agree(
    ranks: Sequence[Facts], names: Sequence[str], shares: str | None
) -> tuple[int, ...]:
    """The share of each rank.

    Args:
        names: Of the ranks, for messages.
        shares: As the user says them, such as "2:1".

    Raises:
        FlashError: If the ranks do not have the same model, or not their parts of it.
    """
    first = ranks[0]
    for facts, name in zip(ranks[1:], names[1:], strict=True):
        if facts.version != first.version:
            raise FlashError(
                f"{names[0]} has mlx-flash {first.version}, {name} has "
                f"{facts.version}. Install the same on all machines."
            )
        if (facts.model, facts.unit) != (first.model, first.unit):
            raise FlashError(
                f"{name} has another model than {names[0]}. Copy the model from one "
                "machine to the others."
            )
        if facts.adapter != first.adapter:
            raise FlashError(
                f"{name} has another adapter than {names[0]}. Copy the adapter from "
                "one machine to the others."
            )
    stored = [facts.share for facts in ranks]
    if any(stored):
        return _stored_shares(stored, names, shares)
    if shares is not None:
        return parse_shares(shares, len(ranks))
    rates = [facts.disk_rate for facts in ranks]
    if not all(rates):
        rates = [1.0] * len(ranks)
    return fair_shares([f.memory_bytes for f in ranks], rates, first.on_flash_bytes)


def _stored_shares(
    stored: Sequence[StoredShare | None], names: Sequence[str], shares: str | None
) -> tuple[int, ...]:
    """The shares that folders were made with: each rank needs its own, or all units."""
    made = next(share.shares for share in stored if share)
    if len(made) != len(stored):
        raise FlashError(
            f"The model was split for {len(made)} machines, and these are "
            f"{len(stored)}. Start as many, or split it again: mlx-flash split"
        )
    if shares is not None and parse_shares(shares, len(stored)) != made:
        raise FlashError(
            f"The model was split {':'.join(map(str, made))}, which --shares {shares} "
            "contradicts. Leave it out, or split the model again: mlx-flash split"
        )
    for rank, (share, name) in enumerate(zip(stored, names, strict=True)):
        if share and (share.part, share.shares) != (rank, made):
            raise FlashError(
                f"{name} has part {share.part + 1} of {len(share.shares)}, and needs "
                f"part {rank + 1} of {len(made)}. Put that part on it, or all of the "
                "model."
            )
    return made


def cut(
    parts: Assembled,
    shares: Sequence[int],
    rank: int,
    add: Callable[[mx.array], mx.array],
    whole: int = 0,
    agree_on: Callable[[mx.array], mx.array] | None = None,
) -> Assembled:
    """The same model with those units alone that a rank has.

    Args:
        add: Adds up an array over all ranks.
        whole: So many layers, the first ones, are not divided.
        agree_on: Makes one rank's choice of experts that of all, where chips differ: at
            a tie two of them could name two experts for one place.

    Raises:
        FlashError: If a rank would have none of a layer, or a folder's part is not
            the one that its manifest says.
    """
    is_part = parts.manifest.share is not None
    layers: list[Layer] = []
    stored: list[np.ndarray | None] = []
    held = parts.manifest.layers
    for layer, ffn in zip(parts.manifest.whole_layers, parts.layers, strict=True):
        if len(layers) < whole:
            layers.append(layer)
            stored.append(None)
            continue
        mine = owned(layer.units, layer.unit_bytes, shares, rank)
        what = f"{layer.module} has {layer.units} {parts.kind.name}s"
        refuse_too_few(what, layer.units, layer.unit_bytes, shares)
        if is_part and held[len(layers)].units != len(mine):
            raise FlashError(
                f"{layer.file} holds {held[len(layers)].units} units, and "
                f"{parts.manifest.share} has {len(mine)}: {MANIFEST} is damaged. Copy "
                "the part again."
            )
        ffn.part = Share(mine, layer.units, add, agree_on)
        layers.append(replace(layer, units=len(mine)))
        stored.append(None if is_part else mine)
    manifest = replace(parts.manifest, layers=tuple(layers))
    return replace(parts, manifest=manifest, stored=stored)
