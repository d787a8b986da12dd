"""Records and arrays that are read once per process, as long as their files do not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from utils.core.artifacts import open_array, read_record
from utils.core.record_forms import Form

MAX_OPEN_ARRAYS = 256  # each uses a file descriptor, of which a process has 1,024 by default
_records: dict[Path, tuple[tuple[int, int, int], Any]] = {}
_arrays: dict[Path, tuple[tuple[int, int, int], Any]] = {}
"""path -> ((inode, modification time, size) of the file, content), the least recently opened first"""


def record_once(path: Path, *, remedy: str, form: Form = MappingProxyType({})) -> dict[str, Any] | None:
    """Like `artifacts.read_record`; the record is shared, so callers must not modify it."""
    try:
        signature = _signature(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    record: dict[str, Any] | None = _once(
        _records, path, signature, lambda: read_record(path, remedy=remedy, form=form)
    )
    return record


def array_once(path: Path, *, remedy: str) -> np.ndarray:
    """Like `artifacts.open_array`: a read-only memory map, which allocates no memory.

    The last `MAX_OPEN_ARRAYS` opened arrays are kept open; earlier ones are opened again on demand.
    """
    try:
        signature = _signature(path)
    except OSError:
        return open_array(path, remedy=remedy)  # raises an error with file and remedy
    array: np.ndarray = _once(_arrays, path, signature, lambda: open_array(path, remedy=remedy))
    while len(_arrays) > MAX_OPEN_ARRAYS:
        del _arrays[next(iter(_arrays))]
    return array


def forget() -> None:
    """Clear the cache, for a state like that of a new process."""
    _records.clear()
    _arrays.clear()


def _signature(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _once(
    cache: dict[Path, tuple[tuple[int, int, int], Any]],
    path: Path,
    signature: tuple[int, int, int],
    read: Callable[[], Any],
) -> Any:
    if path not in cache or cache[path][0] != signature:
        cache.pop(path, None)
        cache[path] = (signature, read())
    return cache[path][1]
