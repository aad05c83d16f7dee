"""`verify --budget`: a model's answers at several budgets, and what is found amiss."""

import dataclasses

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_flash import DEMO_MODEL, FlashError
from mlx_flash.cli import main
from mlx_flash.same_output import Output, compare, output


def made(memory, tokens, logprobs, dtype="float32"):
    return Output(memory, 10, 0.5, dtype, tokens, np.array(logprobs, np.float32))


ROWS = [[-0.1, -2.0, -8.0], [-3.0, -0.2, -8.0]]


def test_two_budgets_of_the_demo_model_answer_alike():
    few = output(DEMO_MODEL, "45%", "Once upon a time", 8)
    many = output(DEMO_MODEL, "100%", "Once upon a time", 8)
    assert few.budget_bytes < many.budget_bytes and few.hit_rate < many.hit_rate
    agreed = compare([few, many])
    assert agreed.tokens == 8 and agreed.worst < 1e-2


def test_equal_answers_agree_bit_for_bit():
    agreed = compare([made("40%", [0, 1], ROWS), made("80%", [0, 1], ROWS)])
    assert (agreed.tokens, agreed.worst, agreed.tied) == (2, 0.0, False)


@pytest.mark.parametrize("place", [0, 1])
def test_another_output_is_found_at_whatever_token(place):
    one = made("40%", [0, 1], ROWS)
    logprobs = one.logprobs.copy()
    logprobs[place, 2] += 0.01
    other = dataclasses.replace(one, memory="80%", logprobs=logprobs)
    with pytest.raises(FlashError, match=f"token {place + 1} differ by 1e-03"):
        compare([one, other])


def test_a_tie_ends_the_comparison():
    one = made("40%", [0, 1], [[-0.5, -0.5000001, -8.0], [-3.0, -0.2, -8.0]])
    two = made("80%", [1, 1], [[-0.5000001, -0.5, -8.0], [0.0, 0.0, 0.0]])
    agreed = compare([one, two])
    assert (agreed.tokens, agreed.tied) == (0, True)


def test_nan_is_no_agreement():
    one = made("40%", [0, 1], ROWS)
    bad = one.logprobs.copy()
    bad[1] = np.nan
    with pytest.raises(FlashError, match="token 2"):
        compare([one, dataclasses.replace(one, logprobs=bad)])


def test_the_command():
    done = CliRunner().invoke(
        main, ["verify", "--budget", "45%", "--budget", "100%", "-m", "4"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1].startswith("ok  the same 4 tokens, to ")


def test_one_budget_compares_nothing():
    done = CliRunner().invoke(main, ["verify", "--budget", "45%"])
    assert done.exit_code == 2 and "give it twice" in done.output
