"""Each rank finds the model that lies in its own folder."""

import os
import sys

import mlx_flash

os.chdir(os.path.join(sys.argv[1], f"rank-{os.environ['MLX_RANK']}"))
try:
    with mlx_flash.load("model", memory="20MB", context=64):
        print("all is well")
except mlx_flash.FlashError as error:
    sys.exit(f"Error: {error}")
