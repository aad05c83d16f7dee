"""The worker: who waits, who has to go, and memory that gives way while nobody asks."""

import asyncio
import threading
import time

import pytest
from chat_model import write_chat_model
from serving import ask, complete, post_bytes, received, send_raw, served

import mlx_flash
from mlx_flash.server import Settings, open_server, worker
from mlx_flash.server.events import Done, Progress, Text
from mlx_flash.server.fields import Refused
from mlx_flash.server.request import Request

PROMPT = "Tom had a red ball and a blue kite. He liked to play with them in the park"


@pytest.fixture
def own_server(request):
    options = {"settings": Settings(port=0), "memory": "50%"}
    options |= getattr(request, "param", {})
    with open_server(str(mlx_flash.DEMO_MODEL), **options) as made, served(made):
        yield made


def gather(service, request):
    async def answer():
        return [event async for event in service.answer(request)]

    return asyncio.run(answer())


def wait_until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def test_events_of_an_answer_in_order(own_server):
    events = gather(own_server.worker, Request(prompt=PROMPT, max_tokens=5))
    kinds = [type(event) for event in events]
    assert kinds[0] is Progress and kinds[-1] is Done
    assert kinds == sorted(kinds, key=[Progress, Text, Done].index)
    assert events[-1].usage.completion_tokens == 5
    assert events[-1].reason == "length" and events[-1].stop_text is None
    assert not any(event.tokens for event in events if isinstance(event, Text))


def test_a_stop_text_is_named(own_server):
    whole = gather(own_server.worker, Request(prompt=PROMPT, max_tokens=9))
    text = "".join(event.text for event in whole if isinstance(event, Text))
    request = Request(prompt=PROMPT, max_tokens=9, stop=("zzz", text[4:7]))
    events = gather(own_server.worker, request)
    assert events[-1].reason == "stop" and events[-1].stop_text == text[4:7]
    found = "".join(event.text for event in events if isinstance(event, Text))
    assert found == text[: text.index(text[4:7])]


def test_the_servers_own_sampling_holds_where_a_request_says_nothing(own_server):
    service = own_server.worker
    plain = service._answering._sampler(Request(prompt="x").sampling)
    object.__setattr__(service.settings, "temperature", 5.0)
    drawn = service._answering._sampler(Request(prompt="x").sampling)
    assert plain.__name__ == "greedy_sampler" and drawn is not plain
    object.__setattr__(service.settings, "max_tokens", 3)
    assert gather(service, Request(prompt=PROMPT))[-1].usage.completion_tokens == 3


def test_too_many_that_wait_are_told_to_come_again(own_server, monkeypatch):
    monkeypatch.setattr(worker, "MAX_WAITING", 2)
    port, flash = own_server.port, own_server.worker.model.flash
    body = {"prompt": PROMPT, "max_tokens": 2}
    with flash._fence.lock:  # a step that takes long
        waiting = [send_raw(port, post_bytes(body)) for _ in range(2)]
        wait_until(lambda: own_server.worker.waiting == 2)
        status, answer, headers = ask(port, "/v1/completions", body)
        assert status == 503 and headers["Retry-After"] == "1"
        assert "2 requests wait" in answer["error"]["message"]
        assert ask(port, "/health")[0] == ask(port, "/v1/models")[0] == 200
    assert all(b" 200 " in received(connection) for connection in waiting)
    assert complete(port, PROMPT)
    wait_until(lambda: own_server.worker.waiting == 0)


def test_who_waits_hears_that_it_still_does(own_server, monkeypatch):
    monkeypatch.setattr(worker, "KEEPALIVE_S", 0.05)
    flash = own_server.worker.model.flash
    body = {"prompt": PROMPT, "max_tokens": 2, "stream": True}
    with flash._fence.lock:
        connection = send_raw(own_server.port, post_bytes(body))
        data = b""
        while data.count(b": keepalive") < 5:
            data += connection.recv(4096)
    assert b"[DONE]" in received(connection)


def test_a_worker_that_was_stopped_refuses(own_server):
    own_server.worker.end_answers()
    assert ask(own_server.port, "/health")[0] == 503
    body = {"prompt": PROMPT, "max_tokens": 2}
    status, answer, _ = ask(own_server.port, "/v1/completions", body)
    assert status == 500 and "stopped" in answer["error"]["message"]


def test_stopping_ends_an_answer_that_is_under_way(own_server):
    flash = own_server.worker.model.flash
    body = {"prompt": PROMPT, "max_tokens": 100, "stream": True}
    body["logit_bias"] = {"2": -100}  # no end of text
    connection = send_raw(own_server.port, post_bytes(body))
    wait_until(lambda: flash.run and flash.run.tokens)
    own_server.stop()
    assert b"The server was stopped" in received(connection)


