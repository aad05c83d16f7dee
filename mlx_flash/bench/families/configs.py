"""Tiny configurations of every family that `check.py` compares, from configs.json.

Two layers of width 64 and 96 token ids, whatever else a family's config.json needs.
"""

import json
from pathlib import Path

_TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
EXPERTS: dict[str, dict] = _TABLE["experts"]
DENSE: dict[str, dict] = _TABLE["dense"]


def make_config(family: str) -> dict:
    """The family's config.json."""
    changes = dict((EXPERTS | DENSE)[family])
    # A dense FFN is as wide as several blocks, also when it is quantised.
    width = 256 if family in DENSE else 64
    sizes = _TABLE["sizes"] | {"intermediate_size": width}
    config = sizes | {"model_type": family}
    if "text" in changes:
        name = _TABLE["text_types"].get(family, f"{family}_text")
        config["text_config"] = sizes | {"model_type": name} | changes.pop("text")
    return config | changes
