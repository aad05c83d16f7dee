"""A conversation answers as if each turn were read anew, and reads only what is new."""

import json

import mlx.core as mx
import pytest
from chat_models import expected_prompt, make_chat_model, with_template
from conftest import save_tokenizer
from stock_checkpoints import NEMOTRON, write_checkpoint

import mlx_flash
from mlx_flash.conversation import Conversation
from mlx_flash.errors import FlashError
from mlx_flash.generation import stream_generate
from mlx_flash.stop_texts import StopTexts
from mlx_flash.thinking import Piece, Thinking

QUESTIONS = ["w20 w21 w22", "w30", "w40 w41"]
# As Qwen3's does: what was thought is left out of earlier turns.
FORGETFUL = (
    "{% for m in messages %}"
    "{{ {'system': 'w10', 'user': 'w11', 'assistant': 'w12'}[m.role] }} "
    "{{ m.content if m.role == 'user' else m.content.split()[-1] }} w13 {% endfor %}"
    "{% if add_generation_prompt %}w12 {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("talk"))


@pytest.fixture(scope="module")
def loaded(folder):
    with opened(folder) as both:
        yield both


@pytest.fixture(scope="module")
def forgetful(folder, tmp_path_factory):
    copy = with_template(folder, tmp_path_factory.mktemp("f") / "flash", FORGETFUL)
    with opened(copy, check="none") as both:
        yield both


def opened(folder, memory="1MB", **options):
    both = mlx_flash.load(folder, memory, context=256, **options)
    both[1].eos_token_ids = set()  # answers of a known length
    return both


def say(talk, text):
    return "".join(piece.text for piece in talk.ask(text))


def anew(loaded, tokens, n=8, **options):
    """The answer to a prompt that is read from its first token on."""
    model, tokenizer = loaded
    list(stream_generate(model, tokenizer, tokens, max_tokens=n, **options))
    return model.flash.run.tokens


def numbers(text):
    return [int(word[1:]) for word in text.split()]


# Turns


@pytest.mark.parametrize("draft", [0, 2], ids=["plain", "drafts"])
def test_every_turn_answers_as_if_it_were_read_anew(loaded, draft):
    talk = Conversation(*loaded, "w50 w51", max_tokens=8, draft_ngrams=draft)
    said = [("system", "w50 w51")]
    for i, question in enumerate(QUESTIONS):
        answer = say(talk, question)
        said.append(("user", question))
        prompt = expected_prompt(*said)
        assert numbers(answer) == anew(loaded, prompt)
        # What the turn before read and said was not read again.
        read = talk.cached_tokens
        assert read == (len(expected_prompt(*said[:-1])) - 2 if i else 0)
        assert talk.tokens == prompt + numbers(answer)
        said.append(("assistant", answer))
    assert [m["content"] for m in talk.messages[::2]] == QUESTIONS
    assert talk.finish_reason == "length" and talk.kept


def test_a_template_that_rewrites_earlier_turns(forgetful):
    talk = Conversation(*forgetful, max_tokens=8)
    answers = [say(talk, question) for question in QUESTIONS]
    said = []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        said.append(("user", question))
        assert numbers(answer) == anew(forgetful, expected_prompt(*said))
        said.append(("assistant", answer.split()[-1]))
    assert 0 < talk.cached_tokens < len(expected_prompt(*said[:-2]))


def test_a_state_that_cannot_be_cut_is_read_anew(tmp_path):
    stock = write_checkpoint(tmp_path / "stock", NEMOTRON)
    save_tokenizer(stock)
    from chat_models import TEMPLATE, write_template

    for template, cached in ((TEMPLATE, True), (FORGETFUL, False)):
        write_template(stock, template)
        with opened(stock, "2MB", check="none") as both:
            talk = Conversation(*both, max_tokens=6)
            first = say(talk, QUESTIONS[0])
            second = say(talk, QUESTIONS[1])
            assert bool(talk.cached_tokens) == cached
            kept = first if cached else first.split()[-1]
            said = ("user", QUESTIONS[0]), ("assistant", kept), ("user", QUESTIONS[1])
            assert numbers(second) == anew(both, expected_prompt(*said), n=6)


def test_without_a_template_the_text_goes_on(tmp_path):
    with opened(make_chat_model(tmp_path, template=None)) as both:
        talk = Conversation(*both, max_tokens=4)
        first, second = say(talk, "w20 w21 "), say(talk, "w30")
        assert numbers(first) == anew(both, [20, 21], n=4)
        assert numbers(second) == anew(both, [20, 21, *numbers(first), 30], n=4)
        assert talk.cached_tokens == 6
        with pytest.raises(FlashError, match="no chat template"):
            say(Conversation(*both, "w50"), "w20")


def test_bounded_and_quantised_caches(loaded):
    bounded = Conversation(*loaded, max_tokens=8, max_kv_size=16)
    assert [len(say(bounded, question).split()) for question in QUESTIONS] == [8] * 3
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    talk = Conversation(*loaded, max_tokens=8, **options)
    answers = [say(talk, question) for question in QUESTIONS[:2]]
    assert numbers(answers[0]) == anew(
        loaded, expected_prompt(("user", QUESTIONS[0])), **options
    )
    assert talk.cached_tokens == len(expected_prompt(("user", QUESTIONS[0]))) + 8


def test_reset_and_system(loaded):
    talk = Conversation(*loaded, max_tokens=4)
    first = say(talk, QUESTIONS[0])
    say(talk, QUESTIONS[1])
    talk.reset()
    assert talk.messages == [] and talk.tokens == [] and talk.cache is None
    assert say(talk, QUESTIONS[0]) == first
    talk.reset()
    talk.system = "w60"
    say(talk, "w20")
    prompt = expected_prompt(("system", "w60"), ("user", "w20"))
    assert talk.tokens[: len(prompt)] == prompt


# Turns that end early


class Stopped(KeyboardInterrupt):
    """Ctrl-C at a call of the model that a test chose."""


def interrupt_at(monkeypatch, model, call):
    """Raise within a layer of the model's so-many-th call from now on."""
    layer, seen = model.layers[-1], []
    real = type(layer).__call__

    def counting(self, *args, **options):
        if self is layer:
            seen.append(1)
            if len(seen) == call:
                raise Stopped
        return real(self, *args, **options)

    monkeypatch.setattr(type(layer), "__call__", counting)


@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("turn", [0, 1])
def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    loaded, monkeypatch, turn, call
):
    """Calls 1 and 2 read the prompt; each of the others is a token's."""
    talk = Conversation(*loaded, max_tokens=8)
    said = []
    for question in QUESTIONS[:turn]:
        said += [("user", question), ("assistant", say(talk, question))]
    text = ""
    with monkeypatch.context() as patch:
        interrupt_at(patch, loaded[0], call)
        with pytest.raises(Stopped):
            for piece in talk.ask("w70 w71"):
                text += piece.text
    assert talk.finish_reason is None
    assert talk.kept == bool(text)
    if text:
        said += [("user", "w70 w71"), ("assistant", text)]
        assert talk.messages[-1]["content"] == text
    assert len(talk.messages) == len(said)
    offsets = {entry.offset for entry in talk.cache or []}
    assert offsets <= {len(talk.tokens)}
    answer = say(talk, "w30")
    prompt = expected_prompt(*said, ("user", "w30"))
    assert numbers(answer) == anew(loaded, prompt)
    # What was known before was not lost.
    assert talk.cached_tokens >= len(expected_prompt(*said)) - 2 if said else True


