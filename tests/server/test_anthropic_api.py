"""Anthropic's Messages API, as its own Python client sees it."""

import anthropic
import pytest
from fake_service import BREAKS, CALLED, FLASH, NAME, SAID, THOUGHT, FakeService, served
from fake_service import done as done_event

from mlx_flash.server.apis import anthropic as api
from mlx_flash.server.events import Text
from mlx_flash.server.fields import Refused

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}
HELLO = [{"role": "user", "content": "Hello"}]
THINK = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def server():
    service = FakeService()
    with served(api.routes(service)) as url:
        yield service, url


@pytest.fixture
def service(server):
    server[0].events = list(SAID)
    server[0].asked.clear()
    return server[0]


@pytest.fixture
def client(server):
    with anthropic.Anthropic(base_url=server[1], api_key="x", max_retries=0) as made:
        yield made.messages


def ask(client, **fields):
    return client.create(
        **({"model": NAME, "max_tokens": 20, "messages": HELLO} | fields)
    )


def test_an_answer_is_whole(service, client):
    answer = ask(
        client,
        system=[{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}],
        stop_sequences=["\n\n"],
        extra_body={"temperature": 0, "top_k": 1000, "top_p": 0.5},
    )
    [block] = answer.content
    assert block.type == "text" and block.text == "Paris."
    assert answer.role == "assistant" and answer.model == NAME
    assert answer.stop_reason == "end_turn" and answer.stop_sequence is None
    assert answer.usage.input_tokens == 8  # and 4 that were in a cache
    assert answer.usage.cache_read_input_tokens == 4
    assert answer.usage.output_tokens == 3
    assert answer.usage.model_extra["flash"] == FLASH
    asked = service.last
    assert asked.messages == [{"role": "system", "content": "Be brief."}, *HELLO]
    assert asked.max_tokens == 20 and asked.stop == ("\n\n",)
    assert asked.template_options == {"enable_thinking": False}
    sampling = asked.sampling
    assert sampling.temperature == 0 and sampling.top_p == 0.5
    assert sampling.top_k == service.limits.vocabulary - 1


def test_a_stream_has_the_events_of_the_real_one(server, service):
    import httpx

    body = {"model": NAME, "max_tokens": 20, "messages": HELLO, "stream": True}
    with httpx.Client(base_url=server[1]) as http:
        lines = http.post("/v1/messages", json=body).text.splitlines()
    names = [line[7:] for line in lines if line.startswith("event: ")]
    assert names == [
        "message_start",
        "ping",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_the_client_reads_the_stream(client, service):
    start, *_, delta, stop = ask(client, stream=True)
    assert start.type == "message_start" and start.message.usage.input_tokens == 12
    assert start.message.content == [] and start.message.stop_reason is None
    assert delta.delta.stop_reason == "end_turn" and delta.usage.output_tokens == 3
    assert delta.usage.model_extra["flash"] == FLASH
    assert stop.type == "message_stop"


def test_the_clients_own_stream_follows(client, service):
    service.events = list(CALLED)
    with client.stream(
        model=NAME, max_tokens=20, messages=HELLO, tools=[WEATHER]
    ) as stream:
        assert "".join(stream.text_stream) == "Let me see."
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    said, first, second = final.content
    assert said.text == "Let me see."
    assert first.id == "call_1" and first.input == {"city": "Paris"}
    assert second.name == "weather" and second.input == {"city": "Rome"}
    assert final.usage.input_tokens == 8
    whole = ask(client, tools=[WEATHER])
    assert [(x.type, x.id) for x in whole.content[1:]] == [
        ("tool_use", "call_1"),
        ("tool_use", "call_2"),
    ]
    assert whole.content[0].text == said.text
    assert whole.stop_reason == final.stop_reason


def test_thoughts_are_blocks_where_they_are_asked_for(client, service):
    service.events = list(THOUGHT)
    thought, said = ask(client, thinking=THINK).content
    assert thought.type == "thinking" and thought.thinking == "Hmm."
    assert thought.signature and said.text == "Paris."
    assert service.last.template_options == {"enable_thinking": True}
    with client.stream(
        model=NAME, max_tokens=20, messages=HELLO, thinking=THINK
    ) as stream:
        thought, said = stream.get_final_message().content
    assert thought.thinking == "Hmm." and thought.signature and said.text == "Paris."
    omitted = THINK | {"display": "omitted"}
    thought, said = ask(client, thinking=omitted).content
    assert thought.thinking == "" and thought.signature
    [said] = ask(client).content
    assert said.text == "Paris."


def test_calls_and_their_results_become_messages(client, service):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let me see."},
                {
                    "type": "tool_use",
                    "id": "a",
                    "name": "weather",
                    "input": {"city": "Paris"},
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "sun"},
                {
                    "type": "tool_result",
                    "tool_use_id": "b",
                    "content": [{"type": "text", "text": "no such city"}],
                    "is_error": True,
                },
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    ask(client, messages=messages, tools=[WEATHER])
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert service.last.messages == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "a", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "sun", "tool_call_id": "a", "name": "weather"},
        {"role": "tool", "content": "Error: no such city", "tool_call_id": "b"},
        {"role": "user", "content": "And now?"},
    ]
    function = {
        "name": "weather",
        "description": "Of a city.",
        "parameters": SCHEMA,
    }
    assert service.last.tools == [{"type": "function", "function": function}]


