"""A bar where somebody looks, one line where nobody does."""

import io
from types import SimpleNamespace

import pytest

from mlx_flash import progress
from mlx_flash.progress import Bar, bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stderr))
    return stderr


@pytest.fixture
def terminal(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stderr))
    return stderr


def test_a_log_gets_one_line(log):
    assert list(bars(range(3), "converting", unit="layer")) == [0, 1, 2]
    assert log.getvalue() == "converting: 3 layers\n"


def test_the_line_says_what_was_done_before(log):
    done = list(bars(range(2, 5), "converting", unit="layer", initial=2, total=5))
    assert done == [2, 3, 4]
    assert log.getvalue() == "converting: 5 layers, 2 of them done\n"


def test_bytes_are_said_as_such(log):
    Bar("loading", 12_345_678, unit="B").close()
    assert log.getvalue() == "loading: 12.3 MB\n"


@pytest.mark.parametrize("shown", [False, None])
def test_a_log_may_be_left_alone(log, shown):
    with Bar("loading", 10, shown) as bar:
        bar.advance(10)
    assert list(bars("ab", "x", shown)) == ["a", "b"]
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_time_that_is_left(terminal):
    with Bar("loading", 100, None, unit="B", delay=0) as bar:
        bar.advance(50)
        bar._drawn.refresh()
    assert "loading:  50%|" in terminal.getvalue() and "<" in terminal.getvalue()


def test_what_is_quick_draws_nothing(terminal):
    with Bar("loading", 100) as bar:
        bar.advance(100)
    assert "loading" not in terminal.getvalue()


def test_a_bar_whose_end_is_known_late(terminal):
    with Bar("reading the prompt", delay=0) as bar:
        bar.reach(0, 8)
        bar.reach(4, 8)
        bar._drawn.refresh()
        assert "4/8" in terminal.getvalue()
        bar.reach(8, 8)
        assert bar._drawn is None


def test_no_bar_where_none_is_wanted(terminal):
    assert list(bars("ab", "x", False, delay=0)) == ["a", "b"]
    assert terminal.getvalue() == ""
