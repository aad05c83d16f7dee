"""What we write, any tool reads; what we read is held against the file's size."""

import errno
import hashlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mlx_flash.errors import FlashError
from mlx_flash.storage import safetensors as safetensors_io
from mlx_flash.storage.digests import file_sha256
from mlx_flash.storage.safetensors import (
    Tensor,
    read_header,
    write_safetensors,
)

NUMPY = {"float32": "f4", "float16": "f2", "uint32": "u4", "int32": "i4", "uint8": "u1"}
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def tensor(array, dtype, pieces=2):
    data = array.tobytes()
    cut = len(data) // pieces

    def chunks():
        return iter([data[:cut], memoryview(data)[cut:]])

    return Tensor(dtype, array.shape, chunks)


def raw(path, header, data=b"", length=None):
    """A file as it should not be: any header, or a wrong length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + text + data)
    return path


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(NUMPY)), shapes),
        max_size=4,
    ),
    st.sampled_from([8, 4096, 16384]),
)
def test_the_safetensors_library_reads_what_is_written(tmp_path_factory, named, align):
    path = tmp_path_factory.mktemp("io") / "a.safetensors"
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 99, shape).astype(NUMPY[dtype])
        for name, (dtype, shape) in named.items()
    }
    tensors = {n: tensor(a, named[n][0]) for n, a in arrays.items()}
    digest = write_safetensors(path, tensors, align)

    assert digest == file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)

    header, start = read_header(path)
    assert start % align == 0
    data = path.read_bytes()[start:]
    for name, array in arrays.items():
        first, last = header[name]["data_offsets"]
        assert data[first:last] == array.tobytes()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_bfloat16_keeps_its_bits(tmp_path):
    words = np.arange(6, dtype=np.uint16)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": Tensor("bfloat16", (2, 3), lambda: [words.data])})
    header, start = read_header(path)
    assert header["w"]["dtype"] == "BF16"
    assert path.read_bytes()[start:] == words.tobytes()


@pytest.mark.parametrize("given_bytes", [3, 5])
def test_a_tensor_of_other_size_than_said_is_our_mistake(tmp_path, given_bytes):
    path = tmp_path / "a.safetensors"
    wrong = Tensor("uint8", (4,), lambda: [bytes(given_bytes)])
    with pytest.raises(ValueError, match=f"w: {given_bytes} of 4 bytes"):
        write_safetensors(path, {"w": wrong})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "code, says", [(errno.ENOSPC, "disk is full"), (errno.EIO, "could not be written")]
)
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch, code, says):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def refuse(*_):
        raise OSError(code, "refused")

    monkeypatch.setattr(safetensors_io.os, "fsync", refuse)
    with pytest.raises(FlashError, match=says) as error:
        write_safetensors(path, {"w": tensor(np.zeros(4, "u1"), "uint8")})
    assert str(path) in str(error.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_interruption_leaves_nothing(tmp_path):
    def chunks():
        yield b"ab"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "a", {"w": Tensor("uint8", (4,), chunks)})
    assert not list(tmp_path.iterdir())


W = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def test_metadata_is_no_tensor(tmp_path):
    path = raw(tmp_path / "a", {"__metadata__": {"format": "mlx"}, "w": W}, bytes(4))
    assert read_header(path)[0] == {"w": W}


def test_a_dtype_we_do_not_write_is_left_to_others(tmp_path):
    entry = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}
    assert read_header(raw(tmp_path / "a", {"w": entry}, bytes(8)))[0] == {"w": entry}


@pytest.mark.parametrize(
    "header",
    [
        [],
        7,
        None,
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        {"w": None},
        {"w": []},
        {"w": {}},
        {"w": {"data_offsets": [0, 4]}},
        {"w": W | {"data_offsets": [0]}},
        {"w": W | {"data_offsets": [4, 0]}},
        {"w": W | {"data_offsets": [-4, 0]}},
        {"w": W | {"data_offsets": [0, 5]}},
        {"w": W | {"data_offsets": [0, 4.0]}},
        {"w": W | {"data_offsets": [False, 4]}},
        {"w": W | {"data_offsets": [0, "4"]}},
        {"w": W | {"data_offsets": [0, 10**30]}},
        {"w": W | {"data_offsets": "04"}},
        {"w": W | {"shape": [5]}},
        {"w": W | {"shape": [-2, -2]}},
        {"w": W | {"shape": [10**30]}},
        {"w": W | {"shape": None}},
        {"w": W | {"shape": ["4"]}},
        {"w": W | {"dtype": "F32"}},
        {"w": W | {"dtype": ["U8"]}},
        {"v": W, "w": W | {"data_offsets": [4, 8]}},
    ],
    ids=lambda header: repr(header)[:60],
)
def test_a_lying_header_is_refused(tmp_path, header):
    path = raw(tmp_path / "a.safetensors", header, bytes(4))
    with pytest.raises(FlashError) as error:
        read_header(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_refused(tmp_path, length):
    path = raw(tmp_path / "a.safetensors", {"w": W}, bytes(4), length)
    with pytest.raises(FlashError, match="a.safetensors"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FlashError, match="nowhere.safetensors cannot be read: No such"):
        read_header(tmp_path / "nowhere.safetensors")


def test_every_cut_and_every_addition_is_seen(tmp_path):
    whole = raw(tmp_path / "whole", {"w": W}, bytes(4)).read_bytes()
    path = tmp_path / "a.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FlashError, match="a.safetensors"):
            read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FlashError, match="cut short or altered"):
        read_header(path)