def test_tool_choice(client, service):
    ask(client, tools=[WEATHER], tool_choice={"type": "none"})
    assert service.last.tools is None
    service.events = list(CALLED)
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    answer = ask(client, tools=[WEATHER], tool_choice=choice)
    assert [block.type for block in answer.content] == ["text", "tool_use"]


@pytest.mark.parametrize(
    "event, reason, sequence",
    [
        (done_event("stop", "END"), "stop_sequence", "END"),
        (done_event("length", tokens=20), "max_tokens", None),
        (done_event("length"), "model_context_window_exceeded", None),
    ],
)
def test_why_an_answer_ended(client, service, event, reason, sequence):
    service.events = [Text("Pa"), event]
    answer = ask(client)
    assert answer.stop_reason == reason and answer.stop_sequence == sequence


def test_more_tokens_than_there_is_room_for_are_no_mistake(client, service):
    list(ask(client, max_tokens=32_000, stream=True))
    assert service.last.max_tokens == service.limits.tokens


def test_tokens_are_counted(client, service):
    assert client.count_tokens(model=NAME, messages=HELLO).input_tokens == 12
    assert service.last.messages == HELLO


def test_an_answer_that_fails(client, service):
    service.events = list(BREAKS)
    with pytest.raises(anthropic.InternalServerError) as caught:
        ask(client)
    error = {"type": "api_error", "message": "A read failed."}
    assert caught.value.body == {"type": "error", "error": error}
    with pytest.raises(anthropic.APIStatusError) as caught:
        list(ask(client, stream=True))
    assert caught.value.body == {"type": "error", "error": error}


def test_what_the_service_refuses_has_a_status_of_its_own(client, service):
    service.events = [Refused("The prompt is too long.")]
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match="too long"):
            ask(client, stream=stream)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number"),
        ({"messages": []}, "at least one message"),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": "Pa"}]},
            "must not be the assistant's",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "text alone",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "must be one of user"),
        ({"system": 3}, "system must be a text or a list"),
        ({"stop_sequences": [""]}, "must have 1 to 256 letters"),
        ({"tools": [{"type": "web_search_20250305"}]}, "no tools of its own"),
        ({"tool_choice": {"type": "any"}}, "nothing can make this model call a tool"),
        ({"thinking": {"type": "much"}}, "thinking.type must be one of"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "to a schema"),
        ({"extra_body": {"temperature": "hot"}}, "temperature must be a number"),
    ],
)
def test_what_is_refused(client, service, fields, says):
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, **fields)
    body = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert says in body["error"]["message"]
    assert not service.asked


def test_another_model_is_not_found(client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(client, model="claude")
    assert caught.value.body["error"]["type"] == "not_found_error"


def test_other_paths_get_a_sentence(client):
    with pytest.raises(anthropic.NotFoundError, match="batches is not there"):
        client.batches.list()
