"""Reading early goes on where tokens come faster with it, and is tried again."""

import pytest

from mlx_flash.memory import trial as trial_module
from mlx_flash.memory.trial import LONG, TURN, TURNS, Trial


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(trial_module.time, "perf_counter", lambda: now[0])
    return now


def play(trial, clock, tokens, early_s, without_s):
    """Tokens that take so long; which of them were read early."""
    ways = []
    for _ in range(tokens):
        trial.next_token()
        ways.append(trial.on)
        clock[0] += early_s if trial.on else without_s
    return ways


@pytest.mark.parametrize("early_s, wins", [(0.8, True), (1.2, False), (0.99, False)])
def test_the_faster_way_goes_on(clock, early_s, wins):
    ways = play(Trial(), clock, LONG - 1, early_s, 1.0)
    assert sum(ways[: TURN * TURNS - 1]) == TURN * TURNS // 2
    assert set(ways[TURN * TURNS - 1 :]) == {wins}


def test_a_pause_does_not_count(clock):
    trial = Trial()
    ways = play(trial, clock, TURN + 1, 0.8, 1.0)
    assert ways[-1]
    clock[0] += 3600
    assert set(play(trial, clock, LONG - TURN - 2, 0.8, 1.0)[TURN * TURNS :]) == {True}


def test_it_is_tried_again(clock):
    trial = Trial()
    play(trial, clock, LONG, 0.8, 1.0)
    ways = play(trial, clock, LONG - 1, 1.2, 1.0)
    assert any(ways[: TURN * TURNS])
    assert not any(ways[TURN * TURNS + 1 :])