def test_an_answer_that_nobody_listens_to_any_more(loaded):
    talk = Conversation(*loaded, max_tokens=8)
    pieces = talk.ask("w20")
    text = next(pieces).text + next(pieces).text
    pieces.close()
    assert talk.kept and talk.messages[-1]["content"] == text
    said = ("user", "w20"), ("assistant", text), ("user", "w30")
    assert numbers(say(talk, "w30")) == anew(loaded, expected_prompt(*said))
    assert talk.cached_tokens == len(expected_prompt(*said[:-1])) - 2


def test_a_cache_that_was_interrupted_while_it_grew_is_dropped(loaded, monkeypatch):
    talk = Conversation(*loaded, max_tokens=4)
    first = say(talk, "w20")
    with monkeypatch.context() as patch:
        interrupt_at(patch, loaded[0], 1)
        entry = talk.cache[0]
        entry.keys = mx.concatenate([entry.keys, entry.keys], axis=-2)
        with pytest.raises(Stopped):
            say(talk, "w21")
    assert talk.cache is None and not talk.kept
    said = ("user", "w20"), ("assistant", first), ("user", "w30")
    assert numbers(say(talk, "w30")) == anew(loaded, expected_prompt(*said), n=4)


def test_an_interrupt_while_another_one_is_dealt_with(loaded, monkeypatch):
    talk = Conversation(*loaded, max_tokens=4)
    first = say(talk, "w20")

    def stopped(*_, **__):
        raise Stopped

    with monkeypatch.context() as patch:
        interrupt_at(patch, loaded[0], 3)
        patch.setattr(talk, "_settle", stopped)
        with pytest.raises(Stopped):
            say(talk, "w21")
    said = [("user", "w20"), ("assistant", first)]
    said += [(m["role"], m["content"]) for m in talk.messages[2:]]
    assert [role for role, _ in said] == ["user", "assistant"] * (len(said) // 2)
    prompt = expected_prompt(*said, ("user", "w30"))
    assert numbers(say(talk, "w30")) == anew(loaded, prompt, n=4)


def test_more_than_the_positions(tmp_path):
    with opened(make_chat_model(tmp_path, max_position_embeddings=64)) as both:
        talk = Conversation(*both, max_tokens=-1)
        first = say(talk, "w20")
        assert talk.finish_reason == "length" and len(talk.tokens) <= 64
        with pytest.raises(FlashError, match="64 positions. Begin a new one"):
            say(talk, "w21")
        assert not talk.kept and len(talk.messages) == 2
        talk.reset()
        assert say(talk, "w20") == first


def test_more_than_the_memory(folder):
    """Keys and values take slots until the least is left: then a sentence says so."""
    least = None
    with pytest.raises(mlx_flash.NotEnoughMemory) as caught:
        opened(folder, "1KB")
    least = caught.value.least_bytes
    with opened(folder, least) as both:
        talk = Conversation(*both, max_tokens=-1)
        text = ""
        with pytest.raises(FlashError) as caught:
            for piece in talk.ask("w20"):
                text += piece.text
        assert "KV cache" in str(caught.value) and "--memory" in str(caught.value)
        del caught  # whose traceback holds the cache
        assert talk.kept == bool(text)
        talk.reset()
        talk._options["max_tokens"] = 4
        assert len(say(talk, "w20").split()) == 4


# On disk


def test_a_saved_conversation_goes_on(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = "~/talk.json"
    talk = Conversation(*loaded, "w50", max_tokens=8)
    say(talk, QUESTIONS[0])
    talk.save(file)
    assert (tmp_path / "talk.json").exists()
    expected = say(talk, QUESTIONS[1])
    other = Conversation(*loaded, max_tokens=8)
    other.load(file)
    assert other.system == "w50"
    assert say(other, QUESTIONS[1]) == expected


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "does not exist"),
        ("{", "cannot be read"),
        ("3", "no saved conversation"),
        ('{"messages": 3}', "no saved conversation"),
        ('[{"role": "user"}]', "Message 0 is none"),
        ('[{"role": "user", "content": 3}]', "no text"),
    ],
)
def test_what_is_no_conversation(loaded, tmp_path, content, said):
    file = tmp_path / "talk.json"
    if content is not None:
        file.write_text(content)
    talk = Conversation(*loaded, "w50")
    with pytest.raises(FlashError, match=said):
        talk.load(file)
    assert talk.system == "w50"
    with pytest.raises(FlashError):
        talk.save(tmp_path)


