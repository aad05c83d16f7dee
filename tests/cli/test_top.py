"""`mlx-flash top`, against a running server."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from rich.console import Console
from serving import complete, free_port, served

import mlx_flash
from mlx_flash.cli import main
from mlx_flash.cli.top_frame import Past, frame, say
from mlx_flash.cli.top_state import read_state
from mlx_flash.server import Settings, open_server

KEY = "sesame"


@pytest.fixture(scope="module")
def url():
    settings = Settings(port=0)
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made, served(made):
        complete(made.port, "Once upon a time", max_tokens=6)
        yield f"http://127.0.0.1:{made.port}"


def run(*arguments, **environment):
    return CliRunner().invoke(main, ["top", *arguments], env=environment)


def drawn(state, width=100, rows=None, past=None, **options):
    console = Console(width=width, force_terminal=True, record=True, **options)
    with console.capture() as shown:
        console.print(frame(state, past or Past(), console, rows))
    return shown.get()


def test_one_picture(url):
    shown = run(url, "--once", COLUMNS="100")
    assert shown.exit_code == 0 and not shown.stderr
    for said in (
        "demo_model  11.8 MB in a budget of 5.92 MB, 4 layers of neurons",
        "idle, 1 request ended",
        "tokens/s",
        "4.00 per token",
        "neuron 0",
        "2,047",
        "predictors 708 KB",
        "memory pressure: ",
    ):
        assert said in shown.stdout, said
    rows = re.findall(r"^ +\d ([·░▒▓█]+) +([\d.]+) %$", shown.stdout, re.MULTILINE)
    layers = read_state(url)["layers"]
    shares = [f"{100 * x['held_units'] / x['units']:.1f}" for x in layers]
    assert [share for _, share in rows] == shares
    assert all("·" in cells and set(cells) != {"·"} for cells, _ in rows)


def test_the_state_for_scripts(url):
    shown = run(url, "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["answer"]["tokens"] == 6


@pytest.mark.parametrize("ending", ["", "/", "/v1"])
def test_addresses_as_people_have_them(url, ending):
    assert run(url.removeprefix("http://") + ending, "--once").exit_code == 0
    assert run(url + ending, "--once").exit_code == 0


def test_lines_are_never_wider_than_the_terminal(url):
    for width in (60, 80, 140):
        shown = drawn(read_state(url), width, color_system=None)
        assert max(map(len, shown.splitlines())) <= width


def test_colours_say_where_units_are(url):
    shown = drawn(read_state(url), color_system="truecolor")
    assert "in memory" in shown and "on flash" in shown
    backgrounds = re.findall(r"48;2;(\d+);(\d+);(\d+)", shown)
    assert len(set(backgrounds)) > 50


def test_layers_that_do_not_fit_are_left_out(url):
    state = read_state(url)
    state["layers"] = state["layers"] * 20
    shown = drawn(state, rows=30, color_system=None)
    assert len(shown.splitlines()) <= 30
    assert re.search(r"^ +72 ", shown, re.MULTILINE)


def test_lines_over_time_are_of_what_changed(url):
    state, past = read_state(url), Past()
    drawn(state, past=past)
    later = json.loads(json.dumps(state))
    later["at_s"] += 4
    later["answer"]["tokens"] += 8
    later["counters"]["waits"] += 32
    later["counters"]["hits"] += 30
    later["counters"]["misses"] += 10
    drawn(later, past=past)
    last = {name: line[-1] for name, line in past.lines.items()}
    assert last["speed"] == 2.0
    assert last["waits"] == 4.0
    assert last["hits"] == 0.75


def test_a_server_before_its_first_answer():
    settings = Settings(port=0, api_key=KEY)
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made, served(made):
        url = f"http://127.0.0.1:{made.port}"
        refused = run(url, "--once")
        assert refused.exit_code == 1
        assert refused.stderr == (
            f"Error: {url} wants its API key. Give it with --api-key, or in "
            "MLX_FLASH_API_KEY.\n"
        )
        assert "idle, 0 requests" in run(url, "--once", "--api-key", KEY).stdout
        assert "idle" in run(url, "--once", MLX_FLASH_API_KEY=KEY).stdout


@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "ftp://x", "http://[", ""])
def test_where_nobody_answers(address):
    shown = run(address.format(free_port()), "--once")
    assert shown.exit_code == 1 and not shown.stdout
    assert shown.stderr.startswith("Error: ") and shown.stderr.count("\n") == 1
    assert "mlx-flash serve" in shown.stderr


@pytest.mark.parametrize(
    "nbytes, said",
    [(0, "0 B"), (999, "999 B"), (1500, "1.50 KB"), (5_916_672, "5.92 MB")],
)
def test_amounts_have_three_figures(nbytes, said):
    assert say(nbytes) == said


def test_it_goes_on_until_ctrl_c(url):
    """In a terminal, whose screen is as before afterwards."""
    ours, its = os.openpty()
    command = [sys.executable, "-m", "mlx_flash.cli", "top", url, "--interval", "0.1"]
    watching = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, env=os.environ | {"TERM": "xterm"}
    )
    os.close(its)
    shown = b""
    try:
        while shown.count(b"demo_model") < 3:
            shown += os.read(ours, 65536)
        watching.send_signal(signal.SIGINT)
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # Linux's way to say that nobody writes any more
                break
            if not more:
                break
            shown += more
        assert watching.wait(60) == 130
    finally:
        watching.kill()
        watching.wait()
        os.close(ours)
    entered, left = b"\x1b[?1049h", b"\x1b[?1049l"
    assert entered in shown and left in shown
    assert b"Traceback" not in shown
