"""What ranks tell each other besides arrays: commands, answers and signs of life.

Rank 0 has a TCP connection to every other rank. MLX's sums could carry the same, but
whoever waits in one of those keeps a core busy (MLX's ring polls its sockets), and
ranks wait for as long as nobody asks rank 0 anything. A sum does not tell either that a
rank is gone for good.

One line of JSON is a message. Who hears nothing from a rank for `SILENT_S`, or sees its
connection end without a goodbye, says so in one line and ends its process at once: a
thread may be waiting in a sum that never comes.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, Queue
from typing import Any

Message = dict[str, Any]

BEAT_S, SILENT_S = 1.0, 7.0
IDLE_S = 0.5  # between two looks whether memory has to give way
BEAT = b"{}\n"
LEAVE_S = 5.0  # after a goodbye
FAILED = 1  # exit code
FLUSH_S = 0.5  # for what was printed before the end


class Link:
    """A connection to one other rank.

    Args:
        name: Of the other rank, for messages.
        lost: Told why it is gone, by a thread of this link; at most once.
        left: Told when it said goodbye, by the same thread.
    """

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        lost: Callable[[str], None],
        left: Callable[[], None] = lambda: None,
    ):
        self.name = name
        self._connection = connection
        self._lines = connection.makefile("r", encoding="utf-8")
        self._lost = lost
        self._left = left
        self._sending = threading.Lock()
        self._heard_s = time.monotonic()
        self._ended = False
        self.received: Queue[Message | None] = Queue()
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name="mlx-flash link", daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message. That nobody is there to get it is found by the listener."""
        data = (json.dumps(message) + "\n").encode()
        with contextlib.suppress(OSError), self._sending:
            self._connection.sendall(data)

    def end(self) -> None:
        """Say goodbye, and take no notice any more of what happens to the other."""
        self._ended = True
        self.send({"do": "bye"})

    def close(self) -> None:
        """End the connection; the listener ends with it."""
        self._ended = True
        with contextlib.suppress(OSError):  # which the other may have ended before
            self._connection.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with self._connection, self._lines:
            try:
                for line in self._lines:
                    self._heard_s = time.monotonic()
                    if not self._take(json.loads(line)):
                        return
            except (OSError, ValueError):
                pass
            self._tell(f"{self.name} ended unexpectedly. All ranks stop.")

    def _take(self, message: Message) -> bool:
        """Take a message in; False if it is the last one."""
        do = message.get("do")
        if do == "lost":  # another rank, as this one found
            self._tell(message["why"])
            return False
        if message:
            self.received.put(message)
        if do == "bye":
            self._ended = True
            self._left()
        return do != "bye"

    def _beat(self) -> None:
        while not self._ended:
            silent_s = time.monotonic() - self._heard_s
            if silent_s > SILENT_S:
                self._tell(
                    f"{self.name} has not answered for {silent_s:.0f} s. All ranks "
                    "stop."
                )
            # A message that is being sent is a sign of life, too, and may wait for a
            # rank that reads nothing any more.
            if self._sending.acquire(blocking=False):
                try:
                    with contextlib.suppress(OSError):
                        self._connection.send(BEAT, socket.MSG_DONTWAIT)
                finally:
                    self._sending.release()
            time.sleep(BEAT_S)

    def _tell(self, why: str) -> None:
        if not self._ended:
            self._ended = True
            self._lost(why)
            self.received.put(None)


def messages(link: Link, idle: Callable[[], None] = lambda: None) -> Iterator[Message]:
    """What arrives, until the other says goodbye or is lost.

    Args:
        idle: Called now and then while nothing does.
    """
    while True:
        try:
            message = link.received.get(timeout=IDLE_S)
        except Empty:
            idle()
            continue
        if message is None:
            return
        yield message
        if message.get("do") == "bye":
            return


def listen() -> socket.socket:
    """A socket that other ranks connect to, at any free port."""
    return socket.create_server(("", 0))


def connect(addresses: list[str], port: int, timeout_s: float) -> socket.socket | None:
    """A connection to the first address that answers, None if none does."""
    for address in addresses:
        try:
            found = socket.create_connection((address, port), timeout_s)
        except OSError:
            continue
        found.settimeout(None)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return found
    return None


def own_addresses() -> list[str]:
    """Where rank 0 can be reached, the likeliest first.

    The hostfile of MLX's ring and JACCL's coordinator name an address that is known to
    work.
    """
    found = []
    try:
        with open(os.environ.get("MLX_HOSTFILE", "")) as file:
            found += [entry.rpartition(":")[0] for entry in json.load(file)[0]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    found.append(os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0])
    try:
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    except OSError:
        pass
    return [*dict.fromkeys(filter(None, found)), "127.0.0.1"]


def hold_abort() -> None:
    """Give `die` time to say what happened before MLX aborts the process.

    MLX's ring throws in a thread of its own when a connection ends, and nobody can
    catch that. A signal handler gets the signal's number, and SIGABRT has number 6: C's
    own `sleep` as its handler keeps that thread for 6 seconds.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def leave_in_time() -> None:
    """End this process soon, also where it waits in a sum that never comes."""
    timer = threading.Timer(LEAVE_S, os._exit, (FAILED,))
    timer.daemon = True
    timer.start()


def die(why: str) -> None:
    """Say why in one line, and end the process, whatever its threads do."""
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(FLUSH_S)
    os.write(2, f"Error: {why}\n".encode())
    os._exit(FAILED)
