"""One model over several machines: each reads and holds a share of every layer's units.

`mlx.launch` starts the same command on all of them, and MLX's distributed engine adds
up what they compute. Rank 0 leads: it runs the command. The others follow it call by
call, with the same tokens and KV caches.
"""

import os

# What mlx.launch sets for its backends, and what MPI's launchers set.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return any(name in os.environ for name in LAUNCHED)
