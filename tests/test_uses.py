"""What else people do with an mlx-lm model works, or is refused by name."""

import gc
import os
import threading
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_load_model
from stock_checkpoints import QWEN3, stream, write_checkpoint
from test_interruptions import KINDS, PROMPT, make_folder

from mlx_flash import FlashError

TOKENS = mx.array(PROMPT)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """(kind, folder, logits) of a tiny model of each kind."""
    folder = make_folder(request.param, tmp_path_factory.mktemp("made"))
    kind = KINDS[request.param]
    model = stream(folder, kind.slots[-1])
    logits = np.array(model(TOKENS))
    model.flash.close()
    return kind, folder, logits


@pytest.fixture
def model(made):
    kind, folder, _ = made
    model = stream(folder, kind.slots[0])
    yield model
    model.flash.close()


def check(model, made):
    kind, _, expected = made
    diff = np.abs(np.array(model(TOKENS)) - expected).max() / np.abs(expected).max()
    assert diff <= kind.tolerance


def test_a_thread_may_end_without_evaluating_what_it_began(model, made):
    thread = threading.Thread(target=lambda: model(TOKENS))
    thread.start()
    thread.join()
    check(model, made)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: mx.eval(mx.compile(lambda tokens: model(tokens))(TOKENS)),
        lambda model: mx.eval(nn.value_and_grad(model, lambda: model(TOKENS).sum())()),
        lambda model: mx.eval(mx.vmap(lambda row: model(row[None]))(TOKENS)),
    ],
    ids=["compile", "gradients", "vmap"],
)
def test_what_cannot_go_through_flash_is_refused_by_name(use, model, made):
    with pytest.raises(FlashError, match="do not go through FFNs on flash"):
        use(model)
    check(model, made)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_on_flash_cannot_be_changed(strict, model, made):
    """`strict=False` would pass over them in silence, as adapters are loaded."""
    path = model.flash.manifest.layers[0].module
    part = model.flash.manifest.layers[0].parts[0].name.rpartition(".")[0]
    for name in ("weight", "lora_a"):
        weights = [(f"{path}.{part}.{name}", mx.zeros((2, 2)))]
        refused = (ValueError, f"{part}.{name}") if strict else (FlashError, "on flash")
        with pytest.raises(refused[0], match=refused[1]):
            model.load_weights(weights, strict=strict)
    check(model, made)


def test_resident_weights_may_be_quantised_after_loading(tmp_path):
    source = write_checkpoint(tmp_path / "source", QWEN3)
    plain, streamed = mlx_load_model(source)[0], stream(source, 2)
    nn.quantize(streamed, group_size=32, bits=8)
    nn.quantize(
        plain,
        group_size=32,
        bits=8,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and "switch_mlp" not in path
        ),
    )
    assert mx.array_equal(streamed(TOKENS), plain(TOKENS)).item()
    streamed.flash.close()


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("reloads", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_a_model_that_is_dropped_leaves_nothing_behind(made, reloads, closed):
    """Without a garbage collection, which may come long after the next model."""
    kind, folder, _ = made
    look_ahead = kind.look_ahead[-1]

    def use():
        model = stream(folder, kind.slots[0], look_ahead=look_ahead)
        mx.eval(model(TOKENS))
        if closed:
            model.flash.close()
        return weakref.ref(model.flash)

    def held():
        files = len(os.listdir("/dev/fd"))
        return mx.get_active_memory(), files, threading.active_count()

    use()
    gc.collect()
    gc.disable()
    try:
        before = held()
        alive = [use() for _ in range(reloads)]
        assert not any(flash() for flash in alive)
        mx.synchronize()
        assert held() == before
    finally:
        gc.enable()


def test_a_model_may_be_closed_while_another_thread_uses_it(made):
    kind, folder, expected = made
    for _ in range(5):
        model = stream(folder, kind.slots[0])
        mx.eval(model(TOKENS))
        ends = []

        def work(model=model, ends=ends):
            try:
                while True:
                    got = np.array(model(TOKENS))
                    diff = np.abs(got - expected).max() / np.abs(expected).max()
                    if not diff <= kind.tolerance:
                        ends.append(f"wrong by {diff}")
            except FlashError as error:
                ends.append(str(error))
            except Exception as error:  # told in the thread that can fail the test
                ends.append(repr(error))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        model.flash.close()
        for thread in threads:
            thread.join(30)
        assert ends == ["This model was closed. Load it again to use it."] * 2
