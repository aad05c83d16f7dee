"""A long generation: prints the process of each rank, then a dot for each token."""

import os
import sys

import mlx.core as mx

import mlx_flash

print(f"\nrank {os.environ['MLX_RANK']} is {os.getpid()}", flush=True)


def never_the_end(logprobs: mx.array) -> mx.array:
    return mx.full(logprobs.shape[:1], 5)


with mlx_flash.load(sys.argv[1], memory="20MB", context=8000) as (model, tokenizer):
    steps = mlx_flash.stream_generate(
        model, tokenizer, "w3 w4 w5", -1, sampler=never_the_end
    )
    for _ in steps:
        print(".", end="", flush=True)
print("ended by itself")
