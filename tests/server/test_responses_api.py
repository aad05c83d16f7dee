"""OpenAI's Responses API, as its own Python client sees it."""

import json

import openai
import pytest
from fake_service import BREAKS, CALLED, FLASH, NAME, SAID, THOUGHT, FakeService, served
from fake_service import done as done_event

from mlx_flash.server.apis import kept_responses, responses
from mlx_flash.server.events import Progress, Text, Token

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def server():
    service = FakeService()
    with served(responses.routes(service)) as url:
        yield service, url


@pytest.fixture
def service(server):
    server[0].events = list(SAID)
    server[0].asked.clear()
    return server[0]


@pytest.fixture
def client(server):
    url = server[1] + "/v1"
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as made:
        yield made.responses


def message(role, content):
    return {"role": role, "content": content}


def test_an_answer_is_whole(service, client):
    answer = client.create(
        model=NAME,
        input="Hello",
        instructions="Be brief.",
        max_output_tokens=9,
        temperature=0,
        metadata={"a": "b"},
    )
    assert answer.output_text == "Paris." and answer.status == "completed"
    assert answer.usage.input_tokens == 12 and answer.usage.output_tokens == 3
    assert answer.usage.input_tokens_details.cached_tokens == 4
    assert answer.usage.total_tokens == 15
    assert answer.usage.output_tokens_details.reasoning_tokens == 1
    assert answer.usage.model_extra["flash"] == FLASH
    assert answer.model == NAME and answer.metadata == {"a": "b"}
    assert answer.instructions == "Be brief." and answer.max_output_tokens == 9
    asked = service.last
    expected = [message("system", "Be brief."), message("user", "Hello")]
    assert asked.messages == expected
    assert asked.max_tokens == 9 and asked.sampling.temperature == 0
    assert asked.tools is None and asked.template_options == {}


def test_a_stream_has_the_events_of_the_real_one(client, service):
    events = list(client.create(model=NAME, input="Hello", stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(10))
    assert events[0].response.status == "in_progress"
    assert events[2].item.content == [] and events[2].item.status == "in_progress"
    assert events[3].part.text == ""
    assert [event.delta for event in events[4:6]] == ["Pa", "ris."]
    assert events[6].text == events[7].part.text == "Paris."
    assert events[-1].response.output_text == "Paris."


def test_the_clients_own_stream_follows(client, service):
    service.events = list(CALLED)
    with client.stream(model=NAME, input="Hello", tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == "Let me see."
    calls = final.output[1:]
    assert [call.name for call in calls] == ["weather", "weather"]
    assert json.loads(calls[1].arguments) == {"city": "Rome"}


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_an_item_of_its_own(client, service, stream):
    service.events = list(THOUGHT)
    answer = client.create(
        model=NAME, input="Hello", reasoning={"effort": "low"}, stream=stream
    )
    if stream:
        events = list(answer)
        answer = events[-1].response
        deltas = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
        assert deltas == ["Hm", "m."]
    thought, said = answer.output
    assert thought.type == "reasoning" and thought.content[0].text == "Hmm."
    assert said.content[0].text == answer.output_text == "Paris."
    options = {"enable_thinking": True, "reasoning_effort": "low"}
    assert service.last.template_options == options


def test_no_effort_switches_thinking_off(client, service):
    client.create(model=NAME, input="Hello", reasoning={"effort": "none"})
    assert service.last.template_options == {"enable_thinking": False}


def test_calls_and_their_outputs_become_messages(client, service):
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        {
            "type": "function_call",
            "call_id": "a",
            "name": "weather",
            "arguments": '{"city": "Paris"}',
        },
        {"type": "function_call", "call_id": "b", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "b", "output": "noon"},
        {
            "type": "function_call_output",
            "call_id": "a",
            "output": [{"type": "input_text", "text": "sun"}],
        },
    ]
    client.create(model=NAME, instructions="Help.", input=items, tools=[WEATHER])

    def call(id, name, arguments):
        function = {"name": name, "arguments": arguments}
        return {"id": id, "type": "function", "function": function}

    assert service.last.messages == [
        message("system", "Help.\n\nBe brief."),
        message("user", "Weather?"),
        message("assistant", "")
        | {
            "reasoning_content": "Hm.",
            "tool_calls": [
                call("a", "weather", '{"city": "Paris"}'),
                call("b", "time", "{}"),
            ],
        },
        message("tool", "noon") | {"tool_call_id": "b", "name": "time"},
        message("tool", "sun") | {"tool_call_id": "a", "name": "weather"},
    ]
    function = {k: v for k, v in WEATHER.items() if k != "type"}
    assert service.last.tools == [{"type": "function", "function": function}]


def test_tool_choice_none_leaves_the_tools_out(client, service):
    client.create(model=NAME, input="Hi", tools=[WEATHER], tool_choice="none")
    assert service.last.tools is None


def test_one_call_at_a_time(client, service):
    service.events = list(CALLED)
    answer = client.create(
        model=NAME, input="Hi", tools=[WEATHER], parallel_tool_calls=False
    )
    assert [item.type for item in answer.output] == ["message", "function_call"]


def test_too_many_tokens_leave_it_incomplete(client, service):
    service.events = [Text("Pa"), done_event("length")]
    answer = client.create(model=NAME, input="Hello", max_output_tokens=1000)
    assert answer.status == "incomplete" and answer.output_text == "Pa"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert service.last.max_tokens == service.limits.tokens
    *_, last = client.create(model=NAME, input="Hello", stream=True)
    assert last.type == "response.incomplete"


def test_log_probabilities(client, service):
    token = Token(5, "Pa", -0.5, ((5, "Pa", -0.5), (6, "Ro", -1.5)))
    service.events = [Progress(1, 1), Text("Pa", (token,)), done_event()]
    include = ["message.output_text.logprobs"]
    answer = client.create(model=NAME, input="Hi", include=include, top_logprobs=2)
    [found] = answer.output[0].content[0].logprobs
    assert found.token == "Pa" and found.logprob == -0.5 and found.bytes == [80, 97]
    assert [top.token for top in found.top_logprobs] == ["Pa", "Ro"]
    assert service.last.top_logprobs == 2
    client.create(model=NAME, input="Hi", include=include)
    assert service.last.top_logprobs == 0


def test_a_conversation_goes_on_from_a_kept_answer(client, service):
    service.events = list(CALLED)
    first = client.create(model=NAME, input="Weather?", instructions="Once.")
    assert client.retrieve(first.id) == first
    service.events = list(SAID)
    output = {"type": "function_call_output", "call_id": "call_1", "output": "sun"}
    *_, last = client.create(
        model=NAME, input=[output], previous_response_id=first.id, stream=True
    )
    roles = [m["role"] for m in service.last.messages]
    assert roles == ["user", "assistant", "tool"]
    assert service.last.messages[1]["content"] == "Let me see."
    assert len(service.last.messages[1]["tool_calls"]) == 2
    second = last.response
    client.create(model=NAME, input="And?", previous_response_id=second.id)
    roles = [m["role"] for m in service.last.messages]
    assert roles == ["user", "assistant", "tool", "assistant", "user"]
    client.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="There is no response"):
        client.retrieve(first.id)


