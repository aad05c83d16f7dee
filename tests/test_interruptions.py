"""A model that was interrupted anywhere goes on as if nothing had happened.

A trace function raises an exception before one of the lines that mlx_flash executes,
where Ctrl-C may raise one too. Afterwards the same model must give the logits that an
undisturbed model gives. Point n of a call is the n-th line that the call executes.
The fast test takes one point of each of many lines. The slow one takes every line that
is executed, in up to three situations.
"""

import faulthandler
import json
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product

import conftest
import mlx.core as mx
import numpy as np
import pytest
import stock_checkpoints
from mlx_lm.models.cache import make_prompt_cache
from stock_checkpoints import LLAMA, QWEN3, stream

import mlx_flash
from mlx_flash.layers import lookup
from mlx_flash.memory import beside

STEP, NEXT_STEP = ((11,),), ((42,),)
PROMPT = ((84, 63, 64, 73, 24, 32, 20, 6),)  # tokens that need every unit of a layer
# What a model that was just loaded is asked before, and the call that is interrupted
MOMENTS = {
    "first step": ((), STEP),
    "first prompt": ((), PROMPT),
    "second step": ((PROMPT, STEP), NEXT_STEP),
    "second prompt": ((PROMPT, STEP), PROMPT),
}
ERRORS = KeyboardInterrupt, RuntimeError
SAMPLED_LINES = 40  # of each kind: 15 seconds for all kinds
HANG_S = 120  # thousands of times what one point takes


@dataclass(frozen=True)
class Kind:
    """A kind of unit, and the ways in which its models are loaded.

    `units` and `slots` are those of each layer. Most steps fit into the larger number
    of slots, where a step does not need every unit. `tolerance` is relative to the
    largest logit: sums depend on what was in the slots, experts are equal bit for bit.
    """

    units: int
    slots: tuple[int, ...]
    look_ahead: tuple[bool, ...]
    tolerance: float
    skip: float | None = None


KINDS = {
    "neurons": Kind(24, (8, 20), (False,), 1e-5),
    "predicted neurons": Kind(24, (8, 20), (False, True), 1e-5),
    "gated neurons": Kind(24, (8, 20), (False,), 1e-5),
    "skipped neurons": Kind(24, (8, 20), (False,), 1e-5, skip=0.5),
    "experts in place": Kind(8, (2, 5), (False, True), 0),
    "converted experts": Kind(8, (2, 5), (False, True), 0),
    "experts and rows": Kind(8, (2, 5), (False,), 0),
    "experts and blocks": Kind(8, (2, 5), (False,), 1e-5),
    "blocks": Kind(11, (4, 9), (False,), 1e-5),
}
# Experts beside a dense FFN of eleven blocks
SHARED = QWEN3 | dict(model_type="qwen2_moe", shared_expert_intermediate_size=11 * 241)
TABLE_SLOTS = 3  # of embeddings: a prompt looks eight up


@dataclass(frozen=True)
class Situation:
    """How a model is loaded, and at which moment it is interrupted."""

    slots: int
    look_ahead: bool
    native: bool
    moment: str


def make_folder(name, base):
    options = {}
    if name == "blocks":
        # Eleven is prime: an eighth is the most that a block may hold of a layer.
        config = LLAMA | {"intermediate_size": 11 * 241}
        source = stock_checkpoints.write_checkpoint(base / "source", config)
    elif name == "experts and blocks":
        source = stock_checkpoints.write_checkpoint(base / "source", SHARED)
        options = {"blocks": True}
    elif name in ("gated neurons", "skipped neurons"):
        config = LLAMA | {"intermediate_size": 24}
        source = stock_checkpoints.write_checkpoint(base / "source", config)
        options = {"skippable": True, "calibration_tokens": 256}
    elif "experts" in name:
        source = stock_checkpoints.write_checkpoint(base / "source", QWEN3)
    else:
        source = conftest.write_checkpoint(base / "source", ffn_dim=24)
        options = {"unit": "neuron", "rank": 0}
        if name == "predicted neurons":
            options |= {"rank": 8, "calibration_tokens": 256}
    if name == "experts in place":
        return source
    folder = mlx_flash.convert(source, base / "flash", progress=False, **options)
    manifest = json.loads((folder / "flash.json").read_text())
    assert {layer["units"] for layer in manifest["layers"]} == {KINDS[name].units}
    return folder


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """The name of a kind, and the folder of a tiny model of it."""
    name = request.param
    with pytest.MonkeyPatch.context() as patch:
        if name == "experts and rows":
            patch.setattr(lookup, "LEAST_TABLE_BYTES", 1)
            patch.setattr(beside, "TABLE_SLOTS", TABLE_SLOTS)
        folder = make_folder(name, tmp_path_factory.mktemp("made"))
        assert ((folder / "ffn/table_00.safetensors").exists()) == ("rows" in name)
        yield name, folder


