"""How many files this process may have open: macOS allows 256 unless it is asked."""

import contextlib
import os
import resource

from ..errors import FlashError

MLX_LM_FILES = 4096  # the hard limit that mlx-lm sets when it is imported
OPEN_MAX = 10240  # more than this macOS refuses as a soft limit
SPARE = 64  # for sockets, pipes and what libraries open


def allow_open_files(files: int) -> None:
    """Raise the soft limit to the hard one where so many more files need it.

    Raises:
        FlashError: If the hard limit is too low as well.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = len(os.listdir("/dev/fd")) + files + SPARE
    if soft == resource.RLIM_INFINITY or soft >= need:
        return
    most = OPEN_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_MAX)
    if most > soft:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    if soft < need:
        raise FlashError(
            f"This process may have {soft:,} files open, and the model has {files:,}. "
            f"Allow them, if need be in a new shell: ulimit -n {need}"
        )


def check_limit() -> None:
    """Say why mlx-lm cannot be imported, if that is the limit's fault.

    It sets a limit of its own, and its import ends in a ValueError where the system
    does not let it.

    Raises:
        FlashError: If the hard limit is too low for mlx-lm.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < MLX_LM_FILES:
        raise FlashError(
            f"This process may have {hard:,} files open, and mlx-lm wants "
            f"{MLX_LM_FILES:,}. Allow them, if need be in a new shell: ulimit -n "
            f"{MLX_LM_FILES}"
        )
