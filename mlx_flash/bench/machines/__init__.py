"""Several ranks on this machine, beside one: `mlx-flash bench machines`."""
