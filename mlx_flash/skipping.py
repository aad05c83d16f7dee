"""Have a model skip the neurons whose gates say little: faster, and lossy."""

from pathlib import Path

from .assembly import Assembled
from .errors import FlashError
from .layers.gated import GatedFFN
from .storage.skipping import MOST_SKIPPED


def skip_neurons(parts: Assembled, share: float, folder: Path) -> None:
    """Leave out about `share` of the neurons of every layer, for every token.

    Raises:
        FlashError: If that is no share, or if the model has no thresholds.
    """
    if not 0 <= share <= MOST_SKIPPED:
        raise FlashError(
            f"A share of {share:g} cannot be skipped. Give one from 0 to "
            f"{MOST_SKIPPED:g}, such as 0.5."
        )
    skipping = parts.manifest.skipping
    if skipping is None:
        raise FlashError(
            f"{folder} has no thresholds to skip neurons by. Convert its checkpoint "
            "with them (mlx-flash convert --skippable), or leave out --skip."
        )
    for entry, layer in zip(parts.manifest.layers, parts.layers, strict=True):
        assert isinstance(layer, GatedFFN)  # as the manifest was held against its unit
        layer.threshold = skipping.threshold(entry.thresholds, share)
