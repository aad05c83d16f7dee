"""Parts of a flash folder: together they are the whole, and none is ever half there."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conversions import OPTIONS, interrupt
from opt_checkpoints import files_of, load, make_checkpoint
from stock_checkpoints import LLAMA, QWEN3, write_checkpoint

from mlx_flash.cli import main
from mlx_flash.converters import parts as parts_module
from mlx_flash.converters.convert import convert
from mlx_flash.converters.split import default_place, split
from mlx_flash.converters.workfolder import WorkFolder
from mlx_flash.errors import FlashError
from mlx_flash.inspection import verify
from mlx_flash.machines.division import model_digest
from mlx_flash.machines.shares import owned
from mlx_flash.storage.manifest_reading import read_manifest

KINDS = ("neurons", "experts", "blocks")
HERE = "mlx_flash.converters"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A flash folder of each kind, by name. Not to be changed."""
    base = tmp_path_factory.mktemp("whole")
    opt = make_checkpoint(base / "opt", ffn_dim=640)
    experts = write_checkpoint(base / "qwen", QWEN3 | {"num_experts": 16})
    blocks = write_checkpoint(base / "llama", LLAMA | {"intermediate_size": 192})
    convert(opt, base / "neurons", **OPTIONS)
    packed = {"bits": 4, "group_size": 32, "progress": False}
    convert(experts, base / "experts", **packed)
    convert(blocks, base / "blocks", progress=False)
    return base


def quiet(src, machines, dst, **options):
    return split(src, machines, dst, progress=False, **options)


def rows_of(folder, index):
    layer = read_manifest(folder).layers[index]
    return [row.tobytes() for row in load(folder / layer.file)["bundles"]]


