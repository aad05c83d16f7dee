"""How a model is loaded: the options of `load` and `load_model`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from .memory.policies import Lru


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        predictor: False computes every neuron of every token: exact, and slow.
        skip: The share of the neurons of each layer that a token leaves out, those
            whose gates say least: 0.5. The output is then another one than the model's
            own; `model.flash.lossy` says what was measured of it. None or 0 is exact.
            For folders of `convert --skippable`.
        policy: What stays in memory: "lru", "lrfu" (what was used often and lately),
            "window" (the paper's: what the last tokens used), or an object of such a
            class. "auto" is what suits the unit kind.
        window: Tokens the window policy keeps (the paper: 4).
        context: Tokens for which the budget reserves KV cache (default: 2048 or the
            model's positions, fewer where memory is short).
        overlap: Read what a layer lacks while MLX multiplies what is there.
        look_ahead: Read also what the next layer will probably need, judged by this
            layer's input. None does so where `mlx-flash learn` taught how to judge it
            and tokens come faster with it, which the run finds out.
        page_cache: Let the operating system cache what is read: "on" or True, "off" or
            False, or "auto": where memory beyond the budget can hold enough.
        native: True insists on the C reader, False takes the Python one.
        elastic: Hold less memory while other programs need it, and take it back when
            they do not. None does so where memory is "auto".
        trace: A file of `mlx-flash trace`: layers get slots by the hits that they
            would have had on it. Without, each gets the same share, but for layers
            that are held whole where waiting for the GPU costs more (`memory.whole`).
        check: What is held against the digests that were noted of the model's files:
            "sample" takes configuration, tokenizer and some pieces of each file of
            weights, "full" every byte, "none" nothing.
        draft_model: A checkpoint, by folder or hub name, that is kept in memory and
            drafts tokens for `mlx_flash.stream_generate`. What it takes is taken from
            `memory`.
        adapter_path: A folder with an adapter that `mlx_lm.lora` trained. Its weights
            stay in memory and are taken from `memory`.
        shares: Of the units of each layer, what each of several machines has, such as
            "2:1". None divides them by memory and by what `mlx-flash probe` measured of
            the disks.
        progress: Show how far loading is: True also where there is no terminal, in one
            line; None on a terminal alone.
    """

    predictor: bool = True
    skip: float | None = None
    policy: str | Lru = "auto"
    window: int = 4
    context: int | None = None
    overlap: bool = True
    look_ahead: bool | None = None
    page_cache: bool | str = "auto"
    native: bool | None = None
    elastic: bool | None = None
    trace: str | Path | None = None
    check: str = "sample"
    draft_model: str | Path | None = None
    adapter_path: str | Path | None = None
    shares: str | None = None
    progress: bool | None = None


class LoadKeywords(TypedDict, total=False):
    """The same as keywords, for editors and type checkers: see `LoadOptions`."""

    predictor: bool
    skip: float | None
    policy: str | Lru
    window: int
    context: int | None
    overlap: bool
    look_ahead: bool | None
    page_cache: bool | str
    native: bool | None
    elastic: bool | None
    trace: str | Path | None
    check: str
    draft_model: str | Path | None
    adapter_path: str | Path | None
    shares: str | None
    progress: bool | None
