"""Experts from flash give the bits that mlx-lm gives with all of them in memory."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import save_tokenizer
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen3_moe
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import load_model as mlx_load_model
from stock_checkpoints import (
    KIMI_K3,
    LLAMA,
    LONGCAT,
    MAMBA,
    NEMOTRON,
    NEMOTRON_LATENT,
    QWEN3,
    assert_same,
    make_weights,
    run,
    save,
    stream,
    write_checkpoint,
    write_original,
)

import mlx_flash
from mlx_flash.converters.bundles import write_bundles
from mlx_flash.errors import FlashError
from mlx_flash.layers import expert as experts
from mlx_flash.layers.expert import SORT_PAIRS, ExpertFFN, switch_layers, switch_parts
from mlx_flash.layers.lookahead import router_guess
from mlx_flash.loading import load_tokenizer
from mlx_flash.memory.fence import Fence
from mlx_flash.memory.policies import Lru
from mlx_flash.memory.slots import UnitSlots
from mlx_flash.memory.stats import Stats
from mlx_flash.storage.extents import bundle_extent
from mlx_flash.storage.manifest_reading import read_manifest
from mlx_flash.storage.reader import open_reader

# ------------------------------------------------------------- one switch layer

UNITS, DIMS, TOP_K = 8, 64, 3
PACKINGS = {
    "unpacked": None,
    **{f"affine-{b}": dict(group_size=32, bits=b) for b in (2, 3, 4, 6, 8)},
    "mxfp4": dict(group_size=32, bits=4, mode="mxfp4"),
    "mxfp8": dict(group_size=32, bits=8, mode="mxfp8"),
    "nvfp4": dict(group_size=16, bits=4, mode="nvfp4"),
}
DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("gated", "non-gated", "biased")
ONLY_FLOAT32 = "MLX's CPU backend has gather_mm for float32 only"


def make_switch(kind, packing=None, dtype=mx.float32):
    mx.random.seed(3)
    biased = kind == "biased"
    if kind == "non-gated":
        switch = SwitchMLP(DIMS, DIMS, UNITS, activation=nn.relu2)
    else:
        switch = SwitchGLU(DIMS, DIMS, UNITS, bias=biased)
    switch.apply(lambda w: (0.2 * mx.random.normal(w.shape)).astype(dtype))
    for name, linear in list(switch.children().items()):
        if packing and hasattr(linear, "to_quantized"):
            switch[name] = linear.to_quantized(**packing)
    return switch


def calls(dtype):
    """(x, chosen experts) of a prompt, of tokens one by one, and of a batch."""
    rng = np.random.default_rng(0)
    for batch, length in [(1, 30), (1, 1), (1, 1), (2, 1), (2, 5), (2, 16)]:
        x = rng.normal(0, 1, (batch, length, DIMS)).astype(np.float32)
        score = rng.random((batch, length, UNITS))
        chosen = np.argsort(score, axis=-1)[..., :TOP_K].astype(np.uint32)
        yield mx.array(x).astype(dtype), mx.array(chosen)


@pytest.fixture
def make_store(tmp_path):
    """make_store(switch)(slots): stores over a bundle file of the switch's experts."""
    readers = []

    def make(switch):
        folder = tmp_path / f"ffn{len(readers)}"
        folder.mkdir()
        layer = write_bundles(folder / "l.safetensors", "mlp", switch_parts(switch))
        readers.append(open_reader(2, direct=False))

        def store(slots):
            extents = [bundle_extent(layer, tmp_path)]
            reader = readers[-1]
            made = UnitSlots(layer, extents, slots, Lru(), reader, Fence(), Stats())
            if made.n_slots == made.units:
                made.read_all()
            return made

        return store

    yield make
    for reader in readers:
        reader.close()


def check_capacities(switch, make_store, dtype, capacities):
    """The same bits at every capacity, whatever was in the slots before."""
    expected = [(x, i, switch(x, i)) for x, i in calls(dtype)]
    mx.eval(expected)
    store = make_store(switch)
    for capacity in capacities:
        ffn = ExpertFFN(switch)
        ffn.attach(store(capacity))
        for x, chosen, y in expected:
            assert mx.array_equal(ffn(x, chosen), y), f"{capacity=} {x.shape=}"
        reads = ffn.slots.stats.misses
        assert reads == UNITS if capacity == UNITS else reads > UNITS