@pytest.mark.parametrize("shares", [None, "2:1", "3:1:2"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_together_hold_every_unit_exactly_once(whole, tmp_path, kind, shares):
    machines = shares.count(":") + 1 if shares else 2
    made_of = tuple(map(int, shares.split(":"))) if shares else (1, 1)
    folders = quiet(whole / kind, machines, tmp_path / "out", shares=shares)
    assert [f.name for f in folders] == [
        f"part-{i + 1}-of-{machines}" for i in range(machines)
    ]
    manifest = read_manifest(whole / kind)
    for index, layer in enumerate(manifest.layers):
        rows = rows_of(whole / kind, index)
        assert len(set(rows)) == len(rows)
        found = Counter()
        for part, folder in enumerate(folders):
            mine = owned(layer.units, layer.unit_bytes, made_of, part)
            stored = rows_of(folder, index)
            assert stored == [rows[unit] for unit in mine]
            assert read_manifest(folder).layers[index].units == len(mine)
            found.update(stored)
        assert found == Counter(rows)
    for part, folder in enumerate(folders):
        share = read_manifest(folder).share
        assert (share.shares, share.part) == (made_of, part)
        assert share.units == tuple(layer.units for layer in manifest.layers)
        assert share.model == model_digest(
            whole / kind, manifest.resident.sha256, manifest.layers
        )


@pytest.mark.parametrize("kind", KINDS)
def test_all_else_is_in_every_part(whole, tmp_path, kind):
    expected = {
        name: content
        for name, content in files_of(whole / kind).items()
        if not name.startswith("ffn/") and name != "flash.json"
    }
    for folder in quiet(whole / kind, 2, tmp_path / "out"):
        files = files_of(folder)
        assert {name: files[name] for name in expected} == expected
        assert files.keys() == files_of(whole / kind).keys()
        assert not any(path.is_symlink() for path in folder.rglob("*"))
        given = json.loads((folder / "flash.json").read_text())
        assert given["format_version"] == 2
        assert verify(folder, lambda name: None) == []
        before = read_manifest(whole / kind)
        after = read_manifest(folder)
        for mine, theirs in zip(after.layers, before.layers, strict=True):
            assert (mine.order, mine.predictor) == (theirs.order, theirs.predictor)
            assert (mine.file, mine.parts) == (theirs.file, theirs.parts)
    assert not list(tmp_path.rglob("*.partial")) + list(tmp_path.rglob("*lock"))


def test_one_part_alone_is_the_same(whole, tmp_path):
    both = quiet(whole / "blocks", 2, tmp_path / "both")
    (alone,) = quiet(whole / "blocks", 2, tmp_path / "one", part=2)
    assert files_of(alone) == files_of(both[1])
    assert [path.name for path in alone.parent.iterdir()] == ["part-2-of-2"]
    # The other one comes beside it later.
    assert quiet(whole / "blocks", 2, tmp_path / "one", part=1)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "both")


@pytest.mark.parametrize(
    "owner, name, call, after",
    [
        (parts_module, "write_bundles", 1, False),
        (parts_module, "write_bundles", 2, True),
        (parts_module, "write_bundles", 3, False),
        (WorkFolder, "note", 1, True),
        (WorkFolder, "note", 3, False),
        (shutil, "copyfile", 1, True),
        (shutil, "copyfile", 2, False),
        (parts_module, "_write_rest", 2, False),
        (parts_module, "check_manifest", 2, True),
        (WorkFolder, "publish", 1, False),
        (WorkFolder, "publish", 1, True),
        (WorkFolder, "publish", 2, False),
        (WorkFolder, "publish", 2, True),
        (WorkFolder, "discard", 3, True),
        (WorkFolder, "discard", 4, False),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interruption_leaves_nothing_that_looks_whole(
    whole, tmp_path, monkeypatch, owner, name, call, after, overwrite
):
    src = whole / "neurons"
    quiet(src, 2, tmp_path / "undisturbed")
    expected = files_of(tmp_path / "undisturbed")
    out = tmp_path / "out"
    if overwrite:
        quiet(src, 2, out)
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, call, after)
        with pytest.raises(KeyboardInterrupt):
            quiet(src, 2, out, overwrite=overwrite)
    if out.exists():
        for folder in out.glob("part-*-of-2"):
            assert verify(folder, lambda name: None) == []
    quiet(src, 2, out, overwrite=overwrite)
    assert files_of(out) == expected


def test_an_interrupted_split_goes_on(whole, tmp_path, monkeypatch):
    out, written = tmp_path / "out", []
    real = parts_module.write_bundles

    def count(path, *args):
        written.append(path)
        return real(path, *args)

    monkeypatch.setattr(parts_module, "write_bundles", count)
    with monkeypatch.context() as patch:
        interrupt(patch, WorkFolder, "note", 3, True)
        with pytest.raises(KeyboardInterrupt):
            quiet(whole / "neurons", 2, out)
    with pytest.raises(FlashError, match="other options.*rm -r"):
        quiet(whole / "neurons", 2, out, shares="2:1")
    quiet(whole / "neurons", 2, out)
    assert len(written) == len(set(written)) == 4


def test_a_changed_byte_of_a_part_is_found(whole, tmp_path):
    folder = quiet(whole / "experts", 2, tmp_path / "out")[1]
    file = folder / "ffn/layer_01.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(FlashError, match="layer_01.safetensors.*differs"):
        verify(folder, lambda name: None)


@pytest.mark.parametrize("name", ["ffn/layer_01.safetensors", "resident.safetensors"])
def test_a_damaged_source_is_not_split(whole, tmp_path, name):
    src = shutil.copytree(whole / "neurons", tmp_path / "src")
    # As an earlier version wrote it: samples would cover all of so small a file.
    manifest = json.loads((src / "flash.json").read_text())
    for entry in (manifest["resident"], manifest["predictors"], *manifest["layers"]):
        del entry["sample"]
    (src / "flash.json").write_text(json.dumps(manifest))
    data = bytearray((src / name).read_bytes())
    data[-30_000 if name.startswith("ffn") else -3] ^= 1
    (src / name).write_bytes(data)
    with pytest.raises(FlashError, match=f"{name}.*differs"):
        quiet(src, 2, tmp_path / "out")
    assert not list(tmp_path.glob("out/part-1-of-2"))


@pytest.fixture
def refused(tmp_path):
    def run(*args):
        result = CliRunner().invoke(main, ["split", *map(str, args)])
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
        return result.stderr

    return run


def test_refusals_leave_nothing(whole, tmp_path, refused):
    out = tmp_path / "out"
    src = make_checkpoint(tmp_path / "checkpoint")
    assert "mlx-flash convert" in refused(src, "-n", 2, "-o", out)
    said = refused(whole / "experts", "-n", 2, "--shares", "60:1", "-o", out)
    assert "has 16 units, too few for the shares 60:1" in said
    said = refused(whole / "experts", "-n", 2, "--shares", "1:2:3", "-o", out)
    assert "3 shares for 2" in said
    said = refused(whole / "experts", "-n", 2, "--part", 3, "-o", out)
    assert "no part 3 of 2" in said
    assert not out.exists()
    part = quiet(whole / "experts", 2, out)[0]
    before = files_of(out)
    assert "part 1 of 2 already" in refused(part, "-n", 2, "-o", tmp_path / "again")
    assert "--overwrite" in refused(whole / "experts", "-n", 2, "-o", out)
    # Others of the same name: of another model, or shared out otherwise
    said = refused(whole / "experts", "-n", 2, "--shares", "2:1", "-o", out)
    assert "--overwrite" in said
    assert "--overwrite" in refused(whole / "blocks", "-n", 2, "-o", out)
    assert files_of(out) == before and not (tmp_path / "again").exists()


def test_what_is_no_flash_folder_is_not_replaced(whole, tmp_path):
    other = tmp_path / "out" / "part-1-of-2"
    other.mkdir(parents=True)
    (other / "letter.txt").write_text("mine")
    with pytest.raises(FlashError, match="no flash folder"):
        quiet(whole / "blocks", 2, tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == {"part-1-of-2/letter.txt": b"mine"}


def test_a_full_disk_is_foreseen(whole, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FlashError, match="need about .* GB.*--part"):
        quiet(whole / "blocks", 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_to_copy_where(whole, tmp_path):
    out = tmp_path / "out"
    args = ["split", str(whole / "blocks"), "-n", "2", "-o", str(out)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    for words in ("part-1-of-2, part-2-of-2", "one machine", "same path", "mlx.launch"):
        assert words in last
    result = CliRunner().invoke(main, [*args, "--part", "2", "--overwrite"])
    assert "machine 2 of 2" in result.stderr.splitlines()[-1]
    quiet_args = [*args, "--overwrite", "-q"]
    assert CliRunner().invoke(main, quiet_args).stderr == ""


def test_ctrl_c_says_how_to_go_on(whole, tmp_path, monkeypatch):
    interrupt(monkeypatch, WorkFolder, "note", 1, True)
    args = ["split", str(whole / "blocks"), "-n", "2", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("Interrupted. The same command")


def test_parts_lie_beside_the_model_unless_it_is_in_a_cache(
    whole, tmp_path, monkeypatch
):
    src = shutil.copytree(whole / "blocks", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    split("model", 2, progress=False)
    assert (tmp_path / "model-split/part-2-of-2/flash.json").is_file()
    monkeypatch.setenv("MLX_FLASH_HOME", str(tmp_path / "home"))
    shelved = shutil.copytree(src, tmp_path / "home/models/name")
    assert default_place("name", shelved) == tmp_path / "name-split"
    snapshot = tmp_path / "hub/models--org--it/snapshots/1234"
    assert default_place("org/it", snapshot) == tmp_path / "it-split"
