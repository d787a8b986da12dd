"""Tests write into folders of their own: what writes into the project fails where it does so.

Only this process and the programs that `warm` starts are watched, by an audit hook of the interpreter. Other programs
may write into the project meanwhile, as `make demo` does: that is no fault of a test.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOOLS = {".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis", "__pycache__"}
"""Folders that the tools keep in the project, at any depth."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_watched: set[str] = set()
_hooks: list[Any] = []


class WrittenIntoProject(BaseException):
    """Nothing that catches errors of a program takes it for one of them."""


@contextmanager
def kept_clean(folder: Path) -> Iterator[None]:
    """Raise WrittenIntoProject where this process or a fork of it is about to make or write a file below `folder`."""
    watch(folder)
    try:
        yield
    finally:
        _watched.discard(str(folder))


def watch(folder: Path) -> None:
    """Begin to watch a folder."""
    _watched.add(str(folder))
    if not _hooks:  # one stays until the process ends
        _hooks.append(_hear)
        sys.addaudithook(_hear)


def watched() -> list[str]:
    """The folders that are watched."""
    return sorted(_watched)


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if not flags & WRITING:
            return
    elif event == "os.mkdir":
        path = arguments[0]
    elif event in ("os.rename", "os.link", "os.symlink"):
        path = arguments[1]
    else:
        return
    if isinstance(path, int) or not _watched:
        return
    try:
        place = os.path.abspath(os.fsdecode(path))
    except FileNotFoundError:  # the working directory has been removed
        return
    for folder in _watched:
        if place.startswith(folder + os.sep) and TOOLS.isdisjoint(place[len(folder) :].split(os.sep)):
            raise WrittenIntoProject(f"{place}: a test may write into folders of its own only")
