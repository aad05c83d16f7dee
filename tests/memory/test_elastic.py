"""A budget follows what the machine has to spare, and never leaves its bounds."""

import time

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

import mlx_flash
from mlx_flash.memory import elastic as elastic_module
from mlx_flash.memory import pressure
from mlx_flash.memory.elastic import CALM_LOOKS, Elastic

GB = 10**9
MACHINE = 16 * GB


def settle(elastic, available, short=False, looks=CALM_LOOKS):
    for _ in range(looks):
        total = elastic.look(available, short, elastic.total_bytes)
    return total


def test_it_gives_what_is_missing_at_once_and_takes_it_back_when_it_is_calm():
    elastic = Elastic(8 * GB, 2 * GB, MACHINE)
    assert elastic.look(4 * GB, False, 8 * GB) == 8 * GB
    assert elastic.look(0, False, 8 * GB) == 8 * GB - MACHINE // 10 - GB // 2
    given = elastic.total_bytes
    assert elastic.look(MACHINE // 20, False, 8 * GB) == given, "neither short nor calm"
    assert settle(elastic, 4 * GB, looks=CALM_LOOKS - 1) == given
    assert elastic.look(4 * GB, False, 8 * GB) > given
    assert settle(elastic, 4 * GB, looks=20) == 8 * GB


def test_it_gives_what_it_has():
    """The first bytes of a generous budget are in nobody's way."""
    elastic = Elastic(8 * GB, 2 * GB, MACHINE)
    assert elastic.look(4 * GB, True, 6 * GB) == 6 * GB - GB // 2


def test_the_kernels_word_counts_for_itself():
    elastic = Elastic(8 * GB, 2 * GB, MACHINE)
    assert elastic.look(4 * GB, True, 8 * GB) == 8 * GB - GB // 2
    assert settle(elastic, 4 * GB, True, looks=100) == 2 * GB


@given(
    st.lists(st.tuples(st.integers(0, 2 * MACHINE), st.booleans()), max_size=40),
    st.integers(1, 10 * GB),
    st.integers(1, 10 * GB),
)
def test_it_never_leaves_its_bounds(looks, total, least):
    elastic = Elastic(total, least, MACHINE)
    for available, short in looks:
        before = elastic.total_bytes
        now = elastic.look(available, short, total)
        assert min(least, total) <= now <= total
        assert now <= before or not short


# A loaded model


def logits(model, tokens, cache):
    result = model(mx.array([tokens]), cache=cache)
    mx.eval(result)
    return np.array(result)


@pytest.fixture
def model(flash_folder):
    with mlx_flash.load_model(flash_folder, "200KB", predictor=False) as (model, _):
        yield model


def test_another_budget_gives_the_same_answer(model):
    cache = make_prompt_cache(model)
    prompt, steps = list(range(3, 40)), range(40, 60)
    logits(model, prompt, cache)
    expected = [logits(model, [t], cache) for t in steps]
    cache = make_prompt_cache(model)
    logits(model, prompt, cache)
    usual = model.flash.budget
    least = model.flash.pool.least_bytes
    for i, token in enumerate(steps):
        if i % 3 == 0:
            model.flash.resize((least, usual.total_bytes, 150_000)[i // 3 % 3])
        actual = logits(model, [token], cache)
        diff = np.abs(actual - expected[i]).max() / np.abs(expected[i]).max()
        assert diff < 1e-5
    assert len(model.flash.resized) == 7
    model.flash.resize(usual.total_bytes)
    assert model.flash.budget.slots == usual.slots


def test_less_memory_is_less_memory(flash_folder):
    """Of a context so short that slots are what the memory is for."""
    loaded = mlx_flash.load_model(flash_folder, "125KB", predictor=False, context=8)
    with loaded as (model, _):
        check_less_memory(model)


def check_less_memory(model):
    least = model.flash.pool.least_bytes
    cache = make_prompt_cache(model)
    logits(model, [5], cache)
    before, slots = mx.get_active_memory(), model.flash.budget.slot_bytes
    model.flash.resize(least)
    assert model.flash.budget.slot_bytes < slots / 2
    gone = before - mx.get_active_memory()
    assert gone >= 0.9 * (slots - model.flash.budget.slot_bytes)
    assert mx.set_cache_limit(0) == model.flash.budget.cache_bytes


def test_what_is_impossible_changes_nothing(model):
    before = model.flash.budget
    with pytest.raises(mlx_flash.NotEnoughMemory, match="needs at least"):
        model.flash.resize("1KB")
    assert model.flash.budget is before
    model.flash.close()
    with pytest.raises(mlx_flash.FlashError, match="closed"):
        model.flash.resize("300KB")


def test_a_model_gives_way_between_two_tokens(flash_folder, monkeypatch):
    facts = {"available": MACHINE, "short": False}
    monkeypatch.setattr(elastic_module, "LOOK_S", 0.01)
    monkeypatch.setattr(pressure, "available_bytes", lambda: facts["available"])
    monkeypatch.setattr(pressure, "is_short", lambda: facts["short"])
    loaded = mlx_flash.load_model(flash_folder, "200KB", predictor=False, elastic=True)
    with loaded as (model, _):
        cache = make_prompt_cache(model)
        usual = model.flash.budget.total_bytes

        def until(done):
            deadline = time.monotonic() + 20
            while not done() and time.monotonic() < deadline:
                logits(model, [7], cache)
                cache[0].trim(1), cache[1].trim(1)
                time.sleep(0.01)
            assert done()

        until(lambda: not model.flash.resized)
        facts["short"] = True
        until(lambda: model.flash.budget.total_bytes == model.flash.pool.least_bytes)
        facts["short"] = False
        until(lambda: model.flash.budget.total_bytes == usual)
        assert len(model.flash.resized) >= 2


def test_it_is_on_by_default_for_auto_alone(flash_folder, monkeypatch):
    begun = []
    monkeypatch.setattr(
        mlx_flash.loading.Flash, "follow_pressure", lambda self: begun.append(self)
    )
    for memory, elastic, wanted in (
        ("auto", None, 1),
        ("200KB", None, 0),
        ("200KB", True, 1),
        ("auto", False, 0),
    ):
        begun.clear()
        with mlx_flash.load_model(flash_folder, memory, elastic=elastic):
            assert len(begun) == wanted


# What the kernel says


def test_macos_levels(monkeypatch):
    class Library:
        level = 2

        def sysctlbyname(self, name, value, size, new, new_size):
            assert name == b"kern.memorystatus_vm_pressure_level"
            value._obj.value = self.level
            return 0

    library = Library()
    monkeypatch.setattr(pressure.sys, "platform", "darwin")
    monkeypatch.setattr(pressure.ctypes, "CDLL", lambda _: library)
    assert pressure.is_short()
    library.level = 1
    assert not pressure.is_short()


@pytest.mark.parametrize(
    "line, folder, files",
    [
        ("0::/own", "own", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/own",
            "memory/own",
            (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            ),
        ),
    ],
)
def test_a_cgroups_limit(tmp_path, monkeypatch, line, folder, files):
    own = tmp_path / folder
    own.mkdir(parents=True)
    limit, usage, statistic = files
    real = pressure.Path

    def path(name):
        if name == "/proc/self/cgroup":
            file = tmp_path / "cgroup"
            file.write_text(line + "\n")
            return file
        return real(name)

    monkeypatch.setattr(pressure, "CGROUPS", tmp_path)
    monkeypatch.setattr(pressure, "Path", path)
    free = pressure.available_bytes()
    assert free > 10**6
    (own / usage).write_text("600000\n")
    (own / "memory.stat").write_text(f"cache 5\n{statistic} 100000\n")
    (own / limit).write_text("max\n")
    assert pressure.available_bytes() > 10**6
    (own / limit).write_text("1000000\n")
    assert pressure.available_bytes() == 500_000
    assert pressure.machine_bytes() == 1_000_000
    (own / limit).write_text("10\n")
    assert pressure.available_bytes() == 0
