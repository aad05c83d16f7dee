"""What skipping neurons costs in quality, and what it saves in reads and time.

On a folder of `convert --skippable`: perplexity of a text with every token skipping,
then bytes and time of a token while decoding some of the same text, all models in turn
token by token, beside the same model as blocks.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import mlx.nn as nn

from ..loading import load
from .options import Count, Memory, ModelType, ShareType, Text
from .perplexity import LENGTH, WARM, cut, perplexity
from .report import Column, Report
from .turns import Turns

BLOCKS = "blocks"
COLUMNS = [
    Column("perplexity", "perplexity", 1, 3),
    Column("cost %", "cost", 0.01, 2),
    Column("MB per token", "bytes_per_token", 1e6, 2),
    Column("reads per token", "reads_per_token"),
    Column("hit rate %", "hit_rate", 0.01, 1),
    Column("tokens/s", "tokens_per_s", 1, 1),
    Column("times as fast", "faster"),
]


def run(
    text: Text,
    model: Annotated[Path, ModelType()],
    blocks: Annotated[
        Path | None, ModelType(), "The same model as blocks.  [default: without]"
    ] = None,
    memory: Memory = "50%",
    skip: Annotated[tuple[float, ...], ShareType(), "Repeat it."] = (0.3, 0.5, 0.7),
    tokens: Annotated[Count, "For perplexity."] = 16384,
    decode_tokens: Annotated[Count, "For bytes and time."] = 512,
) -> Report:
    """What MODEL loses on TEXT by skipping shares of its neurons, and what it saves.

    How many times as fast a token is, is said beside the first row: the median of all
    tokens, then the quartiles.
    """
    shares = {"exact": 0.0} | {f"skip {share:.0%}": share for share in skip}
    costs = {}
    for name, share in shares.items():
        with load(model, memory=memory, context=LENGTH, skip=share) as (net, tokenizer):
            pieces = cut(tokenizer, text, tokens)
            costs[name] = perplexity(net, pieces)
    some = pieces[: max(decode_tokens // LENGTH, 1)]
    with ExitStack() as stack:

        def opened(folder: Path, share: float) -> nn.Module:
            loaded = load(folder, memory, context=LENGTH, skip=share)
            return stack.enter_context(loaded)[0]

        models = {BLOCKS: opened(blocks, 0.0)} if blocks else {}
        models |= {name: opened(model, share) for name, share in shares.items()}
        turns = Turns(models, WARM)
        for piece in some.tolist():
            turns.play(piece)
        first = next(iter(models))
        rows = []
        for name in models:
            row = turns.row(name)
            row.more["perplexity"] = costs.get(name)
            if name in costs:
                row.more["cost"] = costs[name] / costs["exact"] - 1
            row.more["faster"] = turns.ratio_text(first, name)
            rows.append(row)
    note = (
        f"Perplexity of {pieces.size:,} tokens of {text.name} in pieces of {LENGTH}, "
        f"every token skipping; bytes and time of {some.size:,} tokens one by one, the "
        f"models in turn; memory {memory} of each."
    )
    facts = {"perplexity_tokens": pieces.size, "perplexity": costs}
    return Report("neurons", rows, COLUMNS, [note], facts)
