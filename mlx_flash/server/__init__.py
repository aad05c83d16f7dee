"""An HTTP server for the APIs that clients know, on a model whose FFNs are on flash.

A request's way, from the outside in: `listener` (uvicorn), `guards` (who may ask),
`apis` (bodies and answers in the shape of each API), `worker` (one answer at a time),
`answering` (tokens), `conversations` (KV caches that wait for the next request),
`prefix_folder` (those on disk).
"""

from .settings import Settings
from .start import open_server, serve

__all__ = ["Settings", "open_server", "serve"]
