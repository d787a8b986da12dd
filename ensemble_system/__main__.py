"""The commands of an installed package: `ensemble-system`, `ensemble-system-train` and `python -m ensemble_system`.

The project's folder is data of this package. Its modules, among them a package called `utils`, are put on the search
path of this process alone, where they take the place of the folder that Python itself puts first.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def project_folder() -> Path:
    """The project: inside the installed package, or the clone around it."""
    inside = PACKAGE / "project"
    return inside if inside.is_dir() else PACKAGE.parent


def main() -> None:
    """Run the orchestrator's command line."""
    _run("ensemble_orchestrator.py")


def train() -> None:
    """Run the bundled base pipeline's command line."""
    _run("BASE-BACK/src/main.py")


def _run(script: str) -> None:
    """Run a program of the project as `python SCRIPT` does.

    The default workspace of an installed package is the working directory: nothing is written below the installation.
    """
    project = project_folder()
    if project.parent == PACKAGE:
        os.environ.setdefault("DBT_BASE_DIR", os.getcwd())
    program = project / script
    sys.argv[0] = str(program)
    first = str(program.parent)
    if getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, first)
    else:
        sys.path[0] = first
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
