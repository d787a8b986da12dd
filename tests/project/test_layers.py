"""What import-linter cannot see: functions named in strings, the root script, and BASE-BACK with its own `utils`."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from conftest import PROJECT

from utils import base_back, commands

UTILS, SRC = PROJECT / "utils", PROJECT / "BASE-BACK" / "src"
OUR_NAMES = {path.stem for path in UTILS.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
BASE_BACK_NAMES = {path.stem for path in (SRC / "utils").glob("*.py")} - {"__init__"}
TARGETS = {
    target
    for command in commands.COMMANDS.values()
    for target in (command.target, *(target for _, target in command.standalone))
}


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, at any depth; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.is_relative_to(SRC), f"{path}: imports are absolute"
            yield from (node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names))


def test_lint_checks_the_layers():
    contracts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert {contract["type"] for contract in contracts} == {"layers", "acyclic_siblings"}
    assert all(contract.get("exhaustive", True) for contract in contracts)
    (lint,) = (PROJECT / "Makefile").read_text().split("\nlint:")[1:]
    assert "lint-imports" in lint.split("\n\n")[0]


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_function_that_a_command_runs_exists(target):
    module, function = target.split(":")
    assert callable(getattr(import_module(module), function))


def test_the_root_script_imports_only_the_table_of_commands_and_the_core_before_a_command_is_typed():
    tree = ast.parse((PROJECT / "ensemble_orchestrator.py").read_text(encoding="utf-8"))
    modules = [
        node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module.startswith("utils")
    ]
    assert set(modules) == {"utils.commands", "utils.core"}


def test_no_module_of_ours_is_called_like_a_module_or_an_export_of_base_backs_utils():
    assert not OUR_NAMES & (BASE_BACK_NAMES | set(base_back.EXPORTS))


def test_base_back_never_imports_ours():
    ours = {f"utils.{name}" for name in OUR_NAMES - {"__init__"}} | {"ensemble_orchestrator"}
    for path in SRC.rglob("*.py"):
        wrong = {name for name in imported_names(path) if ".".join(name.split(".")[:2]) in ours}
        assert not wrong, f"{path}: imports {sorted(wrong)}"


@pytest.mark.parametrize("path", sorted(UTILS.rglob("*.py")), ids=lambda path: path.relative_to(UTILS).as_posix())
def test_base_back_is_reached_through_the_mount_only(path):
    base_back_modules = {f"utils.{name}" for name in BASE_BACK_NAMES}
    wrong = [
        name
        for name in imported_names(path)
        if name.split(".")[0] in base_back.PACKAGES or ".".join(name.split(".")[:2]) in base_back_modules
    ]
    assert not wrong, f"imports {wrong} of BASE-BACK; use utils.base_back.load"


def test_names_of_test_modules_are_unique():
    """Pytest imports them by their base name, so that the second of one name would not be collected."""
    names = Counter(path.name for path in (PROJECT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
