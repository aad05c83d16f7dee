"""Whatever JSON a client sends, it gets an answer or an error in the API's shape."""

import copy
import json

import anthropic.types as anthropic_types
import ollama
import openai.types.responses as openai_types
import pytest
from fake_service import CALLED, NAME, SAID, THOUGHT, FakeService, application
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from mlx_flash.server.apis import anthropic, responses
from mlx_flash.server.apis import ollama as ollama_api
from mlx_flash.server.events import Done, Progress, Reasoning, Text, ToolCall, Usage

ROUTES = (responses.routes, anthropic.routes, ollama_api.routes)
# Words that have a meaning somewhere, so that what is made of them gets far.
WORDS = st.sampled_from(
    """user assistant system developer tool message text input_text output_text image
    function function_call function_call_output reasoning thinking tool_use tool_result
    auto none enabled disabled custom low weather a {} {"a":1} latest object
    """.split()
    + [NAME, "", "\ud800", "é\n", '{"a": NaN}']
)
FIELDS = st.sampled_from(
    """model messages input prompt system instructions role content type text name id
    call_id tool_use_id arguments output function tools tool_choice parameters
    input_schema description options temperature top_p top_k seed stop num_predict think
    thinking images tool_calls tool_call_id tool_name stop_sequences max_tokens
    max_output_tokens stream store metadata include top_logprobs logprobs raw format
    reasoning effort output_config display is_error parallel_tool_calls keep_alive
    previous_response_id disable_parallel_tool_use summary context suffix template
    """.split()
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([2**70, -(2**70), 1e300, 0.5])
    | WORDS
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=5)
    ),
    max_leaves=25,
)
TEXT = {"type": "text", "text": "Hello"}
USER = {"role": "user", "content": "Hello"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}
RESPONSE = {
    "model": NAME,
    "instructions": "Be brief.",
    "input": [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "function_call", "call_id": "a", "name": "b", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "sun"},
    ],
    "tools": [{"type": "function", **WEATHER}],
    "tool_choice": "auto",
    "include": ["message.output_text.logprobs"],
    "metadata": {"a": "b"},
    "reasoning": {"effort": "low"},
    "text": {"format": {"type": "text"}},
    "temperature": 0,
    "stream": False,
}
MESSAGE = {
    "model": NAME,
    "max_tokens": 9,
    "system": [TEXT],
    "messages": [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": ""},
                TEXT,
                {"type": "tool_use", "id": "a", "name": "b", "input": {"c": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [TEXT]},
                TEXT,
            ],
        },
    ],
    "tools": [{"name": "weather", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "display": "omitted"},
    "stop_sequences": ["END"],
    "top_k": 3,
    "stream": False,
}
OPTIONS = {"temperature": 0, "seed": 1, "stop": ["END"], "num_predict": 9}
CHAT = {
    "model": NAME,
    "messages": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "thinking": "Hm",
            "tool_calls": [{"function": {"name": "a", "arguments": {"b": 1}}}],
        },
        {"role": "tool", "content": "sun", "tool_name": "a"},
    ],
    "tools": [{"type": "function", "function": WEATHER}],
    "options": OPTIONS,
    "think": True,
    "stream": False,
}
PROMPT = {"prompt": "Hello", "system": "Be brief.", "options": OPTIONS, "raw": False}
GENERATE = {"model": NAME, **PROMPT, "stream": False}


def places(value, place=()):
    """Where something stands in a body."""
    inner = {}
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    for key, x in inner:
        yield (*place, key)
        yield from places(x, (*place, key))


@st.composite
def near(draw, right):
    """A right body in which up to three things are exchanged for others, or added."""
    body = copy.deepcopy(right)
    for _ in range(draw(st.integers(0, 3))):
        *way, last = draw(st.sampled_from(list(places(body))))
        at = body
        for key in way:
            at = at[key]
        if isinstance(at, dict) and draw(st.booleans()):
            last = draw(FIELDS)
        at[last] = draw(VALUES)
    if draw(st.booleans()):
        body["stream"] = True
    return body


EVENTS = st.lists(
    st.sampled_from(
        [
            Progress(1, 2),
            Text(""),
            Text("Pa"),
            Text("\ud800"),
            Reasoning("Hm"),
            Reasoning(""),
            ToolCall("a", "weather", "{}"),
            ToolCall("b", "", ""),
        ]
    ),
    max_size=6,
).map(lambda events: [*events, Done("stop", Usage(3, 1, 2))])


@pytest.fixture(scope="module")
def made():
    service = FakeService()
    routes = [route for make in ROUTES for route in make(service)]
    with TestClient(application(routes)) as client:
        yield service, client


def check_openai(answer):
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert "event: response.completed" in answer.text
    else:
        openai_types.Response.model_validate(answer.json())


def check_anthropic(answer):
    if answer.status_code != 200:
        error = anthropic_types.ErrorResponse.model_validate(answer.json())
        assert error.error.message
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert "event: message_stop" in answer.text
    elif "input_tokens" not in answer.json():
        anthropic_types.Message.model_validate(answer.json())


def check_ollama(answer):
    if answer.status_code != 200:
        assert set(answer.json()) == {"error"} and answer.json()["error"]
        return
    lines = [json.loads(line) for line in answer.text.splitlines()]
    if "message" in lines[-1]:
        assert lines[-1]["done"] is True
        ollama.ChatResponse.model_validate(lines[-1])
    elif "response" in lines[-1]:
        assert lines[-1]["done"] is True
        ollama.GenerateResponse.model_validate(lines[-1])


ENDPOINTS = [
    ("/v1/responses", RESPONSE, check_openai),
    ("/v1/messages", MESSAGE, check_anthropic),
    ("/v1/messages/count_tokens", MESSAGE, check_anthropic),
    ("/api/chat", CHAT, check_ollama),
    ("/api/generate", GENERATE, check_ollama),
    ("/api/show", {"model": NAME}, check_ollama),
]


@pytest.mark.parametrize("path, right, check", ENDPOINTS)
@given(data=st.data())
def test_any_json_gets_an_answer_of_the_api(made, path, right, check, data):
    service, client = made
    service.events = data.draw(st.sampled_from([SAID, THOUGHT, CALLED]) | EVENTS)
    body = data.draw(near(right) | near(right) | near(right) | VALUES)
    answer = client.post(path, content=json.dumps(body).encode())
    assert answer.status_code in (200, 400, 404), answer.text
    check(answer)


@pytest.mark.parametrize("path, right, check", ENDPOINTS)
def test_the_right_bodies_are_right(made, path, right, check):
    made[0].events = list(CALLED)
    answer = made[1].post(path, json=right)
    assert answer.status_code == 200, answer.text
    check(answer)


@pytest.mark.parametrize("path, right, check", ENDPOINTS)
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff", b"3", b'{"a": NaN}', b"[" * 50_000 + b"]" * 50_000],
)
def test_what_is_no_json_object(made, path, right, check, raw):
    answer = made[1].post(path, content=raw)
    assert answer.status_code == 400
    check(answer)


def test_what_is_nested_deeply(made):
    deep = {"a": 1}
    for _ in range(500):
        deep = {"a": deep}
    tool = {"type": "function", "name": "f", "parameters": deep}
    body = {"model": NAME, "input": "Hello", "tools": [tool]}
    answer = made[1].post("/v1/responses", json=body)
    assert answer.status_code == 400
    assert "nested more than" in answer.json()["error"]["message"]
