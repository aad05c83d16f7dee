"""Reads go through the page cache where memory beyond the budget can hold enough."""

import dataclasses
import json
from types import SimpleNamespace

import mlx.core as mx
import pytest
from click.testing import CliRunner
from machine_profile import PROFILE

from mlx_flash.cli import main
from mlx_flash.errors import FlashError
from mlx_flash.loading import load_model
from mlx_flash.memory import page_cache
from mlx_flash.memory.page_cache import better_through, use_page_cache
from mlx_flash.profile import BufferedPoint, default_path, save_profile
from mlx_flash.storage import direct_io
from mlx_flash.storage.manifest import Layer, Part

GB = 10**9
PART = Part("rows", "float32", (250,), 0, 1000)
LAYERS = [Layer("mlp", "ffn", "", 0, 10**7, 1000, (PART,), "", None)] * 2  # 20 GB


@pytest.fixture(autouse=True)
def no_profile(monkeypatch, tmp_path):
    """Not the one of whoever runs the tests."""
    monkeypatch.setenv("MLX_FLASH_PROFILE", str(tmp_path / "profile.json"))


@pytest.fixture
def free(monkeypatch):
    """free(bytes): what the machine has available."""

    def pretend(nbytes):
        stand_in = SimpleNamespace(available_bytes=lambda: nbytes)
        monkeypatch.setattr(page_cache, "pressure", stand_in)

    return pretend


def auto(slots=(5 * 10**6,) * 2, budget=12 * GB, worthwhile=0.5):
    """The choice for 20 GB on flash, half of them in slots by default."""
    return use_page_cache("auto", LAYERS, slots, budget, worthwhile)


def test_free_memory_beyond_the_budget_decides(free):
    free(32 * GB)
    assert auto()
    free(25 * GB)  # 22.5 of them, less 12, hold half of the 20 on flash
    assert auto()
    free(24 * GB)
    assert not auto()
    assert auto(worthwhile=0.3)
    assert not auto(worthwhile=1.0)


def test_layers_that_are_held_whole_want_no_cache(free):
    free(24 * GB)
    assert auto(slots=(10**7, 10**6))


def test_a_model_held_whole_is_read_once(free):
    free(60 * GB)
    assert not auto(slots=(10**7, 10**7), budget=22 * GB)


# PROFILE reads 1.6 GB/s of blocks of 64 KiB, around the page cache, and more of longer
# ones; 0.4 GB/s of 4 KiB.
@pytest.mark.parametrize(
    "cold, warm, wanted",
    [
        (1.0e9, 1.5e9, False),
        (1.0e9, 5.0e9, None),
        (1.7e9, 5.0e9, None),
        (1.8e9, 5.0e9, True),
    ],
)
def test_what_was_measured_comes_first(free, cold, warm, wanted):
    """Slower even warm: never. Faster even cold: always. Else memory decides."""
    short = BufferedPoint(4096, 16, 3e8, 3.5e8)
    measured = dataclasses.replace(
        PROFILE,
        device=f"a test, MLX on {mx.default_device().type.name}",
        buffered=(short, BufferedPoint(65536, 16, cold, warm)),
    )
    assert better_through(measured, 100_000) is wanted
    assert better_through(measured, 1000) is False
    assert better_through(PROFILE, 100_000) is None
    save_profile(measured, default_path())
    long = [dataclasses.replace(layer, unit_bytes=65536, units=10) for layer in LAYERS]
    for room in (0, 64 * GB):
        free(room)
        found = use_page_cache("auto", long, (5, 5), GB, 0.5)
        assert found is (room > 0 if wanted is None else wanted)
        assert use_page_cache("on", long, (5, 5), GB, 0.5)
        assert not use_page_cache("auto", long, (10, 10), GB, 0.5), "nothing is read"


def test_settings(free):
    free(0)
    for setting, wanted in (("on", True), (True, True), ("off", False), (False, False)):
        assert use_page_cache(setting, LAYERS, (1, 1), GB, 0.5) is wanted
    with pytest.raises(FlashError, match="page_cache is 'maybe'. Try auto, on or off."):
        use_page_cache("maybe", LAYERS, (1, 1), GB, 0.5)


@pytest.mark.parametrize("available, through", [(64 * GB, True), (50_000, False)])
def test_loading_chooses_by_itself(flash_folder, free, available, through):
    free(available)
    with load_model(flash_folder, "120KB", predictor=False, context=8) as (model, _):
        assert not any(layer.slots.holds_all for layer in model.flash.layers)
        if not through and not model.flash.direct_io:
            pytest.skip("no direct I/O on this file system")
        assert model.flash.direct_io is not through


def run(*args):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize(
    "options, through",
    [
        (["--page-cache"], True),
        (["--page-cache", "on"], True),
        (["--page-cache=off"], False),
        (["--page-cache", "auto"], True),
        ([], True),
    ],
)
def test_the_command_says_which_it_was(free, options, through):
    free(64 * GB)
    command = ["generate", "Once", "-m", 3, *options]
    stats = json.loads(run(*command, "--json").stdout)["stats"]
    assert stats["page_cache"] is through
    line = "reads       " + ("through" if through else "around") + " the page cache"
    assert line in run(*command).stderr


def test_the_report_says_what_was_cached_before(own_folder):
    file = next((own_folder / "ffn").iterdir())
    if direct_io.cached_share(file) is None:
        pytest.skip("this system does not say what it caches")
    for path in own_folder.rglob("*.safetensors"):
        path.read_bytes()
    with load_model(own_folder, "140KB", page_cache="on") as (model, _):
        assert model.flash.report().cached_share == 1
    with load_model(own_folder, "140KB", page_cache="off") as (model, _):
        report = model.flash.report()
        assert report.page_cache is False
        if model.flash.direct_io:
            assert report.cached_share == 0  # Linux reads from the disk all the same


def test_it_is_no_choice(tmp_path):
    result = CliRunner().invoke(main, ["generate", "Once", "--page-cache", "maybe"])
    assert result.exit_code == 2 and "'maybe' is not one of" in result.output


@pytest.mark.parametrize("command", ["generate", "serve", "trace"])
def test_commands_that_load_have_the_option(command):
    assert "--page-cache" in run(command, "--help").stdout
