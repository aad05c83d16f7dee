"""The manifest survives a round trip, and no damage to a folder goes unnoticed.

Whatever happens to flash.json, loading gives the same model or a FlashError that names
the file; never another exception.
"""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.errors import FlashError
from mlx_flash.inspection import verify
from mlx_flash.loading import load_model
from mlx_flash.planning.info import look_at
from mlx_flash.storage import manifest as format
from mlx_flash.storage.limits import LARGE_PAGE_BYTES
from mlx_flash.storage.manifest import BESIDE_VERSION, FORMAT_VERSION
from mlx_flash.storage.manifest_reading import read_manifest
from mlx_flash.storage.typed_json import from_json

TOKENS = mx.array([[5, 17, 3, 80]])
FILES = [
    "resident.safetensors",
    "predictors.safetensors",
    "ffn/layer_00.safetensors",
    "ffn/layer_01.safetensors",
]
SIDE_FILES = ["config.json"]  # a golden has no tokenizer

# Any manifest

names = st.text(max_size=12)
ints = st.integers(0, 2**63 - 1)
floats = st.floats(allow_nan=False)
weights = st.builds(format.Weights, file=names, sha256=names, bytes=ints, sample=names)
parts = st.builds(
    format.Part,
    name=names,
    dtype=names,
    shape=st.lists(ints, max_size=3).map(tuple),
    offset=ints,
    bytes=ints,
)
predictors = st.builds(
    format.PredictorFacts,
    rank=ints,
    bits=ints,
    threshold=floats,
    recall=floats,
    precision=floats,
    mass=floats,
    predicted_share=floats,
    active_share=floats,
)
layers = st.builds(
    format.Layer,
    module=names,
    file=names,
    sha256=names,
    data_offset=ints,
    units=ints,
    unit_bytes=ints,
    parts=st.lists(parts, max_size=3).map(tuple),
    order=names,
    predictor=st.none() | predictors,
    sample=names,
)
manifests = st.builds(
    format.Manifest,
    format_version=st.just(FORMAT_VERSION),
    source=names,
    revision=st.none() | names,
    model_type=names,
    unit=names,
    activation=names,
    dtype=names,
    resident=weights,
    predictors=st.none() | weights,
    calibration=st.none()
    | st.builds(format.Calibration, text=names, tokens=ints, held_out_tokens=ints),
    layers=st.lists(layers, max_size=3).map(tuple),
    side_files=st.lists(
        st.builds(format.SideFile, file=names, sha256=names), max_size=3
    ).map(tuple),
)


@given(manifests)
def test_any_manifest_survives_a_round_trip(manifest):
    raw = json.loads(manifest.to_json())
    assert from_json(format.Manifest, raw, Path("flash.json"), "it") == manifest


@given(layers)
def test_a_layer_survives_a_round_trip_on_its_own(layer):
    assert format.layer_from_json(dataclasses.asdict(layer)) == layer


def test_a_real_manifest_survives_a_round_trip(own_folder):
    manifest = read_manifest(own_folder)
    (own_folder / "flash.json").write_text(manifest.to_json())
    assert read_manifest(own_folder) == manifest


def test_sizes_are_those_of_the_files(flash_folder):
    manifest = read_manifest(flash_folder)
    for layer in manifest.layers:
        size = (flash_folder / layer.file).stat().st_size
        assert size == layer.data_offset + layer.nbytes
        assert layer.data_offset % LARGE_PAGE_BYTES == 0
    stored = mx.load(str(flash_folder / "resident.safetensors")).values()
    assert manifest.resident.bytes == sum(w.nbytes for w in stored)
    assert manifest.ffn_bytes == 2 * 48 * 2 * 24 * 4
    assert manifest.model_bytes == manifest.resident.bytes + manifest.ffn_bytes
    found = look_at(flash_folder).facts()
    assert (found["units_per_layer"], found["unit_bytes"]) == (48, 192)
    assert found["predictor_bytes"] == manifest.predictor_bytes > 0
    assert len(look_at(flash_folder).layers().rows) == len(manifest.layers)


# Damage to flash.json


@pytest.fixture(scope="module")
def victim(flash_folder, tmp_path_factory):
    """(a copy to damage, its sound flash.json, the logits it gives)"""
    folder = Path(shutil.copytree(flash_folder, tmp_path_factory.mktemp("v") / "f"))
    return folder, json.loads((folder / "flash.json").read_text()), logits(folder)


def logits(folder):
    with load_model(folder, page_cache=True, native=False) as (model, _):
        out = model(TOKENS)
        mx.eval(out)
    return out


