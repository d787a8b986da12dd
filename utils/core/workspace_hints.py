"""Hints for folders that are not a workspace: the workspace that was meant; folders of photographs are refused."""

from __future__ import annotations

import shlex
from difflib import get_close_matches
from pathlib import Path

from utils.core.errors import UserError

MARKS = ("ensembles/ensemble_catalog.json", "split_dataset", "checkpoints")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MOST_ENTRIES = 1000  # number of inspected entries of a folder


def near(folder: Path) -> str:
    """`; did you mean DIR?` for a workspace above, below or beside a folder, or `.` if there is none."""
    workspace = _around(folder)
    if workspace is None and folder.parent.is_dir():
        names = {path.name: path for path in _children(folder.parent)}
        workspace = next((names[name] for name in get_close_matches(folder.name, names, n=1)), None)
    return f"; did you mean {workspace}?" if workspace else "."


def refuse(folder: Path) -> None:
    """Raise UserError for a workspace that is a folder of photographs, or that is beside or inside one."""
    if workspace := _around(folder):
        raise UserError(f"--workspace {folder}: not a workspace; did you mean {workspace}?")
    classes = [path.name for path in _children(folder) if _has_image(path)]
    if not classes and not _has_image(folder):
        return
    images = f"{len(classes)} class folders of images" if len(classes) > 1 else "images"
    raise UserError(
        f"--workspace {folder}: holds {images} and no workspace, and nothing is written beside images. To start "
        f"with these images: make demo DATA={shlex.quote(str(folder))}, which prints the workspace that it makes"
    )


def elsewhere(folder: Path) -> str:
    """` DIR holds no networks; ...` with the workspace that was meant; empty for a folder that is a workspace."""
    if _is_workspace(folder):
        return ""
    made_here = [path for path in _children(folder / "workspaces") if _is_workspace(path)]  # by `demo`
    workspace = _around(folder) or max(made_here, key=lambda path: path.stat().st_mtime, default=None)
    meant = f"did you mean --workspace {shlex.quote(str(workspace))}?" if workspace else "`make demo` trains some"
    return f". {folder} holds no networks; {meant}"


def _around(folder: Path) -> Path | None:
    """A workspace above or below a folder."""
    return next((path for path in (*folder.parents[:2], *_children(folder)) if _is_workspace(path)), None)


def _is_workspace(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS)


def _children(folder: Path) -> list[Path]:
    try:
        entries = [path for path, _ in zip(folder.iterdir(), range(MOST_ENTRIES), strict=False)]
        return sorted(path for path in entries if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _has_image(folder: Path) -> bool:
    try:
        entries = zip(folder.iterdir(), range(MOST_ENTRIES), strict=False)
        return any(path.suffix.lower() in IMAGES and path.is_file() for path, _ in entries)
    except OSError:
        return False
