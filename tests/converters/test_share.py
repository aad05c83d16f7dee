"""`convert --share`: what one machine keeps, without the disk space of all units."""

import json
import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conversions import OPTIONS, interrupt
from opt_checkpoints import files_of, make_checkpoint
from stock_checkpoints import LLAMA, QWEN3, write_checkpoint

from mlx_flash.cli import main
from mlx_flash.converters import conversion
from mlx_flash.converters.convert import convert
from mlx_flash.converters.split import split
from mlx_flash.converters.tensors import TensorCutter
from mlx_flash.converters.workfolder import WorkFolder
from mlx_flash.errors import FlashError
from mlx_flash.loading import load_model
from mlx_flash.planning.plan import make_plan
from mlx_flash.storage.manifest_reading import read_manifest

PACKED = {"bits": 4, "group_size": 32, "progress": False}
KINDS = {
    "neurons": OPTIONS,
    "packed neurons": {"unit": "neuron", "rank": 0, **PACKED},
    "gated neurons": {"skippable": True, "calibration_tokens": 256, **PACKED},
    "experts": PACKED,
    "blocks": {"progress": False},
}


def source(kind, folder):
    if kind == "gated neurons":
        return write_checkpoint(folder, LLAMA | {"intermediate_size": 640})
    if kind.endswith("neurons"):
        return make_checkpoint(folder, ffn_dim=640)
    if kind == "experts":
        return write_checkpoint(folder, QWEN3 | {"num_experts": 16})
    return write_checkpoint(folder, LLAMA | {"intermediate_size": 192})


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_split_makes_of_the_whole_conversion(tmp_path, kind):
    src = source(kind, tmp_path / "model")
    options = KINDS[kind]
    whole = convert(src, tmp_path / "whole", **options)
    for shares in (None, "1:3"):
        parts = split(whole, 2, tmp_path / f"{shares}", shares=shares, progress=False)
        for number, part in enumerate(parts, 1):
            share = {"share": f"{number}/2", "shares": shares}
            folder = tmp_path / f"{shares} {number}"
            assert files_of(convert(src, folder, **options, **share)) == files_of(part)


@pytest.mark.parametrize(
    "owner, name, call, after",
    [
        (conversion, "whole_sha256", 2, True),
        (WorkFolder, "note", 1, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (conversion, "write_bundles", 2, False),
                (conversion, "whole_sha256", 2, False),
                (WorkFolder, "note", 2, False),
                (conversion, "copy_config", 1, True),
                (WorkFolder, "publish", 1, True),
            )
        ),
    ],
)
def test_an_interrupted_one_goes_on(tmp_path, monkeypatch, owner, name, call, after):
    src = source("neurons", tmp_path / "model")
    expected = files_of(convert(src, tmp_path / "other", share="2/2", **OPTIONS))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, call, after)
        with pytest.raises(KeyboardInterrupt):
            convert(src, out, share="2/2", **OPTIONS)
    if name != "publish":
        assert not out.exists()
        with pytest.raises(FlashError, match="other options"):
            convert(src, out, **OPTIONS)
        with pytest.raises(FlashError, match="other options"):
            convert(src, out, share="1/2", **OPTIONS)
    assert files_of(convert(src, out, share="2/2", **OPTIONS)) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other", "out"]