def test_store_false_keeps_nothing(client, service):
    answer = client.create(model=NAME, input="Hi", store=False)
    with pytest.raises(openai.NotFoundError):
        client.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError, match="Send the whole conversation"):
        client.create(model=NAME, input="Hi", previous_response_id=answer.id)


def test_what_was_used_longest_ago_is_dropped():
    kept = kept_responses.KeptResponses(most_bytes=100)
    for id in "abc":
        kept.keep({"id": id, "text": "x" * 20}, [])
        kept.find("a")
    assert kept.find("a") and kept.find("c") and kept.find("b") is None
    kept.keep({"id": "d", "text": "x" * 200}, [])
    assert kept.find("d") is None and kept.find("a")
    assert kept.nbytes <= 100


def test_tokens_are_counted(client, service):
    counted = client.input_tokens.count(model=NAME, input="Hello")
    assert counted.input_tokens == 12
    assert service.last.messages == [message("user", "Hello")]


def test_an_answer_that_fails(client, service):
    service.events = list(BREAKS)
    with pytest.raises(openai.InternalServerError, match="A read failed"):
        client.create(model=NAME, input="Hello")
    *_, last = client.create(model=NAME, input="Hello", stream=True)
    assert last.type == "response.failed"
    assert last.response.error.message == "A read failed."
    assert last.response.status == "failed"


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"input": []}, "at least one item"),
        ({"input": [{"type": "web_search_call"}]}, "text alone"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "send the item itself"),
        ({"input": [message("user", [{"type": "input_image"}])]}, "text alone"),
        ({"input": [message("tool", "x")]}, "must be one of user, assistant"),
        (
            {
                "input": [
                    {
                        "type": "function_call",
                        "call_id": "a",
                        "name": "f",
                        "arguments": "3",
                    }
                ]
            },
            "JSON object",
        ),
        ({"background": True}, "background is not possible here"),
        ({"conversation": "c"}, "use previous_response_id"),
        ({"truncation": "auto"}, "truncation can only be disabled"),
        ({"text": {"format": {"type": "json_object"}}}, "to a schema"),
        ({"tools": [{"type": "web_search"}]}, "no tools of its own"),
        ({"tool_choice": "required"}, "nothing can make this model call a tool"),
        ({"temperature": 1000}, "temperature must be a number from 0 to 100"),
        ({"max_output_tokens": 0}, "max_output_tokens must be a whole number"),
        ({"metadata": {"a": 3}}, "metadata.a must be text"),
    ],
)
def test_what_is_refused(client, service, fields, says):
    with pytest.raises(openai.BadRequestError) as caught:
        client.create(**({"model": NAME, "input": "Hello"} | fields))
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert says in body["message"]
    assert not service.asked


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt'"):
        client.create(model="gpt", input="Hello")


def test_other_paths_get_a_sentence(client):
    with pytest.raises(openai.NotFoundError, match="input_items is not there"):
        client.input_items.list("resp_1")