# All three kinds meet each packing and each dtype.
MATRIX = [
    (packing, dtype, KINDS[(p + d) % 3])
    for p, packing in enumerate(PACKINGS)
    for d, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize("packing, dtype, kind", MATRIX)
def test_the_same_bits_at_one_slot_and_at_half(packing, dtype, kind, make_store):
    if packing == "unpacked" and dtype != "float32":
        if mx.default_device() == mx.cpu:
            pytest.skip(ONLY_FLOAT32)
    dtype = getattr(mx, dtype)
    switch = make_switch(kind, PACKINGS[packing], dtype)
    check_capacities(switch, make_store, dtype, [1, UNITS // 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", ["unpacked", "affine-4", "mxfp4"])
def test_the_same_bits_at_any_number_of_slots(packing, kind, make_store):
    switch = make_switch(kind, PACKINGS[packing])
    capacities = [1, UNITS // 4, TOP_K, UNITS // 2, UNITS - 1, UNITS]
    check_capacities(switch, make_store, mx.float32, capacities)


@pytest.mark.parametrize("slots", [TOP_K, UNITS // 2])
def test_a_result_that_was_not_evaluated_outlives_its_slots(slots, make_store):
    switch = make_switch("gated")
    wanted = [(x, i, switch(x, i)) for x, i in calls(mx.float32) if i.size == TOP_K]
    mx.eval(wanted)
    ffn = ExpertFFN(switch)
    ffn.attach(make_store(switch)(slots))
    results = [ffn(x, chosen) for x, chosen, _ in wanted]
    assert ffn.slots.stats.misses > slots  # slots were read anew in between
    for result, (_, _, y) in zip(results, wanted, strict=True):
        assert mx.array_equal(result, y)


def test_nvfp4_with_a_scale_for_each_expert(make_store):
    packing = PACKINGS["nvfp4"] | {"global_scale": True}
    try:
        switch = make_switch("gated", packing)
        mx.eval([switch(x, i) for x, i in calls(mx.float32)])
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"this backend of MLX cannot multiply it: {error}")
    assert "up_proj.global_scale" in switch_parts(switch)
    check_capacities(switch, make_store, mx.float32, [1, UNITS // 2, UNITS])


def test_parts_are_all_that_the_projections_hold():
    names = set(switch_parts(make_switch("biased", PACKINGS["affine-4"])))
    linears = [f"{side}_proj" for side in ("gate", "up", "down")]
    keys = ["weight", "scales", "biases", "bias"]
    assert names == {f"{n}.{k}" for n in linears for k in keys}
    assert set(switch_parts(make_switch("non-gated"))) == {"fc1.weight", "fc2.weight"}


def test_what_else_hangs_on_a_switch_layer_stays_resident(make_store):
    # Muse Spark's `experts.post_expert_norm`, which its block looks up by that name
    switch = make_switch("gated")
    switch.post_expert_norm = nn.RMSNorm(DIMS)
    assert "post_expert_norm.weight" not in switch_parts(switch)
    ffn = ExpertFFN(switch)
    assert ffn.post_expert_norm is switch.post_expert_norm
    names = [name for name, _ in tree_flatten(ffn.parameters())]
    assert names == ["post_expert_norm.weight"]


def test_layers_come_in_the_order_of_their_numbers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [make_switch("gated") for _ in range(11)]

    assert list(switch_layers(Model())) == [f"layers.{i}" for i in range(11)]


def test_no_wave_is_filled_up_on_a_cpu(make_store):
    """There is one kernel, and what is filled up is multiplied for nothing."""
    switch = make_switch("gated")
    pairs, ordinary = [], type(switch).__call__

    class Spy(SwitchGLU):
        def __call__(self, x, indices):
            pairs.append(indices.size)
            return ordinary(self, x, indices)

    switch.__class__ = Spy
    ffn = ExpertFFN(switch)
    ffn.attach(make_store(switch)(1))
    long, chosen = next(iter(calls(mx.float32)))
    mx.eval(ffn(long, chosen))
    assert sum(pairs) == chosen.size and min(pairs) < SORT_PAIRS


def test_short_waves_of_a_sorted_prompt_are_sorted_too(make_store, monkeypatch):
    """mlx-lm sorts from 64 pairs on, and on a GPU that kernel rounds differently."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    switch = make_switch("gated")
    sizes, ordinary = [], type(switch).__call__

    class Spy(SwitchGLU):
        def __call__(self, x, indices):
            sizes.append(indices.size)
            return ordinary(self, x, indices)

    switch.__class__ = Spy
    ffn = ExpertFFN(switch)
    ffn.attach(make_store(switch)(1))
    (long, chosen), (one, its) = list(calls(mx.float32))[:2]
    mx.eval(ffn(long, chosen))
    assert chosen.size >= SORT_PAIRS and len(sizes) >= UNITS - 1
    assert min(sizes) >= SORT_PAIRS
    sizes.clear()
    mx.eval(ffn(one, its))
    assert max(sizes) < SORT_PAIRS


def test_a_layer_without_a_store_says_that_the_model_was_closed(make_store):
    ffn = ExpertFFN(make_switch("gated"))
    x, chosen = next(calls(mx.float32))
    with pytest.raises(FlashError, match="closed"):
        ffn(x, chosen)


# ------------------------------------------------------------------ whole models

FOUR_BITS = dict(group_size=32, bits=4)
MODELS = {
    "qwen3_moe": (QWEN3, None),
    "qwen3_moe-4bit": (QWEN3, FOUR_BITS),
    "nemotron_h": (NEMOTRON, None),
    "nemotron_h-latent": (NEMOTRON_LATENT, None),
    "longcat_flash": (LONGCAT, None),
}
# Models whose next layer's router cannot be asked with what the experts are given
NOT_GUESSED = ("nemotron_h-latent",)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """stock(name): a checkpoint in mlx-lm's own layout, with a tokenizer."""
    base = tmp_path_factory.mktemp("stock")

    def make(name):
        folder = base / name
        if not folder.exists():
            write_checkpoint(folder, *MODELS[name])
            save_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def flash(stock, tmp_path_factory):
    """flash(name): the same checkpoint, converted."""
    base = tmp_path_factory.mktemp("flash")

    def make(name):
        if not (base / name).exists():
            mlx_flash.convert(stock(name), base / name, progress=False)
        return base / name

    return make


@pytest.fixture
def streamed():
    """streamed(folder, slots): as moe.stream, closed at the end."""
    models = []

    def make(folder, *slots, **options):
        models.append(stream(folder, *slots, **options))
        return models[-1]

    yield make
    for model in models:
        model.flash.close()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_mlx_lm(name, stock, flash, streamed):
    resident, _ = mlx_load_model(stock(name))
    expected = {batch: run(resident, batch) for batch in (1, 2)}
    for folder in (stock(name), flash(name)):
        for slots in (1, 2, 4, 8):
            model = streamed(folder, slots)
            for batch in (1, 2):
                assert_same(run(model, batch), expected[batch])
            assert (model.flash.stats.misses == 0) == (slots == 8)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_reading_early_changes_no_bit(name, overlap, stock, streamed):
    resident, _ = mlx_load_model(stock(name))
    expected = {batch: run(resident, batch) for batch in (1, 2)}
    for slots in (1, 3, 6):
        model = streamed(stock(name), slots, overlap=overlap, look_ahead=True)
        for batch in (1, 2):
            assert_same(run(model, batch), expected[batch])
        stats = model.flash.stats
        assert stats.early >= stats.early_right
        if name in NOT_GUESSED:
            assert stats.early == 0
        elif slots == 3:
            assert stats.early > 0


def test_the_next_router_names_experts_that_have_no_weights(stock, streamed):
    """The LongCat above is one: else the test above would not show that it works."""
    model = streamed(stock("longcat_flash"), 3, look_ahead=True)
    layer = model.layers[0].mlp.switch_mlp
    guesses, ordinary = [], layer._ahead.guess

    def spy(x, top_k):
        guesses.append(ordinary(x, top_k))
        return guesses[-1]

    layer.look_ahead(layer._ahead.layer, spy)
    run(model, 1)
    named = {unit for guess in guesses for unit in np.array(guess).flat}
    assert min(named) < 8 <= max(named)


def test_a_router_that_is_not_understood_is_not_asked():
    class Block(nn.Module):
        def __init__(self, router):
            super().__init__()
            self.router = router

    assert router_guess(nn.Module(), 8, 16) is None
    assert router_guess(Block(nn.Linear(16, 7)), 8, 16) is None
    assert router_guess(Block(nn.Linear(4, 8)), 8, 16) is None
    linear = nn.Linear(16, 8)
    x = mx.random.normal((1, 2, 16))
    ids = np.sort(np.array(router_guess(Block(linear), 8, 16)(x, 3)))
    np.testing.assert_array_equal(ids, np.sort(np.argsort(-linear(x))[..., :3]))
    pairs = Block(lambda x: (mx.zeros((*x.shape[:2], 3), mx.uint32), x))
    assert router_guess(pairs, 8, 16)(x, 3).dtype == mx.uint32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_four_bits_with_half_precision(dtype, tmp_path, streamed):
    src = write_checkpoint(tmp_path / "src", QWEN3, FOUR_BITS, getattr(mx, dtype))
    expected = run(mlx_load_model(src)[0], 1)
    dst = mlx_flash.convert(src, tmp_path / "dst", progress=False)
    for folder in (src, dst):
        model = streamed(folder, 2)
        assert model.flash.manifest.dtype == dtype
        assert_same(run(model, 1), expected)


@pytest.mark.parametrize(
    "packing",
    [dict(bits=4, group_size=32), dict(mode="mxfp4", bits=4, group_size=32)],
    ids=["affine", "mxfp4"],
)
def test_converting_with_bits_is_mlx_quantising_the_experts(
    packing, stock, tmp_path, streamed
):
    resident, _ = mlx_load_model(stock("qwen3_moe"))
    nn.quantize(
        resident,
        class_predicate=lambda path, _: (
            path.endswith("_proj") and ".switch_mlp." in path
        ),
        **packing,
    )
    folder = tmp_path / "dst"
    mlx_flash.convert(stock("qwen3_moe"), folder, progress=False, **packing)
    assert_same(run(streamed(folder, 2), 1), run(resident, 1))


def test_bits_that_cannot_be_given(stock, tmp_path):
    dst = tmp_path / "dst"

    def convert(name, **packing):
        return lambda: mlx_flash.convert(stock(name), dst, progress=False, **packing)

    refused(convert("qwen3_moe-4bit", bits=8), "have 4 bits already", "--bits")
    # The second matrix of these experts has rows of 96 values.
    refused(convert("qwen3_moe", bits=4), "down_proj", "(8,64,96)", "--group-size 32")
    assert not dst.exists() and not dst.with_name("dst.partial").exists()


def test_a_model_that_keeps_values_from_its_first_run(tmp_path, streamed):
    """Kimi K3: judged for its size before its weights are there, it kept zeros."""
    src = write_checkpoint(tmp_path / "src", KIMI_K3)
    dst = mlx_flash.convert(src, tmp_path / "dst", progress=False)
    tokens = mx.array([list(range(30))])  # decoding would compile for ten seconds
    expected = mlx_load_model(src)[0](tokens)
    for folder in (src, dst):
        assert mx.array_equal(streamed(folder, 2)(tokens), expected)


@pytest.mark.parametrize("original", [False, True])
def test_converting_holds_few_layers_at_once(original, tmp_path):
    config = QWEN3 | {"num_hidden_layers": 10, "moe_intermediate_size": 512}
    src = (write_original if original else write_checkpoint)(tmp_path / "src", config)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    flash = mlx_flash.convert(src, tmp_path / "flash", progress=False)
    layer = read_manifest(flash).layers[0].nbytes
    assert mx.get_peak_memory() - before < 4 * layer


def test_a_norm_beside_the_experts(tmp_path, streamed, monkeypatch):
    """As in Muse Spark, which needs Metal: here a block of Qwen3 is given one."""

    class Block(qwen3_moe.Qwen3MoeSparseMoeBlock):
        def __init__(self, args):
            super().__init__(args)
            self.switch_mlp.post_expert_norm = nn.RMSNorm(args.hidden_size)

        def __call__(self, x):
            return self.switch_mlp.post_expert_norm(super().__call__(x))

    monkeypatch.setattr(qwen3_moe, "Qwen3MoeSparseMoeBlock", Block)
    src = write_checkpoint(tmp_path / "src", QWEN3)
    dst = mlx_flash.convert(src, tmp_path / "dst", progress=False)
    expected = run(mlx_load_model(src)[0], 1)
    for folder in (src, dst):
        assert_same(run(streamed(folder, 2), 1), expected)


def test_in_place_means_no_copy_and_no_change(tmp_path, streamed):
    folder = write_checkpoint(tmp_path / "src", QWEN3)
    before = {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.iterdir()}
    run(streamed(folder, 1), 1)
    after = {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.iterdir()}
    assert before == after


PROMPT = list(range(5, 45))


def test_our_generate_gives_the_same_text(stock):
    folder = stock("qwen3_moe")
    resident, _ = mlx_load_model(folder)
    expected = mlx_lm.generate(resident, load_tokenizer(folder), PROMPT, max_tokens=12)
    read = {}
    for memory in (800_000, 1_250_000, "auto"):
        with mlx_flash.load(folder, memory, context=64, page_cache=True) as loaded:
            text = mlx_flash.generate(*loaded, PROMPT, max_tokens=12)
            read[memory] = loaded[0].flash.stats.misses
        assert text == expected
    assert read[800_000] > read[1_250_000] > read["auto"] == 0


# ----------------------------------------------------------------- what is read


class Recorder(nn.Module):
    """Stands in for a switch layer and keeps which experts were asked for."""

    def __init__(self, switch):
        super().__init__()
        self.switch, self.asked = switch, []

    def __call__(self, x, indices):
        self.asked.append(set(np.array(indices).ravel().tolist()))
        return self.switch(x, indices)


@pytest.mark.parametrize("slots", [1, 4])
def test_a_prompt_reads_each_expert_it_needs_once(slots, stock, flash, streamed):
    resident, _ = mlx_load_model(stock("qwen3_moe"))
    layers = {n: Recorder(s) for n, s in switch_layers(resident).items()}
    resident.update_modules(tree_unflatten(list(layers.items())))
    tokens = mx.array(np.random.default_rng(0).integers(3, 97, (1, 512)))
    expected = resident(tokens)
    mx.eval(expected)
    needed = [len(layer.asked[0]) for layer in layers.values()]
    assert sum(needed) > slots * len(needed)
    for folder in (stock("qwen3_moe"), flash("qwen3_moe")):
        model = streamed(folder, slots)
        stats, manifest = model.flash.stats, model.flash.manifest
        assert stats.bytes_read == 0
        assert mx.array_equal(model(tokens), expected)
        assert (stats.misses, stats.hits) == (sum(needed), 0)
        assert stats.bytes_read == sum(
            count * layer.unit_bytes
            for count, layer in zip(needed, manifest.layers, strict=True)
        )


def test_the_next_chunk_reads_at_most_what_it_needs(stock, streamed):
    model = streamed(stock("qwen3_moe"), 4)
    tokens = mx.array(np.random.default_rng(0).integers(3, 97, (1, 512)))
    cache = make_prompt_cache(model)
    mx.eval(model(tokens[:, :256], cache=cache))
    before = model.flash.stats.misses
    mx.eval(model(tokens[:, 256:], cache=cache))
    # The four experts that are there are used before they are overwritten.
    assert model.flash.stats.misses - before <= 2 * (8 - 4)


def test_a_layer_that_is_held_whole_reads_nothing(stock, streamed, monkeypatch):
    expected = run(mlx_load_model(stock("qwen3_moe"))[0], 1)
    model = streamed(stock("qwen3_moe"), 8)

    class NoHost:
        def __getattr__(self, name):
            raise AssertionError(f"the host asked for np.{name}")

    def no_fetch(self, *args, **kwargs):
        raise AssertionError("a whole layer was fetched")

    monkeypatch.setattr(experts, "np", NoHost())
    monkeypatch.setattr(UnitSlots, "run", no_fetch)
    assert_same(run(model, 1), expected)
    assert model.flash.stats.bytes_read == 0


def test_one_layer_whole_and_one_not(stock, streamed):
    folder = stock("qwen3_moe")
    model = streamed(folder, 8, 7)
    assert_same(run(model, 2), run(mlx_load_model(folder)[0], 2))
    first, second = (layer.slots for layer in model.flash.layers)
    assert first.holds_all and not second.holds_all
    assert model.flash.stats.misses > 0


# --------------------------------------------------------------------- refusals


def refused(call, *words):
    with pytest.raises(FlashError) as caught:
        call()
    for word in words:
        assert str(word) in str(caught.value)


def test_a_model_without_experts(tmp_path):
    src = write_checkpoint(tmp_path / "llama", LLAMA)
    looked_for = ["llama", "SwitchGLU", "SwitchMLP", "mixture-of-experts"]
    refused(lambda: mlx_flash.load_model(src), src, *looked_for)
    dst = tmp_path / "dst"
    src = write_checkpoint(tmp_path / "mamba", MAMBA)
    looked_for = ["mamba", "SwitchGLU", "SwitchMLP", "dense FFNs"]
    refused(lambda: mlx_flash.convert(src, dst, progress=False), src, *looked_for)
    assert not dst.exists() and not dst.with_name("dst.partial").exists()


def test_a_model_type_that_nobody_knows(tmp_path):
    src = write_checkpoint(tmp_path / "src", QWEN3)
    config = json.loads((src / "config.json").read_text()) | {"model_type": "nope_moe"}
    (src / "config.json").write_text(json.dumps(config))
    refused(lambda: mlx_flash.load_model(src), "nope_moe", "not supported")
    dst = tmp_path / "dst"
    refused(lambda: mlx_flash.convert(src, dst, progress=False), "nope_moe")


def test_an_expert_tensor_that_is_missing(tmp_path):
    weights = dict(tree_flatten(make_weights(QWEN3).parameters()))
    lost = "model.layers.1.mlp.switch_mlp.down_proj.weight"
    first = {k: v for k, v in weights.items() if ".layers.1." not in k}
    rest = {k: v for k, v in weights.items() if ".layers.1." in k and k != lost}
    src = save(tmp_path / "src", QWEN3, first, rest)
    refused(lambda: mlx_flash.load_model(src), src, lost)
    dst = tmp_path / "dst"
    refused(lambda: mlx_flash.convert(src, dst, progress=False), lost)
    assert not dst.exists()


def test_shards_are_read_where_each_tensor_lies(tmp_path, streamed):
    weights = sorted(tree_flatten(make_weights(QWEN3).parameters()))
    # Also one layer's parts are spread over the shards.
    src = save(tmp_path / "src", QWEN3, *(dict(weights[i::3]) for i in range(3)))
    model = streamed(src, 2)
    assert len({e.path for layer in model.flash.layers for e in extents(layer)}) > 1
    assert_same(run(model, 1), run(mlx_load_model(src)[0], 1))


def extents(layer):
    store = layer.slots
    return store._reader._sources[store._source][0].extents


def test_a_shard_that_is_cut_short(tmp_path):
    src = write_checkpoint(tmp_path / "src", QWEN3)
    shard = src / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(lambda: mlx_flash.load_model(src), shard)


@pytest.mark.parametrize("form", ["in place", "converted"])
@pytest.mark.parametrize("how", ["size", "time", "gone"])
def test_a_file_rewritten_under_a_running_model(form, how, stock, flash, tmp_path):
    folder = stock("qwen3_moe") if form == "in place" else flash("qwen3_moe")
    folder = shutil.copytree(folder, tmp_path / "own")
    pattern = "model.safetensors" if form == "in place" else "ffn/layer_01*"
    (file,) = folder.glob(pattern)
    model = stream(folder, 1)
    try:
        run(model, 1)
        if how == "size":
            file.write_bytes(file.read_bytes() + b"\0")
        elif how == "time":
            file.write_bytes(file.read_bytes())
        else:
            file.unlink()
        refused(lambda: run(model, 1), file, "changed", "Load the model again")
    finally:
        model.flash.close()


def test_experts_stored_one_by_one_run_in_place_and_converted(tmp_path, streamed):
    src = write_original(tmp_path / "src", QWEN3)
    names = mx.load(str(src / "model.safetensors"))
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in names
    dst = mlx_flash.convert(src, tmp_path / "dst", progress=False)
    expected = run(mlx_load_model(src)[0], 1)
    for folder in (src, dst):
        for slots in (1, 4):
            assert_same(run(streamed(folder, slots), 1), expected)


def test_a_closed_model_says_so(stock):
    model = stream(stock("qwen3_moe"), 2)
    model.flash.close()
    refused(lambda: run(model, 1), "closed")
