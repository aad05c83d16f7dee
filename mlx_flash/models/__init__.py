"""Models that mlx-lm lacks, in its own style."""
