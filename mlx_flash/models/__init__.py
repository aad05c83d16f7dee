"""Models that mlx-lm lacks, in its own style; all others are mlx-lm's."""
