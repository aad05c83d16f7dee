"""Drives _reader.c under a sanitizer: python drive_reader.py EXTENSION.

Failures, dropped and repeated tickets, closing in flight, forks, many threads. Imports
neither MLX nor mlx_flash's readers: what is loaded is what was compiled for this.
"""

import gc
import importlib.util
import os
import struct
import sys
import tempfile
import threading

import numpy as np

UNITS, STRIDE, FIRST, SLOTS = 64, 5000, 1000, 24


def load(path):
    spec = importlib.util.spec_from_file_location("_reader", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Client:
    """A source of its own with slots, and the bytes that should arrive."""

    def __init__(self, c, reader, content, fd, seed):
        self.c, self.reader, self.content = c, reader, content
        self.rng = np.random.default_rng(seed)
        self.slots = [np.zeros((SLOTS, n), np.uint8) for n in (FIRST, STRIDE - FIRST)]
        begins = STRIDE * np.arange(UNITS, dtype=np.int64)[:, None]
        self.places = np.ascontiguousarray(begins + np.array([0, FIRST]))
        place = (0, STRIDE, 2, 0)  # the same bytes, at a stride or by their places
        if seed % 2:
            place = (0, 0, 2, self.places.ctypes.data)
        extents = struct.pack("=7q", fd, 1, 1, *place)
        parts = b"".join(
            struct.pack("=Q2q", array.ctypes.data, offset, array.shape[1])
            for array, offset in zip(self.slots, (0, FIRST), strict=True)
        )
        self.source = c.add_source(reader, extents, parts, UNITS, SLOTS)

    def submit(self, units):
        units = np.asarray(units, np.int64)
        slots = self.rng.permutation(SLOTS)[: len(units)].astype(np.int64)
        places = units.ctypes.data, slots.ctypes.data, len(units)
        guess = self.rng.random() < 0.3
        ticket = self.c.submit(self.reader, self.source, *places, guess)
        return ticket, units, slots

    def some_units(self):
        return self.rng.integers(0, UNITS, self.rng.integers(0, SLOTS))

    def read(self):
        ticket, units, slots = self.submit(self.some_units())
        *_, error, _, _, _, _ = self.c.wait(ticket)
        assert not error
        found = np.concatenate([array[slots] for array in self.slots], axis=1)
        assert (found == self.content[units]).all()

    def drop(self):
        for _ in range(4):
            self.submit(self.some_units())
        self.c.drain(self.reader)

    def refuse(self):
        for wrong in ([UNITS], [-1], [1] * (SLOTS + 1)):
            try:
                self.submit(wrong)
            except ValueError:
                continue
            raise AssertionError(f"{wrong} was accepted")

    def work(self, rounds):
        for _ in range(rounds):
            self.rng.choice([self.read, self.read, self.drop, self.refuse])()


def run_threads(clients, rounds):
    faults = []

    def work(client):
        try:
            client.work(rounds)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def end_in_flight(c, content, fd, end):
    """Readers that are closed, dropped or forked while reads are under way."""
    reader = c.create(8, 4096)
    client = Client(c, reader, content, fd, 3)
    tickets = [client.submit(range(SLOTS)) for _ in range(30)]
    if end == "close":
        c.close(reader)
        c.close(reader)
    elif end == "fork":
        if not (child := os.fork()):
            try:
                c.wait(tickets[0][0])
            except ValueError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    else:
        c.drain(reader)  # arrays must outlive what is in flight
    del tickets, client, reader
    gc.collect()


def main():
    c = load(sys.argv[1])
    with tempfile.TemporaryFile() as file:
        content = np.random.default_rng(1).integers(0, 256, (UNITS, STRIDE), np.uint8)
        file.write(content.tobytes())
        file.flush()
        reader = c.create(8, 4096)
        fd = file.fileno()
        run_threads([Client(c, reader, content, fd, i) for i in range(6)], 100)
        for fd_of_nothing in (-1, os.open("/", os.O_RDONLY)):
            client = Client(c, reader, content, fd_of_nothing, 9)
            ticket, *_ = client.submit(range(SLOTS))
            *_, error, _, _, _, _ = c.wait(ticket)
            assert error and c.wait(ticket)[3] == error
        for _ in range(10):
            for end in ("close", "fork", "drop"):
                end_in_flight(c, content, fd, end)


main()
