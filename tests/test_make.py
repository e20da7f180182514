"""The make targets set up .venv by themselves, once, also after a run that was interrupted. Nothing is downloaded."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")

WORKING = """#!/bin/sh
# Stands for a Python: writes down what it is asked, and makes the Python of a new .venv.
echo "$(basename "$(dirname "$0")") $*" >> "{log}"
case "$*" in
    "-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""
BROKEN = """#!/bin/sh
# What is left of a .venv when its making was interrupted: a Python without pip.
echo "$*: No module named pip" >&2
exit 1
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What make reads, and a Python that only keeps a list of what it is asked."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    program(tmp_path / "system" / "python", WORKING.format(log=tmp_path / "log"))
    return tmp_path


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make(checkout: Path, *targets: str) -> str:
    command = [str(MAKE), "--no-print-directory", f"PYTHON={checkout / 'system' / 'python'}", *targets]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout


def asked(checkout: Path) -> list[str]:
    """What the Pythons were asked since the last time."""
    log = checkout / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_the_first_call_makes_the_environment_and_the_second_starts_at_once(checkout):
    assert ".venv is ready" in make(checkout, "setup")
    first = asked(checkout)
    assert first[0] == "system -m venv --clear .venv"
    installs = [line for line in first if " install " in line]
    assert "torch==" in installs[0]  # before anything that could choose another torch
    assert installs[-1].endswith("-e .[lab,export]")
    make(checkout, "setup")
    assert asked(checkout) == []
    with open(checkout / "constraints.txt", "a") as constraints:
        constraints.write("# another\n")
    make(checkout, "setup")
    again = asked(checkout)
    assert not any("-m venv" in line for line in again)  # the environment is kept, what is in it is brought up to date
    assert len([line for line in again if " install " in line]) == len(installs)
    assert len([*(checkout / ".venv").glob("installed-*")]) == 1


def test_only_test_all_installs_other_peoples_models_and_it_installs_them_once(checkout):
    make(checkout, "test")
    assert not any("transformers" in line for line in asked(checkout))
    make(checkout, "test-all")
    (install,) = [line for line in asked(checkout) if " install " in line]
    assert "-c constraints.txt" in install
    make(checkout, "test-all")
    assert not any(" install " in line for line in asked(checkout))


@pytest.mark.parametrize("left", ["a Python without pip", "a link to nowhere", "an empty folder"])
def test_what_an_interrupted_run_left_behind_is_made_again(checkout, left):
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    if left == "a Python without pip":
        program(python, BROKEN)
    elif left == "a link to nowhere":
        python.symlink_to(checkout / "gone")
    assert ".venv is ready" in make(checkout, "setup")
    assert asked(checkout)[0] == "system -m venv --clear .venv"


def test_an_interrupted_installation_goes_on_in_the_same_environment(checkout):
    make(checkout, "setup")
    asked(checkout)
    for mark in (checkout / ".venv").glob("installed-*"):
        mark.unlink()
    make(checkout, "setup")
    again = asked(checkout)
    assert not any("-m venv" in line for line in again)
    assert any(" install " in line for line in again)


def test_without_a_python_that_is_new_enough_the_message_says_so(checkout):
    command = [str(MAKE), "--no-print-directory", "PYTHON=", "setup"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "needs Python 3.11 or newer" in result.stderr


def test_help_lists_every_target_and_needs_no_environment(checkout):
    listed = set(re.findall(r"^  make ([a-z-]+) ", make(checkout, "help"), re.MULTILINE))
    (targets,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(targets.split()) <= listed
    assert {"compare", "test", "test-all", "check", "bench"} <= listed
    assert not (checkout / ".venv").exists()
