"""KV caches of several conversations: as many as fit, and the same answers."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from stock_checkpoints import NEMOTRON, QWEN3, write_checkpoint

import mlx_flash
from mlx_flash.memory.footprint import KV_STEP
from mlx_flash.server.conversations import Conversations, cache_bytes

CONTEXT = 1024  # of it a step and a layer of what grows are left free


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "experts", QWEN3)
    with mlx_flash.load_model(folder, "1GB", context=CONTEXT) as (model, _):
        yield model


@pytest.fixture
def conversations(model):
    return Conversations(model)


def numbered(i, length=200):
    """The tokens of conversation i."""
    return [3 + i] + [3 + (7 * k + i) % 90 for k in range(length - 1)]


def answered(model, conversations, tokens, **options):
    """The logits after `tokens`, and how many of them were not read again."""
    cache, count = conversations.begin(tokens, **options)
    logits = model(mx.array([tokens[count:]]), cache=cache)[:, -1]
    mx.eval(logits)
    conversations.keep(tokens, cache)
    return logits, count


def alone(model, tokens):
    return model(mx.array([tokens]), cache=make_prompt_cache(model))[:, -1]


def same(a, b):
    return mx.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_two_conversations_take_turns(model, conversations):
    for length, counts in ((200, {0}), (230, {200})):
        for i in (0, 1):
            tokens = numbered(i, length)
            logits, count = answered(model, conversations, tokens)
            assert count in counts
            assert same(logits, alone(model, tokens))


def test_what_was_used_longest_ago_goes(model, conversations):
    for i in (0, 1, 0, 2):
        answered(model, conversations, numbered(i, 300))
    counts = [conversations.begin(numbered(i, 300) + [5])[1] for i in (0, 2, 1)]
    assert counts == [300, 300, 0]


@pytest.mark.parametrize("length", [40, 100, 200, 400, 500])
def test_all_together_stay_within_the_reserve(model, conversations, length):
    room = model.flash.budget.kv_bytes
    most = 0
    for i in range(20):
        tokens = numbered(i, length)
        cache, count = conversations.begin(tokens)
        pieces = [tokens[i : i + 20] for i in range(0, length, 20)]
        for piece in [*pieces, *([token] for token in range(3, 12))]:
            model(mx.array([piece]), cache=cache)
            held = sum(entry.n_bytes for entry in conversations._kept)
            assert held + cache_bytes(cache) <= room
            conversations.grow(cache)
        conversations.keep([*tokens, *range(3, 12)], cache)
        most = max(most, len(conversations))
    step_bytes = room * KV_STEP // CONTEXT
    taken = -(-(length + 9) // KV_STEP) * step_bytes
    grown = -(-length // KV_STEP) * step_bytes + step_bytes
    assert most == 1 + (room - grown * 3 // 2) // taken


def test_a_shared_beginning_is_copied_if_there_is_room(model, conversations):
    first, second = numbered(0), numbered(0)[:150] + numbered(1, 40)
    answered(model, conversations, first)
    logits, count = answered(model, conversations, second)
    assert count == 150
    assert same(logits, alone(model, second))
    assert conversations.begin(first + [5])[1] == 200
    assert conversations.begin(second + [5])[1] == 190


def test_a_shared_beginning_is_taken_over_if_there_is_none(model, conversations):
    first, second = numbered(0, 600), numbered(0, 600)[:300] + numbered(1, 300)
    answered(model, conversations, first)
    logits, count = answered(model, conversations, second)
    assert count == 300 and len(conversations) == 1
    assert same(logits, alone(model, second))


def test_a_cache_that_cannot_be_cut_helps_only_who_goes_on(tmp_path):
    """Of a state space, with attention."""
    folder = write_checkpoint(tmp_path / "model", NEMOTRON)
    with mlx_flash.load_model(folder, "1GB", context=CONTEXT) as (model, _):
        conversations = Conversations(model)
        tokens = numbered(0)
        answered(model, conversations, tokens)
        assert conversations.begin(tokens[:150] + [5] * 20)[1] == 0
        logits, count = answered(model, conversations, tokens + [5, 6])
        assert count == 200
        assert same(logits, alone(model, tokens + [5, 6]))


def test_the_last_token_is_always_read(model, conversations):
    tokens = numbered(0)
    answered(model, conversations, tokens)
    assert conversations.begin(tokens)[1] == len(tokens) - 1


def test_a_few_common_tokens_are_not_worth_it(model, conversations):
    answered(model, conversations, numbered(0))
    assert conversations.begin(numbered(0)[:10] + numbered(1))[1] == 0
    assert conversations.begin(numbered(0) + [5], anew=True)[1] == 0


def test_what_was_read_of_a_prompt_is_kept(model, conversations):
    """A client that left in the middle of its prompt may ask again."""
    tokens = numbered(0)
    cache, _ = conversations.begin(tokens)
    model(mx.array([tokens[:120]]), cache=cache)
    conversations.keep(tokens, cache)
    logits, count = answered(model, conversations, tokens)
    assert count == 120
    assert same(logits, alone(model, tokens))
