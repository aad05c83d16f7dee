"""`chat` in a pipe and at a terminal: turns, commands, Ctrl-C."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from chat_models import expected_prompt, make_chat_model
from click.testing import CliRunner
from test_commands import refused, run

from mlx_flash import conversation
from mlx_flash.cli import main, terminal

MEMORY = ("--memory", "1MB", "--context", "256")
WAIT_S = 120  # until a busy machine has shown something


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat"))


def chat(folder, *lines, code=0, options=("-m", "6")):
    text = "".join(f"{line}\n" for line in lines)
    return run("chat", folder, *MEMORY, *options, input=text, code=code)


@pytest.fixture
def prompts_read(monkeypatch):
    """The whole prompt of each turn."""
    seen, real = [], conversation.Conversation._prompt

    def noting(self, question):
        seen.append(real(self, question)[1])
        return real(self, question)

    monkeypatch.setattr(conversation.Conversation, "_prompt", noting)
    return seen


# In a pipe


def test_a_line_is_a_turn(folder, prompts_read):
    options = "-m", "6", "--memory", "470KB", "--context", "64"
    result = chat(folder, "w20 w21", "w30", options=options)
    first, second = result.stdout.splitlines()
    assert len(first.split()) == len(second.split()) == 6
    said = ("user", "w20 w21"), ("assistant", first), ("user", "w30")
    assert prompts_read == [expected_prompt(said[0]), expected_prompt(*said)]
    assert "\x1b" not in result.stdout + result.stderr
    figures = [line for line in result.stderr.splitlines() if "/s" in line]
    assert re.match(r"6 tokens, [\d.]+/s · first after [\d.]+ s · ", figures[0])
    assert re.search(r"· 11 not read again · \d+% of blocks in memory · ", figures[1])


def test_run_is_chat(folder):
    for args in (["run", folder], ["chat", "--model", folder]):
        result = run(*args, *MEMORY, "-m", 6, "-q", input="w20")
        assert result.stdout == chat(folder, "w20").stdout


def test_quiet_prints_answers_alone(folder):
    result = chat(folder, "w20", options=("-m", "6", "-q", "--stop", "w1", "--seed", 1))
    assert len(result.stderr.splitlines()) <= 1


def test_lines_that_go_on(folder, prompts_read):
    chat(folder, "w20 \\", "w21", "", "w30")
    assert prompts_read[0] == expected_prompt(("user", "w20 w21"))
    assert len(prompts_read) == 2


def test_commands(folder, tmp_path, prompts_read):
    file = tmp_path / "talk.json"
    lines = ["/help", "/system w50", "w20", f"/save {file}", "/stats", "/memory 2MB"]
    lines += ["/reset", "w20", "/system", f"/load {file}", "/memory", "w30", "/quit"]
    result = chat(folder, *lines, "w40")
    assert len(result.stdout.splitlines()) == 3
    first, again, _ = result.stdout.splitlines()
    assert first == again
    said = ("system", "w50"), ("user", "w20"), ("assistant", first), ("user", "w30")
    assert prompts_read[-1] == expected_prompt(*said)
    messages = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    for words in (
        "/memory SIZE",
        "Ctrl-C ends an answer",
        "System prompt: w50",
        "2 messages written",
        "generation  6 tokens",
        "Memory: 2.0 MB.",
        "A new conversation.",
        "2 messages read",
    ):
        assert words in result.stderr, words


@pytest.mark.parametrize(
    "line, said",
    [
        ("/fly", "There is no /fly. /help lists what there is."),
        ("/save", "Name a file: /save talk.json"),
        ("/load", "Name a file: /load talk.json"),
        ("/load nowhere.json", "nowhere.json does not exist"),
        ("/memory much", "'much' is no amount of memory"),
        ("/memory 1KB", "1KB is too little: the model needs"),
    ],
)
def test_commands_that_fail_do_not_end_the_chat(folder, line, said):
    result = chat(folder, line, "w20", code=1)
    errors = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert len(result.stdout.split()) == 6


def test_a_path_is_no_command(folder):
    assert len(chat(folder, "/etc/hosts w20").stdout.split()) == 6


def test_a_turn_that_does_not_fit_says_what_to_do(tmp_path):
    folder = make_chat_model(tmp_path, max_position_embeddings=32)
    long = " ".join(["w20"] * 40)
    result = run("chat", folder, "--memory", "1MB", input=f"{long}\nw20\n", code=1)
    loading, error, *_ = result.stderr.splitlines()
    assert loading.startswith("loading")
    assert "32 positions" in error and "/reset begins anew" in error
    assert "was not taken into the conversation" in error
    assert result.stdout.split()
    assert "Cut off: the model has 32 positions. /reset begins" in result.stderr


def test_a_prompt_cache_goes_on(folder, tmp_path):
    file, talk = tmp_path / "c.safetensors", tmp_path / "talk.json"
    options = "-m", "6", "--prompt-cache", file
    first = chat(folder, "w20", f"/save {talk}", options=options).stdout
    expected = chat(folder, "w20", "w30").stdout.splitlines()[1]
    result = chat(folder, f"/load {talk}", "w30", options=options)
    assert first and result.stdout.splitlines() == [expected]
    assert "10 not read again" in result.stderr
    file.write_bytes(b"damaged")
    result = chat(folder, "w20", options=options)
    assert "Not used: " in result.stderr and result.stdout == first


def test_input_that_is_no_text(folder):
    options = *MEMORY, "-q", "-m", 4
    result = run("chat", folder, *options, input=b"w20\ncaf\xe9\n", code=1)
    assert result.stdout.strip()
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: The input is not text in UTF-8.")


def test_nobody_reads_a_system_prompt_without_a_template():
    result = run("chat", "-q", "-m", 4, input="/system Be brief.\nOnce\n", code=1)
    assert "has no chat template" in result.stderr and result.stdout.strip()


def test_what_was_thought_is_told_apart_and_ends(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(
        terminal.Screen, "piece", lambda self, *said: shown.append(said)
    )
    plain = chat(folder, "w20").stdout
    assert shown and not plain.strip()
    assert not any(thinking for _, thinking in shown)


def test_the_demo_model_continues_what_is_written():
    result = run("chat", "-m", 12, input="Once upon a time\n")
    assert result.stdout.startswith(", there was")


@pytest.mark.parametrize(
    "options, said, code",
    [
        (["a", "--model", "b"], "Name the model once", 2),
        (["nowhere"], "nowhere does not exist", 1),
        (["a", "--num-ctx", "9"], "mlx-flash calls it --context.", 2),
        (["a", "--system", "x"], "mlx-flash calls it --system-prompt.", 2),
        (["a", "--temperature", "1"], "mlx-flash calls it --temp.", 2),
        (["a", "--context", "0"], "--context", 2),
        (["a", "-m", "0"], "at least 1", 2),
        (["--system-prompt", "x"], "has no chat template", 1),  # the demo model
        (["a", "--prompt-cache", "x.npz"], "must end in .safetensors", 1),
    ],
)
def test_wrong_usages(options, said, code):
    assert said in refused("chat", *options, code=code)


# At a terminal


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model whose answers nothing ends but Ctrl-C."""
    base = tmp_path_factory.mktemp("endless")
    folder = make_chat_model(base, max_position_embeddings=100_000, eos_token_id=None)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("eos_token")
    file.write_text(json.dumps(config))
    return folder


