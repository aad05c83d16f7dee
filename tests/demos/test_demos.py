"""Each short script runs alone, as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_models import make_chat_model

from mlx_flash.bench import synthetic, whole
from mlx_flash.layers.kinds import BLOCK, EXPERT

ROOT = Path(__file__).parents[2]
DEMOS = ROOT / "demos"
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "moe_intermediate_size": 64,
    "vocab_size": 128,
}


def run(name: str, *args, typed: str = "") -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment.pop("MLX_FLASH_PROFILE", None)
    done = subprocess.run(
        [sys.executable, DEMOS / name, *map(str, args)],
        capture_output=True,
        input=typed,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def checkpoint(folder: Path, kind, **changes) -> Path:
    config = whole.MODELS[kind] | SMALL | changes
    make = synthetic.plain_weights("float32")
    return synthetic.write_checkpoint(folder, config, make)


def test_generate_continues_the_prompt():
    output = run("generate.py", "Once upon a time", "--tokens", 8)
    assert output.startswith("Once upon a time")
    assert "neurons were in memory" in output


def test_a_chat_reads_only_what_is_new(tmp_path):
    folder = make_chat_model(tmp_path)
    args = folder, "--tokens", 6, "--memory", "2MB"
    output = run("chat.py", *args, typed="w20 w21\nw30\n")
    assert "(5 tokens were read, 0 were known, 6 are new)" in output
    assert "(5 tokens were read, 11 were known, 6 are new)" in output


def test_convert_gives_the_same_logits(tmp_path):
    source = checkpoint(tmp_path / "source", BLOCK, intermediate_size=8192)
    output = run("convert.py", source, tmp_path / "flash")
    assert "200% of memory: 0.00 MB read" in output
    assert (tmp_path / "flash" / "flash.json").exists()
    assert float(output.split("differ by ")[1].split()[0]) < 1e-4


@pytest.mark.slow
def test_a_draft_that_is_often_right_saves_reads():
    output = run("speculate.py", "--tokens", 40, "--right", 1)
    plain, drafted = output.splitlines()
    assert plain.startswith("without drafts: ") and drafted.startswith("right 100%: ")
    assert plain.endswith("the same text") and drafted.endswith("the same text")
    plain_mb, drafted_mb = (float(x.split()[2]) for x in (plain, drafted))
    assert plain_mb > 5 * drafted_mb


def test_stream_experts_finds_more_the_second_time(tmp_path):
    source = checkpoint(tmp_path / "moe", EXPERT)
    output = run(
        "stream_experts.py", source, "17 4 9", "--memory", "90%", "--tokens", 8
    )
    assert "of 16 experts fit" in output
    shares = [int(line.split()[2].rstrip("%")) for line in output.splitlines()[1:3]]
    assert 0 < shares[0] <= shares[1]


def test_plan_has_a_line_for_each_budget():
    output = run("plan.py")
    assert "tokens/s" in output and "modelled" in output
    for memory in ("50%", "70%", "100%"):
        assert f"\n{memory} " in output


@pytest.mark.parametrize("path", sorted(DEMOS.glob("*.py")), ids=lambda p: p.name)
def test_a_demo_edits_no_path(path):
    assert "sys.path" not in path.read_text()
