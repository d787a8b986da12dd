"""A copy of the project for a test to change, and commands that are typed in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from conftest import PROJECT, run_python
from in_process import Done

PROGRAM = f"""
import dataclasses, json, sys
sys.path.insert(1, {str(PROJECT / "tests" / "support")!r})
import in_process
print(json.dumps([dataclasses.asdict(in_process.run(*line)) for line in json.loads(sys.argv[1])]))
"""


def copy_project(folder: Path, *folders: str) -> Path:
    """The sources, the configurations and these other folders, in `folder`/project."""
    copy = folder / "project"
    for name in ("BASE-BACK", "configs", "utils", *folders):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("ensemble_orchestrator.py", "pyproject.toml"):
        shutil.copy(PROJECT / file, copy / file)
    (copy / "typed.py").write_text(PROGRAM, encoding="utf-8")
    return copy


def typed(copy: Path, *lines: Sequence[str]) -> list[Done]:
    """Run these command lines of the copy one after the other, in one process of their own."""
    done = run_python("typed.py", json.dumps(lines), cwd=copy)
    assert done.returncode == 0, done.stderr
    return [Done(**record) for record in json.loads(done.stdout)]
