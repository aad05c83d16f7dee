"""On a machine where waits cost something, models are loaded with whole layers."""

import json

import mlx.core as mx
import pytest
import stock_checkpoints as moe
from click.testing import CliRunner
from mlx_lm.models.cache import make_prompt_cache
from test_interruptions import PROMPT, STEP, make_folder, talk

import mlx_flash
from mlx_flash import DEMO_MODEL, cli
from mlx_flash.memory import whole
from mlx_flash.planning.plan import make_plan

LAYERS = 4
CONFIG = moe.QWEN3 | {"num_hidden_layers": LAYERS, "num_experts": 16}


@pytest.fixture
def waits_cost(monkeypatch):
    """What the engine reckons with on a Mac without a profile."""
    monkeypatch.setattr(whole, "on_metal", lambda: True)


def load(folder, memory, **options):
    return mlx_flash.load_model(folder, memory, context=64, **options)[0]


def whole_layers(model):
    return [layer.slots.holds_all for layer in model.flash.layers]


@pytest.fixture
def experts(tmp_path):
    return moe.write_checkpoint(tmp_path / "model", CONFIG)


def memory_for(folder, share, context=64):
    """The least memory with which so many of the units have slots."""
    plan = make_plan(folder, "1GB", context=context)
    low, high = plan.least_bytes, plan.best_bytes
    while high - low > 64:
        middle = (low + high) // 2
        if make_plan(folder, middle, context=context).held_share < share:
            low = middle
        else:
            high = middle
    return high


def test_a_layer_held_whole_does_not_wait(experts, waits_cost):
    model = load(experts, memory_for(experts, 0.7))
    held = whole_layers(model)
    assert 0 < sum(held) < LAYERS
    cache, _ = talk(model, (PROMPT, STEP))
    model.flash.stats.reset()
    mx.eval(model(mx.array(STEP), cache=cache))
    assert model.flash.stats.waits == LAYERS - sum(held)
    model.flash.close()


def test_where_waits_cost_nothing_every_layer_has_its_share(experts):
    model = load(experts, memory_for(experts, 0.7))
    slots = model.flash.budget.slots
    assert max(slots) - min(slots) <= 1 and not any(whole_layers(model))
    model.flash.close()


def test_what_is_computed_does_not_depend_on_the_division(experts, waits_cost):
    """Also after a prompt and a conversation for which slots give way."""
    calls = [[list(range(3, 60))], STEP, [list(range(30, 90))], STEP]
    results = []
    for share in (1.0, 0.7):
        model = load(experts, memory_for(experts, share))
        cache = make_prompt_cache(model)
        results.append([model(mx.array(ids), cache=cache) for ids in calls])
        mx.eval(results[-1])
        model.flash.close()
    for streamed, resident in zip(*results, strict=True):
        assert mx.array_equal(streamed, resident)


def test_a_plan_divides_as_loading_does(experts, waits_cost):
    memory = memory_for(experts, 0.7)
    plan = make_plan(experts, memory, context=64)
    model = load(experts, memory)
    assert plan.layers_held_whole == sum(whole_layers(model)) > 0
    assert plan.waits_per_token == LAYERS - plan.layers_held_whole
    model.flash.close()


@pytest.mark.parametrize("name", ["blocks", "neurons"])
def test_kinds_that_never_wait_keep_equal_shares(name, tmp_path, waits_cost):
    folder = make_folder(name, tmp_path)
    # So short a context that slots are what the memory is for.
    some = make_plan(folder, memory_for(folder, 0.7, context=8), context=8)
    assert 0.7 <= some.held_share < 1
    assert some.layers_held_whole == 0 and some.waits_per_token == 0


def test_predicted_neurons_wait_unless_nothing_is_predicted(waits_cost):
    """At 80 % the demo model has whole layers; with every neuron in order, none."""
    with mlx_flash.load(DEMO_MODEL, memory="80%", context=64) as (model, _):
        assert any(whole_layers(model)) and not all(whole_layers(model))
    options = dict(memory="80%", context=64, predictor=False)
    with mlx_flash.load(DEMO_MODEL, **options) as (model, _):
        assert not any(whole_layers(model))


def test_memory_is_kept_beside_whole_layers(waits_cost):
    for memory in ("50%", "60%", "80%", "95%"):
        with mlx_flash.load(DEMO_MODEL, memory=memory, context=64) as (model, _):
            budget = model.flash.budget
            parts = budget.resident_bytes + budget.predictor_bytes + budget.kv_bytes
            parts += budget.workspace_bytes + budget.slot_bytes
            assert parts == budget.total_bytes and budget.workspace_bytes > 0


@pytest.mark.slow
def test_a_trace_weighs_waits_too(tmp_path, waits_cost):
    text, path = tmp_path / "a.txt", tmp_path / "a.npz"
    text.write_text("Once there was a red dog. The dog saw a big red ball. " * 4)
    command = ["trace", "--text", str(text), "-m", "60", "-o", str(path)]
    assert CliRunner().invoke(cli.main, command).exit_code == 0
    options = dict(memory="75%", context=64, trace=path)
    with mlx_flash.load(DEMO_MODEL, **options) as (model, _):
        assert any(whole_layers(model))
    told = CliRunner().invoke(cli.main, ["replay", str(path), "--json"])
    found = json.loads(told.stdout)["divided_by_trace"]
    counts = [row["whole_layers"] for row in found]
    assert counts == sorted(counts) and counts[-1] > 0
    table = CliRunner().invoke(cli.main, ["replay", str(path)]).stdout
    assert "divided by the trace | whole layers |" in table
