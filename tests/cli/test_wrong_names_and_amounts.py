"""Wrong usages of names, amounts, `convert`, `info`, `verify` and `rm`: a line each.

Those of `generate`'s and `chat`'s own options are in their own tests.
"""

import pytest
from click.testing import CliRunner
from opt_checkpoints import make_checkpoint, save_tokenizer
from stock_checkpoints import LLAMA, write_checkpoint

import mlx_flash
from mlx_flash.cli import main
from mlx_flash.converters.convert import convert
from mlx_flash.library.opening import runnable


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense checkpoint, one with exact zeros, a flash folder, and an empty one."""
    base = tmp_path_factory.mktemp("wrong")
    dense = write_checkpoint(base / "dense", LLAMA | {"vocab_size": 2048})
    save_tokenizer(dense)
    make_checkpoint(base / "opt")
    convert(dense, base / "flash", progress=False)
    (base / "empty").mkdir()
    return base


def said(place, args):
    """The last line that the command printed; it ends with an error."""
    args = [str(arg).replace("@", f"{place}/") for arg in args]
    result = CliRunner().invoke(main, args)
    assert result.exit_code in (1, 2), result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    if result.exit_code == 1:
        assert result.stderr.count("\n") == 1, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    return line.replace(f"{place}/", "@")


LONG = "word " * 2000
WRONG = {
    "no unit": (
        ["generate", "a", "--memory", "7"],
        "7 is an amount of memory without a unit. Try 7GB, 7MB, or a share of the "
        "model such as 50%.",
    ),
    "no amount": (
        ["generate", "a", "--memory", "lots"],
        "'lots' is no amount of memory. Try 7GB, 512MB, 50% or auto.",
    ),
    "a dense checkpoint where nobody can be asked": (
        ["generate", "a", "--model", "@dense"],
        "@dense runs from flash once it is converted: 0.00 GB of disk, in ",
    ),
    "no such model": (
        ["info", "@nothing"],
        "@nothing does not exist. Give a model's folder or a hub name such as "
        "facebook/opt-6.7b.",
    ),
    "a folder without a model": (
        ["plan", "@empty"],
        "@empty has no config.json: it is no model folder.",
    ),
    "a file": (
        ["verify", "@dense/config.json"],
        "@dense/config.json is a file; a model is a folder with config.json.",
    ),
    "nothing to verify with": (
        ["verify", "@dense"],
        "@dense has no digests to compare with. Note what is there now: mlx-flash "
        "verify --record @dense",
    ),
    "a prompt beyond the positions, and no memory": (
        ["generate", LONG, "--model", "@flash", "--memory", "10KB"],
        "The prompt has ",
    ),
    "0 bits": (
        ["convert", "@dense", "--bits", "0"],
        "MLX has no affine quantisation of 0 bits. Choose 2, 3, 4, 5, 6 or 8, or leave "
        "out the option for weights as they are.",
    ),
    "nvfp4 of 8 bits": (
        ["convert", "@dense", "--mode", "nvfp4", "--bits", "8"],
        "nvfp4 has 4 bits in groups of 16, and nothing else. Leave out --bits and "
        "--group-size, or choose --mode affine.",
    ),
    "groups without bits": (
        ["convert", "@dense", "--group-size", "32"],
        "Groups of 32 are for quantised weights: give --bits too, or leave out "
        "--group-size.",
    ),
    "predictors for blocks": (
        ["convert", "@dense", "--recall", "0.9"],
        "--recall would be ignored: it is for predictors, and @dense becomes blocks, "
        "which have none. Leave it out.",
    ),
    "recall beside a threshold": (
        ["convert", "@opt", "--recall", "0.9", "--threshold", "0.4"],
        "--recall would be ignored: it is for predictors, and --threshold sets them. "
        "Leave it out.",
    ),
    "a folder's revision": (
        ["convert", "@dense", "--revision", "main"],
        "--revision would be ignored: @dense is a folder here, and only a hub "
        "repository has revisions. Leave it out.",
    ),
    "a flash folder to convert": (
        ["convert", "@flash", "-o", "@other"],
        "@flash is a flash folder already.",
    ),
    "rm of what is not there": (
        ["rm", "@dense", "-y"],
        "@dense is not among the models in ",
    ),
    "rm of nothing": (["rm"], "Missing argument 'NAME'."),
}


@pytest.mark.parametrize("usage", WRONG)
def test_wrong_usage_gets_one_line(place, usage):
    args, words = WRONG[usage]
    assert said(place, args).removeprefix("Error: ").startswith(words) or (
        words in said(place, args)
    )


def test_rm_of_what_nobody_can_be_asked_about_or_is_in_use(place):
    folder = runnable(place / "dense", lambda offer: True, progress=False)
    line = said(place, ["rm", "@dense"])
    assert line.endswith("would be deleted. Add --yes to agree.")
    with mlx_flash.load_model(folder, "1GB"):
        line = said(place, ["rm", "@dense", "-y"])
    assert line.endswith("is in use by a process that loaded it. End that one first.")
