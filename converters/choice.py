"""Decide what becomes of a checkpoint's FFNs: neurons, experts or blocks."""

from ..checkpoints.units import activation, find_units
from ..errors import FlashError
from ..layers.kinds import BLOCK, EXPERT, NEURON, UnitKind
from .source import Source


def choose(source: Source, unit: str | None = None) -> tuple[UnitKind, str]:
    """The kind of unit for a checkpoint, and a sentence that says why.

    Args:
        unit: "neuron" or "block" if somebody asked for it.

    Raises:
        FlashError: If nothing of the model can be brought from flash, or not as `unit`.
    """
    name = source.name
    kind, ffns, why_not = find_units(source.make_model(), source.config, name)
    if kind is EXPERT:
        if unit:
            raise FlashError(
                f"{name} is a mixture of experts: each becomes a bundle. Leave out "
                f"--unit {unit}."
            )
        return EXPERT, f"{len(ffns)} layers of experts."
    if unit == NEURON.name and why_not:
        raise FlashError(f"{name} {why_not}. It can become blocks: leave out --unit.")
    if unit == BLOCK.name or why_not:
        reason = f"{name} {why_not}" if why_not else "Blocks were asked for"
        return BLOCK, f"{reason}: its {len(ffns)} FFNs become blocks."
    zeros = f"whose activation ({activation(source.config)}) gives exact zeros"
    return NEURON, f"{len(ffns)} FFNs {zeros}."
