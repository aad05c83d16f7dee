"""A budget is divided without a byte more than was given, or refused with numbers."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_flash.errors import FlashError
from mlx_flash.layers.kinds import NEURON
from mlx_flash.memory import budget as budget_module
from mlx_flash.memory.budget import make_budget
from mlx_flash.memory.footprint import MAX_PREFILL, MIN_PREFILL, Footprint, Shapes
from mlx_flash.memory_size import parse_memory, say_memory
from mlx_flash.storage import manifest as format

FOLDER = Path("some-flash")


def opt_like(dims, units, layers, vocab, dtype="float16"):
    """(manifest, shapes) of an OPT of this size, with predictors."""
    size = 4 if dtype == "float32" else 2
    part = dims * size
    layer = format.Layer(
        module="mlp",
        file="x",
        sha256="",
        data_offset=16384,
        units=units,
        unit_bytes=2 * part,
        parts=(
            format.Part("up", dtype, (dims,), 0, part),
            format.Part("down", dtype, (dims,), part, part),
        ),
        order="checkpoint",
        predictor=None,
    )
    resident = (vocab * dims + layers * 4 * dims * dims) * size
    manifest = format.Manifest(
        format_version=1,
        source="",
        revision=None,
        model_type="opt",
        unit="neuron",
        activation="relu",
        dtype=dtype,
        resident=format.Weights("r", "", resident),
        predictors=format.Weights("p", "", layers * (dims + units) * 32 * size),
        calibration=None,
        layers=(layer,) * layers,
    )
    shapes = Shapes(2 * layers * dims * size, 0, vocab, dims, max(dims // 64, 1))
    return manifest, shapes


def footprint(model, context):
    return Footprint(*model, NEURON, context)


MODELS = {
    "tiny": opt_like(32, 96, 2, 97, "float32"),
    "demo": opt_like(256, 2048, 4, 2048),
    "125m": opt_like(768, 3072, 12, 50272),
    "6.7b": opt_like(4096, 16384, 32, 50272),
}
models = pytest.mark.parametrize("name", MODELS)


def make(name, memory, context=2048):
    return make_budget(memory, footprint(MODELS[name], context), FOLDER)


def least(name, context=2048):
    """The amount the refusal names, as it is written there."""
    with pytest.raises(FlashError) as error:
        make(name, "1KB", context)
    assert str(FOLDER) in str(error.value)
    assert f"{context:,} tokens" in str(error.value)
    return re.search(r"--memory (\S+) ", str(error.value))[1]


@models
def test_the_least_that_is_named_works_and_less_does_not(name):
    amount = least(name)
    budget = make(name, amount)
    assert budget.total_bytes == parse_memory(amount)
    for n, layer in zip(budget.slots, MODELS[name][0].layers, strict=True):
        assert n >= max(layer.units // 64, 1)
    with pytest.raises(FlashError, match=f"at least --memory {amount}"):
        make(name, int(0.9 * parse_memory(amount)))


@given(
    st.integers(1, 64).map(lambda n: 8 * n),
    st.integers(1, 5000),
    st.integers(1, 40),
    st.integers(1, 5000),
    st.integers(1, 4096),
)
def test_the_least_works_for_a_model_of_any_size(dims, units, layers, vocab, context):
    model = opt_like(dims, units, layers, vocab)
    with pytest.raises(FlashError) as error:
        make_budget("1B", footprint(model, context), FOLDER)
    amount = re.search(r"--memory (\S+) ", str(error.value))[1]
    budget = make_budget(amount, footprint(model, context), FOLDER)
    assert min(budget.slots) >= max(units // 64, 1)


@models
def test_all_uses_together_are_the_total(name):
    low = parse_memory(least(name))
    manifest = MODELS[name][0]
    for memory in (low, int(1.3 * low), 2 * low, 5 * low):
        budget = make(name, memory)
        assert (
            budget.total_bytes
            == memory
            == (
                budget.resident_bytes
                + budget.predictor_bytes
                + budget.kv_bytes
                + budget.workspace_bytes
                + budget.slot_bytes
            )
        )
        data = sum(
            n * layer.unit_bytes
            for n, layer in zip(budget.slots, manifest.layers, strict=True)
        )
        parts = [part for layer in manifest.layers for part in layer.parts]
        pages = 16384 * sum(part.bytes % 4096 == 0 for part in parts)
        assert budget.slot_bytes == data + pages
        assert budget.workspace_bytes > 0


@models
@given(st.floats(1, 20), st.floats(1, 20))
def test_more_memory_never_gives_fewer_slots(name, a, b):
    low = parse_memory(least(name))
    small, large = (make(name, int(low * x)) for x in sorted((a, b)))
    units = [layer.units for layer in MODELS[name][0].layers]
    for s, m, n in zip(small.slots, large.slots, units, strict=True):
        assert s <= m <= n


@models
def test_auto_holds_everything_where_there_is_room(name, monkeypatch):
    monkeypatch.setattr(budget_module.system, "usable_memory_bytes", lambda: 10**12)
    budget = make(name, "auto")
    assert budget.slots == tuple(layer.units for layer in MODELS[name][0].layers)
    # And takes no more than that: the machine's memory is not all ours.
    assert budget.total_bytes < 2 * MODELS[name][0].model_bytes + 2 * 10**9


def test_auto_takes_what_the_machine_has(monkeypatch):
    monkeypatch.setattr(budget_module.system, "usable_memory_bytes", lambda: 8 * 10**9)
    budget = make("6.7b", "auto")
    assert budget.total_bytes == 8 * 10**9
    assert 0 < budget.slots[0] < 16384


def test_a_share_is_of_the_model():
    manifest = MODELS["6.7b"][0]
    half = make("6.7b", "60%")
    assert half.total_bytes == int(0.6 * manifest.model_bytes)


def test_a_longer_context_leaves_fewer_slots():
    short, long = (make("6.7b", "8GB", context) for context in (64, 2048))
    assert short.kv_bytes < long.kv_bytes
    # 2 (keys and values) · layers · width · bytes · tokens
    assert long.kv_bytes == 2 * 32 * 4096 * 2 * 2048
    assert short.slots[0] > long.slots[0]


def test_prompt_chunks_grow_with_the_budget():
    chunks = [make("6.7b", f"{gb}GB").prefill_tokens for gb in (7, 8, 12, 20)]
    assert chunks == sorted(chunks)
    assert chunks[-1] <= MAX_PREFILL
    assert make("6.7b", least("6.7b")).prefill_tokens >= MIN_PREFILL


# Amounts


@pytest.mark.parametrize(
    "text, value",
    [
        ("7GB", 7 * 10**9),
        ("7 gb", 7 * 10**9),
        ("1.5g", 15 * 10**8),
        ("512MB", 512 * 10**6),
        ("7GiB", 7 * 2**30),
        ("1.5Gi", 3 * 2**29),
        ("512 kib", 2**19),
        ("100B", 100),
        ("5000", 5000),
        (10**17 + 1, 10**17 + 1),
        (8e9, 8 * 10**9),
        ("50%", 0.5),
        (0.8, 0.8),
        ("0.8", 0.8),
        (1.0, 1.0),
        ("auto", None),
        (" AUTO ", None),
    ],
)
def test_amounts_as_people_write_them(text, value):
    assert parse_memory(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "much", "-1GB", "0", 0, -5, True, None, "0%", "1e9", "7iB", "GB", "7 G B"],
)
def test_what_is_no_amount_is_refused_with_an_example(text):
    with pytest.raises(FlashError, match="Try 7GB"):
        parse_memory(text)


@pytest.mark.parametrize("amount", [7, "7", 1, "1", "7.5", 1.5, 999])
def test_a_small_number_is_asked_for_its_unit(amount):
    number = f"{float(amount):g}"
    with pytest.raises(FlashError, match=f"without a unit. Try {number}GB, {number}MB"):
        parse_memory(amount)


@given(
    st.one_of(
        st.text(), st.integers(), st.floats(), st.from_regex(r"\d+(\.\d+)?[KMGT%]?")
    )
)
@example(10**400)
@example("9" * 400 + "GB")
@example("9" * 400 + "%")
def test_any_amount_is_understood_or_refused(memory):
    try:
        make("tiny", memory)
    except FlashError as error:
        assert "memory" in str(error)


@given(st.integers(1, 10**13))
def test_an_amount_that_is_said_is_enough_and_not_much_more(nbytes):
    said = parse_memory(say_memory(nbytes))
    assert nbytes <= said <= nbytes * 1.01 + 1


def test_every_three_figures_are_read_back_exactly():
    for zeros in range(11):
        for digits in range(1, 1000):
            nbytes = digits * 10**zeros
            assert parse_memory(say_memory(nbytes)) == nbytes
