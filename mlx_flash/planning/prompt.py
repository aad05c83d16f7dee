"""What a prompt costs a run that has just been loaded: cut as a run would cut it.

mlx-lm's loops call a model with 2,048 tokens at a time, but for the last one, which has
a call of its own. Slots give way to the chunks of every call, and are empty at first.
"""

from dataclasses import replace

from ..memory.division import Divider
from ..memory.footprint import KV_STEP, MAX_PREFILL
from ..profile import Profile
from .cost import Cost, prompt_cost, token_cost
from .outline import Outline
from .requirements import Selection, make_work


def first_prompt(
    found: Outline,
    divider: Divider,
    profile: Profile,
    selection: Selection,
    tokens: int,
) -> Cost:
    """The cost of reading a prompt, up to the logits of its first new token.

    Args:
        divider: Of the model's budget.
        selection: By which its last token chooses units.
    """
    budget, shapes = divider.budget, found.shapes
    units = [layer.units for layer in found.manifest.layers]
    # Loading fills the layers that are held whole, and no others.
    held = [n if n == m else 0 for n, m in zip(budget.slots, units, strict=True)]
    total = Cost()
    for start in range(0, tokens - 1, MAX_PREFILL):
        call = min(MAX_PREFILL, tokens - 1 - start)
        grown = -(-(start + call) // KV_STEP) * KV_STEP * shapes.kv_bytes_per_token
        division = divider.best(call, int(shapes.kv_bytes_fixed + grown))
        if division is None:  # the run will say that memory is short
            break
        slots = division.slots
        held = [min(pair) for pair in zip(held, slots, strict=True)]
        now = replace(budget, slots=slots, beside_slots=division.beside_slots)
        work = make_work(found, now, selection, tokens)
        total += prompt_cost(profile, work, call, division.tokens, held)
        held = list(slots)
    # Then slots come back. Layers that are to be held whole are filled at once.
    filled_bytes = 0
    for i, layer in enumerate(found.manifest.layers):
        if budget.slots[i] == layer.units:
            filled_bytes += (layer.units - held[i]) * layer.unit_bytes
            held[i] = layer.units
    io_s = filled_bytes / profile.sequential_bytes_per_s
    total += Cost(io_s=io_s, bytes_read=float(filled_bytes))
    last = make_work(found, replace(budget, slots=tuple(held)), selection, tokens)
    return total + token_cost(profile, last)
