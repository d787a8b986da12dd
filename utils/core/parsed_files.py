"""Records and arrays that are read once per process, as long as their files stay the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from utils.core.artifacts import open_array, read_record

_read: dict[Path, tuple[tuple[int, int, int], Any]] = {}
"""path -> (inode, time of change and size of the file; what was read)"""


def record_once(path: Path, *, remedy: str, form: Mapping[str, type] = MappingProxyType({})) -> dict[str, Any] | None:
    """As `artifacts.read_record`; the record is shared, so that callers do not modify it."""
    try:
        signature = _signature(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _once(path, signature, lambda: read_record(path, remedy=remedy, form=form))


def array_once(path: Path, *, remedy: str) -> np.ndarray:
    """As `artifacts.open_array`: a read-only memory map, which takes no memory of its own."""
    try:
        signature = _signature(path)
    except OSError:
        return open_array(path, remedy=remedy)  # which names the file and the remedy
    array: np.ndarray = _once(path, signature, lambda: open_array(path, remedy=remedy))
    return array


def forget() -> None:
    """Drop what was read, as a new process would."""
    _read.clear()


def _signature(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _once(path: Path, signature: tuple[int, int, int], read: Callable[[], Any]) -> Any:
    if path not in _read or _read[path][0] != signature:
        _read[path] = (signature, read())
    return _read[path][1]
