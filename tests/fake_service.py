"""A server of one API whose answers are known beforehand."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette

from mlx_flash.errors import FlashError
from mlx_flash.server.events import Done, Progress, Reasoning, Text, ToolCall, Usage
from mlx_flash.server.facts import Facts
from mlx_flash.server.failures import HANDLERS
from mlx_flash.server.fields import Limits
from mlx_flash.server.request import Request

NAME = "small"
FLASH = {"hit_rate": 0.5, "budget_bytes": 1000}
FACTS = Facts(
    family="llama",
    dtype="float16",
    bits=None,
    model_bytes=2000,
    memory_bytes=1000,
    modified_s=1e9,
    digest="ab" * 32,
    chat_template="{{ messages }}",
    tools=True,
    thinking=True,
)
BROKEN = FlashError("A read failed.")


def done(reason="stop", stop_text=None, tokens=3):
    return Done(reason, Usage(12, 4, tokens, FLASH, 1), stop_text)


SAID = [Progress(4, 12), Progress(12, 12), Text("Pa"), Text("ris."), done()]
THOUGHT = [Progress(12, 12), Reasoning("Hm"), Reasoning("m."), Text("Paris."), done()]
CALLED = [
    Progress(12, 12),
    Text("Let me see."),
    ToolCall("call_1", "weather", '{"city": "Paris"}'),
    ToolCall("call_2", "weather", '{"city": "Rome"}'),
    done("tool_calls"),
]
BREAKS = [Progress(12, 12), Text("Pa"), BROKEN]


@dataclass
class FakeService:
    """Answers with `events`, and notes what was asked. Errors among them are raised."""

    events: list = field(default_factory=lambda: list(SAID))
    limits: Limits = Limits(NAME, frozenset({NAME, "default_model"}), 100, 64)
    facts: Facts = FACTS
    asked: list[Request] = field(default_factory=list)
    is_healthy: bool = True

    async def answer(self, request):
        self.asked.append(request)
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            yield event

    async def count_tokens(self, request):
        self.asked.append(request)
        return 12

    @property
    def last(self):
        return self.asked[-1]


def application(routes):
    return Starlette(routes=routes, exception_handlers=HANDLERS)


@contextlib.contextmanager
def served(routes):
    """The address of a server with these routes, in a thread of this process."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(application(routes), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
