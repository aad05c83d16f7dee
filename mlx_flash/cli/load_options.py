"""How a model is loaded: what `generate` and `chat` ask beside name and memory."""

from dataclasses import dataclass
from typing import Any

import click

from .common import (
    check_option,
    elastic_option,
    page_cache_option,
    shares_option,
    skip_option,
)
from .gathered import gathered

WINDOW = 4  # tokens, the paper's number


@dataclass(frozen=True)
class LoadingOptions:
    """The options, some of them under another name than `LoadOptions` has."""

    policy: str | None
    window: int | None
    trace: str | None
    no_predictor: bool
    skip: float | None
    look_ahead: bool | None
    draft_model: str | None
    adapter_path: str | None
    page_cache: str
    elastic: bool | None
    check: str
    shares: str | None
    trust_remote_code: bool

    def arguments(self) -> dict[str, Any]:
        """Keywords for `load_model`.

        Raises:
            click.UsageError: If options exclude each other.
        """
        if self.window and self.policy in ("lru", "lrfu"):
            raise click.UsageError("--window goes with --policy window.")
        return {
            "predictor": not self.no_predictor,
            "skip": self.skip,
            "policy": self.policy or ("window" if self.window else "auto"),
            "window": self.window or WINDOW,
            "trace": self.trace,
            "look_ahead": self.look_ahead,
            "draft_model": self.draft_model,
            "adapter_path": self.adapter_path,
            "page_cache": self.page_cache,
            "elastic": self.elastic,
            "check": self.check,
            "shares": self.shares,
        }


loading_options = gathered(
    "loading",
    LoadingOptions,
    [
        click.option(
            "--policy",
            type=click.Choice(["lru", "lrfu", "window"]),
            help="What stays in memory: what was used last, what was used often and "
            "lately, or a window.  [default: lrfu, with what mlx-flash learn taught; "
            "lru for blocks]",
        ),
        click.option(
            "--window",
            type=click.IntRange(1),
            metavar="K",
            help="Keep what the last K tokens used; implies --policy window.",
        ),
        click.option(
            "--trace",
            type=click.Path(),
            metavar="FILE.npz",
            help="Divide memory over layers by a recorded run.  [default: evenly, or "
            "whole layers where that saves waiting]",
        ),
        click.option(
            "--no-predictor", is_flag=True, help="Compute every neuron: exact, slow."
        ),
        skip_option,
        click.option(
            "--look-ahead/--no-look-ahead",
            default=None,
            help="Read early what the next layer will need.  [default: where mlx-flash "
            "learn taught what that is, and it pays]",
        ),
        click.option(
            "--draft-model",
            metavar="NAME",
            help="A small checkpoint, by folder or hub name, that drafts. It stays in "
            "memory and counts in --memory.",
        ),
        click.option(
            "--adapter-path",
            type=click.Path(file_okay=False),
            metavar="FOLDER",
            help="An adapter that mlx_lm.lora trained. It stays in memory and counts "
            "in --memory.",
        ),
        page_cache_option,
        elastic_option,
        check_option,
        shares_option,
        click.option(
            "--trust-remote-code",
            is_flag=True,
            help="Run the code that the folder's tokenizer brings, if it brings any.",
        ),
    ],
)
