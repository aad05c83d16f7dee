"""The small models that come with the package, by the names that stand for them."""

from pathlib import Path

HERE = Path(__file__).parent
DEMO_MODEL = HERE / "demo_model"  # neurons: an OPT
DEMO_MOE = HERE / "demo_moe"  # experts: a Qwen3-MoE
DEMO_MODELS = {"demo": DEMO_MODEL, "demo-moe": DEMO_MOE}


def demo_model(name: str | Path) -> Path | None:
    """The folder that "demo" or "demo-moe" stands for, None of any other name.

    A folder of that name where the program runs comes first, as it does for hub names.
    """
    if isinstance(name, Path) or Path(name).is_dir():
        return None
    return DEMO_MODELS.get(name)


def demo_name(folder: Path) -> str | None:
    """The name of one of these folders, None of any other folder."""
    names = {path: name for name, path in DEMO_MODELS.items()}
    return names.get(folder)
