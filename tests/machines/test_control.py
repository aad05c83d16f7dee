"""Ranks notice when another one is gone, and only then."""

import socket
import threading
import time
from queue import Empty

import pytest

from mlx_flash.machines import control
from mlx_flash.machines.control import Link, messages


class Pair:
    """Two ends of a connection, and what each was told of the other's loss."""

    def __init__(self):
        self.sockets = socket.socketpair()
        self.lost = [], []
        self.left = []
        self.ends = [
            Link(self.sockets[0], "Rank 1 (b)", self.lost[0].append),
            Link(self.sockets[1], "Rank 0 (a)", self.lost[1].append, self._note_left),
        ]

    def _note_left(self):
        self.left.append(True)


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr(control, "BEAT_S", 0.05)
    monkeypatch.setattr(control, "SILENT_S", 1.0)
    found = Pair()
    yield found
    for end in found.ends:
        end.close()
    for end in found.sockets:
        end.close()


def until(condition, timeout_s=20):
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_messages_arrive_in_order(pair):
    one, other = pair.ends
    for i in range(100):
        one.send({"do": "call", "tokens": [i] * 50})
    one.end()
    got = list(messages(other))
    assert [m["tokens"][0] for m in got[:-1]] == list(range(100))
    assert got[-1] == {"do": "bye"}


def test_a_goodbye_is_no_loss(pair):
    one, other = pair.ends
    one.end()
    until(lambda: pair.left)
    other.end()
    one.close()
    time.sleep(0.3)
    assert pair.lost == ([], [])


def test_an_end_without_a_goodbye_is_a_loss(pair):
    pair.sockets[0].shutdown(socket.SHUT_RDWR)
    until(lambda: pair.lost[1])
    assert pair.lost[1] == ["Rank 0 (a) ended unexpectedly. All ranks stop."]
    assert list(messages(pair.ends[1])) == []


def test_silence_is_a_loss(pair):
    pair.ends[0]._ended = True  # its signs of life end
    until(lambda: pair.lost[1])
    assert "Rank 0 (a) has not answered for" in pair.lost[1][0]


def test_signs_of_life_are_no_messages(pair):
    time.sleep(1.5)  # longer than silence may be
    assert pair.lost == ([], [])
    with pytest.raises(Empty):
        pair.ends[0].received.get_nowait()


def test_the_loss_of_a_third_is_told(pair):
    pair.ends[0].send({"do": "lost", "why": "Rank 2 (c) ended unexpectedly."})
    until(lambda: pair.lost[1])
    assert pair.lost[1] == ["Rank 2 (c) ended unexpectedly."]


def test_garbage_is_a_loss(pair):
    pair.sockets[0].sendall(b"GET / HTTP/1.1\r\n")
    until(lambda: pair.lost[1])


def test_rank_0_is_where_the_hostfile_says(monkeypatch, tmp_path):
    file = tmp_path / "hosts.json"
    file.write_text('[["10.0.0.5:5000", "10.0.0.6:5001"], ["10.0.0.7:5000"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(file))
    assert control.own_addresses()[:2] == ["10.0.0.5", "10.0.0.6"]
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "none"))
    monkeypatch.setenv("MLX_JACCL_COORDINATOR", "10.0.0.9:1234")
    assert control.own_addresses()[0] == "10.0.0.9"
    assert control.own_addresses()[-1] == "127.0.0.1"


def test_a_rank_that_reads_nothing_is_a_loss_also_while_much_is_sent(monkeypatch):
    monkeypatch.setattr(control, "BEAT_S", 0.05)
    monkeypatch.setattr(control, "SILENT_S", 1.0)
    ours, theirs = socket.socketpair()
    lost = []
    link = Link(ours, "Rank 1 (b)", lost.append)
    sending = threading.Thread(target=link.send, args=({"tokens": "w" * 5_000_000},))
    sending.start()  # fills what the system keeps for a reader, and waits
    try:
        until(lambda: lost)
        assert "has not answered" in lost[0]
    finally:
        theirs.close()
        sending.join()
        link.close()