@pytest.fixture
def limit_time(capfd):
    """limit_time(): from now on a hang shows where it is, and ends the run."""
    with capfd.disabled():
        stderr = os.dup(sys.__stderr__.fileno())
    yield lambda: faulthandler.dump_traceback_later(HANG_S, exit=True, file=stderr)
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)


class Interruption:
    """Notes every line that mlx_flash executes, and raises `error` before one of them.

    A line belongs to the module whose globals it uses: the functions that dataclasses
    generate lie in no file. `places` has (module, line number) of each line so far,
    `swallowed` counts exceptions that came where Python raises none: in a finalizer.
    """

    def __init__(self, point=None, error=None):
        self.point, self.error = point, error
        self.places = []
        self.swallowed = 0

    def __enter__(self):
        self._before = sys.gettrace(), sys.unraisablehook
        sys.unraisablehook = self._swallow
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before[0])
        sys.unraisablehook = self._before[1]

    def _call(self, frame, event, arg):
        name = frame.f_globals.get("__name__", "")
        return self._line if name.split(".")[0] == "mlx_flash" else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.places.append((frame.f_globals["__name__"], frame.f_lineno))
            if len(self.places) == self.point:
                raise self.error
        return self._line

    def _swallow(self, unraisable):
        self.swallowed += 1


def logits(model, tokens, cache):
    result = model(mx.array(tokens), cache=cache)
    mx.eval(result)
    return np.array(result)


def talk(model, calls):
    """A new KV cache after `calls`, and the logits of the last one."""
    cache, result = make_prompt_cache(model), None
    for tokens in calls:
        result = logits(model, tokens, cache)
    return cache, result


class Wrong(Exception):
    """Logits differ from those of a model that nobody disturbed."""


