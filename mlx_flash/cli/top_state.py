"""Ask a server for its state over HTTP."""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from ..errors import FlashError

ANSWER_S = 10.0
PATH = "/api/flash/state"


def read_state(url: str, api_key: str | None = None) -> dict[str, Any]:
    """The state of the server at `url`, as `server.state.State` has it.

    Args:
        url: Of the server, or of its OpenAI API, which is what it prints.

    Raises:
        FlashError: If nobody answers, or somebody else.
    """
    base = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        asked = Request(base + PATH, headers=headers)
        with urlopen(asked, timeout=ANSWER_S) as answer:
            state = json.load(answer)
    except HTTPError as error:
        error.close()
        if error.code == 401:
            raise FlashError(
                f"{base} wants its API key. Give it with --api-key, or in "
                "MLX_FLASH_API_KEY."
            ) from None
        raise _no_server(base, f"answers {error.code} to {PATH}") from None
    except (URLError, OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise _no_server(base, f"does not answer ({reason})") from None
    except ValueError:
        raise _no_server(base, "answers with no JSON, or is no address") from None
    if not isinstance(state, dict) or "layers" not in state:
        raise _no_server(base, f"answers something else at {PATH}")
    return state


def _no_server(base: str, found: str) -> FlashError:
    return FlashError(
        f"{base} {found}. Start a server with mlx-flash serve, and give the address "
        "that it prints."
    )
