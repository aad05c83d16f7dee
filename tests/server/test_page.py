"""The page and the state: what is served, how it is typed and what it may do."""

import http.client
import json
import re
from contextlib import closing

import pytest
from serving import ask, complete, served

import mlx_flash
from mlx_flash.server import Settings, open_server
from mlx_flash.server.apis.page import FOLDER

KEY = "sesame"
FILES = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(scope="module")
def port():
    settings = Settings(port=0, api_key=KEY)
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made, served(made):
        yield made.port


def get(port, path, **headers):
    """(status, headers, body)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    with closing(connection):
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def with_key(port, path):
    return ask(port, path, headers={"Authorization": f"Bearer {KEY}"})


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/", "text/html; charset=utf-8"),
        ("/page/style.css", "text/css; charset=utf-8"),
        ("/page/inside.css", "text/css; charset=utf-8"),
        ("/page/main.js", "text/javascript; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ],
)
def test_files_have_their_types_and_need_no_key(port, path, kind):
    status, headers, body = get(port, path)
    assert (status, headers["Content-Type"]) == (200, kind)
    name = path.rpartition("/")[2] or "index.html"
    assert body == (FOLDER / name).read_bytes()


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
def test_the_page_may_reach_nobody_else(port, path):
    _, headers, _ = get(port, path)
    rules = dict(
        rule.strip().split(" ", 1)
        for rule in headers["Content-Security-Policy"].split(";")
    )
    assert rules.pop("default-src") == "'none'"
    assert set(rules.values()) <= {"'self'", "'none'"}
    assert rules["frame-ancestors"] == "'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fapp.py", "%2e%2e/app.py"])
def test_other_files_are_not_served(port, name):
    status, _, body = get(port, f"/page/{name}")
    assert status == 404
    assert "import" not in body.decode()


@pytest.mark.parametrize("name", FILES)
def test_files_name_no_other_address(name):
    text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|[\"'(]//|@import", text)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_nothing_becomes_html(name):
    """What a model writes is text, whatever it looks like."""
    text = (FOLDER / name).read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", text)
    assert not re.search(r"\beval\(|new Function|DOMParser", text)


def test_all_files_are_named_somewhere():
    texts = {name: (FOLDER / name).read_text() for name in FILES}
    for name in FILES:
        others = "".join(text for other, text in texts.items() if other != name)
        assert name == "index.html" or name in others


@pytest.mark.parametrize("path", ["/api/flash/state", "/api/flash/stream", "/metrics"])
def test_figures_need_the_key(port, path):
    assert get(port, path)[0] == 401


def test_the_state_is_json(port):
    status, state, _ = with_key(port, "/api/flash/state")
    assert status == 200
    assert state["model"]["name"] == "demo_model"
    assert not state["model"]["chat"]
    assert len(state["layers"]) == state["model"]["layers"] == 4


def test_the_stream_has_a_picture_whenever_something_changes(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with_it = {"Authorization": f"Bearer {KEY}"}
    connection.request("GET", "/api/flash/stream", headers=with_it)
    answer = connection.getresponse()
    assert answer.headers["Content-Type"].startswith("text/event-stream")

    def next_picture():
        line = answer.readline()
        while not line.startswith(b"data: "):
            line = answer.readline()
        return json.loads(line[6:])

    with closing(connection):
        before = next_picture()
        body = {"prompt": "Once upon a time", "max_tokens": 4}
        assert ask(port, "/v1/completions", body, with_it)[0] == 200
        picture = next_picture()
        while picture["counters"]["hits"] == before["counters"]["hits"]:
            picture = next_picture()
        while picture["requests"]["running"]:
            picture = next_picture()
    assert picture["answer"]["tokens"] == 4
    assert picture["requests"]["ended"] == before["requests"]["ended"] + 1


def test_an_open_stream_does_not_hold_the_server_up():
    settings = Settings(port=0)
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made:
        with served(made):
            connection = http.client.HTTPConnection("127.0.0.1", made.port, timeout=60)
            connection.request("GET", "/api/flash/stream")
            answer = connection.getresponse()
            assert answer.readline().startswith(b"data: ")
            complete(made.port, "Once upon a time", max_tokens=2)
        rest = answer.read()  # to its end
        connection.close()
    assert rest
