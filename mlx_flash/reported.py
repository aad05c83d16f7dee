"""What a run report is made from."""

from __future__ import annotations

from typing import Protocol

from .memory.budget import Budget
from .run import Run
from .storage.manifest import Manifest


class Reported(Protocol):
    """What a report is made from: `flash.Flash` is one."""

    manifest: Manifest
    layers: list
    run: Run | None
    cached_share: float | None
    skip: float

    @property
    def budget(self) -> Budget: ...

    @property
    def draft_bytes(self) -> int: ...

    @property
    def direct_io(self) -> bool: ...

    @property
    def resized(self) -> list[tuple[float, int]]: ...

    @property
    def refused(self) -> list[tuple[float, int, int]]: ...

    @property
    def lossy(self) -> str | None: ...
