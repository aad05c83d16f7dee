"""What `mlx-flash serve` was told besides the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START


@dataclass(frozen=True)
class Settings:
    """Options of the server. Names and defaults are those of mlx-lm's.

    Attributes:
        host, port: Where it listens; port 0 takes any that is free.
        allowed_origins: Web pages that may use it; "*" allows all.
        api_key: What requests have to bring; None asks for nothing.
        temperature, top_p, top_k, min_p, max_tokens: Where a request says nothing.
        chat_template: In the place of the tokenizer's own.
        template_options: For the chat template, below those of a request.
        kv_bits, kv_group_size, quantized_kv_start: How KV caches are quantised.
        num_draft_tokens: Of a draft.
        prefill_step_size: Tokens of a prompt that are read at once, at most.
        prompt_cache_size: Conversations whose KV caches are kept, at most.
        prompt_cache_bytes: What these may take besides the budget's own limit.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    allowed_origins: tuple[str, ...] = ()
    api_key: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 512
    chat_template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START
    num_draft_tokens: int = 3
    prefill_step_size: int = 2048
    prompt_cache_size: int | None = None
    prompt_cache_bytes: int | None = None

    @property
    def kv_options(self) -> dict[str, Any]:
        """What decides what is in a KV cache."""
        if self.kv_bits is None:
            return {}
        return {
            "kv_bits": self.kv_bits,
            "kv_group_size": self.kv_group_size,
            "quantized_kv_start": self.quantized_kv_start,
        }
