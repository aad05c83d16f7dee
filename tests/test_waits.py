"""How often the host waits for MLX: each time a GPU stands still for 0.2 to 0.4 ms.

A hook sees every evaluation and every array that goes to NumPy. A wait is hard if
nobody had begun to compute what is waited for: MLX has nothing else to do then.
"""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from stock_checkpoints import stream
from test_interruptions import KINDS, PROMPT, STEP, make_folder, talk

LAYERS = 2  # of each tiny model
# kind → hard waits of a streamed layer for a token. What lies beside layers has waits
# of its own, between waves.
WAITS = {
    "neurons": 0,  # without predictors all are swept
    "predicted neurons": 1,
    "gated neurons": 0,
    "skipped neurons": 1,
    "experts in place": 1,
    "converted experts": 1,
    "blocks": 0,
}


class Hook:
    """Counts waits for arrays that were begun before, and for others."""

    def __init__(self, patch):
        self.hard = self.soft = 0
        self._begun = {}  # by id; the arrays are kept, so that no id comes twice
        evaluate, begin, to_numpy = mx.eval, mx.async_eval, np.asarray

        def note_eval(*args):
            self._wait(args)
            evaluate(*args)

        def note_begin(*args):
            self._note(args)
            begin(*args)

        def note_numpy(value, *args, **kwargs):
            if isinstance(value, mx.array) and self._note([value]):
                self.hard += 1
            return to_numpy(value, *args, **kwargs)

        patch.setattr(mx, "eval", note_eval)
        patch.setattr(mx, "async_eval", note_begin)
        patch.setattr(np, "asarray", note_numpy)
        for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
            patch.setattr(mx.array, name, self._method(getattr(mx.array, name)))

    def _method(self, method):
        def note(array, *args):
            if self._note([array]):
                self.hard += 1
            return method(array, *args)

        return note

    def _wait(self, args):
        found = [a for arg in args for a in leaves(arg)]
        if found:
            if self._note(found):
                self.hard += 1
            else:
                self.soft += 1

    def _note(self, args):
        """Whether something is new among them."""
        new = [a for arg in args for a in leaves(arg) if id(a) not in self._begun]
        self._begun.update((id(a), a) for a in new)
        return bool(new)


def leaves(value):
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)


@pytest.fixture(params=WAITS)
def made(request, tmp_path):
    return request.param, make_folder(request.param, tmp_path)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_token_waits_as_often_as_it_must_and_is_told(made, look_ahead, monkeypatch):
    name, folder = made
    kind = KINDS[name]
    if look_ahead not in kind.look_ahead:
        pytest.skip("there is nothing to guess")
    model = stream(folder, kind.slots[-1], look_ahead=look_ahead, skip=kind.skip)
    with monkeypatch.context() as patch:
        hook = Hook(patch)
        cache, _ = talk(model, (PROMPT, STEP))
        model.flash.stats.reset()
        hook.hard = 0
        logits = model(mx.array(STEP), cache=cache)
        assert hook.hard == WAITS[name] * LAYERS
    assert model.flash.stats.waits == WAITS[name] * LAYERS
    mx.eval(logits)
    model.flash.close()


def test_a_layer_held_whole_never_waits(made, monkeypatch):
    name, folder = made
    model = stream(folder, KINDS[name].units)
    cache = make_prompt_cache(model)
    with monkeypatch.context() as patch:
        hook = Hook(patch)
        logits = model(mx.array(STEP), cache=cache)
        assert hook.hard == hook.soft == 0
    assert model.flash.stats.waits == 0
    mx.eval(logits)
    model.flash.close()


def test_the_hook_sees_every_way_to_wait(monkeypatch):
    with monkeypatch.context() as patch:
        hook = Hook(patch)
        ways = [
            mx.eval,
            np.asarray,
            mx.array.item,
            lambda x: x.tolist(),
            bool,
            int,
            float,
        ]
        for i, wait in enumerate(ways, 1):
            wait(mx.ones(()) * i)
            assert hook.hard == i
        begun = mx.ones(3) * 2
        mx.async_eval([begun])
        mx.eval({"a": 1}, [begun])
        assert (hook.hard, hook.soft) == (len(ways), 1)
