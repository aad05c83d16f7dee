"""The page at `/`: static files of the package, which ask for nothing elsewhere."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
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
    paths = [path for path in FOLDER.iterdir() if path.suffix in TYPES]
    files = {path.name: path.read_bytes() for path in paths}

    async def send(http: Request) -> Response:
        name = http.path_params.get("name", "index.html")
        if name not in files:
            raise HTTPException(404, f"The page has no file {name[:80]!r}")
        kind = TYPES[Path(name).suffix]
        return Response(files[name], media_type=kind, headers=HEADERS)

    return [Route("/", send), Route("/page/{name}", send)]
