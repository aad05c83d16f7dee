"""A machine's figures: stored, read back, interpolated, judged."""

import dataclasses
import json
import math

import pytest
from machine_profile import PROFILE

from mlx_flash import profile as profile_module
from mlx_flash.errors import FlashError
from mlx_flash.profile import (
    LONG_READ_BYTES,
    Profile,
    load_profile,
    measured_here,
    save_profile,
)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "deep" / "profile.json"
    save_profile(PROFILE, path)
    return path


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "block, threads, expected",
    [
        (4096, 1, 1e8),
        (65536, 16, 16e8),
        (16384, 1, 2e8),  # halfway on both scales
        (16384, 4, 4e8),  # and between the threads
        (2048, 1, 0.5e8),  # as many reads a second as of 4 KiB
        (4096, 64, 4e8),  # no more than was measured
        (LONG_READ_BYTES, 1, 3.2e9),
        (1 << 30, 16, 3.2e9),
    ],
)
def test_throughput_between_points(block, threads, expected):
    assert math.isclose(PROFILE.read_bytes_per_s(block, threads), expected)


def test_longer_reads_are_never_slower():
    blocks = [2**k for k in range(9, 26)]
    speeds = [PROFILE.read_bytes_per_s(b, 8) for b in blocks]
    assert speeds == sorted(speeds)


def test_one_number_of_threads_serves_for_all():
    paper = load_profile("m1-max-paper")
    assert (
        paper.read_bytes_per_s(16384, 4) == paper.read_bytes_per_s(16384, 32) == 2.25e9
    )


@pytest.mark.parametrize(
    "asked, found",
    [
        (("matmul", "float32", 0), 0),
        (("matmul", "float32", 4), 1),
        (("matmul", "float32", 5), 1),  # the nearest width
        (("matmul", "float32", 8), 2),
        (("gathered", "float32", 0), 3),
        (("gathered", "float32", 4), 1),  # no such kernel, the same packing
        (("matmul", "float16", 0), 0),  # no such dtype
    ],
)
def test_the_nearest_rate_serves(asked, found):
    assert PROFILE.rate(*asked) is PROFILE.rates[found]


def test_half_precisions_stand_for_each_other():
    paper = load_profile("m1-max-paper")
    assert paper.rate("experts", "bfloat16", 4).dtype == "float16"
    assert paper.rate("gathered", "float32", 0).dtype == "float32"


def test_what_is_stored_comes_back(stored):
    assert load_profile(stored) == PROFILE
    assert [p.name for p in stored.parent.iterdir()] == ["profile.json"]


def test_a_profile_from_before_the_page_cache_and_waits_were_measured(stored):
    raw = json.loads(stored.read_text())
    for name in ("buffered", "wait_s", "launch_s"):
        raw.pop(name)
    stored.write_text(json.dumps(raw))
    assert load_profile(stored) == PROFILE


def test_default_place_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MLX_FLASH_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_profile() is None
    assert profile_module.default_path() == tmp_path / "mlx-flash" / "profile.json"
    save_profile(PROFILE, profile_module.default_path())
    assert load_profile() == PROFILE
    monkeypatch.setenv("MLX_FLASH_PROFILE", str(tmp_path / "nothing.json"))
    with pytest.raises(FlashError, match="no profile .*nothing.json.*m1-max-paper"):
        load_profile()


def test_models_run_with_this_machines_figures_for_the_same_device(
    tmp_path, monkeypatch
):
    path = tmp_path / "p.json"
    monkeypatch.setenv("MLX_FLASH_PROFILE", str(path))
    assert measured_here("gpu") is None  # nothing is there
    mine = dataclasses.replace(PROFILE, device="Apple M9, MLX on gpu")
    save_profile(mine, path)
    assert measured_here("gpu") == mine
    assert measured_here("cpu") is None
    path.write_text("{")
    assert measured_here("gpu") is None  # which is for `plan` to tell


def test_the_paper_says_nothing_of_waits_and_the_profile_names_who_did():
    paper = load_profile("m1-max-paper")
    assert paper.wait_s == 4e-4
    assert any("wait_s" in note and "qwisp" in note for note in paper.notes)


def test_shipped_profile_names_its_source():
    paper = load_profile("m1-max-paper")
    assert "2312.11514" in paper.source and "not measured" in paper.source


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"profile_version": 2}, "version 1 .found 2"),
        ({"profile_version": None}, "found None"),
        ({"flash": []}, "flash must hold numbers above zero"),
        ({"buffered": 7}, "profile.buffered must be a list"),
        ({"rates": []}, "rates must hold numbers above zero"),
        ({"sequential_bytes_per_s": 0}, "sequential_bytes_per_s must hold"),
        ({"memory_bytes_per_s": math.inf}, "memory_bytes_per_s must hold"),
        ({"memory_bytes_per_s": math.nan}, "memory_bytes_per_s must hold"),
        ({"layer_s": -1.0}, "layer_s must not be negative"),
        ({"wait_s": -1e-4}, "wait_s must not be negative"),
        ({"launch_s": math.nan}, "launch_s must not be negative"),
        ({"device": 7}, "profile.device must be str"),
        ({"flash": [{"block_bytes": 4096}]}, "lacks bytes_per_s"),
    ],
)
def test_damaged_profiles_are_refused(stored, fields, words):
    change(stored, **fields)
    with pytest.raises(FlashError, match=words) as error:
        load_profile(stored)
    assert str(stored) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '"profile"'])
def test_what_is_no_profile_is_refused(stored, text):
    stored.write_text(text)
    with pytest.raises(FlashError, match="profile"):
        load_profile(stored)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FlashError, match="MLX_FLASH_PROFILE"):
        save_profile(PROFILE, tmp_path / "file" / "profile.json")


def test_profile_is_plain_json():
    assert json.loads(PROFILE.to_json()).keys() == {
        field.name for field in dataclasses.fields(Profile)
    }