# -------------------------------------------------------------- memory gives way


def kept(own_server):
    return len(own_server.worker.conversations)


def test_idle_conversations_stay_where_slots_can_give_way(own_server):
    port, pool = own_server.port, own_server.worker.model.flash.pool
    text = complete(port, PROMPT)
    wait_until(lambda: kept(own_server) == 1)
    less = pool.budget.total_bytes - 200_000
    pool.want(less)  # as the thread does that watches the machine
    wait_until(lambda: pool.budget.total_bytes == less)
    assert kept(own_server) == 1
    assert complete(port, PROMPT) == text


def test_more_memory_takes_nothing_away(own_server):
    pool = own_server.worker.model.flash.pool
    complete(own_server.port, PROMPT)
    wait_until(lambda: kept(own_server) == 1)
    more = pool.budget.total_bytes + 200_000
    pool.want(more)
    wait_until(lambda: pool.budget.total_bytes == more)
    assert kept(own_server) == 1


def test_idle_conversations_give_way_while_another_is_answered(own_server):
    flash = own_server.worker.model.flash
    complete(own_server.port, PROMPT)
    wait_until(lambda: kept(own_server) == 1)
    body = {"prompt": "The dog", "max_tokens": 100, "stream": True}
    body["logit_bias"] = {"2": -100}
    connection = send_raw(own_server.port, post_bytes(body))
    wait_until(lambda: flash.run and flash.run.tokens and kept(own_server) == 1)
    flash.pool.want(flash.pool.least_bytes)
    wait_until(lambda: kept(own_server) == 0)
    assert b"[DONE]" in received(connection)


@pytest.mark.parametrize(
    "limits", [{"prompt_cache_size": 1}, {"prompt_cache_bytes": 1}]
)
def test_kept_conversations_can_be_limited(limits):
    settings = Settings(port=0, **limits)
    with open_server(str(mlx_flash.DEMO_MODEL), "90%", settings) as made, served(made):
        for prompt in (PROMPT, PROMPT[::-1]):
            complete(made.port, prompt)
        wait_until(lambda: made.worker.waiting == 0)
        assert kept(made) == limits.get("prompt_cache_size", 0)


# -------------------------------------------------------------------------- options


def test_a_draft_changes_no_answer(tmp_path):
    folder = write_chat_model(tmp_path / "model")
    prompt = [5, 6, 7] * 10
    with open_server(str(folder), "1GB", Settings(port=0)) as made, served(made):
        expected = complete(made.port, prompt, 20)
        again = complete(made.port, [*prompt, 8, 9], 20)
    settings = Settings(port=0, num_draft_tokens=2)
    with open_server(str(folder), "1GB", settings, draft_model=str(folder)) as made:
        with served(made):
            assert complete(made.port, prompt, 20) == expected
            assert made.worker.model.flash.run.drafts.drafted
            assert complete(made.port, [*prompt, 8, 9], 20) == again


def test_a_quantised_kv_cache(own_server):
    settings = Settings(port=0, kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    demo = str(mlx_flash.DEMO_MODEL)
    with open_server(demo, "90%", settings) as made, served(made):
        assert complete(made.port, PROMPT)
        [entry] = made.worker.conversations._kept
        assert type(entry.cache[0]).__name__ == "QuantizedKVCache"


def test_another_chat_template_is_used():
    settings = Settings(
        port=0,
        chat_template="Once upon a time {{ where }} {{ messages[0].content }}",
        template_options={"where": "in Rome"},
    )
    demo = str(mlx_flash.DEMO_MODEL)
    with open_server(demo, "50%", settings) as made, served(made):
        body = {"messages": [{"role": "user", "content": "Tom"}], "max_tokens": 1}
        usage = ask(made.port, "/v1/chat/completions", body)[1]["usage"]
        tokens = made.worker.tokenizer.encode("Once upon a time in Rome Tom")[1:]
        assert usage["prompt_tokens"] == len(tokens)


def test_threads_of_a_stopped_server_are_gone():
    before = set(threading.enumerate())
    settings = Settings(port=0)
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made, served(made):
        complete(made.port, PROMPT)
    mine = {t for t in threading.enumerate() if "worker" in t.name} - before
    assert not mine


def test_what_cannot_be_answered_is_refused_before_the_first_event(own_server):
    with pytest.raises(Refused, match="has room for"):
        gather(own_server.worker, Request(prompt="word " * 3000))
    assert own_server.worker.waiting == 0
