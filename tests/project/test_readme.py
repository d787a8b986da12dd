"""What README shows can be typed: verbs of the Makefile, commands and options of the programs, files that exist."""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import PROJECT, run_python

import ensemble_orchestrator

README = (PROJECT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
VERBS = set(re.findall(r"^([a-z-]+):.*## ", (PROJECT / "Makefile").read_text(), re.MULTILINE))


def commands(start: str) -> list[str]:
    return sorted({line for line in LINES if line.startswith(start)})


def test_the_two_verbs_stand_first():
    assert commands("make")[:1]
    assert {"make demo", "make test"} <= set(LINES)
    assert README.index("make demo") < README.index("ensemble_orchestrator.py")


@pytest.mark.parametrize("line", commands("make "))
def test_every_verb_exists(line):
    assert shlex.split(line)[1] in VERBS


@pytest.mark.parametrize("line", commands("python ensemble_orchestrator.py"))
def test_every_orchestrator_line_is_understood(line):
    arguments = shlex.split(line)[2:]
    parsed = ensemble_orchestrator.build_parser().parse_args(arguments)
    assert parsed.command in ensemble_orchestrator.COMMANDS
    named = [PROJECT / value for value in arguments if value.startswith("configs/")]
    assert all(path.is_file() for path in named)


@pytest.mark.parametrize("line", commands("ensemble-system "))
def test_every_line_of_the_installed_command_is_understood(line):
    parsed = ensemble_orchestrator.build_parser().parse_args(shlex.split(line)[1:])
    assert parsed.command in ensemble_orchestrator.COMMANDS


@pytest.mark.parametrize("line", commands("python BASE-BACK/src/main.py"))
def test_every_base_pipeline_line_is_understood(line):
    code = "import sys; sys.path.insert(0, 'BASE-BACK/src'); import main; main.build_parser().parse_args(sys.argv[1:])"
    done = run_python("-c", code, *shlex.split(line)[2:])
    assert done.returncode == 0, done.stderr


def test_every_command_is_shown():
    shown = {line.split()[2] for line in commands("python ensemble_orchestrator.py")}
    assert shown == set(ensemble_orchestrator.COMMANDS)


def test_every_file_that_is_linked_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (PROJECT / target).exists(), target
