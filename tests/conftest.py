"""Small checkpoints and flash folders that several test modules share."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from mlx_lm.utils import load_model as mlx_load_model
from opt_checkpoints import make_checkpoint

from mlx_flash.converters.bundles import write_bundles
from mlx_flash.converters.convert import convert
from mlx_flash.layers.neuron import NeuronFFN
from mlx_flash.layers.projections import neuron_rows
from mlx_flash.memory import page_cache, whole
from mlx_flash.memory.fence import Fence
from mlx_flash.memory.policies import Lru
from mlx_flash.memory.slots import UnitSlots
from mlx_flash.memory.stats import Stats
from mlx_flash.models.registry import get_model_classes
from mlx_flash.storage.extents import bundle_extent
from mlx_flash.storage.reader import open_reader

pytest_plugins = ["conversions", "fake_hub"]

# A busy machine is no mistake of the code under test.
settings.register_profile(
    "mlx-flash", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("mlx-flash")


@pytest.fixture(autouse=True)
def no_memory_is_free(monkeypatch):
    """Reads go around the page cache unless a test asks for it, on every machine."""
    stand_in = SimpleNamespace(available_bytes=lambda: 0)
    monkeypatch.setattr(page_cache, "pressure", stand_in)


@pytest.fixture(autouse=True)
def no_figures_of_this_machine(monkeypatch):
    """Slots are divided alike on every machine, whatever `probe` stored on it."""
    monkeypatch.setattr(whole, "measured_here", lambda device: None)


@pytest.fixture(autouse=True)
def no_models_of_this_user(monkeypatch, tmp_path_factory):
    """Conversions by name go to a folder of the test's own."""
    home = tmp_path_factory.getbasetemp() / "home"
    shutil.rmtree(home, ignore_errors=True)
    monkeypatch.setenv("MLX_FLASH_HOME", str(home))


GOLDENS = Path(__file__).parent / "goldens" / "opt"
SIZES = {"vocab_size": 97, "ffn_dim": 96}


def write_checkpoint(folder, dtype="float32", seed=0, **changes):
    """A small OPT as the hub has it, without a tokenizer."""
    config = {**SIZES, **changes}
    return make_checkpoint(folder, dtype, seed=seed, tokenizer=False, **config)


def save_tokenizer(folder):
    """One word per token: `w3` is token 3, and `</s>` is token 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<pad>": 1, "</s>": 2}
    vocab |= {f"w{i}": i for i in range(3, 97)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def load_resident(checkpoint):
    """The same checkpoint as an ordinary model, all in memory."""
    return mlx_load_model(checkpoint, get_model_classes=get_model_classes)[0]


def relative_diff(actual, expected):
    """Largest difference by largest expected value, reckoned in float32."""
    actual, expected = actual.astype(mx.float32), expected.astype(mx.float32)
    assert actual.shape == expected.shape
    return (mx.abs(actual - expected).max() / mx.abs(expected).max()).item()


class Says(nn.Module):
    """A predictor made by hand: `choose(x)` gives bool [T, N]."""

    def __init__(self, choose):
        super().__init__()
        self._choose = choose

    def __call__(self, x):
        return self._choose(x)


class FFN(nn.Module):
    """A plain FFN, as OPT has it."""

    def __init__(self, dims, neurons, bias=True):
        super().__init__()
        self.fc1 = nn.Linear(dims, neurons, bias=bias)
        self.fc2 = nn.Linear(neurons, dims, bias=bias)

    def __call__(self, x):
        return self.fc2(nn.relu(self.fc1(x)))


class Bench:
    """One FFN on flash without a model around it, and what it should compute."""

    UNITS, DIMS = 24, 16

    def __init__(self, folder, dtype="float32"):
        rng = np.random.default_rng(7)
        kind = getattr(mx, dtype)

        def draw(*shape):
            return mx.array(rng.normal(0, 0.5, shape).astype(np.float32)).astype(kind)

        self.up, self.down = draw(self.UNITS, self.DIMS), draw(self.DIMS, self.UNITS)
        self.up_bias, self.down_bias = draw(self.UNITS), draw(self.DIMS)
        self.folder, self.dtype = folder, kind
        self.path = folder / "layer.safetensors"
        parts = {f"{k}.weight": w for k, w in neuron_rows(self.module()).items()}
        self.layer = write_bundles(self.path, "mlp", parts)
        self._readers = []
        self.root = folder.parent  # a layer's file is named with its folder

    def module(self, bias=True):
        """The FFN as it would be without flash."""
        ffn = FFN(self.DIMS, self.UNITS, bias)
        ffn.fc1.weight, ffn.fc2.weight = self.up, self.down
        if bias:
            ffn.fc1.bias, ffn.fc2.bias = self.up_bias, self.down_bias
        return ffn

    def store(self, n_slots, policy=None, native=None, reader=None, apart=0.0):
        if reader is None:
            reader = open_reader(4, direct=False, native=native)
            self._readers.append(reader)
        policy = policy or Lru()
        extents = [bundle_extent(self.layer, self.root)]
        args = self.layer, extents, n_slots, policy, reader, Fence(), Stats()
        return UnitSlots(*args, apart=apart)

    def ffn(self, n_slots, choose=None, bias=True, **options):
        ffn = NeuronFFN(self.module(bias), choose and Says(choose))
        ffn.attach(self.store(n_slots, **options))
        if ffn.slots.n_slots == ffn.slots.units:
            ffn.slots.read_all()
        return ffn

    def inputs(self, *shape, seed=0):
        rng = np.random.default_rng(seed)
        return mx.array(rng.normal(0, 1, (*shape, self.DIMS)).astype(np.float32))

    def expected(self, x, chosen=None, bias=True):
        """The slow truth in float64; `chosen` is bool [..., N]."""

        def wide(a):
            return np.array(a.astype(mx.float32)).astype(np.float64)

        h = wide(x) @ wide(self.up).T + (wide(self.up_bias) if bias else 0)
        h = np.maximum(h, 0)
        if chosen is not None:
            h = np.where(np.array(chosen).reshape(h.shape), h, 0)
        return h @ wide(self.down).T + (wide(self.down_bias) if bias else 0)

    def close(self):
        while self._readers:
            self._readers.pop().close()


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "ffn"
    folder.mkdir()
    return Bench(folder)


@pytest.fixture(scope="session")
def golden_checkpoint():
    return GOLDENS / "pre_ln"


@pytest.fixture(scope="session")
def flash_folder(golden_checkpoint, tmp_path_factory):
    """The golden OPT as a flash folder with small predictors. Not to be changed."""
    folder = tmp_path_factory.mktemp("golden") / "flash"
    return convert(
        golden_checkpoint,
        folder,
        rank=8,
        unit="neuron",
        calibration_tokens=256,
        progress=False,
    )


@pytest.fixture
def own_folder(flash_folder, tmp_path):
    """A copy of `flash_folder` that a test may damage."""
    return Path(shutil.copytree(flash_folder, tmp_path / "own"))


@pytest.fixture(scope="session")
def make_flash(tmp_path_factory):
    """make_flash(dtype=…, **config) → (checkpoint, flash folder without predictors)."""
    made = {}

    def make(dtype="float32", **changes):
        key = (dtype, *sorted(changes.items()))
        if key not in made:
            base = tmp_path_factory.mktemp(dtype)
            checkpoint = write_checkpoint(base / "checkpoint", dtype, **changes)
            made[key] = (
                checkpoint,
                convert(checkpoint, base / "flash", rank=0, progress=False),
            )
        return made[key]

    return make
