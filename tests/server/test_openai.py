"""OpenAI's own Python client, against the demo model and one with a chat template."""

import json
import math

import openai
import pytest
from chat_model import BROKEN, CALL, TOOLS, saying, write_chat_model
from mlx_lm.server import convert_chat
from serving import ask, served

import mlx_flash
from mlx_flash.server import Settings, open_server

HELLO = [{"role": "user", "content": "w5 w6"}]
DEMO_CHAT = [{"role": "user", "content": "Tell me of a dog."}]
KEY = "sesame"


def client_of(listener, **options):
    options = {"api_key": "none", "max_retries": 0, "timeout": 120} | options
    return openai.OpenAI(base_url=listener.url, **options)


@pytest.fixture(scope="module")
def demo():
    """A client of a server with the demo model, which has no chat template."""
    settings = Settings(port=0)
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made, served(made):
        with client_of(made) as client:
            yield client


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A server with the model that knows tools and thinking."""
    folder = write_chat_model(tmp_path_factory.mktemp("model") / "chatty")
    settings = Settings(port=0, max_tokens=40)
    with open_server(str(folder), "1GB", settings) as made, served(made):
        with client_of(made) as made.client:
            yield made


def create(client, messages=HELLO, **options):
    options = {"model": "default_model", "max_tokens": 6} | options
    return client.chat.completions.create(messages=messages, **options)


def expected_of_demo(prompt, max_tokens):
    with mlx_flash.load(mlx_flash.DEMO_MODEL, "50%") as (model, tokenizer):
        prompt = tokenizer.encode(prompt)
        return mlx_flash.generate(model, tokenizer, prompt, max_tokens=max_tokens)


def test_a_chat_says_what_generate_says(demo):
    expected = expected_of_demo(convert_chat(DEMO_CHAT), 12)
    answer = create(demo, DEMO_CHAT, max_tokens=12)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.model == demo.models.list().data[0].id


def test_a_stream_says_the_same(demo):
    whole = create(demo, DEMO_CHAT, max_tokens=12).choices[0].message.content
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(create(demo, DEMO_CHAT, max_tokens=12, **options))
    last = chunks.pop()
    assert last.choices == [] and last.usage.completion_tokens == 12
    assert chunks[-1].choices[0].finish_reason == "length"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas) == whole and len([x for x in deltas if x]) > 5
    assert not any(chunk.usage for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_completion_with_log_probabilities(demo):
    prompt = "Once upon a time, there was a"
    answer = demo.completions.create(
        model="default_model", prompt=prompt, max_tokens=8, temperature=0, logprobs=3
    )
    choice = answer.choices[0]
    assert choice.text == expected_of_demo(prompt, 8)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == 8
    for i, top in enumerate(choice.logprobs.top_logprobs):
        # The likeliest was chosen; two tokens may have one text.
        assert 1 <= len(top) <= 3
        assert max(top.values()) == choice.logprobs.token_logprobs[i] <= 0


def test_log_probabilities_of_a_chat_are_those_of_the_model(demo):
    options = {"logprobs": True, "top_logprobs": 4, "max_tokens": 5}
    answer = create(demo, DEMO_CHAT, **options)
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    text = "".join(x.token for x in content)
    assert (
        text.lstrip() == answer.choices[0].message.content
    )  # as all tokenizers say it
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        found = [other.logprob for other in entry.top_logprobs]
        assert found == sorted(found, reverse=True) and len(found) == 4
        assert math.isclose(found[0], entry.logprob)
    chunks = list(create(demo, DEMO_CHAT, stream=True, **options))
    logs = [chunk.choices[0].logprobs for chunk in chunks]
    told = [entry for log in logs if log for entry in log.content]
    assert [x.token for x in told] == [x.token for x in content]


def test_figures_of_flash_are_in_the_usage(demo):
    flash = create(demo, DEMO_CHAT, max_tokens=8).usage.flash
    assert flash["first_token_s"] > 0 and flash["tokens_per_s"] > 0
    assert 0 <= flash["hit_rate"] <= 1
    assert flash["peak_bytes"] > 0 and flash["bytes_read"] > 0
    assert 5e6 < flash["budget_bytes"] < 7e6


def test_a_seed_repeats_an_answer(demo):
    options = {"temperature": 1.0, "max_tokens": 12, "top_p": 0.95}
    texts = [
        create(demo, DEMO_CHAT, seed=seed, **options).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_errors_are_the_clients_own(demo):
    with pytest.raises(openai.BadRequestError, match="temperature must be a number"):
        create(demo, DEMO_CHAT, temperature=500)
    with pytest.raises(openai.BadRequestError, match="n cannot be 2"):
        create(demo, DEMO_CHAT, n=2)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        create(demo, DEMO_CHAT, response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match="Shorten it"):
        create(demo, [{"role": "user", "content": "word " * 3000}])
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        create(demo, DEMO_CHAT, model="gpt-5")
    with pytest.raises(openai.NotFoundError, match="There is nothing at"):
        demo.embeddings.create(model="default_model", input="x")


def test_a_model_is_found_by_its_name(demo):
    [model] = demo.models.list().data
    assert demo.models.retrieve(model.id).id == model.id


# ------------------------------------------------------------------ tools, thinking


def test_a_tool_is_called(chatty):
    with saying(chatty.worker.tokenizer, f"w5 <tool_call> {CALL} </tool_call>"):
        choice = create(chatty.client, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content.strip() == "w5"
    [call] = choice.message.tool_calls
    assert call.type == "function" and call.id and call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 3, "b": [4]}


def test_several_tools_are_called_in_a_stream(chatty):
    one = f"<tool_call> {CALL} </tool_call>"
    with saying(chatty.worker.tokenizer, f"w5 {one} {one}"):
        chunks = list(create(chatty.client, tools=TOOLS, stream=True, max_tokens=20))
    calls = [c for x in chunks for c in x.choices[0].delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert len({call.id for call in calls}) == 2
    for call in calls:
        assert json.loads(call.function.arguments) == {"a": 3, "b": [4]}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_what_is_no_call_is_told_as_text(chatty):
    with saying(chatty.worker.tokenizer, f"w5 <tool_call> {BROKEN} </tool_call> w6"):
        choice = create(chatty.client, tools=TOOLS).choices[0]
    assert choice.finish_reason == "stop" and not choice.message.tool_calls
    assert BROKEN in choice.message.content


def test_a_call_that_is_cut_off_does_not_hang(chatty):
    with saying(chatty.worker.tokenizer, f"<tool_call> {BROKEN} w5 w5 w5 w5 w5"):
        choice = create(chatty.client, tools=TOOLS, max_tokens=4).choices[0]
    assert choice.finish_reason == "length"


def test_a_conversation_with_a_tool_goes_on(chatty):
    function = {"name": "add", "arguments": '{"a": 7}'}
    call = {"id": "c1", "type": "function", "function": function}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "w9"},
    ]
    before = create(chatty.client, messages[:1], tools=TOOLS).usage.prompt_tokens
    after = create(chatty.client, messages, tools=TOOLS).usage.prompt_tokens
    assert after > before


def test_tools_can_be_forbidden(chatty):
    plain = create(chatty.client).usage.prompt_tokens
    assert create(chatty.client, tools=TOOLS).usage.prompt_tokens == plain + 1
    without = create(chatty.client, tools=TOOLS, tool_choice="none")
    assert without.usage.prompt_tokens == plain


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("begun", [False, True], ids=["by the model", "by the prompt"])
def test_thinking_is_told_apart(chatty, stream, begun):
    text = "w7 w8 </think> w9" if begun else "<think> w7 w8 </think> w9"
    options = {"chat_template_kwargs": {"enable_thinking": "now"}} if begun else {}
    with saying(chatty.worker.tokenizer, text):
        answer = create(chatty.client, stream=stream, extra_body=options)
        if stream:
            deltas = [chunk.choices[0].delta for chunk in answer]
        else:
            deltas = [answer.choices[0].message]
    thought = "".join(getattr(x, "reasoning", None) or "" for x in deltas)
    assert thought.split() == ["w7", "w8"]
    assert "".join(x.content or "" for x in deltas).split() == ["w9"]


def test_a_completion_tells_marks_as_they_are(chatty):
    with saying(chatty.worker.tokenizer, "<think> w7 </think> w9"):
        answer = chatty.client.completions.create(
            model="default_model", prompt="w5", max_tokens=9
        )
    assert answer.choices[0].text.split() == ["<think>", "w7", "</think>", "w9"]
    assert answer.choices[0].finish_reason == "stop"


def test_a_stop_text_over_several_tokens(chatty):
    with saying(chatty.worker.tokenizer, "w7 w8 w9 w10 w11"):
        for stream in (False, True):
            answer = create(chatty.client, stop=["8 w9 w1"], stream=stream)
            if stream:
                pieces = [chunk.choices[0].delta.content or "" for chunk in answer]
                assert "".join(pieces) == "w7 w"
            else:
                assert answer.choices[0].message.content == "w7 w"
                assert answer.choices[0].finish_reason == "stop"


# ---------------------------------------------------------------------------- a key


@pytest.fixture(scope="module")
def locked():
    settings = Settings(port=0, api_key=KEY)
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made, served(made):
        yield made


def test_a_key_is_asked_for(locked):
    for key in ("none", KEY + "x", "ключ"):
        code = ask(locked.port, "/v1/models", headers={"x-api-key": key.encode()})[0]
        assert code == 401
    with client_of(locked) as client:
        with pytest.raises(openai.AuthenticationError, match="asks for a key"):
            client.models.list()
    with client_of(locked, api_key=KEY) as client:
        assert client.models.list().data
    assert ask(locked.port, "/v1/models", headers={"X-Api-Key": KEY})[0] == 200
    assert ask(locked.port, "/health")[0] == 200
