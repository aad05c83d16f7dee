"""Converting to a disk that is full, or that fails."""

import errno
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from conversions import OPTIONS, convert_plain
from opt_checkpoints import files_of, make_checkpoint

from mlx_flash.converters import bundles
from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError


def test_too_little_room_is_seen_first(refuse, checkpoint, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refuse(checkpoint, "needs about 0.00 GB", checkpoint.parent)


def test_disk_that_fills_up_keeps_finished_layers(tmp_path, checkpoint, monkeypatch):
    whole = files_of(convert_plain(checkpoint, tmp_path / "whole"))
    real = os.fsync
    second = tmp_path / "flash.partial/flash/ffn/layer_01.safetensors.part"

    def full(fd):
        if second.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FlashError, match="disk is full.*layer_01.*same command"):
            convert_plain(checkpoint, tmp_path / "flash")
    assert not (tmp_path / "flash").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert (tmp_path / "flash.partial/flash/ffn/layer_00.safetensors").exists()
    assert files_of(convert_plain(checkpoint, tmp_path / "flash")) == whole


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes) mounts a tmpfs of that size, or skips where it may not."""
    mounted = []

    def mount(size):
        disk = tmp_path / f"disk{len(mounted)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"no mount here: {error}")
        if done.returncode:
            pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_disk_that_is_really_full(tmp_path, small_disk, monkeypatch):
    src = make_checkpoint(tmp_path / "model", num_hidden_layers=4, ffn_dim=512)
    options = OPTIONS | {"calibration_tokens": 256}
    whole = files_of(convert(src, tmp_path / "whole", **options))
    size = sum(map(len, whole.values()))
    small_disk(1 << 20)  # skips where it cannot be done
    plenty = SimpleNamespace(free=1 << 40)  # the check before would see it
    for share in (0.1, 0.3, 0.6, 0.9):
        disk = small_disk(int(size * share) // 4096 * 4096)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: plenty)
            with pytest.raises(FlashError, match="disk is full"):
                convert(src, disk / "flash", **options)
        assert not (disk / "flash").exists()
        assert not list(disk.rglob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=64M", str(disk)], check=True)
        assert files_of(convert(src, disk / "flash", **options)) == whole
        assert [p.name for p in disk.iterdir()] == ["flash"]


def test_failing_disk_is_noticed(tmp_path, checkpoint, monkeypatch):
    """What is read back differs from what was written."""
    real = bundles.read_header

    def spoil(path):
        header, offset = real(path)
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(b"\xff\xff\xff\xff")
        return header, offset

    monkeypatch.setattr(bundles, "read_header", spoil)
    with pytest.raises(FlashError, match="layer_00.*reads back differently"):
        convert_plain(checkpoint, tmp_path / "flash")
    assert not (tmp_path / "flash").exists()
