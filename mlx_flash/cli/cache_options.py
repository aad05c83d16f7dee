"""Drafts, chunks and the KV cache: options of `generate` and `chat`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .gathered import gathered

NUM_DRAFT_TOKENS = 3  # mlx-lm's number


@dataclass(frozen=True)
class CacheOptions:
    """The options by mlx-lm's names."""

    draft_ngrams: int | None
    num_draft_tokens: int
    prefill_step_size: int
    max_tokens: int
    kv_bits: str | None
    kv_group_size: str
    quantized_kv_start: int
    max_kv_size: int | None
    prompt_cache: Path | None

    def check(self, draft_model: str | None) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            click.UsageError: If options exclude each other.
            FlashError: If the prompt cache could not be written.
        """
        if self.max_tokens < 1 and self.max_tokens != -1:
            raise click.BadParameter(
                "give at least 1, or -1 for no limit", param_hint="--max-tokens"
            )
        if draft_model and self.draft_ngrams:
            raise click.UsageError("Either --draft-model or --draft-ngrams drafts.")
        if self.max_kv_size and (self.kv_bits or self.prompt_cache):
            raise click.UsageError(
                "--max-kv-size goes with neither --kv-bits nor --prompt-cache."
            )
        if self.prompt_cache:
            from .saved_prompt import check_name

            check_name(self.prompt_cache)

    @property
    def quantised(self) -> dict[str, int]:
        """How the KV cache is quantised, as `stream_generate` takes it; {} if not."""
        if not self.kv_bits:
            return {}
        return {
            "kv_bits": int(self.kv_bits),
            "kv_group_size": int(self.kv_group_size),
            "quantized_kv_start": self.quantized_kv_start,
        }

    def arguments(self) -> dict[str, Any]:
        """Keywords for `stream_generate`, but for the caches themselves."""
        return {
            "max_tokens": self.max_tokens,
            "draft_ngrams": self.draft_ngrams or 0,
            "num_draft_tokens": self.num_draft_tokens,
            "prefill_step_size": self.prefill_step_size,
            **self.quantised,
        }


def cache_options(max_tokens: int) -> Any:
    """The options, with this default of --max-tokens."""
    return gathered(
        "caching",
        CacheOptions,
        [
            click.option(
                "--max-tokens",
                "-m",
                default=max_tokens,
                show_default=True,
                help="New tokens of an answer; -1 is no limit.",
            ),
            click.option(
                "--draft-ngrams",
                type=click.IntRange(1),
                metavar="N",
                help="Draft what followed the last N tokens (or fewer, but not below "
                "2) where they stood before.",
            ),
            click.option(
                "--num-draft-tokens",
                type=click.IntRange(1),
                default=NUM_DRAFT_TOKENS,
                show_default=True,
                help="Tokens of a draft, which the model verifies in one call.",
            ),
            click.option(
                "--prefill-step-size",
                type=click.IntRange(1),
                default=2048,
                show_default=True,
                help="Tokens of a prompt in a call, at most: memory decides further.",
            ),
            click.option(
                "--kv-bits",
                type=click.Choice(["2", "3", "4", "5", "6", "8"]),
                help="Quantise the KV cache.  [default: not]",
            ),
            click.option(
                "--kv-group-size",
                type=click.Choice(["32", "64", "128"]),
                default="64",
                show_default=True,
                help="Values that share a scale in a quantised KV cache.",
            ),
            click.option(
                "--quantized-kv-start",
                type=click.IntRange(0),
                default=5000,
                show_default=True,
                help="With --kv-bits: from this token on.",
            ),
            click.option(
                "--max-kv-size",
                type=click.IntRange(8),
                metavar="TOKENS",
                help="Keep the first 4 and the latest of so many tokens in the KV "
                "cache.",
            ),
            click.option(
                "--prompt-cache",
                type=click.Path(dir_okay=False, path_type=Path),
                metavar="FILE.safetensors",
                help="Begin with the KV cache of this file as far as the prompt is "
                "the same, and write it after the answer.",
            ),
        ],
    )
