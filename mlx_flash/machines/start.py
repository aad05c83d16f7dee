"""Find the other ranks, when a command begins."""

import atexit
import json
import platform
import secrets
import socket
import threading
from functools import cache

from ..errors import FlashError
from . import launched
from .control import (
    Link,
    connect,
    die,
    hold_abort,
    leave_in_time,
    listen,
    own_addresses,
)
from .follow import Follower
from .group import Group, join_group
from .lead import Lead

CONNECT_S = 30.0
IN_A_THREAD = (
    "On several machines the main thread loads the first model: it is the one that "
    "follows rank 0 on the others. Call mlx_flash.load there."
)


def start() -> Lead | Follower | None:
    """Who this process is beside others; None where it runs alone.

    Raises:
        FlashError: If the other ranks cannot be reached, or if another thread than the
            main one is the first to ask.
    """
    if launched() and not _start.cache_info().currsize:
        if threading.current_thread() is not threading.main_thread():
            raise FlashError(IN_A_THREAD)
    return _start()


@cache
def _start() -> Lead | Follower | None:
    group = join_group()
    if group is None:
        return None
    hold_abort()
    return _lead(group) if group.rank == 0 else _follow(group)


def name_of(rank: int, host: str) -> str:
    return f"Rank {rank} ({host})"


def _lead(group: Group) -> Lead:
    token = secrets.token_hex(16)
    links: list[Link] = []

    def lost(why: str) -> None:
        for link in links:
            link.send({"do": "lost", "why": why})
        die(why)

    with listen() as server:
        port = server.getsockname()[1]
        where = {"at": own_addresses()[:8], "port": port, "token": token}
        group.tell(json.dumps(where))
        group.measure()
        server.settimeout(CONNECT_S)
        found: dict[int, tuple[socket.socket, str]] = {}
        while len(found) < group.size - 1:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, group.size)) - found.keys())
                raise FlashError(
                    f"Rank {missing[0]} did not connect in {CONNECT_S:.0f} s. Check "
                    "that its firewall lets Python connect to this machine."
                ) from None
            rank, host = _greeting(connection, token)
            if 0 < rank < group.size:
                found[rank] = connection, host
            else:
                connection.close()
    for rank, (connection, host) in sorted(found.items()):
        links.append(Link(connection, name_of(rank, host), lost))
    lead = Lead(group, links, name_of(0, platform.node()))
    lead.tell({"name": lead.names[0]})
    atexit.register(lead.end)
    return lead


def _greeting(connection: socket.socket, token: str) -> tuple[int, str]:
    """(rank, host) of who connects; (-1, "") of a stranger."""
    connection.settimeout(CONNECT_S)
    try:
        with connection.makefile("r", encoding="utf-8") as lines:
            hello = json.loads(lines.readline(1000))
        if not secrets.compare_digest(hello["token"], token):
            return -1, ""
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return int(hello["rank"]), str(hello["host"])[:100]
    except (OSError, ValueError, LookupError, TypeError):
        return -1, ""


def _follow(group: Group) -> Follower:
    where = json.loads(group.tell(""))
    group.measure()
    connection = connect(where["at"], where["port"], CONNECT_S)
    if connection is None:
        raise FlashError(
            f"Rank 0 cannot be reached at {', '.join(where['at'])}. Check that its "
            "firewall lets Python accept connections."
        )
    host = platform.node()
    hello = {"rank": group.rank, "token": where["token"], "host": host}
    connection.sendall((json.dumps(hello) + "\n").encode())
    link = Link(connection, name_of(0, where["at"][0]), die, leave_in_time)
    follower = Follower(group, link, name_of(group.rank, host))
    link.name = follower.next()["name"]
    return follower
