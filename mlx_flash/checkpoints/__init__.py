"""Models as the hub and mlx-lm have them."""
