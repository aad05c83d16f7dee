"""Ollama's API, as its own Python client sees it."""

import json
from dataclasses import replace

import httpx
import ollama
import pytest
from fake_service import (
    BREAKS,
    CALLED,
    FACTS,
    FLASH,
    NAME,
    SAID,
    THOUGHT,
    FakeService,
    served,
)
from fake_service import done as done_event

from mlx_flash.server.apis import ollama as api
from mlx_flash.server.events import Text, Token

HELLO = [{"role": "user", "content": "Hello"}]


def weather(city: str) -> str:
    """The weather of a city."""
    return "sun"


@pytest.fixture(scope="module")
def server():
    service = FakeService()
    with served(api.routes(service)) as url:
        yield service, url


@pytest.fixture
def service(server):
    server[0].events = list(SAID)
    server[0].facts = FACTS
    server[0].asked.clear()
    return server[0]


@pytest.fixture
def client(server):
    with ollama.Client(host=server[1], trust_env=False) as made:
        yield made


@pytest.mark.parametrize("name", [NAME, NAME + ":latest"])
def test_a_chat_is_whole(service, client, name):
    answer = client.chat(
        name,
        HELLO,
        options={
            "temperature": 0,
            "num_predict": 9,
            "top_p": 0.5,
            "top_k": 3,
            "min_p": 0.1,
            "seed": 7,
            "stop": ["END"],
            "repeat_penalty": 1.5,
            "repeat_last_n": 10,
            "num_ctx": 4096,
        },
        keep_alive="5m",
    )
    assert answer.message.role == "assistant" and answer.message.content == "Paris."
    assert answer.model == name and answer.done and answer.done_reason == "stop"
    assert answer.prompt_eval_count == 12 and answer.eval_count == 3
    assert answer.total_duration >= answer.eval_duration >= 0
    assert answer.prompt_eval_duration >= 0 and answer.load_duration == 0
    assert answer.message.tool_calls is None and answer.message.thinking is None
    asked = service.last
    assert asked.messages == HELLO
    assert asked.max_tokens == 9 and asked.stop == ("END",)
    sampling = asked.sampling
    assert sampling.temperature == 0 and sampling.top_p == 0.5 and sampling.top_k == 3
    assert sampling.min_p == 0.1 and sampling.seed == 7
    assert sampling.repetition_penalty == 1.5
    assert sampling.repetition_context_size == 10


def test_a_stream_is_the_default_and_lines_of_json(server, service):
    with httpx.Client(base_url=server[1], trust_env=False) as http:
        answer = http.post("/api/chat", json={"model": NAME, "messages": HELLO})
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    lines = [ollama.ChatResponse.model_validate_json(x) for x in answer.iter_lines()]
    assert [line.message.content for line in lines] == ["Pa", "ris.", ""]
    assert [line.done for line in lines] == [False, False, True]
    assert lines[-1].eval_count == 3
    assert json.loads(answer.text.splitlines()[-1])["flash"] == FLASH


def test_the_client_reads_the_stream(client, service):
    parts = list(client.chat(NAME, HELLO, stream=True))
    assert "".join(part.message.content for part in parts) == "Paris."


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called(client, service, stream):
    service.events = list(CALLED)
    answer = client.chat(NAME, HELLO, tools=[weather], stream=stream)
    parts = list(answer) if stream else [answer]
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    assert [call.function.arguments["city"] for call in calls] == ["Paris", "Rome"]
    assert parts[-1].done_reason == "stop"
    [tool] = service.last.tools
    assert tool["type"] == "function" and tool["function"]["name"] == "weather"
    assert tool["function"]["parameters"]["required"] == ["city"]


