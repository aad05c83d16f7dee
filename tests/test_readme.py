"""What README and docs tell people to type exists, and what they show is so."""

import re
import runpy
import shlex
from pathlib import Path
from unittest import mock

import click
import pytest
from test_layout import ROWS

from mlx_flash.cli import hints, main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
MOST_LINES = 250


def commands_in(text, program):
    """The arguments of every command line of `program` in code blocks and spans."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", outside)])
    lines = lines.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        line = re.sub(r"^\s*[$>]\s+", "", line)
        for part in re.split(r"&&|\|\||[|;]", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # a quote that belongs to program output
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)  # VARIABLE=value before the command
            if words and words[0].split("/")[-1] == program:
                found.append(words[1:])
    return found


def judge(args, group=main):
    """Parse as click would. Raises for an unknown command, flag or value."""
    if not args or args[0] in ("-h", "--help", "--version"):
        return
    name, *rest = args
    command = group.get_command(click.Context(group), name)
    if command is None:
        raise click.UsageError(f"no command {name!r}")
    if isinstance(command, click.Group):
        return judge(rest, command)
    if not rest or "--help" in rest or "-h" in rest:
        return  # `mlx-flash convert` in running text
    # Files of examples need not exist.
    with mock.patch.object(click.Path, "convert", lambda self, value, *_: value):
        command.make_context(name, list(rest))


# Options of mlx.launch and mlx.distributed_config.
OF_MLX = {"--auto-setup", "--backend", "--over", "--print-python"}


def all_commands(group=main):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield command
        if isinstance(command, click.Group):
            yield from all_commands(command)


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_the_readme_shows_commands():
    assert commands_in(README.read_text(), "mlx-flash")


@each_page
def test_every_command_line_parses(page):
    for args in commands_in(page.read_text(), "mlx-flash"):
        try:
            judge(args)
        except click.ClickException as error:
            pytest.fail(f"mlx-flash {shlex.join(args)}: {error.format_message()}")


@each_page
def test_every_flag_exists(page):
    """Also those that are only spoken of, such as `--memory`."""
    known = {"--help", "--version", "-h"}
    if page.name == "machines.md":
        known |= OF_MLX
    if page.name == "commands.md":  # which has those of others in a table
        known |= {*hints.SAME, *hints.NOTHING}
    for command in all_commands():
        for param in command.params:
            known |= {*param.opts, *param.secondary_opts}
    outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for span in re.findall(r"`([^`\n]+)`", outside):
        if span.startswith("-") or span.startswith("mlx-flash "):
            for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", span):
                assert flag in known, f"{flag} in `{span}`"


@each_page
def test_every_make_target_exists(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    for args in commands_in(page.read_text(), "make"):
        for word in args:
            if re.fullmatch(r"[a-z][\w-]*", word):
                assert word in targets, f"make {word}"


@each_page
def test_every_file_exists(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    for link in links:
        if not re.match(r"[a-z]+:", link):
            assert (page.parent / link).exists(), link
    for args in [*commands_in(text, "python"), *commands_in(text, "python3")]:
        for word in args:
            if word.endswith(".py"):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("name", ["architecture.md", "architecture.svg", "format.md"])
def test_every_source_file_that_is_named_exists(name):
    text = (ROOT / "docs" / name).read_text()
    named = re.findall(r"\b(?:\w+/)+\w+\.(?:py|c|h)\b", text)
    assert named
    for file in named:
        assert (ROOT / "mlx_flash" / file).exists() or (ROOT / file).exists(), file


def test_the_rows_of_imports_are_those_that_are_enforced():
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.partition("## Who imports whom")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.M)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == list(ROWS)


def test_the_picture_is_what_the_script_draws():
    script = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))
    assert script["picture"]() == (ROOT / "docs" / "architecture.svg").read_text()


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if python_blocks(page)],
    ids=lambda page: page.name,
)
def test_python_examples_run(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), {})
    assert capsys.readouterr().out


# The judges themselves


def test_commands_are_found_wherever_they_are_shown():
    text = (
        "Run `mlx-flash info` or:\n"
        "```sh\n$ mlx-flash generate 'a b' \\\n   --json | jq\n"
        "cat x | MLX_FLASH_MEMORY=1GB .venv/bin/mlx-flash verify x # why\n```\n"
        "```\nIt's output of mlx-flash info\n```\n"
    )
    assert commands_in(text, "mlx-flash") == [
        ["generate", "a b", "--json"],
        ["verify", "x"],
        ["info"],
    ]


@pytest.mark.parametrize(
    "args",
    [
        ["fly"],
        ["generate", "a", "--wings"],
        ["generate", "a", "--memory", "7 parrots"],
        ["convert", "a", "b", "-o", "c"],
        ["bench", "fly"],
        ["bench", "sweep", "--wings"],
    ],
)
def test_wrong_commands_are_seen(args):
    with pytest.raises(click.ClickException):
        judge(args)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--version"],
        ["info"],
        ["generate", "a", "--memory", "7GB"],
        ["bench"],
        ["bench", "sweep", "--memory", "7GB"],
    ],
)
def test_right_commands_pass(args):
    judge(args)