class Trial:
    """Interrupts models of one kind and counts what becomes of them."""

    def __init__(self, name, folder):
        self.folder = folder
        self.kind = KINDS[name]
        self.counts = Counter()
        self.faults = []
        self.last_place = None
        undisturbed = self.load(Situation(self.kind.slots[-1], False, False, ""))
        calls = [(*before, tokens) for before, tokens in MOMENTS.values()]
        calls.append((PROMPT, STEP))
        self.expected = {c: talk(undisturbed, c)[1] for c in calls}
        undisturbed.flash.close()

    def load(self, situation):
        options = {"look_ahead": situation.look_ahead, "native": situation.native}
        return stream(self.folder, situation.slots, skip=self.kind.skip, **options)

    def situations(self, native):
        """All that there are with this reader: none if it was not built."""
        try:
            self.load(Situation(1, False, native, "")).flash.close()
        except mlx_flash.FlashError as error:
            if "C reader is not built" not in str(error):
                raise
            return []
        options = product(self.kind.slots, self.kind.look_ahead, [native], MOMENTS)
        return [Situation(*option) for option in options]

    def places(self, situation):
        """(module, line number) of every point of the call."""
        before, tokens = MOMENTS[situation.moment]
        model = self.load(situation)
        cache, _ = talk(model, before)
        with Interruption() as nothing:
            logits(model, tokens, cache)
        model.flash.close()
        return nothing.places

    def judge(self, situation, point, error_class, same_cache):
        """Interrupt a call at a point, and count what comes of it."""
        self.counts["points"] += 1
        try:
            self.interrupt(situation, point, error_class("interrupted"), same_cache)
            return
        except Wrong as error:
            fault = f"wrong {error}"
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and not error.args:
                raise  # somebody at the keyboard
            fault = f"stuck: {error!r}"
        self.counts[fault[:5]] += 1
        where = f"{self.last_place}, point {point} of {situation}, {same_cache=}"
        self.faults.append(f"{fault} after {error_class.__name__} at {where}")

    def interrupt(self, situation, point, error, same_cache):
        before, tokens = MOMENTS[situation.moment]
        model = self.load(situation)
        try:
            cache, _ = talk(model, before)
            offsets = [entry.offset for entry in cache]
            result = self.call_until(point, error, model, tokens, cache)
            if result is not None:
                self.compare((*before, tokens), result)
            elif same_cache:
                for entry, offset in zip(cache, offsets, strict=True):
                    entry.trim(entry.offset - offset)
                self.compare((*before, tokens), logits(model, tokens, cache))
            cache, result = talk(model, (PROMPT,))
            self.compare((PROMPT,), result)
            self.compare((PROMPT, STEP), logits(model, STEP, cache))
        finally:
            # So far it kept the interrupted frames alive, as interactive Python does.
            error.__traceback__ = None
            model.flash.close()

    def call_until(self, point, error, model, tokens, cache):
        """Logits, or None if the error came out of the call."""
        with Interruption(point, error) as interruption:
            try:
                result = logits(model, tokens, cache)
            except type(error) as caught:
                if caught is not error:
                    raise
                result = None
        self.last_place = interruption.places[-1]
        self.counts["hit"] += result is None
        self.counts["swallowed"] += interruption.swallowed
        return result

    def compare(self, calls, actual):
        expected = self.expected[calls]
        diff = np.abs(actual - expected).max() / np.abs(expected).max()
        if not diff <= self.kind.tolerance:  # also where it is no number
            raise Wrong(f"by {diff:.1g}")

    def end(self):
        """Say what was counted, and fail if anything was wrong."""
        counts = ", ".join(f"{n:,} {what}" for what, n in self.counts.items())
        print(counts)
        if self.faults:
            pytest.fail("\n".join([counts, *self.faults[:20]]), pytrace=False)
        assert self.counts["hit"] > 0.9 * self.counts["points"], counts


def test_after_an_interruption_at_some_lines(made, limit_time):
    """Each line at one of its points, in one of the situations that execute it."""
    limit_time()
    trial = Trial(*made)
    chance = random.Random(1)
    points = {}
    for situation in trial.situations(True) + trial.situations(False):
        for point, place in enumerate(trial.places(situation), 1):
            points.setdefault(place, []).append((situation, point))
    lines = chance.sample(sorted(points), min(SAMPLED_LINES, len(points)))
    for i, line in enumerate(lines):
        limit_time()
        trial.judge(*chance.choice(points[line]), ERRORS[i % 2], i % 3 == 0)
    trial.end()


@pytest.mark.slow
@pytest.mark.parametrize("error_class", ERRORS)
@pytest.mark.parametrize("native", [True, False], ids=["C", "Python"])
def test_after_an_interruption_at_every_line(made, native, error_class, limit_time):
    """Each line that is executed, in some of the situations that execute it."""
    trial = Trial(*made)
    chance = random.Random(1)
    points = {}
    for situation in trial.situations(native) or pytest.skip("no C reader"):
        in_this = {}
        for point, place in enumerate(trial.places(situation), 1):
            in_this.setdefault(place, []).append(point)
        for place, executed in in_this.items():
            points.setdefault(place, []).append((situation, chance.choice(executed)))
    trial.counts["lines"] = len(points)
    for executed in points.values():
        for situation, point in chance.sample(executed, min(3, len(executed))):
            limit_time()
            trial.judge(situation, point, error_class, point % 3 == 0)
    trial.end()
