"""Symbolic links: they are followed for reading, but nothing below a workspace or an output is written through one.

The workspace and the output may be links themselves, since the user has named them.
"""

from __future__ import annotations

import os
from pathlib import Path

from utils.core.errors import UserError

ROOTS = ("DBT_BASE_DIR", "DBT_ENSEMBLE_DIR")
"""Environment variables with the workspace and the output, in this process and its children."""


def require_no_symlink(folder: Path) -> None:
    """Raise UserError if a folder to be written is a symbolic link."""
    if folder.is_symlink():
        raise UserError(
            f"{folder}: a symbolic link to {folder.resolve()}; nothing is written behind links. Write elsewhere with "
            "--output DIR (or DBT_ENSEMBLE_DIR)"
        )


def require_unlinked(path: Path) -> None:
    """Raise UserError if there is a link on the path from the workspace, or the output, to a file to be written.

    A file that is itself a link is replaced, which does not affect its target.
    """
    roots = [Path(value) for variable in ROOTS if (value := os.environ.get(variable))]
    for root in (root for root in roots if path.is_relative_to(root)):
        for folder in path.parents[: len(path.relative_to(root).parts) - 1]:
            require_no_symlink(folder)


def remove_file(path: Path) -> None:
    """Remove a file of this project, if it exists. Raises UserError for a file behind a link."""
    require_unlinked(path)
    path.unlink(missing_ok=True)
