"""A budget follows what the machine has to spare, and never leaves its bounds."""

import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import save_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from stock_checkpoints import LLAMA, write_checkpoint

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


class Machine:
    """A machine's memory: what a ballast and the model leave is what is available."""

    def __init__(self, monkeypatch, total):
        self.total, self.ballast, self.others = total, 0, mx.get_active_memory()
        monkeypatch.setattr(elastic_module, "LOOK_S", 0.005)
        monkeypatch.setattr(pressure, "machine_bytes", lambda: self.total)
        monkeypatch.setattr(pressure, "available_bytes", self.available)
        monkeypatch.setattr(pressure, "is_short", lambda: False)

    def available(self):
        held = mx.get_active_memory() + mx.get_cache_memory() - self.others
        return max(self.total - self.ballast - held, 0)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    base = tmp_path_factory.mktemp("blocks")
    wide = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 8}
    source = write_checkpoint(base / "stock", LLAMA | wide)
    save_tokenizer(source)
    return mlx_flash.convert(source, base / "flash", progress=False, rank=0)


def text_of(model, tokenizer, tokens, after_token=lambda count: None):
    found = []
    for response in mlx_flash.stream_generate(model, tokenizer, [5, 9, 33], tokens):
        found.append(response.token)
        after_token(len(found))
    return found


def until(done, wait=0.01):
    deadline = time.monotonic() + 20
    while not done() and time.monotonic() < deadline:
        time.sleep(wait)


def test_a_ballast_takes_40_percent_and_gives_them_back(blocks, monkeypatch):
    """The same text as undisturbed, and the report says when and how much."""
    model_bytes = mlx_flash.storage.manifest_reading.read_manifest(blocks).model_bytes
    with mlx_flash.load(blocks, "60%", context=256) as (model, tokenizer):
        tokenizer.eos_token_ids = set()
        expected = text_of(model, tokenizer, 60)
        assert model.flash.report().resizes == []
    machine = Machine(monkeypatch, int(1.25 * model_bytes))
    loaded = mlx_flash.load(blocks, model_bytes, context=256, elastic=True)
    with loaded as (model, tokenizer):
        tokenizer.eos_token_ids = set()
        flash, usual = model.flash, model.flash.budget.total_bytes

        def play(count):
            if count == 10:
                machine.ballast = machine.total * 2 // 5
            if count in (10, 11, 12):  # the watch looks before the next token
                until(lambda: flash.pool.want(None) is None)
            if count == 30:
                assert machine.available() > 0, "memory was given"
                machine.ballast = 0
            if 30 <= count < 60 and flash.budget.total_bytes < usual:
                until(lambda: flash.pool.want(None) is None)

        assert text_of(model, tokenizer, 60, play) == expected
        report = flash.report()
        budgets = [nbytes for _, nbytes in report.resizes]
        assert min(budgets) < 0.8 * usual and budgets[-1] == usual
        times = [when for when, _ in report.resizes]
        assert times == sorted(times) and times[0] > 0
        assert report.resizes_refused == []
        said = f"the budget changed {len(budgets)} times, down to"
        assert said in str(report)


@pytest.mark.slow
def test_what_conversations_need_is_not_given_and_the_report_says_so(
    blocks, monkeypatch
):
    machine = Machine(monkeypatch, 1 << 40)
    loaded = mlx_flash.load(blocks, "80%", context=64, elastic=True)
    with loaded as (model, tokenizer):
        flash = model.flash
        elastic = flash._watch._elastic
        caches = [make_prompt_cache(model) for _ in range(12)]
        for cache in caches:
            logits(model, list(range(3, 60)), cache)
        machine.ballast = machine.total

        def play(count):
            if count in (2, 4):
                until(lambda: flash.pool.want(None) is None)

        text_of(model, tokenizer, 8, play)
        report = flash.report()
        _, wanted, kept = report.resizes_refused[0]
        assert wanted < kept
        kept = report.resizes_refused[-1][2]
        assert kept == flash.budget.total_bytes == report.memory_budget_bytes
        assert kept > flash.pool.least_bytes, "the least of all, without conversations"
        assert sum(c.nbytes for cache in caches for c in cache) > flash.budget.kv_bytes
        assert "the conversations left no less than" in str(report)
        until(lambda: elastic.total_bytes <= kept)

        class Holder:
            def let_go(self):
                caches.clear()

        holder = Holder()
        flash.pool.caches.add_holder(holder.let_go)
        before = len(flash.refused)
        del cache

        def wait(count):
            if count in (2, 4):
                until(lambda: flash.pool.want(None) is None)

        text_of(model, tokenizer, 8, wait)
        assert not caches and len(flash.refused) == before
        assert flash.budget.total_bytes < kept


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
