"""Options of `generate` that concern drafts and the KV cache."""

from collections.abc import Callable
from pathlib import Path

import click

NUM_DRAFT_TOKENS = 3  # mlx-lm's number


def draft_options(command: Callable) -> Callable:
    """--draft-model, --draft-ngrams and --num-draft-tokens."""
    command = click.option(
        "--num-draft-tokens",
        type=click.IntRange(1),
        default=NUM_DRAFT_TOKENS,
        show_default=True,
        help="Tokens of a draft, which the model verifies in one call.",
    )(command)
    command = click.option(
        "--draft-ngrams",
        type=click.IntRange(1),
        metavar="N",
        help="Draft what followed the last N tokens (or fewer, but not below 2) where "
        "they stood before.",
    )(command)
    return click.option(
        "--draft-model",
        metavar="NAME",
        help="A small checkpoint, by folder or hub name, that drafts. It stays in "
        "memory and counts in --memory.",
    )(command)


def kv_options(command: Callable) -> Callable:
    """--kv-bits and its like, by mlx-lm's names, and --prompt-cache."""
    command = click.option(
        "--prompt-cache",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE.safetensors",
        help="Begin with the KV cache of this file as far as the prompt is the same, "
        "and write it after the answer.",
    )(command)
    command = click.option(
        "--max-kv-size",
        type=click.IntRange(8),
        metavar="TOKENS",
        help="Keep the first 4 and the latest of so many tokens in the KV cache.",
    )(command)
    command = click.option(
        "--quantized-kv-start",
        type=click.IntRange(0),
        default=5000,
        show_default=True,
        help="With --kv-bits: from this token on.",
    )(command)
    command = click.option(
        "--kv-group-size",
        type=click.Choice(["32", "64", "128"]),
        default="64",
        show_default=True,
        help="Values that share a scale in a quantised KV cache.",
    )(command)
    return click.option(
        "--kv-bits",
        type=click.Choice(["2", "3", "4", "5", "6", "8"]),
        help="Quantise the KV cache.  [default: not]",
    )(command)
