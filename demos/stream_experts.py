"""Stream a mixture of experts from its own shards, without converting it.

    python demos/stream_experts.py mlx-community/Qwen3-30B-A3B-4bit --memory 8GB

A token needs a few experts of each layer, which the router names. Those that are not in
memory are read from the checkpoint's files where they lie. Twice the same prompt shows
what the first run left in memory for the second.
"""

import argparse

import mlx_flash


def main() -> None:
    parser = argparse.ArgumentParser(description="Stream a mixture of experts.")
    parser.add_argument("model", help="folder, or a name on the Hugging Face hub")
    parser.add_argument("prompt", nargs="?", default="Three uses for old slate:")
    parser.add_argument("--memory", default="auto", help="8GB, 50%% or auto")
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()

    with mlx_flash.load(args.model, memory=args.memory, context=args.tokens + 64) as (
        model,
        tokenizer,
    ):
        flash = model.flash
        layers = zip(flash.budget.slots, flash.manifest.layers, strict=True)
        slots, units = zip(*((n, layer.units) for n, layer in layers), strict=True)
        print(
            f"{sum(slots):,} of {sum(units):,} {flash.manifest.unit}s fit in "
            f"{flash.budget.total_bytes / 1e9:.3f} GB."
        )
        for turn in ("first", "second"):
            before = flash.stats.copy()
            text = mlx_flash.generate(
                model, tokenizer, args.prompt, max_tokens=args.tokens
            )
            spent = flash.stats - before
            print(f"{turn} run: {spent.hit_rate or 0:.0%} found in memory", end=", ")
            print(f"{spent.bytes_read / 1e6:,.1f} MB read")
        print(args.prompt + text)


if __name__ == "__main__":
    main()
