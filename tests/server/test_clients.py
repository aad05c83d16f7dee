"""The clients of other APIs than OpenAI's chat, against models on flash."""

import json

import anthropic
import ollama
import openai
import pytest
from chat_model import CALL, TOOLS, saying, write_chat_model
from mlx_lm.server import convert_chat
from serving import ask, served

import mlx_flash
from mlx_flash.server import Settings, open_server

NAME = "default_model"
KEY = "sesame"
HELLO = [{"role": "user", "content": "w5 w6"}]
STORY = "Once upon a time, there was a"
DOG = [{"role": "user", "content": "Tell me of a dog."}]
ADD = {"name": "add", "input_schema": {"type": "object", "properties": {}}}
CALLING = f"w5 <tool_call> {CALL} </tool_call>"
THINKING = "<think> w7 w8 </think> w9"
ARGUMENTS = {"a": 3, "b": [4]}


class Clients:
    """Of one server, one for each API."""

    def __init__(self, server, key="none"):
        self.server = server
        root = server.url.removesuffix("/v1")
        options = {"api_key": key, "max_retries": 0, "timeout": 120}
        self.openai = openai.OpenAI(base_url=server.url, **options)
        self.anthropic = anthropic.Anthropic(base_url=root, **options)
        headers = {"Authorization": f"Bearer {key}"}
        self.ollama = ollama.Client(host=root, headers=headers, trust_env=False)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.openai.close()
        self.anthropic.close()
        self.ollama.close()

    def respond(self, asked=HELLO, **options):
        return self.openai.responses.create(
            **({"model": NAME, "input": asked, "max_output_tokens": 12} | options)
        )

    def message(self, asked=HELLO, **options):
        return self.anthropic.messages.create(
            **({"model": NAME, "messages": asked, "max_tokens": 12} | options)
        )

    def chat(self, asked=HELLO, **options):
        limit = {"num_predict": 12}
        return self.ollama.chat(NAME, asked, **({"options": limit} | options))

    def saying(self, text):
        return saying(self.server.worker.tokenizer, text)


@pytest.fixture(scope="module")
def demo():
    settings = Settings(port=0)
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made, served(made):
        with Clients(made) as clients:
            yield clients


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """With the model that knows tools and thinking."""
    folder = write_chat_model(tmp_path_factory.mktemp("model") / "chatty")
    settings = Settings(port=0, max_tokens=40)
    with open_server(str(folder), "1GB", settings) as made, served(made):
        with Clients(made) as clients:
            yield clients


@pytest.fixture(scope="module")
def story():
    """What `generate` makes of a text, and of a conversation as plain text."""
    with mlx_flash.load(mlx_flash.DEMO_MODEL, "50%") as (model, tokenizer):
        texts = STORY, convert_chat(DOG)
        return [
            mlx_flash.generate(model, tokenizer, tokenizer.encode(x), max_tokens=12)
            for x in texts
        ]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_all_say_what_generate_says(demo, story, stream):
    answer = demo.respond(DOG, stream=stream)
    if stream:
        *_, last = answer
        answer = last.response
    assert answer.output_text == story[1]
    assert answer.status == "incomplete" and answer.usage.output_tokens == 12

    message = demo.message(DOG, stream=stream)
    if stream:
        deltas = [e.delta for e in message if e.type == "content_block_delta"]
        assert "".join(delta.text for delta in deltas) == story[1]
    else:
        assert message.content[0].text == story[1]
        assert message.stop_reason == "max_tokens"

    chat = demo.chat(DOG, stream=stream)
    parts = list(chat) if stream else [chat]
    assert "".join(part.message.content for part in parts) == story[1]
    assert parts[-1].done_reason == "length" and parts[-1].eval_count == 12

    options = {"num_predict": 12}
    made = demo.ollama.generate(NAME, STORY, options=options, stream=stream)
    parts = list(made) if stream else [made]
    assert "".join(part.response for part in parts) == story[0]


def test_figures_of_flash_come_with_each_answer(demo):
    port = demo.server.port
    asked = {"model": NAME, "messages": DOG, "max_tokens": 4, "stream": False}
    asked |= {"input": "Hello", "max_output_tokens": 4, "options": {"num_predict": 4}}
    found = [
        ask(port, "/v1/responses", asked)[1]["usage"]["flash"],
        ask(port, "/v1/messages", asked)[1]["usage"]["flash"],
        ask(port, "/api/chat", asked)[1]["flash"],
    ]
    for flash in found:
        assert flash["first_token_s"] > 0 and 5e6 < flash["budget_bytes"] < 7e6


def test_tokens_are_counted_as_they_are_read(demo):
    counted = demo.anthropic.messages.count_tokens(model=NAME, messages=DOG)
    usage = demo.message(DOG).usage
    read = usage.input_tokens + usage.cache_read_input_tokens
    assert counted.input_tokens == read
    counted = demo.openai.responses.input_tokens.count(model=NAME, input=DOG)
    assert counted.input_tokens == read == demo.chat(DOG).prompt_eval_count
    long = [{"role": "user", "content": "word " * 3000}]
    counted = demo.anthropic.messages.count_tokens(model=NAME, messages=long)
    assert counted.input_tokens > 3000
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match="Shorten it"):
            demo.message(long, stream=stream)
        with pytest.raises(openai.BadRequestError, match="Shorten it"):
            demo.respond(long, stream=stream)
        with pytest.raises(ollama.ResponseError, match="Shorten it"):
            list(demo.chat(long, stream=stream))