def test_a_list_of_messages_is_a_conversation(loaded, tmp_path):
    messages = [{"role": "user", "content": "w20"}]
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(messages))
    talk = Conversation(*loaded)
    talk.load(file)
    assert talk.messages == messages and talk.system is None


# Messages without a conversation


def test_messages_in_the_place_of_a_prompt(loaded):
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "w20"}]
    text = mlx_flash.generate(model, tokenizer, messages=messages, max_tokens=6)
    prompt = expected_prompt(("user", "w20"))
    assert numbers(text) == anew(loaded, prompt, n=6)
    words = text.split()
    assert words[2] not in words[:2]
    stopped = mlx_flash.generate(
        model, tokenizer, messages=messages, max_tokens=6, stop=[words[2]]
    )
    assert stopped.split() == words[:2]
    begun = [*messages, {"role": "assistant", "content": " ".join(words[:2])}]
    rest = mlx_flash.generate(model, tokenizer, messages=begun, max_tokens=4)
    assert rest.split() == words[2:]
    loud = {"template_options": {"loud": True}}
    list(stream_generate(model, tokenizer, messages=messages, max_tokens=2, **loud))
    assert model.flash.run.tokens == anew(loaded, [*prompt[:-1], 14, 12], n=2)


@pytest.mark.parametrize(
    "messages",
    ["w20", [], {"role": "user"}, [3], [{"role": "user"}], [{"content": "a"}]],
)
def test_what_are_no_messages(loaded, messages):
    with pytest.raises(FlashError, match='"role": "user"'):
        mlx_flash.generate(*loaded, messages=messages)


# Thoughts and stop texts


def pieces_of(text, size, prompt=""):
    thinking, found = Thinking(None, prompt), []
    cuts = [text[i : i + size] for i in range(0, len(text), size)]
    for i, cut in enumerate(cuts):
        found += thinking.take(cut, last=i == len(cuts) - 1)
    joined = {True: "", False: ""}
    for piece in found:
        joined[piece.thinking] += piece.text
    return joined[True], joined[False]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_thoughts_are_told_from_the_answer(size):
    text = "<think>Hm <b>.</think>So <i>it</i> is <"
    assert pieces_of(text, size) == ("Hm <b>.", "So <i>it</i> is <")
    begun = "Hm.</think>So."
    assert pieces_of(begun, size, "assistant<think>\n") == ("Hm.", "So.")
    assert pieces_of("No thought.", size) == ("", "No thought.")


def test_a_piece_is_shown_as_soon_as_it_may_be():
    assert list(Thinking(None).take("a<b")) == [Piece("a<b")]
    assert list(Thinking(None).take("a<th")) == [Piece("a")]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_texts(size):
    def shown(text, *words):
        stop, found = StopTexts(words), ""
        for i in range(0, len(text), size):
            found += stop.take(text[i : i + size], last=i + size >= len(text))
        return found, stop.found

    assert shown("one END two", "END") == ("one ", "END")
    assert shown("aab", "ab", "b") == ("a", "ab")
    assert shown("no EN", "END") == ("no EN", None)
    assert shown("text", "") == ("text", None)
