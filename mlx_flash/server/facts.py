"""What the loaded model is, for APIs that describe it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from ..checkpoints.config import read_config


@dataclass(frozen=True)
class Facts:
    """The model in a few figures.

    Attributes:
        family: Its model_type.
        dtype: Of the weights that are not packed, such as "float16".
        bits: Of packed weights; None if none are packed.
        model_bytes: On disk.
        memory_bytes: The budget it began with.
        modified_s: When its config.json was written, in seconds since 1970.
        digest: Of its config.json, in hexadecimal: it tells models apart, no more.
        chat_template: None if it has none, and knows no roles.
        tools, thinking: Whether its tokenizer says how it calls tools, and thinks.
    """

    family: str
    dtype: str
    bits: int | None
    model_bytes: int
    memory_bytes: int
    modified_s: float
    digest: str
    chat_template: str | None
    tools: bool
    thinking: bool


def facts_of(model: nn.Module, tokenizer: Any) -> Facts:
    """Those of what `mlx_flash.load` returned."""
    flash = model.flash
    config = read_config(flash.folder)
    packing = config.get("quantization") or config.get("quantization_config") or {}
    file = flash.folder / "config.json"
    template = tokenizer.chat_template if tokenizer.has_chat_template else None
    return Facts(
        family=config["model_type"],
        dtype=flash.manifest.dtype,
        bits=packing.get("bits"),
        model_bytes=flash.manifest.model_bytes,
        memory_bytes=flash.budget.total_bytes,
        modified_s=file.stat().st_mtime,
        digest=hashlib.sha256(file.read_bytes()).hexdigest(),
        chat_template=template if isinstance(template, str) else None,
        tools=bool(tokenizer.has_tool_calling),
        thinking=bool(tokenizer.has_thinking),
    )
