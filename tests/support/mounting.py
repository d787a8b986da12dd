"""Processes that mount a BASE-BACK, for tests: what they print, and what they and their workers see of the mount.

A process prints one JSON document on standard output; anything else there fails the test.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from foreign_base_back import build

PROJECT = Path(__file__).resolve().parents[2]

# What a process, or a worker of it, sees of the mount; `look` imports none of it.
PROBE = """
import os, sys
from pathlib import Path

TOP = ("config", "models", "training", "export", "utils")

def look():
    files = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and ("BASE-BACK" in file or name.partition(".")[0] in TOP):
            files.setdefault(os.path.realpath(file), []).append(name)
    return {
        "files": {names[0]: file for file, names in files.items()},
        "twice": {file: names for file, names in files.items() if len(names) > 1},
        "finder": type(sys.meta_path[0]).__module__,
        "base_back": os.environ.get("BASE_BACK_DIR"),
        "workspace": os.environ.get("DBT_BASE_DIR"),
        "path": list(sys.path),
        "torch": "torch" in sys.modules,
    }

def use():
    import config.settings, export, models, training, utils.datasets
    return look()
"""


@dataclass
class Mount:
    """A BASE-BACK, a workspace for it and an empty working directory outside both."""

    base_back: Path
    workspace: Path
    cwd: Path
    more: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str) -> tuple[Any, str]:
        """What a fresh Python process with these arguments printed as JSON, and its standard error."""
        return self._run("-u", *command)

    def run_script(self, code: str, *arguments: str) -> tuple[Any, str]:
        """The same of a script outside the working directory, which may start where torch is imported already."""
        script = self.cwd.parent / "probe" / "script.py"
        script.write_text(code)
        return self.run_file(script, *arguments)

    def run_file(self, script: Path, *arguments: str) -> tuple[Any, str]:
        """The same of a script anywhere."""
        return self._run(str(script), *arguments)

    def _run(self, *command: str) -> tuple[Any, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("DBT_", "BASE_BACK", "PYTHON"))
        }
        environment = {
            **kept,
            "PYTHONPATH": os.pathsep.join([str(PROJECT), str(self.cwd.parent / "probe")]),
            "BASE_BACK_DIR": os.path.relpath(self.base_back, self.cwd),
            "DBT_BASE_DIR": os.path.relpath(self.workspace, self.cwd),
            "DBT_MODEL_SIZE": "tiny",
            "OMP_NUM_THREADS": "1",
            **self.more,
        }
        environment = {name: value for name, value in environment.items() if value}
        done = subprocess.run(
            [sys.executable, *command], cwd=self.cwd, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout), done.stderr


def mount_in(folder: Path, base: Path, **more: str) -> Mount:
    for name in ("probe", "workspace", "cwd"):
        (folder / name).mkdir()
    (folder / "probe" / "probe.py").write_text(PROBE)
    return Mount(base, folder / "workspace", folder / "cwd", more)


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="session")
def foreign_base_back(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Somebody else's BASE-BACK, read-only; at the end of the session it is what it was."""
    folder = build(tmp_path_factory.mktemp("somebody"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = snapshot(folder.parent)
    yield folder
    assert snapshot(folder.parent) == before


@pytest.fixture
def foreign(tmp_path: Path, foreign_base_back: Path) -> Mount:
    return mount_in(tmp_path, foreign_base_back)


@pytest.fixture(params=["foreign", "bundled"])
def mount(request: pytest.FixtureRequest, tmp_path: Path, foreign_base_back: Path) -> Mount:
    return mount_in(tmp_path, foreign_base_back if request.param == "foreign" else PROJECT / "BASE-BACK")


def assert_whole(seen: dict[str, Any], mount: Mount) -> None:
    assert seen["twice"] == {}
    assert seen["finder"] == "utils.base_back"
    assert (seen["base_back"], seen["workspace"]) == (str(mount.base_back), str(mount.workspace))
    src = str(mount.base_back / "src") + os.sep
    for name, file in seen["files"].items():
        ours = name in ("utils", "utils.base_back", "utils.core") or name.startswith("utils.core.")
        assert file.startswith(str(PROJECT / "utils") if ours else os.path.realpath(src) + os.sep), name
