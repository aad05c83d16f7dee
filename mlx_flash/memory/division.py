"""How slots give way to what is needed at the moment.

A long prompt is read in chunks, and every chunk has every unit read that memory does
not hold; so a longer chunk is worth some slots. A conversation that outgrows the
reserve for its KV cache takes them, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .budget import Budget, all_slots
from .divide import Divide
from .footprint import MAX_PREFILL, Footprint

KV_AHEAD = 256  # tokens


@dataclass(frozen=True)
class Division:
    """Slots of each layer beside chunks of so many tokens and so much KV cache.

    `beside_slots` are those of what `memory.beside` is about.
    """

    slots: tuple[int, ...]
    tokens: int
    kv_bytes: int
    beside_slots: tuple[int, ...] = ()

    @property
    def all_slots(self) -> tuple[int, ...]:
        return self.slots + self.beside_slots


def as_divided(footprint: Footprint, budget: Budget) -> Footprint:
    """What a model needs that has just the slots and the context of a budget."""
    units = [layer.units for layer in footprint.manifest.layers]
    share = max(n / m for n, m in zip(budget.slots, units, strict=True))
    return replace(footprint, context=budget.context, share=share)


@dataclass(frozen=True)
class Divider:
    """Divides the memory of a budget anew for every need.

    Attributes:
        budget: How it is divided as a rule. No layer gets more slots than it has there.
        footprint: From `as_divided`.
        divide: As `budget.make_budget` takes it.
    """

    budget: Budget
    footprint: Footprint
    divide: Divide | None = None

    def best(self, tokens: int, kv_bytes: int) -> Division | None:
        """The division with which a prompt of so many tokens reads the fewest bytes.

        Args:
            tokens: Of one call of the model, all sequences together.
            kv_bytes: Of all KV caches that there will be.

        Returns:
            None if the least slots do not fit beside so much KV cache.
        """
        usual, reserve = self.budget.prefill_tokens, self.budget.kv_bytes
        # Some more than is needed now, so that not every step has slots give way.
        ahead = int(KV_AHEAD * self.footprint.shapes.kv_bytes_per_token)
        for kv in (kv_bytes + ahead, kv_bytes) if kv_bytes > reserve else (reserve,):
            chunks = -(-tokens // usual)
            sizes = [
                max(-(-tokens // count), usual)
                for count in range(-(-tokens // MAX_PREFILL), chunks + 1)
            ]
            possible = [x for size in sizes if (x := self._divided(size, kv, tokens))]
            if possible:
                return min(possible, key=lambda x: self._bytes_read(tokens, x))
        return None

    def _bytes_read(self, tokens: int, division: Division) -> int:
        """What a prompt has read, and once more what slots lose by it."""
        ffn_bytes = self.footprint.manifest.ffn_bytes
        missing = ffn_bytes - self._bytes(division.slots)
        usual = ffn_bytes - self._bytes(self.budget.slots)
        return -(-tokens // division.tokens) * missing + max(missing - usual, 0)

    def _divided(self, tokens: int, kv_bytes: int, of: int) -> Division | None:
        """The division for chunks of so many tokens `of` a call."""
        budget, footprint = self.budget, self.footprint
        waiting = of if of > tokens else 0
        workspace = footprint.workspace_bytes(tokens, budget.batch_tokens, waiting)
        workspace += footprint.growth_bytes(kv_bytes - footprint.kv_bytes)
        fixed = footprint.fixed_bytes - footprint.kv_bytes + kv_bytes
        room = budget.total_bytes - fixed - workspace
        found = all_slots(room, footprint, self.divide)
        if found is None:
            return None
        pairs = zip(found, (budget.slots, budget.beside_slots), strict=True)
        slots, beside = (_fewer(*pair) for pair in pairs)
        return Division(slots, tokens, kv_bytes, beside)

    def _bytes(self, slots: Sequence[int]) -> int:
        layers = self.footprint.manifest.layers
        return sum(n * x.unit_bytes for n, x in zip(slots, layers, strict=True))


def _fewer(slots: Sequence[int], usual: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(pair) for pair in zip(slots, usual, strict=True))
