"""Folders that hold a share each: which machines may run them together."""

import json
from dataclasses import replace

import pytest
from stock_checkpoints import QWEN3, write_checkpoint

from mlx_flash.assembly import assemble
from mlx_flash.converters.convert import convert
from mlx_flash.converters.split import split
from mlx_flash.errors import FlashError
from mlx_flash.machines.division import Facts, agree, cut
from mlx_flash.storage.manifest import StoredShare


def facts(part=None, shares=(2, 1)):
    share = None
    if part is not None:
        share = StoredShare(shares, part, (16, 16), "digest")
    return Facts("1.0", "digest", "expert", share, 100, 1000, 0.0, layer_s=0.0)


def names(count):
    return [f"Rank {rank}" for rank in range(count)]


@pytest.mark.parametrize("given", [None, "2:1"])
@pytest.mark.parametrize("parts", [(0, 1), (None, 1), (0, None)])
def test_each_has_its_part_or_all(parts, given):
    """A machine with the whole model takes its share of that."""
    assert agree([facts(part) for part in parts], names(2), given) == (2, 1)


@pytest.mark.parametrize(
    "ranks, given, words",
    [
        ([facts(0), facts(1), facts(0)], None, "for 2 machines, and these are 3"),
        ([facts(0), None, None], None, "for 2 machines, and these are 3"),
        ([facts(0), facts(1)], "1:1", "split 2:1, which --shares 1:1 contradicts"),
        ([facts(0), facts(1)], "2:1:1", "3 shares for 2 ranks"),
        ([facts(1), facts(0)], None, "Rank 0 has part 2 of 2, and needs part 1 of 2"),
        ([facts(0), facts(0)], None, "Rank 1 has part 1 of 2, and needs part 2 of 2"),
        ([None, facts(0)], None, "Rank 1 has part 1 of 2, and needs part 2 of 2"),
        ([facts(0), facts(1, (1, 1))], None, "Rank 1 has part 2 of 2, and needs"),
    ],
)
def test_refusals(ranks, given, words):
    ranks = [entry or facts() for entry in ranks]
    with pytest.raises(FlashError, match=words):
        agree(ranks, names(len(ranks)), given)


def test_a_part_of_another_model():
    with pytest.raises(FlashError, match="Rank 1 has another model than Rank 0"):
        agree([facts(0), replace(facts(1), model="other")], names(2), None)


def test_facts_survive_json():
    for entry in (facts(), facts(1)):
        assert Facts.from_json(json.loads(json.dumps(entry.to_json()))) == entry


def test_a_part_that_is_not_what_its_manifest_says(tmp_path):
    """Other units would be taken for those of this part."""
    src = write_checkpoint(tmp_path / "model", QWEN3 | {"num_experts": 16})
    whole = convert(src, tmp_path / "whole", progress=False)
    part = split(whole, 2, shares="2:1", progress=False)[1]
    assert cut(assemble(part, True), (2, 1), 1, abs).stored == [None, None]
    manifest = json.loads((part / "flash.json").read_text())
    manifest["share"] |= {"shares": [1, 1]}
    (part / "flash.json").write_text(json.dumps(manifest))
    with pytest.raises(FlashError, match="holds 5 units, and part 2 of 2 has 8"):
        cut(assemble(part, True), (1, 1), 1, abs)