@pytest.mark.parametrize("kind", ["packed neurons", "experts", "blocks"])
def test_a_disk_that_cannot_hold_all_units_is_enough(tmp_path, monkeypatch, kind):
    src = source(kind, tmp_path / "model")
    manifest = read_manifest(convert(src, tmp_path / "whole", **KINDS[kind]))
    most = 1.1 if kind == "blocks" else 8  # quantised, and reckoned as they come
    free = most * (manifest.resident.bytes + manifest.ffn_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    convert(src, tmp_path / "fits", **KINDS[kind])
    written = {}
    real = conversion.write_bundles

    def note(path, *args):
        entry = real(path, *args)
        written[path.name] = path.stat().st_size
        return entry

    monkeypatch.setattr(conversion, "write_bundles", note)
    folder = convert(src, tmp_path / "share", share="1/2", **KINDS[kind])
    assert 0.3 < read_manifest(folder).ffn_bytes / manifest.ffn_bytes < 0.7
    assert max(written.values()) < 16384 + 0.7 * manifest.layers[0].nbytes


def test_the_space_that_is_asked_for_is_that_of_the_part(tmp_path, monkeypatch):
    src = source("blocks", tmp_path / "model")
    manifest = read_manifest(convert(src, tmp_path / "whole", progress=False))
    needed = manifest.resident.bytes + 0.3 * manifest.ffn_bytes
    usage = SimpleNamespace(free=needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FlashError, match="needs about"):
        convert(src, tmp_path / "a", progress=False)
    with pytest.raises(FlashError, match="needs about"):
        convert(src, tmp_path / "b", progress=False, share="2/2", shares="1:2")
    convert(src, tmp_path / "c", progress=False, share="1/2", shares="1:3")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"share": "3/2"}, "'3/2' is no part"),
        ({"share": "0/2"}, "no part of several. Give 1/2"),
        ({"share": "1/1"}, "no part of several"),
        ({"share": "half"}, "no part of several"),
        ({"share": "1/2", "shares": "1:1:1"}, "3 shares for 2"),
        ({"share": "1/2", "shares": "1:x"}, "no shares"),
        ({"shares": "2:1"}, "give --share 1/2 too"),
        ({"share": "1/2", "delete_source": True}, "--delete-source would delete"),
        ({"share": "1/2", "shares": "90:1"}, "too few for the shares 90:1"),
    ],
)
def test_refusals(tmp_path, options, words):
    src = source("experts", tmp_path / "model")
    before = files_of(tmp_path)
    with pytest.raises(FlashError, match=words):
        convert(src, tmp_path / "out", progress=False, **options)
    assert files_of(tmp_path) == before


def test_shares_are_judged_before_anything_is_cut(tmp_path, monkeypatch):
    src = source("experts", tmp_path / "model")
    monkeypatch.setattr(TensorCutter, "cut", None)
    with pytest.raises(FlashError, match="layers.0.mlp.* too few for the shares"):
        convert(src, tmp_path / "out", progress=False, share="1/2", shares="90:1")


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """The first of two parts. Not to be changed."""
    base = tmp_path_factory.mktemp("part")
    src = source("neurons", base / "model")
    return convert(src, base / "opt-part", share="1/2", shares="1:3", **OPTIONS)


def test_one_alone_does_not_run(part):
    with pytest.raises(FlashError, match="holds part 1 of 2.*mlx.launch -n 2"):
        load_model(part)


def test_one_alone_is_not_planned_converted_or_split(part, tmp_path):
    with pytest.raises(FlashError, match="holds part 1 of 2 alone"):
        make_plan(part)
    with pytest.raises(FlashError, match="is part 1 of 2 of a flash folder already"):
        convert(part, tmp_path / "out", progress=False)
    with pytest.raises(FlashError, match="part 1 of 2 already"):
        split(part, 2, tmp_path / "out", progress=False)


def test_info_says_what_it_is_a_part_of(part):
    whole = read_manifest(part).whole_model_bytes
    text = CliRunner().invoke(main, ["info", str(part)]).stdout
    assert text.splitlines()[0] == f"{part}: part 1 of 2"
    assert f"{whole / 1e6:,.1f} MB" in text and "shared out 1:3" in text
    assert "from model" in text.splitlines()[1]
    own = read_manifest(part).model_bytes
    assert own < whole and f"this part   {own / 1e6:10,.1f} MB" in text


def test_info_for_scripts_has_both_sizes(part):
    facts = json.loads(CliRunner().invoke(main, ["info", str(part), "--json"]).stdout)
    manifest = read_manifest(part)
    assert (facts["share"], facts["shares"]) == ("part 1 of 2", [1, 3])
    assert facts["model_bytes"] == manifest.resident.bytes + manifest.ffn_bytes
    ffns = sum(layer.unit_bytes * 640 for layer in manifest.layers)
    assert facts["whole_model_bytes"] == manifest.resident.bytes + ffns


def test_verify_says_which_part_it_is(part):
    result = CliRunner().invoke(main, ["verify", str(part)])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"{part} is part 1 of 2"


def test_list_says_which_part_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASH_HOME", str(tmp_path / "home"))
    src = source("blocks", tmp_path / "model")
    args = ["convert", str(src), "--share", "2/2"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    assert "Part 2/2 of" in result.stderr and "mlx.launch" in result.stderr
    listed = CliRunner().invoke(main, ["list"]).stdout
    assert "blocks, part 2 of 2" in listed
