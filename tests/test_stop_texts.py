"""Stop texts are found however they lie in pieces, and nothing else is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.stop_texts import StopTexts

ABC = st.text("ab ", min_size=1, max_size=4)


@given(st.lists(st.text("ab ", max_size=3)), st.lists(ABC, max_size=3))
def test_the_text_before_the_first_stop_text(pieces, words):
    text = "".join(pieces)
    stop = StopTexts(tuple(words))
    told = ""
    for piece in pieces:
        told += stop.take(piece)
        assert text.startswith(told)
        if stop.found is not None:
            break
    else:
        told += stop.take("", last=True)
    if stop.found is None:
        assert told == text and not any(word in text for word in words)
    else:
        assert stop.found in words and text.startswith(told + stop.found)
        assert not any(word in told for word in words)


@pytest.mark.parametrize("piece", ["x", "xend", "xen"])
def test_only_what_may_begin_a_stop_text_is_held_back(piece):
    assert StopTexts(("end",)).take(piece) == "x"
