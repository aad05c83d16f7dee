"""What `import mlx_flash` offers, to people, editors and interpreters."""

import dataclasses
import inspect
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest

import mlx_flash
from mlx_flash import load_options
from mlx_flash.errors import FlashError

VERBS = {"convert", "generate", "load", "load_model", "stream_generate"}


def test_dir_lists_the_verbs_before_anything_is_loaded():
    script = (
        "import sys, mlx_flash\n"
        "print(*dir(mlx_flash))\n"
        "print('mlx.core' in sys.modules)\n"
    )
    names, loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert VERBS | {"Conversation", "LoadOptions", "DEMO_MODEL"} <= set(names.split())
    assert loaded == "False"


@pytest.mark.parametrize("name", sorted(mlx_flash.__all__))
def test_everything_that_is_offered_is_there_and_explained(name):
    value = getattr(mlx_flash, name)
    if callable(value):
        assert inspect.getdoc(value)


def test_options_of_load_are_typed_once_and_explained():
    fields = {field.name: field for field in dataclasses.fields(mlx_flash.LoadOptions)}
    hints = typing.get_type_hints(mlx_flash.LoadOptions)
    assert typing.get_type_hints(load_options.LoadKeywords) == hints
    text = inspect.getdoc(mlx_flash.LoadOptions)
    for name in fields:
        assert f"    {name}: " in text, name
    for verb in (mlx_flash.load, mlx_flash.load_model):
        kind = inspect.signature(verb).parameters["options"].annotation
        assert typing.get_args(kind) == (load_options.LoadKeywords,)


def test_a_wheel_has_every_package():
    """Who installs in place sees the folders themselves, and misses nothing."""
    root = Path(mlx_flash.__file__).parent
    folders = {file.parent for file in root.glob("**/__init__.py")}
    folders |= {file.parent for file in root.glob("converters/**/__init__.py")}
    names = {".".join(("mlx_flash", *f.relative_to(root).parts)) for f in folders}
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    assert names == set(project["tool"]["setuptools"]["packages"])


def test_the_module_is_the_command():
    args = [sys.executable, "-m", "mlx_flash", "--version"]
    said = subprocess.run(args, capture_output=True, text=True, check=True).stdout
    assert said == f"mlx-flash, version {mlx_flash.__version__}\n"


def test_repr_says_what_is_loaded_in_a_line():
    model, tokenizer = mlx_flash.load(mlx_flash.DEMO_MODEL, "50%")
    said = repr(model.flash)
    assert "\n" not in said
    for words in ("demo_model: opt", "11.9MB", "5.92MB", "4 layers of neurons"):
        assert words in said
    model.flash.close()
    assert "closed" in repr(model.flash)


def test_either_a_prompt_or_messages():
    messages = [{"role": "user", "content": "Hello"}]
    with mlx_flash.load(mlx_flash.DEMO_MODEL, "50%") as both:
        for arguments in ({}, {"prompt": "a", "messages": messages}):
            with pytest.raises(FlashError, match="either a prompt or messages"):
                mlx_flash.generate(*both, **arguments)
        with pytest.raises(FlashError, match="no chat template"):
            mlx_flash.generate(*both, messages=messages)
