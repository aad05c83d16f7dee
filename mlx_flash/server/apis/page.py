"""The page at `/`: static files of the package, which ask for nothing elsewhere."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parents[1] / "page"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# The page can neither load nor send anything elsewhere, nor run what a model writes.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
    "style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """The page and its files. They hold no secrets and need no key."""
    files = [path for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES]
    named = {f"/page/{path.name}": path for path in files}
    named["/"] = FOLDER / "index.html"
    return [Route(address, _sender(path)) for address, path in named.items()]


def _sender(path: Path):
    content = path.read_bytes()

    async def send(http: Request) -> Response:
        return Response(content, media_type=TYPES[path.suffix], headers=HEADERS)

    return send
