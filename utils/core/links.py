"""Symbolic links are followed for reading; below a workspace or an output nothing is written through one.

The workspace and the output may be links themselves: they are the folders that the user has named.
"""

from __future__ import annotations

import os
from pathlib import Path

from utils.core.errors import UserError

ROOTS = ("DBT_BASE_DIR", "DBT_ENSEMBLE_DIR")
"""Variables that hold the workspace and the output, here and in every process that is started from here."""


def require_no_symlink(folder: Path) -> None:
    """Raise UserError where a folder that is to be written is a symbolic link."""
    if folder.is_symlink():
        raise UserError(
            f"{folder}: a symbolic link to {folder.resolve()}; nothing is written behind links. Write elsewhere with "
            "--output DIR (or DBT_ENSEMBLE_DIR)"
        )


def require_unlinked(path: Path) -> None:
    """Raise UserError where a link lies between the workspace, or the output, and a file that is to be written.

    A file that is a link itself is replaced, which writes nothing behind it.
    """
    roots = [Path(value) for variable in ROOTS if (value := os.environ.get(variable))]
    for root in (root for root in roots if path.is_relative_to(root)):
        for folder in path.parents[: len(path.relative_to(root).parts) - 1]:
            require_no_symlink(folder)


def remove_file(path: Path) -> None:
    """Remove a file of this project, or do nothing where there is none. Raises UserError for one behind a link."""
    require_unlinked(path)
    path.unlink(missing_ok=True)
