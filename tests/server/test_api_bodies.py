"""Whatever JSON a client sends, it gets an answer or an error in the API's shape."""

import json

import anthropic.types as anthropic_types
import ollama
import openai.types.responses as openai_types
import pytest
from fake_service import CALLED, NAME, SAID, THOUGHT, FakeService
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
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
# Bodies that are right but for what is drawn; else nearly all would fail at once.
PART = st.fixed_dictionaries(
    {"type": WORDS},
    optional={
        "text": WORDS,
        "id": WORDS,
        "name": WORDS,
        "input": VALUES,
        "content": VALUES,
        "tool_use_id": WORDS,
        "thinking": WORDS,
    },
)
MESSAGE = st.fixed_dictionaries(
    {"role": WORDS, "content": WORDS | st.lists(PART | VALUES, max_size=3)},
    optional={
        "type": WORDS,
        "call_id": WORDS,
        "arguments": WORDS | VALUES,
        "output": WORDS,
        "tool_calls": VALUES,
        "name": WORDS,
    },
)
MESSAGES = st.lists(MESSAGE, max_size=4)
BODIES = VALUES | st.fixed_dictionaries(
    {
        "model": st.just(NAME),
        "max_tokens": st.just(9),
        "messages": MESSAGES | VALUES,
        "input": WORDS | MESSAGES | VALUES,
        "prompt": WORDS,
    },
    optional={
        "stream": st.booleans(),
        "system": WORDS | VALUES,
        "instructions": WORDS | VALUES,
        "tools": VALUES,
        "tool_choice": WORDS | VALUES,
        "options": st.dictionaries(FIELDS, LEAVES, max_size=4),
        "thinking": VALUES,
        "think": LEAVES,
        "reasoning": VALUES,
        "metadata": VALUES,
        "output_config": VALUES,
        "previous_response_id": LEAVES,
        "parallel_tool_calls": LEAVES,
        "temperature": LEAVES,
        "stop_sequences": VALUES,
    },
)
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
    with TestClient(Starlette(routes=routes)) as client:
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
    ("/v1/responses", check_openai),
    ("/v1/responses/input_tokens", None),
    ("/v1/messages", check_anthropic),
    ("/v1/messages/count_tokens", check_anthropic),
    ("/api/chat", check_ollama),
    ("/api/generate", check_ollama),
    ("/api/show", check_ollama),
    ("/api/pull", check_ollama),
]


@pytest.mark.parametrize("path, check", ENDPOINTS)
@given(body=BODIES, events=st.sampled_from([SAID, THOUGHT, CALLED]) | EVENTS)
def test_any_json_gets_an_answer_of_the_api(made, path, check, body, events):
    service, client = made
    service.events = list(events)
    answer = client.post(path, content=json.dumps(body).encode())
    assert answer.status_code in (200, 400, 404), answer.text
    if check is not None:
        check(answer)


@pytest.mark.parametrize("path, check", ENDPOINTS)
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff", b"3", b'{"a": NaN}', b"[" * 50_000 + b"]" * 50_000],
)
def test_what_is_no_json_object(made, path, check, raw):
    answer = made[1].post(path, content=raw)
    assert answer.status_code == 400
    if check is not None:
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