def test_calls_and_their_results_become_messages(client, service):
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "sun", "tool_name": "weather"},
    ]
    client.chat(NAME, messages)
    system, user, assistant, tool = service.last.messages
    assert system["role"] == "system" and user == HELLO[0]
    assert assistant["reasoning_content"] == "Hm."
    [made] = assistant["tool_calls"]
    expected = {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert made["function"] == expected and made["id"]
    assert tool == {"role": "tool", "content": "sun", "name": "weather"}


@pytest.mark.parametrize(
    "think, options",
    [
        (None, {}),
        (False, {"enable_thinking": False}),
        (True, {"enable_thinking": True}),
        ("low", {"enable_thinking": True, "reasoning_effort": "low"}),
    ],
)
def test_thinking(client, service, think, options):
    service.events = list(THOUGHT)
    answer = client.chat(NAME, HELLO, think=think)
    assert answer.message.thinking == "Hmm." and answer.message.content == "Paris."
    assert service.last.template_options == options
    generated = client.generate(NAME, "Hello", think=think)
    assert generated.thinking == "Hmm." and generated.response == "Paris."


def test_a_model_that_does_not_think(client, service):
    service.facts = replace(FACTS, thinking=False)
    client.chat(NAME, HELLO, think=False)
    with pytest.raises(ollama.ResponseError, match="does not support thinking"):
        client.chat(NAME, HELLO, think=True)


def test_generate(client, service):
    answer = client.generate(NAME, "Hello", system="Be brief.")
    assert answer.response == "Paris." and answer.done_reason == "stop"
    assert service.last.messages == [{"role": "system", "content": "Be brief."}, *HELLO]
    assert service.last.prompt is None
    parts = list(client.generate(NAME, "Hello", stream=True))
    assert "".join(part.response for part in parts) == "Paris."
    client.generate(NAME, "Hello", raw=True)
    assert service.last.prompt == "Hello" and service.last.messages is None


def test_a_model_without_a_template_gets_the_prompt_as_it_is(client, service):
    service.facts = replace(FACTS, chat_template=None)
    client.generate(NAME, "Once upon a time")
    assert service.last.prompt == "Once upon a time"


def test_nothing_to_say_loads_the_model(client, service):
    assert client.generate(NAME, "").done_reason == "load"
    assert client.chat(NAME, []).done_reason == "load"
    assert not service.asked


def test_log_probabilities(client, service):
    token = Token(5, "Pa", -0.5, ((5, "Pa", -0.5), (6, "Ro", -1.5)))
    service.events = [Text("Pa", (token,)), done_event()]
    answer = client.chat(NAME, HELLO, logprobs=True, top_logprobs=2)
    [found] = answer.logprobs
    assert found.token == "Pa" and found.logprob == -0.5
    assert [top.token for top in found.top_logprobs] == ["Pa", "Ro"]
    assert service.last.top_logprobs == 2


@pytest.mark.parametrize("most", [-1, -2, 1000])
def test_as_many_tokens_as_there_is_room_for(client, service, most):
    client.chat(NAME, HELLO, options={"num_predict": most})
    assert service.last.max_tokens == service.limits.tokens


def test_options_that_change_nothing(client, service):
    options = {"seed": -1, "repeat_penalty": 1.0, "repeat_last_n": -1, "mirostat": 0}
    client.chat(NAME, HELLO, options=options)
    sampling = service.last.sampling
    assert sampling.seed is None and sampling.repetition_penalty == 0
    assert sampling.repetition_context_size == service.limits.tokens


def test_too_many_tokens(client, service):
    service.events = [Text("Pa"), done_event("length")]
    assert client.chat(NAME, HELLO).done_reason == "length"


def test_what_the_server_says_of_the_model(client, service):
    [model] = client.list().models
    assert model.model == NAME + ":latest" and model.size == 2000
    assert model.details.family == "llama" and model.modified_at.year == 2001
    assert model.details.quantization_level == "float16" and len(model.digest) == 64
    [running] = client.ps().models
    assert running.size == running.size_vram == 1000
    assert running.context_length == 64 and running.name == NAME + ":latest"
    shown = client.show(NAME + ":latest")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo["llama.context_length"] == 64
    assert shown.template == FACTS.chat_template
    service.facts = replace(FACTS, tools=False, thinking=False, bits=4)
    shown = client.show(NAME)
    assert shown.capabilities == ["completion"]
    assert shown.details.quantization_level == "4 bits"


def test_the_version_is_that_of_an_ollama(server):
    with httpx.Client(base_url=server[1], trust_env=False) as http:
        version = http.get("/api/version").json()["version"]
    assert version.startswith("0.12.11-mlx-flash.")


def test_the_loaded_model_is_pulled_already(client):
    assert client.pull(NAME).status == "success"
    assert [part.status for part in client.pull(NAME, stream=True)] == ["success"]
    with pytest.raises(ollama.ResponseError, match="There is no model 'llama3'"):
        client.pull("llama3")


def test_other_paths_get_a_sentence(client):
    for request in (client.delete, client.create, lambda x: client.embed(x, "Hi")):
        with pytest.raises(ollama.ResponseError, match="the one model") as caught:
            request(NAME)
        assert caught.value.status_code == 501


def test_an_answer_that_fails(client, service):
    service.events = list(BREAKS)
    with pytest.raises(ollama.ResponseError, match="A read failed") as caught:
        client.chat(NAME, HELLO)
    assert caught.value.status_code == 500
    with pytest.raises(ollama.ResponseError, match="A read failed"):
        list(client.chat(NAME, HELLO, stream=True))


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "must be one of system"),
        ({"messages": [HELLO[0] | {"images": ["aGk="]}]}, "reads text alone"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be text"),
        ({"messages": "Hello"}, "must be a list of objects"),
        ({"format": "json"}, "format is not possible here"),
        ({"options": {"temperature": "hot"}}, "temperature must be a number"),
        ({"options": {"mirostat": 1}}, "mirostat is not possible here"),
        ({"options": {"num_predict": 1.5}}, "num_predict must be a whole number"),
        ({"think": "hard"}, "think can be low"),
        ({"think": 1}, "think must be true or false"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ],
)
def test_what_a_chat_is_refused_for(server, service, fields, says):
    body = {"model": NAME, "messages": HELLO} | fields
    with httpx.Client(base_url=server[1], trust_env=False) as http:
        answer = http.post("/api/chat", json=body)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"} and says in answer.json()["error"]
    assert not service.asked


@pytest.mark.parametrize("name", ["suffix", "template", "context", "images"])
def test_what_generate_is_refused_for(server, service, name):
    body = {"model": NAME, "prompt": "Hello", name: "aGk="}
    with httpx.Client(base_url=server[1], trust_env=False) as http:
        answer = http.post("/api/generate", json=body)
    assert answer.status_code == 400 and name in answer.json()["error"]
    assert not service.asked


def test_another_model_is_not_found(client):
    with pytest.raises(ollama.ResponseError, match="There is no model") as caught:
        client.chat("llama3:8b", HELLO)
    assert caught.value.status_code == 404
