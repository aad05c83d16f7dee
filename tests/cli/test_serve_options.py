"""Options of `mlx-flash serve` reach the server, and none of mlx-lm's is missing."""

import re
import sys
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

import mlx_flash.server
from mlx_flash.cli import main
from mlx_flash.cli.serve import serve

serving = sys.modules[serve.callback.__module__]

DOCS = Path(__file__).parents[2] / "docs" / "server.md"


def run(*arguments, **environment):
    """(exit code, stderr, what the server was started with)."""
    with (
        mock.patch.object(mlx_flash.server, "serve") as started,
        mock.patch.object(serving, "model_folder", Path),
    ):
        result = CliRunner().invoke(
            main, ["serve", "--model", "m", *arguments], env=environment
        )
    return result.exit_code, result.stderr, started.call_args


def test_defaults_are_those_of_the_library():
    code, _, call = run()
    assert code == 0
    model, memory, settings, saving = call.args
    assert (model, memory, saving) == ("m", "auto", None)
    assert settings == mlx_flash.server.Settings()


def test_every_option_reaches_the_server(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    code, error, call = run(
        *(
            "--host",
            "0.0.0.0",
            "--port",
            "9",
            "--allowed-origins",
            "http://a, http://b",
        ),
        *("--api-key", "k", "--log-level", "error", "--temp", "0.5", "--top-p", "0.9"),
        *("--top-k", "7", "--min-p", "0.1", "--max-tokens", "33"),
        *("--chat-template", str(template), "--trust-remote-code"),
        *("--chat-template-args", '{"enable_thinking": false}'),
        *("--adapter-path", "a", "--draft-model", "d"),
        *("--num-draft-tokens", "2", "--kv-bits", "8"),
        *("--kv-group-size", "32", "--quantized-kv-start", "5"),
        *("--prefill-step-size", "512", "--prompt-cache-size", "3"),
        *("--prompt-cache-bytes", "2MB", "--prompt-cache-dir", str(tmp_path)),
        *("--prompt-cache-gb", "1.5", "--context", "99", "--memory", "7GB"),
        *("--page-cache", "off", "--no-elastic", "--check", "full", "--shares", "2:1"),
        *("--skip", "30%"),
        *("--decode-concurrency", "1", "--prompt-concurrency", "1"),
    )
    assert code == 0, error
    _, memory, settings, saving = call.args
    assert settings == mlx_flash.server.Settings(
        host="0.0.0.0",
        port=9,
        allowed_origins=("http://a", "http://b"),
        api_key="k",
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        max_tokens=33,
        chat_template="{{ messages }}",
        template_options={"enable_thinking": False},
        kv_bits=8,
        kv_group_size=32,
        quantized_kv_start=5,
        num_draft_tokens=2,
        prefill_step_size=512,
        prompt_cache_size=3,
        prompt_cache_bytes=2_000_000,
    )
    assert memory == "7GB" and saving.most_bytes == 1_500_000_000
    assert call.kwargs == {
        "folder_of_model": Path("m"),
        "context": 99,
        "skip": 0.3,
        "page_cache": "off",
        "elastic": False,
        "check": "full",
        "shares": "2:1",
        "adapter_path": "a",
        "draft_model": "d",
        "trust_remote_code": True,
    }


def test_a_key_may_be_in_the_environment():
    assert run(MLX_FLASH_API_KEY="k")[2].args[2].api_key == "k"
    assert run()[2].args[2].api_key is None


def test_a_template_may_be_given_as_text():
    text = "{% for m in messages %}{{ m.content }}{% endfor %}" * 20
    assert run("--chat-template", text)[2].args[2].chat_template == text


@pytest.mark.parametrize(
    "options, says",
    [
        (["--pipeline"], "one machine"),
        (["--use-default-chat-template"], "Give --chat-template"),
        (["--decode-concurrency", "32"], "one after the other"),
        (["--prompt-concurrency", "8"], "one after the other"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options, says):
    code, error, call = run(*options)
    assert code == 1 and call is None
    [line] = error.splitlines()
    assert line.startswith("Error: ") and options[0] in line and says in line


@pytest.mark.parametrize(
    "options, says",
    [
        (["--chat-template-args", "[1]"], "no JSON object"),
        (["--chat-template-args", "{"], "no JSON object"),
        (["--prompt-cache-bytes", "many"], "many"),
        (["--prompt-cache-bytes", "50%"], "512MB"),
        (["--prompt-cache-gb", "3"], "--prompt-cache-dir"),
        (["--port", "70000"], "65535"),
        (["--temp", "-1"], "--temp"),
        (["--top-p", "2"], "--top-p"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_wrong_values_are_refused(options, says):
    code, error, call = run(*options)
    assert code == 2 and call is None
    assert says in error.splitlines()[-1]


def test_every_row_of_mlx_lms_help_is_an_option_and_in_the_docs(capsys):
    from mlx_lm import server

    with mock.patch("sys.argv", ["mlx_lm.server", "--help"]):
        with pytest.raises(SystemExit):
            server.main()
    theirs = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.M))
    assert len(theirs) > 20
    ours = {name for param in serve.params for name in param.opts}
    assert theirs - ours == set()
    named = set(re.findall(r"`(--[a-z-]+)", DOCS.read_text()))
    assert theirs - named == set()