def paths(value, path=()):
    """The way to every value in parsed JSON."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


def put(raw, path, value):
    """`raw` with another value at `path`; `...` takes the value out."""
    if not path:
        return {} if value is ... else value
    raw = copy.deepcopy(raw)
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return raw


def check_damage(victim, raw):
    """Refused by name, or the same model as before."""
    folder, _, expected = victim
    text = raw if isinstance(raw, str) else json.dumps(raw)
    (folder / "flash.json").write_text(text)
    try:
        actual = logits(folder)
    except FlashError as error:
        assert str(folder) in str(error)
        return True
    assert mx.array_equal(actual, expected).item()
    return False


NASTY = [
    ...,
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    48,
    16384,
    2**31,
    2**63,
    10**30,
    10**400,
    0.5,
    -1.5,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "x" * 5000,
    "\0",
    "\ud800",
    "../x",
    "../f/resident.safetensors",
    "/etc/passwd",
    "ffn",
    "ffn/layer_00.safetensors",
    "ffn/../ffn/layer_00.safetensors",
    "resident.safetensors",
    "float16",
    "int32",
    "uint8",
    "gelu",
    "model.decoder",
    "model.decoder.layers.1.mlp",
    "model.decoder.layers.0.self_attn",
    [],
    [0],
    [48],
    [24, 1],
    {},
    {"file": "x"},
    [[]],
]


@settings(max_examples=300)
@given(st.data())
def test_any_change_is_refused_or_harmless(victim, data):
    raw = victim[1]
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        path = data.draw(st.sampled_from(list(paths(raw))), "where")
        value = data.draw(
            st.sampled_from(NASTY) | st.integers() | st.text(max_size=5), "what"
        )
        raw = put(raw, path, value)
    check_damage(victim, json.dumps(raw))


@pytest.mark.parametrize(
    "path, value",
    [
        ((), []),
        ((), ...),
        (("format_version",), ...),
        (("format_version",), True),
        (("format_version",), 0),
        (("format_version",), "1"),
        (("unit",), "expert"),
        (("dtype",), "float16"),
        (("dtype",), "float8"),
        (("calibration", "tokens"), -1),
        (("calibration", "tokens"), True),
        (("calibration", "tokens"), 2**63),
        (("resident",), None),
        (("resident", "bytes"), 36380),
        (("resident", "bytes"), -1),
        (("resident", "file"), "../f/resident.safetensors"),
        (("resident", "file"), "x" * 5000),
        (("predictors",), None),
        (("layers",), []),
        (("layers",), {}),
        (("layers", 1), ...),
        (("layers", 0, "module"), "model.decoder.layers.1.mlp"),
        (("layers", 0, "module"), "model.decoder.layers.0.self_attn"),
        (("layers", 0, "module"), ""),
        (("layers", 0, "file"), "../f/ffn/layer_00.safetensors"),
        (("layers", 0, "file"), "/etc/passwd"),
        (("layers", 0, "file"), "ffn"),
        (("layers", 0, "file"), "\0"),
        (("layers", 0, "file"), "ffn/layer_01.safetensors"),
        (("layers", 0, "file"), "ffn/./layer_01.safetensors"),
        (("layers", 0, "data_offset"), 0),
        (("layers", 0, "data_offset"), 32768),
        (("layers", 0, "data_offset"), 2**40),
        (("layers", 0, "units"), 47),
        (("layers", 0, "units"), 49),
        (("layers", 0, "units"), 48.0),
        (("layers", 0, "units"), True),
        (("layers", 0, "unit_bytes"), 0),
        (("layers", 0, "parts"), []),
        (("layers", 0, "parts", 0), ...),
        (("layers", 0, "parts", 0, "name"), "gate"),
        (("layers", 0, "parts", 0, "dtype"), "int32"),
        (("layers", 0, "parts", 0, "shape"), [12, 2]),
        (("layers", 0, "parts", 0, "shape"), [-24]),
        (("layers", 0, "parts", 0, "shape"), [48]),
        (("layers", 0, "parts", 0, "shape"), []),
        (("layers", 0, "parts", 0, "bytes"), 95),
        (("layers", 0, "parts", 0, "offset"), 8),
        (("layers", 0, "parts", 1, "offset"), 0),
        (("layers", 0, "parts", 1, "offset"), 104),
        (("layers", 0, "sample"), "0" * 64),
        (("layers", 0, "sample"), None),
        (("side_files",), None),
        (("side_files", 0), {}),
        (("side_files", 0, "file"), "../f/config.json"),
        (("side_files", 0, "file"), "/etc/passwd"),
        (("side_files", 0, "file"), "resident.safetensors"),
        (("side_files", 0, "sha256"), ""),
        (("layers", 0, "predictor"), None),
        (("layers", 0, "predictor", "rank"), 0),
        (("layers", 0, "predictor", "bits"), 2**40),  # no C integer
        (("layers", 0, "predictor", "rank"), 9),
        (("layers", 0, "predictor", "rank"), 2**40),
        (("layers", 0, "predictor", "recall"), 10**400),
        (("layers", 0, "predictor", "recall"), "much"),
    ],
    ids=lambda x: ".".join(map(str, x)) if isinstance(x, tuple) else repr(x)[:25],
)
def test_this_change_is_refused(victim, path, value):
    assert check_damage(victim, put(victim[1], path, value)), "it was let through"


def test_a_unit_count_that_only_agrees_in_bytes_is_refused(victim):
    folder, raw, _ = victim
    raw = put(put(raw, ("layers", 0, "units"), 24), ("layers", 0, "unit_bytes"), 384)
    (folder / "flash.json").write_text(json.dumps(raw))
    with pytest.raises(FlashError, match="layer_00.safetensors: .* not what the file"):
        read_manifest(folder)


def test_a_free_text_field_may_change(victim):
    assert not check_damage(victim, put(victim[1], ("source",), "elsewhere"))


def test_an_unknown_key_is_no_damage(victim):
    assert not check_damage(victim, {**victim[1], "note": "from a later 1.x"})


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format_version": 1', "7"])
def test_what_is_no_json_is_refused(victim, text):
    assert check_damage(victim, text)


def test_what_is_no_text_is_refused(own_folder):
    (own_folder / "flash.json").write_bytes(b"\xff\xfe\0")
    with pytest.raises(FlashError, match="flash.json cannot be read"):
        read_manifest(own_folder)


def test_a_newer_version_asks_for_an_update(victim):
    folder, raw, _ = victim
    changed = {"format_version": BESIDE_VERSION + 1, "all": "different"}
    (folder / "flash.json").write_text(json.dumps(changed))
    with pytest.raises(FlashError, match="pip install -U"):
        read_manifest(folder)


def test_a_folder_without_manifest_says_how_to_make_one(golden_checkpoint):
    with pytest.raises(FlashError, match="Make one: mlx-flash convert"):
        read_manifest(golden_checkpoint)


# Damage to the other files


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["cut by 1", "cut to 100", "longer", "gone", "dir"])
def test_a_wrong_size_is_seen_before_anything_is_read(own_folder, name, change):
    path = own_folder / name
    data = path.read_bytes()
    if change == "cut by 1":
        path.write_bytes(data[:-1])
    elif change == "cut to 100":
        path.write_bytes(data[:100])
    elif change == "longer":
        path.write_bytes(data + b"\0")
    else:
        path.unlink()
        if change == "dir":
            path.mkdir()
    with pytest.raises(FlashError, match=re.escape(str(path))):
        read_manifest(own_folder)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60)
@given(data=st.data())
def test_any_flipped_bit_of_a_header_is_refused_or_harmless(victim, name, data):
    folder, raw, expected = victim
    (folder / "flash.json").write_text(json.dumps(raw))
    path = folder / name
    sound = path.read_bytes()
    # The padding is long: most flips belong into the header's text.
    length = len(sound[:16384].rstrip(b" ")) if "layer" in name else 600
    byte = data.draw(st.integers(0, min(length + 8, 16383)), "byte")
    bit = data.draw(st.integers(0, 7), "bit")
    damaged = bytearray(sound)
    damaged[byte] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        assert mx.array_equal(logits(folder), expected).item()
    except FlashError as error:
        assert str(folder) in str(error)
    finally:
        path.write_bytes(sound)


@pytest.mark.parametrize("name", FILES[:2])
def test_weights_of_a_dtype_mlx_does_not_know_are_refused(own_folder, name):
    path = own_folder / name
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"X32"', 1))
    with pytest.raises(FlashError, match=re.escape(str(path))):
        load_model(own_folder)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_verify_names_exactly_the_damaged_files(own_folder, count):
    for name in FILES[:count]:
        path = own_folder / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # the size stays, only the digest can tell
        path.write_bytes(data)
    passed = []
    with pytest.raises(FlashError) as error:
        verify(own_folder, passed.append)
    assert [name for name in FILES if name in str(error.value)] == FILES[:count]
    assert passed == FILES[count:] + SIDE_FILES


def test_verify_passes_a_sound_folder(flash_folder):
    passed = []
    verify(flash_folder, passed.append)
    assert passed == FILES + SIDE_FILES
