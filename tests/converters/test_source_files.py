"""Which files of a checkpoint are read, copied and in the end deleted."""

import json
import os
import shutil

import pytest
from conversions import convert_plain
from opt_checkpoints import files_of, load, make_checkpoint, save
from stock_checkpoints import LLAMA, write_checkpoint

from mlx_flash.converters import convert as module
from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError


def sharded(src, names):
    """Cut a checkpoint's weights into files of these names, with an index."""
    weights = load(src / "model.safetensors")
    (src / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(names):
        part = dict(list(weights.items())[number :: len(names)])
        (src / name).parent.mkdir(exist_ok=True)
        save(src / name, part)
        weight_map |= dict.fromkeys(part, str(name))
    index = {"weight_map": weight_map}
    (src / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("options", [{"rank": 0}, {"unit": "block"}])
@pytest.mark.parametrize(
    "name",
    ["../model-2.safetensors", "deep/model-2.safetensors", "/absolute", "notes.txt", 7],
)
def test_an_index_names_only_weight_files_of_its_folder(
    tmp_path, checkpoint, name, options
):
    sharded(checkpoint, ["model-1.safetensors", "model-2.safetensors"])
    index = checkpoint / "model.safetensors.index.json"
    outside = shutil.copy(checkpoint / "model-2.safetensors", tmp_path)
    (checkpoint / "notes.txt").write_text("mine")
    name = outside if name == "/absolute" else name
    text = json.loads(index.read_text())
    text["weight_map"]["model.decoder.embed_tokens.weight"] = name
    index.write_text(json.dumps(text))
    before = files_of(tmp_path)
    with pytest.raises(FlashError, match="index.json names"):
        convert(
            checkpoint,
            tmp_path / "flash",
            delete_source=True,
            progress=False,
            **options,
        )
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "z.txt", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(refuse, tmp_path, checkpoint, name):
    outside = tmp_path / "outside"
    outside.write_text("secret")
    if (checkpoint / name).exists():
        shutil.move(checkpoint / name, outside)
    (checkpoint / name).symlink_to(outside)
    refuse(checkpoint, checkpoint / name, "link", options=("--delete-source",))
    assert outside.exists()


def test_a_link_within_the_folder_is_read(tmp_path, checkpoint):
    whole = files_of(convert_plain(checkpoint, tmp_path / "whole"))
    (checkpoint / "model.safetensors").rename(checkpoint / "bytes")
    (checkpoint / "model.safetensors").symlink_to("bytes")
    assert files_of(convert_plain(checkpoint, tmp_path / "flash")) == whole


def in_cache(tmp_path, source):
    """`source` as the hub's cache has it: links from a snapshot to blobs."""
    snapshot = tmp_path / "models--tiny--opt" / "snapshots" / "0123"
    blobs = tmp_path / "models--tiny--opt" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_hubs_cache_is_read_and_its_weights_deleted(tmp_path, checkpoint):
    whole = files_of(convert_plain(checkpoint, tmp_path / "whole"))
    snapshot = in_cache(tmp_path, checkpoint)
    blobs = snapshot.parents[1] / "blobs"
    count = len(list(blobs.iterdir()))
    flash = convert_plain(snapshot, tmp_path / "flash", delete_source=True)
    made = files_of(flash)
    for files in (made, whole):  # they name their source
        files.pop("flash.json")
    assert made == whole
    assert len(list(blobs.iterdir())) == count - 1
    assert not (snapshot / "model.safetensors").is_symlink()
    assert (snapshot / "config.json").exists()


def test_a_blob_of_another_model_is_refused(refuse, tmp_path, checkpoint):
    snapshot = in_cache(tmp_path, checkpoint)
    other = in_cache(tmp_path / "other", make_checkpoint(tmp_path / "another"))
    link = snapshot / "model.safetensors"
    link.unlink()
    link.symlink_to((other / "model.safetensors").resolve())
    refuse(snapshot, link, "link")


@pytest.mark.parametrize("unit", ["neuron", "block"])
def test_only_what_was_read_is_deleted(tmp_path, unit):
    """A file that appears while the checkpoint is converted was read by nobody."""
    src = write_checkpoint(tmp_path / "llama", LLAMA)
    if unit == "neuron":
        src = make_checkpoint(tmp_path / "opt")
    before = {p.name for p in src.iterdir()}
    options = {"rank": 0} if unit == "neuron" else {}
    convert(src, tmp_path / "flash", delete_source=True, progress=False, **options)
    after = {p.name for p in src.iterdir()}
    assert before - after == {n for n in before if n.endswith(".safetensors")}


def test_a_source_that_changed_before_it_is_deleted_stays(
    tmp_path, checkpoint, monkeypatch
):
    real = module.verify

    def change_meanwhile(folder, passed):
        real(folder, passed)
        os.utime(checkpoint / "model.safetensors", ns=(0, 0))

    monkeypatch.setattr(module, "verify", change_meanwhile)
    with pytest.raises(FlashError, match="changed.*not deleted"):
        convert_plain(checkpoint, tmp_path / "flash", delete_source=True)
    assert (checkpoint / "model.safetensors").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"model", "flash"}
