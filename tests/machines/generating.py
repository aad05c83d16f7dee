"""A long generation: prints the process of each rank, then a dot for each token."""

import os
import sys

import mlx_flash

print(f"\nrank {os.environ['MLX_RANK']} is {os.getpid()}", flush=True)
with mlx_flash.load(sys.argv[1], memory="20MB", context=8000) as (model, tokenizer):
    for _ in mlx_flash.stream_generate(model, tokenizer, "w3 w4 w5", max_tokens=-1):
        print(".", end="", flush=True)
print("ended by itself")
