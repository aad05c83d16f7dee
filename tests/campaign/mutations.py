"""Damage to the files of a model's folder, each from a seed."""

import json
import random
from pathlib import Path

VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 64, 2**31 - 1, 2**31, 2**32, 2**53, 2**63,
    10**6, 10**30, -(2**31), 0.5, -0.0, 1e300, float("nan"), float("inf"),
    "", "1", "relu", "\x1b[2J", "\x00", "\ud800", "../x", "/dev/zero",
    [], [1], [[]], [0, 10**18], {}, {"a": 1}, {"__float__": "NaN"},
]  # fmt: skip


def files_of(folder: Path) -> list[Path]:
    """The files that a mutation may change."""
    found = (p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors"))
    return sorted(found)


def mutate(folder: Path, seed: int) -> tuple[Path, bytes, bool]:
    """Damage one file.

    Returns:
        The file, its sound bytes, and whether the damage may alter what the model
        computes without contradicting anything: bytes of weights or a size that no
        weight depends on.
    """
    chance = random.Random(seed)
    path = chance.choice(files_of(folder))
    if chance.random() < 0.3:
        path = folder / "config.json"  # of which each value may build another model
    sound = path.read_bytes()
    start = 0
    if path.suffix == ".safetensors":
        start = 8 + int.from_bytes(sound[:8], "little")
        text, rest = sound[8:start], sound[start:]
    else:
        text, rest = sound, b""
    way = chance.choice(["value"] * 6 + ["drop", "bytes", "cut", "length"])
    if way in ("value", "drop"):
        parsed = json.loads(text)
        _alter(parsed, chance, way == "drop")
        text = json.dumps(parsed).encode()
    elif way == "bytes":
        altered = bytearray(text)
        for _ in range(chance.choice([1, 1, 2, 8])):
            altered[chance.randrange(len(altered))] = chance.randrange(256)
        text = bytes(altered)
    elif way == "cut":
        whole = text + rest
        whole = whole[: chance.randrange(len(whole))]
        text, rest = whole[: len(text)], whole[len(text) :]
    elif start:
        length = chance.choice([0, 1, len(text) - 1, len(text) + 1, 2**32, 2**63])
        path.write_bytes(length.to_bytes(8, "little") + text + rest)
        return path, sound, False
    else:
        text = chance.choice([b"", b"[]", b"null", b"[" * 10**5, b'{"a":' * 10**5])
    prefix = b""
    if start:
        # A cut leaves the length as it was; else the header says its own length.
        length = start - 8 if way == "cut" else len(text)
        prefix = length.to_bytes(8, "little")
    path.write_bytes(prefix + text + rest)
    return path, sound, way in ("value", "drop", "bytes")


def _alter(parsed: dict | list, chance: random.Random, drop: bool) -> None:
    """Exchange or delete one value somewhere in parsed JSON."""
    places = []

    def collect(value):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], dict | list):
                collect(value[key])

    collect(parsed)
    holder, key = chance.choice(places)
    if drop:
        del holder[key]
    elif isinstance(holder[key], int) and chance.random() < 0.4:
        holder[key] += chance.choice([-1, 1, holder[key], 2**40])
    else:
        holder[key] = chance.choice(VALUES)
