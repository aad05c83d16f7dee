"""Digests of whole files and of samples, and files that are written whole."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlx_flash.errors import FlashError
from mlx_flash.storage import files
from mlx_flash.storage.digests import PIECE_BYTES, PIECES, file_sha256, sample_sha256
from mlx_flash.storage.files import cache_folder, make_folder, sync, write_whole
from mlx_flash.storage.typed_json import from_json


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECES * PIECE_BYTES, 300_001])
def test_a_sample_is_of_eight_pieces_as_the_format_says(tmp_path, size):
    path = tmp_path / "file"
    data = os.urandom(size)
    path.write_bytes(data)
    last = max(size - 16384, 0)
    pieces = [data[i * last // 7 :][:16384] for i in range(8)]
    assert sample_sha256(path) == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert file_sha256(path) == hashlib.sha256(data).hexdigest()


def test_every_byte_of_a_small_file_is_in_its_sample(tmp_path):
    path = tmp_path / "file"
    data = bytearray(PIECES * PIECE_BYTES)
    path.write_bytes(data)
    before = sample_sha256(path)
    for offset in range(0, len(data), 997):
        data[offset] ^= 1
        path.write_bytes(data)
        assert sample_sha256(path) != before
        data[offset] ^= 1


def test_what_is_no_file_has_no_sample(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FlashError, match="where a file should be"):
            sample_sha256(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    write_whole(path, "first")

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        write_whole(path, "second")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


def test_the_cache_folder_can_be_chosen(monkeypatch):
    monkeypatch.delenv("MLX_FLASH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/mlx-flash")
    monkeypatch.setenv("MLX_FLASH_CACHE", "~/y")
    assert cache_folder() == Path.home() / "y"


@dataclass
class Entry:
    name: str
    note: str = "none"


def test_a_field_with_a_default_may_be_left_out():
    path = Path("file")
    assert from_json(Entry, {"name": "a"}, path, "it") == Entry("a", "none")
    assert from_json(Entry, {"name": "a", "note": "b"}, path, "it") == Entry("a", "b")
    with pytest.raises(FlashError, match="lacks name"):
        from_json(Entry, {"note": "b"}, path, "it")
    with pytest.raises(FlashError, match="it.note must be str"):
        from_json(Entry, {"name": "a", "note": None}, path, "it")


def test_new_folders_have_their_names_on_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path))
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path, tmp_path / "a"]


@pytest.mark.parametrize("supported", [True, False])
def test_on_macos_the_disk_empties_its_own_memory_too(tmp_path, monkeypatch, supported):
    asked = []

    def fcntl(fd, command):
        asked.append(command)
        if not supported:
            raise OSError(45, "Operation not supported")

    monkeypatch.setattr(files.sys, "platform", "darwin")
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", fcntl)
    monkeypatch.setattr(files.os, "fsync", lambda fd: asked.append("fsync"))
    sync(tmp_path)
    assert asked == ([51] if supported else [51, "fsync"])
