"""One writer per workspace: a lock file that names its owner.

The file is created with its content atomically. Its owner is identified by host name, boot, process id and the
process's start time, so that a reused process id is not mistaken for the owner. The lock of a dead process of this host
is taken over; that of another host never is, since its state is unknown here. Host names are not unique (clones,
`localhost`), so a lock from another boot counts as dead only on a file system that no other machine can write to.
Readers do not use the lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from utils.core.errors import UserError, cannot_write
from utils.core.links import require_unlinked
from utils.core.regular_files import OpenFile, open_regular

logger = logging.getLogger("disease_pipeline")

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # file systems without hard links
LOCAL_FILE_SYSTEMS = (
    *("bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "ntfs", "ntfs3", "overlay", "ramfs"),
    *("reiserfs", "tmpfs", "ufs", "vfat", "xfs", "zfs"),
)
"""Types, by the kernel's names, that only one machine can mount for writing."""
MAX_LOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock."""

    host: str
    boot: str | None
    """Boot id of the running system; None if it has none."""
    pid_space: str | None
    """PID namespace, since process ids are valid only inside one container"""
    pid: int
    started: int
    """Start time of the process in clock ticks since the boot; 0 if unknown."""
    command: str
    since: str

    def __str__(self) -> str:
        return f"`{self.command}`, process {self.pid} on host {self.host}, since {self.since}"


def this_process(command: str) -> LockOwner:
    """The running process as the owner of a lock."""
    return LockOwner(
        host=socket.gethostname(),
        boot=_boot(),
        pid_space=_pid_space(),
        pid=os.getpid(),
        started=_start(os.getpid()) or 0,
        command=command,
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


@contextmanager
def writer_lock(lock: Path, command: str) -> Iterator[None]:
    """Hold the lock file `lock` during the block, and remove it afterwards, even after an exception.

    Raises UserError naming the owner if another process holds the lock, or with a remedy if it cannot be written.
    """
    record = json.dumps(asdict(this_process(command)), indent=1, sort_keys=True)
    require_unlinked(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        _take(lock, record)
    except OSError as error:
        raise cannot_write(lock, error) from error
    try:
        yield
    finally:
        _release(lock, record)


def owner_of(lock: Path) -> LockOwner | None:
    """The owner of a lock, alive or dead; None if there is no lock. Raises UserError for a damaged one."""
    try:
        with _opened(lock) as file:
            return _read(lock, file)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_dead(owner: LockOwner, lock: Path) -> bool:
    """Whether the owner of the file `lock` has certainly ended; False if that cannot be determined from this host."""
    if owner.host != socket.gethostname():
        return False
    if owner.boot != _boot():
        return _is_local(lock)
    return owner.pid_space == _pid_space() and owner.started != _start(owner.pid)


def _take(lock: Path, record: str) -> None:
    """Create the lock file, or take over a dead owner's."""
    temporary = lock.with_name(f".lock.{secrets.token_hex(4)}.partial")
    try:  # a signal may arrive as soon as the file exists
        with temporary.open("x", encoding="utf-8") as file:
            file.write(record)
            file.flush()
            os.fsync(file.fileno())
        while not (_is_placed(temporary, lock, record) or _is_taken_over(temporary, lock)):
            pass  # the owner released the lock between the two calls
    finally:
        temporary.unlink(missing_ok=True)


def _is_placed(temporary: Path, lock: Path, record: str) -> bool:
    try:
        os.link(temporary, lock)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(record)
    except FileExistsError:
        return False
    return True


def _is_taken_over(temporary: Path, lock: Path) -> bool:
    """Replace a dead owner's lock; False if it was removed meanwhile. Raises UserError if the owner may be alive."""
    owner = owner_of(lock)
    if owner is None:
        return False
    if not is_dead(owner, lock):
        raise UserError(_refusal(lock, owner))
    try:
        file = _opened(lock, writable=True)
    except FileNotFoundError:
        return False
    with file:
        # If two processes find the same dead owner, one waits here and then sees that the file has been replaced.
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if not os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                return False
        except FileNotFoundError:
            return False
        if _read(lock, file) != owner:
            return False
        temporary.replace(lock)
    logger.warning("%s: left by %s, which no longer runs; taken over", lock, owner)
    return True


def _opened(lock: Path, *, writable: bool = False) -> OpenFile:
    """Open the file `lock`. Raises UserError for anything but a regular file, such as a link, a folder or a FIFO."""
    try:
        return open_regular(lock, follow_links=False, writable=writable)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.EINVAL):
            raise _damaged(lock, f"it is {error.strerror}") from error
        raise


def _read(lock: Path, file: OpenFile) -> LockOwner:
    try:
        record = json.loads(file.read(MAX_LOCK_BYTES))
        if not isinstance(record, dict) or record.keys() != {field.name for field in fields(LockOwner)}:
            raise ValueError("it lacks what identifies a writer")
        for name, value in record.items():
            if not _is_valid(name, value):
                raise ValueError(f"its {name} is {str(value)[:60]!r}")
        return LockOwner(**record)
    except (ValueError, RecursionError) as error:
        raise _damaged(lock, str(error)) from error


def _is_valid(name: str, value: Any) -> bool:
    if name in ("pid", "started"):
        return type(value) is int
    return isinstance(value, str) or (value is None and name in ("boot", "pid_space"))


def _damaged(lock: Path, problem: str) -> UserError:
    remove = "rm -r" if lock.is_dir() and not lock.is_symlink() else "rm"
    return UserError(
        f"{lock}: damaged, {problem}; expected the record of a writer. When no command is writing into this "
        f"workspace: {remove} {shlex.quote(str(lock))}"
    )


def _refusal(lock: Path, owner: LockOwner) -> str:
    is_visible = (owner.host, owner.boot, owner.pid_space) == (socket.gethostname(), _boot(), _pid_space())
    if is_visible:
        return f"{lock.parent}: being written by {owner}; expected no other writer. Wait until it ends, then try again"
    return (
        f"{lock.parent}: being written by {owner}, which cannot be seen from here ({socket.gethostname()}); expected "
        f"no other writer. Wait until it ends; if that process is known to be dead: rm {shlex.quote(str(lock))}"
    )


def _release(lock: Path, record: str) -> None:
    """Remove the lock; warn if another process has removed or taken it."""
    try:
        with _opened(lock) as file:
            is_ours = file.read(MAX_LOCK_BYTES) == record.encode()
    except (OSError, UserError):
        is_ours = False
    if is_ours:
        lock.unlink(missing_ok=True)
    else:
        logger.warning("%s: removed or taken by another process while this command wrote", lock)


def _is_local(path: Path) -> bool:
    """Whether a file is on a file system that no other machine can write to; False if unknown."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    resolved, kind, longest = os.path.realpath(path.parent), "", -1
    for words in map(str.split, mounts):
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[4])
        is_above = resolved == point or resolved.startswith(point.rstrip(os.sep) + os.sep)
        if is_above and len(point) >= longest:  # of several mounts at one point, the last is visible
            kind, longest = words[words.index("-") + 1], len(point)
    return kind in LOCAL_FILE_SYSTEMS


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _pid_space() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _start(pid: int) -> int | None:
    """Start time of a running process in clock ticks since the boot (0 if unknown); None if it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])  # a zombie has ended
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() or not _answers(pid) else 0


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
