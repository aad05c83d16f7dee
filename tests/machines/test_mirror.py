"""Whatever is done to a cache on rank 0, the copies become what it is."""

import copy
import json
from collections import deque

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)

from mlx_flash.errors import FlashError
from mlx_flash.machines.mirror import Copies, Mirror

DIMS = 32


def grow(cache, tokens, seed):
    """What a call does to a cache on every rank."""
    for i, entry in enumerate(cache):
        x = mx.random.normal((1, 2, tokens, DIMS), key=mx.random.key(seed + i))
        if isinstance(entry, CacheList):
            grow(entry.caches, tokens, seed + 100)
        elif isinstance(entry, ArraysCache):
            entry[0] = x if entry[0] is None else entry[0][:, :, :1] + x
        else:
            entry.update_and_fetch(x, x + 1)


def values(entry):
    """All that an entry holds, as plain values."""
    if isinstance(entry, mx.array):
        return entry.tolist()
    if isinstance(entry, (list, tuple)):
        return [values(item) for item in entry]
    if hasattr(entry, "__dict__"):
        return [type(entry).__name__, {k: values(v) for k, v in vars(entry).items()}]
    return entry


class Two:
    """Rank 0 and one that follows it."""

    def __init__(self):
        self.mirror, self.copies = Mirror(), Copies()
        self.sent = 0  # arrays

    def call(self, cache, tokens, seed):
        message, arrays = self.mirror.describe(cache)
        message = json.loads(json.dumps(message))
        self.sent += len(arrays)
        coming = deque(arrays)

        def brought(array, shape, dtype):
            got = coming.popleft()
            assert list(got.shape) == list(shape) and str(got.dtype).endswith(dtype)
            return mx.array(got)

        other = self.copies.apply(message, brought)
        assert values(other) == values(cache)
        grow(cache, tokens, seed)
        grow(other, tokens, seed)
        mx.eval([values(entry) for entry in ()])
        self.mirror.note(cache)
        return other


KINDS = {
    "plain": lambda: [KVCache(), KVCache()],
    "rotating": lambda: [RotatingKVCache(max_size=16, keep=2), KVCache()],
    "recurrent": lambda: [ArraysCache(2), KVCache()],
    "chunked": lambda: [ChunkedKVCache(8)],
    "nested": lambda: [CacheList(KVCache(), RotatingKVCache(max_size=8))],
}
DEEDS = st.lists(
    st.tuples(
        st.sampled_from(("call", "trim", "copy", "quantise", "drop", "new", "again")),
        st.integers(1, 6),
    ),
    max_size=14,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(deeds=DEEDS)
def test_copies_are_what_caches_are(kind, deeds):
    two = Two()
    caches = [KINDS[kind]()]
    two.call(caches[0], 5, 0)
    for step, (deed, number) in enumerate(deeds):
        cache = caches[number % len(caches)]
        if deed == "trim":
            for entry in cache:
                if entry.is_trimmable():
                    entry.trim(number)
        elif deed == "copy":
            caches.append(copy.deepcopy(cache))
        elif deed == "quantise" and all(type(entry) is KVCache for entry in cache):
            cache[:] = [entry.to_quantized(32, 8) for entry in cache]
        elif deed == "drop" and len(caches) > 1:
            caches.pop(number % len(caches))
            cache = caches[0]
        elif deed == "new":
            caches.append(KINDS[kind]())
            cache = caches[-1]
        two.call(cache, number, step)


def test_what_did_not_change_is_not_sent_again():
    two, cache = Two(), [KVCache(), KVCache()]
    for step in range(5):
        two.call(cache, 3, step)
    for entry in cache:
        entry.trim(4)
    two.call(cache, 2, 9)
    assert two.sent == 0
    two.call(copy.deepcopy(cache), 2, 10)
    assert two.sent == 4


def test_copies_of_caches_that_are_gone_go():
    two, cache = Two(), [KVCache()]
    two.call(cache, 3, 0)
    del cache
    two.call([KVCache()], 3, 1)
    assert len(two.copies._caches) == 1


def test_an_array_in_the_place_of_another_is_noticed():
    two, cache = Two(), [KVCache()]
    two.call(cache, 3, 0)
    cache[0].keys = cache[0].keys + 1
    assert two.call(cache, 3, 1)
    assert two.sent == 2


def test_what_a_refused_call_told_is_known():
    two, cache = Two(), [KVCache()]
    two.call(cache, 8, 0)
    cache[0].trim(4)
    message, _ = two.mirror.describe(cache)
    two.copies.apply(message, None)  # and no room: nothing was computed
    cache[0].offset = 8
    two.call(cache, 2, 1)
    cache.append(KVCache())
    cache[1].hook = object()
    cache[0].keys = cache[0].keys + 1
    for _ in range(2):
        with pytest.raises(FlashError):
            two.mirror.describe(cache)
    del cache[1]
    two.call(cache, 2, 2)


def test_what_cannot_be_sent_is_refused():
    cache = [KVCache()]
    cache[0].hook = object()
    with pytest.raises(FlashError, match="object in it cannot be used on several"):
        Mirror().describe(cache)
