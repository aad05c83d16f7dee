"""A hub of one repository in this process, and an empty cache for it."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


NAME = "tiny/opt"


class FakeHub(ThreadingHTTPServer):
    """The hub's endpoints that a download needs, for one repository."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.status = 200
        self.error_code = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0].strip("/")
        if hub.status != 200:
            return self.answer(b"{}", hub.status)
        if path in (f"api/models/{NAME}", f"api/models/{NAME}/revision/main"):
            return self.answer(json.dumps({"id": NAME, "sha": COMMIT}).encode())
        if path.startswith(f"api/models/{NAME}/revision/"):
            return self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        if path == f"api/models/{NAME}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": k, "size": len(v), "oid": digest(v)}
                for k, v in hub.files.items()
            ]
            return self.answer(json.dumps(tree).encode())
        start = f"{NAME}/resolve/{COMMIT}/"
        if path.startswith(start) and path.removeprefix(start) in hub.files:
            name = path.removeprefix(start)
            if self.command == "GET":
                hub.fetched.append(name)
            data = hub.files[name]
            headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": COMMIT}
            return self.answer(data, 200, headers)
        self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, data, status=200, headers=None):
        self.send_response(status)
        if status != 200 and self.server.error_code:
            headers = {"X-Error-Code": self.server.error_code}
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


def digest(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no hub at all unless `hub` gives one."""
    folder = tmp_path / "hub-cache"
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    point_to(nowhere, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    return folder


def point_to(url, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(cache, monkeypatch):
    server = FakeHub()
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}
    )
    thread.start()
    point_to(server.url, monkeypatch)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
