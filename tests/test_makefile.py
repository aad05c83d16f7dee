"""`make` finds a Python that works, or says in one line what to install."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MAKE = shutil.which("make")
WORKS = '#!/bin/sh\n[ "$1" = -c ] || echo "$0 $*"\n'
TOO_OLD = "#!/bin/sh\nexit 1\n"  # as the check of its version ends

needs_make = pytest.mark.skipif(MAKE is None, reason="there is no make")


@pytest.fixture
def make(tmp_path):
    """make(python3=…, …) → what `make` did where only these commands exist."""

    def run(*arguments, **commands):
        folder = tmp_path / "bin"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, script in commands.items():
            path = folder / name.replace("_", ".")
            path.write_text(script)
            path.chmod(0o755)
        venv = tmp_path / "venv"
        # A `make` that runs these tests has numbered itself, and named a Python.
        left_out = "PYTHON", "MAKELEVEL"
        environment = {k: v for k, v in os.environ.items() if k not in left_out}
        return subprocess.run(
            [MAKE, "--no-print-directory", f"VENV={venv}", f"{venv}/bin/pip"]
            + [*arguments],
            cwd=ROOT,
            env=environment | {"PATH": str(folder), "MAKEFLAGS": ""},
            capture_output=True,
            text=True,
        )

    return run


@needs_make
def test_macos_own_python_is_passed_over(make):
    done = make(python3=TOO_OLD, python3_12=WORKS, python3_11=WORKS)
    assert done.returncode == 0, done.stderr
    assert "bin/python3.12 -m venv" in done.stdout


@needs_make
@pytest.mark.parametrize("name", [f"python3_{minor}" for minor in range(11, 15)])
def test_each_version_is_found_by_its_name(make, name):
    done = make(**{name: WORKS})
    assert f"bin/{name.replace('_', '.')} -m venv" in done.stdout


@needs_make
def test_the_python3_of_the_shell_comes_first(make):
    done = make(python3=WORKS, python3_14=WORKS)
    assert "bin/python3 -m venv" in done.stdout


@needs_make
@pytest.mark.parametrize("commands", [{}, {"python3": TOO_OLD}], ids=str)
def test_none_is_one_line_that_says_what_to_install(make, commands):
    done = make(**commands)
    assert done.returncode == 2
    said, make_itself = done.stderr.splitlines()
    assert said == (
        "mlx-flash needs Python 3.11 to 3.14 with venv. Install one (macOS: brew "
        "install python@3.13; Debian: apt install python3-venv), or name yours: make "
        "PYTHON=/path/to/python3"
    )
    assert make_itself.startswith(("make: ***", "gmake: ***"))


@needs_make
def test_a_python_that_was_named_is_judged_too(make, tmp_path):
    done = make("PYTHON=python3.9", **{"python3_9": TOO_OLD, "python3": WORKS})
    assert done.returncode == 2 and "needs Python 3.11" in done.stderr
    done = make("PYTHON=mine", mine=WORKS)
    assert "bin/mine -m venv" in done.stdout


def test_hosted_machines_run_the_demo_and_the_tests():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    (job,) = workflow["jobs"].values()
    systems = {entry["os"] for entry in job["strategy"]["matrix"]["include"]}
    assert any(s.startswith("macos-1") for s in systems)  # macos-13 was the last Intel
    assert "macos-13" not in systems and any(s.startswith("ubuntu") for s in systems)
    commands = [step.get("run", "") for step in job["steps"]]
    assert "make demo" in commands and "make test" in commands
