"""The part of every layer's units that one of several machines keeps on its disk."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FlashError
from ..machines.division import model_digest
from ..machines.shares import owned, parse_shares, refuse_too_few
from ..storage.manifest import Layer, StoredShare, Weights
from .bundles import Bundles


@dataclass(frozen=True)
class Portion:
    """Part number `part`, from 0 on, of units that are shared out as `shares` say."""

    shares: tuple[int, ...]
    part: int

    @property
    def fraction(self) -> float:
        """Of all units."""
        return self.shares[self.part] / sum(self.shares)

    def owned(self, module: str, bundles: Bundles) -> np.ndarray:
        """The units of a layer that belong to it: int array, sorted.

        Raises:
            FlashError: If it or another part would have none.
        """
        units, unit_bytes = bundles.units, bundles.unit_bytes
        refuse_too_few(f"{module} has {units} units", units, unit_bytes, self.shares)
        return owned(units, unit_bytes, self.shares, self.part)

    def stored(
        self,
        folder: Path,
        resident: Weights,
        whole: Sequence[Layer],
        beside: Sequence[Layer],
    ) -> StoredShare:
        """What the manifest says of it.

        Args:
            folder: One with the model's config.json.
            resident: The weights that stay in memory.
            whole: The layers of the whole model.
            beside: What is on flash beside them, and whole in every part.
        """
        return StoredShare(
            self.shares,
            self.part,
            tuple(layer.units for layer in whole),
            model_digest(folder, resident.sha256, (*whole, *beside)),
        )


def parse_portion(share: str, shares: str | None) -> Portion:
    """A part as "1/2" has it, of parts that are alike or as `shares` ("2:1") say.

    Raises:
        FlashError: If there is no such part.
    """
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", share, re.ASCII)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts or parts < 2:
        raise FlashError(
            f"{share!r} is no part of several. Give 1/2 for the first of two."
        )
    return Portion(shares_of(parts, shares), part - 1)


def shares_of(parts: int, shares: str | None) -> tuple[int, ...]:
    """The shares of so many machines: as "2:1" says, or all the same."""
    return parse_shares(shares, parts) if shares else (1,) * parts
