"""What the README tells people to type exists."""

import re
import shlex
from pathlib import Path

import click
import pytest

from mlx_flash.cli import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def readme():
    if not README.exists():
        pytest.skip("there is no README.md yet")
    return README.read_text()


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


def judge(args):
    """Parse as click would. Raises for an unknown command, flag or value."""
    if not args or args[0] in ("-h", "--help", "--version"):
        return
    name, *rest = args
    if name not in main.commands:
        raise click.UsageError(f"no command {name!r}")
    if not rest or "--help" in rest or "-h" in rest:
        return  # `mlx-flash convert` in running text
    main.commands[name].make_context(name, list(rest))


def test_every_command_line_parses(readme):
    lines = commands_in(readme, "mlx-flash")
    assert lines, "the README shows no mlx-flash command"
    for args in lines:
        try:
            judge(args)
        except click.ClickException as error:
            pytest.fail(f"mlx-flash {shlex.join(args)}: {error.format_message()}")


def test_every_flag_exists(readme):
    """Also those that are only spoken of, such as `--memory`."""
    known = {"--help", "--version", "-h"}
    commands = list(main.commands.values())
    for command in commands:
        commands += getattr(command, "commands", {}).values()  # of a group
        for param in command.params:
            known |= {*param.opts, *param.secondary_opts}
    outside = re.sub(r"^```.*?^```", "", readme, flags=re.M | re.S)
    for span in re.findall(r"`([^`\n]+)`", outside):
        if span.startswith("-") or span.startswith("mlx-flash "):
            for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", span):
                assert flag in known, f"{flag} in `{span}`"


def test_every_make_target_exists(readme):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    for args in commands_in(readme, "make"):
        for word in args:
            if re.fullmatch(r"[a-z][\w-]*", word):
                assert word in targets, f"make {word}"


def test_every_file_exists(readme):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", readme)
    for link in links:
        if not re.match(r"[a-z]+:", link):
            assert (ROOT / link).exists(), link
    for args in [*commands_in(readme, "python"), *commands_in(readme, "python3")]:
        for word in args:
            if word.endswith(".py"):
                assert (ROOT / word).exists(), word


def test_the_families_that_were_compared(readme):
    """What `python demos/families.py --readme` wrote; the families are not run here."""
    table = readme.partition("<!-- families -->")[2].partition("<!-- /families -->")[0]
    rows = re.findall(r"^\| (.+) \| (\w+) \| (\d+) of (\d+) \| (.+) \|$", table, re.M)
    units = [unit for _, unit, *_ in rows]
    assert len({name for name, *_ in rows}) >= 25 and units.count("expert") >= 20
    assert {"neuron", "block"} < set(units)
    for name, unit, some, every, difference in rows:
        assert some == every, name
        assert float(difference) <= (0 if unit == "expert" else 1e-4), name
    assert "DIFFERS" not in table and "FAILED" not in table


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
    ],
)
def test_wrong_commands_are_seen(args):
    with pytest.raises(click.ClickException):
        judge(args)


@pytest.mark.parametrize(
    "args", [[], ["--version"], ["info"], ["generate", "a", "--memory", "7GB"]]
)
def test_right_commands_pass(args):
    judge(args)