@pytest.fixture
def live(endless, tmp_path):
    """A chat in a terminal: send(text), until(what the screen shall show) → screen."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "mlx_flash.cli", "chat", str(endless), *MEMORY]
    command += ["-m", "-1", "--max-kv-size", "64", "--check", "none"]
    environment = os.environ | {"MLX_FLASH_CACHE": str(tmp_path), "TERM": "xterm"}
    child = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
    )
    os.close(slave)
    os.set_blocking(master, False)
    seen = bytearray()

    def until(pattern, start=0):
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            try:
                piece = os.read(master, 65536)
                seen.extend(piece)
                if b"\x1b[6n" in piece:  # where is the cursor?
                    os.write(master, b"\x1b[1;1R")
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # it ended
                break
            if re.search(pattern, seen[start:]):
                return len(seen)
        assert re.search(pattern, seen[start:]), bytes(seen[start:])
        return len(seen)

    yield child, lambda text: os.write(master, text), until
    child.kill()
    child.wait()
    os.close(master)


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(live, tmp_path):
    child, send, until = live
    at = until(rb"/help lists commands")
    at = until(rb"\xe2\x80\xba", at)
    send(b"w20 w21\r")
    at = until(rb"w\d+ w\d+ w\d+ w\d+ w\d+ w\d+ w\d+ ", at)
    child.send_signal(signal.SIGINT)
    at = until(rb"Stopped\. The answer so far is kept\.", at)
    at = until(rb"\xe2\x80\xba", at)
    send(b"/reset\r")
    at = until(rb"A new conversation\.", at)
    at = until(rb"\xe2\x80\xba", at)
    send(b"\x03")
    at = until(rb"Ctrl-D or /quit ends the chat", at)
    at = until(rb"\xe2\x80\xba", at)
    send(b"\x04")
    child.wait(WAIT_S)
    assert child.returncode == 0
    history = tmp_path / terminal.HISTORY
    assert "+w20 w21" in history.read_text()
    assert history.stat().st_mode & 0o77 == 0


def test_what_a_terminal_would_obey_is_not_shown():
    assert terminal.shown("a\x1b]0;title\x07\tb\nc") == "a\ufffd]0;title\ufffd\tb\nc"


def test_an_interrupt_in_a_pipe_ends_the_turn_alone(folder, monkeypatch):
    real = conversation.stream_generate
    turns = []

    def interrupted(*args, **options):
        turns.append(1)
        for i, response in enumerate(real(*args, **options)):
            if len(turns) == 1 and i == 2:
                raise KeyboardInterrupt
            yield response

    monkeypatch.setattr(conversation, "stream_generate", interrupted)
    result = CliRunner().invoke(
        main, ["chat", str(folder), *MEMORY, "-m", "6"], input="w20\nw30\n"
    )
    assert result.exit_code == 0
    assert [len(line.split()) for line in result.stdout.splitlines()] == [2, 6]
    assert "Stopped. The answer so far is kept." in result.stderr