def test_a_stop_text_is_named(chatty):
    with chatty.saying("w7 w8 w9 w10"):
        message = chatty.message(stop_sequences=["w9"])
        assert message.stop_reason == "stop_sequence"
        assert message.stop_sequence == "w9"
        assert message.content[0].text.split() == ["w7", "w8"]
        chat = chatty.chat(options={"stop": "w9"})
        assert chat.message.content.split() == ["w7", "w8"]


def test_log_probabilities(chatty):
    with chatty.saying("w7 w8"):
        answer = chatty.respond(
            include=["message.output_text.logprobs"], top_logprobs=2
        )
        chat = chatty.chat(logprobs=True, top_logprobs=2)
    told = answer.output[0].content[0].logprobs
    for found in (told, chat.logprobs):
        assert [entry.token.strip() for entry in found] == ["w7", "w8"]
        assert all(len(entry.top_logprobs) == 2 for entry in found)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_tool_is_called_and_answers(chatty, stream):
    function = TOOLS[0]["function"]
    tool = {"type": "function", **function}
    with chatty.saying(CALLING):
        answer = chatty.respond(tools=[tool], stream=stream)
        if stream:
            *_, last = answer
            answer = last.response
        if stream:
            with chatty.anthropic.messages.stream(
                model=NAME, messages=HELLO, max_tokens=12, tools=[ADD]
            ) as streamed:
                message = streamed.get_final_message()
        else:
            message = chatty.message(tools=[ADD])
        chat = chatty.chat(tools=TOOLS, stream=stream)
        parts = list(chat) if stream else [chat]
    said, call = answer.output
    assert said.content[0].text.strip() == "w5"
    assert call.name == "add" and json.loads(call.arguments) == ARGUMENTS
    text, use = message.content
    assert text.text.strip() == "w5" and message.stop_reason == "tool_use"
    assert use.name == "add" and use.input == ARGUMENTS
    [made] = [call for part in parts for call in part.message.tool_calls or ()]
    assert made.function.name == "add" and made.function.arguments == ARGUMENTS

    # What comes back is read with the call and its result, and in the same tokens.
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "w9"}
    asked = [*HELLO, *(item.model_dump() for item in answer.output), result]
    counts = [
        chatty.respond(asked, tools=[tool]).usage.input_tokens,
        chatty.respond(
            [result], tools=[tool], previous_response_id=answer.id
        ).usage.input_tokens,
    ]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "w9"}
    blocks = [block.model_dump(exclude_none=True) for block in message.content]
    asked = [
        *HELLO,
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [result]},
    ]
    counted = chatty.anthropic.messages.count_tokens(
        model=NAME, messages=asked, tools=[ADD]
    )
    counts.append(counted.input_tokens)
    message = ollama.Message(role="assistant", content="w5", tool_calls=[made])
    asked = [*HELLO, message, {"role": "tool", "content": "w9", "tool_name": "add"}]
    counts.append(chatty.chat(asked, tools=TOOLS).prompt_eval_count)
    plain = chatty.chat(HELLO, tools=TOOLS).prompt_eval_count
    assert len(set(counts)) == 1 and counts[0] > plain + 4


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_thinking_is_told_apart(chatty, stream):
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with chatty.saying(THINKING):
        answer = chatty.respond(stream=stream)
        if stream:
            *_, last = answer
            answer = last.response
        with chatty.anthropic.messages.stream(
            model=NAME, messages=HELLO, max_tokens=12, thinking=thinking
        ) as streamed:
            message = streamed.get_final_message()
        [said] = chatty.message().content
        chat = chatty.chat(think=True, stream=stream)
        parts = list(chat) if stream else [chat]
    assert said.text.split() == ["w9"]
    thought, said = answer.output
    assert thought.content[0].text.split() == ["w7", "w8"]
    assert said.content[0].text.split() == ["w9"]
    assert answer.usage.output_tokens_details.reasoning_tokens >= 2
    thought, said = message.content
    assert thought.thinking.split() == ["w7", "w8"] and said.text.split() == ["w9"]
    thought = "".join(part.message.thinking or "" for part in parts)
    assert thought.split() == ["w7", "w8"]
    assert "".join(part.message.content for part in parts).split() == ["w9"]


def test_what_the_server_says_of_its_models(demo, chatty):
    [listed] = demo.anthropic.models.list().data
    assert listed.type == "model" and listed.display_name == listed.id
    assert demo.message(DOG, model=listed.id, max_tokens=1).model == listed.id
    assert demo.anthropic.models.retrieve(listed.id) == listed
    [model] = demo.ollama.list().models
    assert model.details.family == "opt" and 1e7 < model.size < 2e7
    assert demo.ollama.show(model.model).capabilities == ["completion"]
    assert demo.ollama.generate(model.model, "").done_reason == "load"
    [running] = demo.ollama.ps().models
    assert 5e6 < running.size < 7e6 and running.model == model.model
    shown = chatty.ollama.show(NAME)
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert "enable_thinking" in shown.template


def test_errors_have_the_shape_of_the_api():
    settings = Settings(port=0, api_key=KEY)
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made, served(made):
        with Clients(made) as wrong:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                wrong.message()
            assert caught.value.body["error"]["type"] == "authentication_error"
            with pytest.raises(openai.AuthenticationError, match="asks for a key"):
                wrong.respond()
            with pytest.raises(ollama.ResponseError, match="asks for a key"):
                wrong.chat()
        with Clients(made, KEY) as right:
            assert right.message(max_tokens=1).content is not None
            assert right.respond(max_output_tokens=1).status == "incomplete"
            assert right.chat(options={"num_predict": 1}).eval_count == 1
            status, body, _ = ask(made.port, "/v1/messages", headers={"x-api-key": KEY})
            assert status == 405 and body["type"] == "error"
