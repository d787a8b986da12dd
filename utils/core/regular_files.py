"""Opens files of any origin: only regular files, since reading a FIFO or a device can block or have side effects."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import TypeAlias

OpenFile: TypeAlias = BufferedReader | BufferedRandom
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
}


def open_regular(path: str | os.PathLike[str], *, follow_links: bool = True, writable: bool = False) -> OpenFile:
    """Open an existing regular file for reading (and writing) bytes, without blocking.

    Raises OSError, also for a file of another kind, naming the kind.
    """
    require_regular(path, follow_links=follow_links)
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags | (0 if follow_links else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # replaced since the first check
        os.close(descriptor)
        raise _not_regular(path, os.stat(path))
    return os.fdopen(descriptor, "r+b") if writable else os.fdopen(descriptor, "rb")


def require_regular(path: str | os.PathLike[str], *, follow_links: bool = True) -> None:
    """Raise OSError unless `path` is an existing regular file."""
    status = os.stat(path, follow_symlinks=follow_links)
    if not stat.S_ISREG(status.st_mode):
        raise _not_regular(path, status)


def _not_regular(path: str | os.PathLike[str], status: os.stat_result) -> OSError:
    kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
    number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
    return OSError(number, f"{kind}; expected a regular file", str(Path(path)))
