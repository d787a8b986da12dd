"""One writer per workspace: a lock file that says who writes, and that outlives no process.

The file appears with its content in one step. Its owner is known by host name, boot, process id and the process's
start time, so that an id which the system has given away again does not pass for the owner. What a dead process of this
host left behind is taken over; what another host left never is, since nobody here can tell whether it lives. Names of
hosts are not unique (clones, `localhost`), so a lock of another boot is dead only on a file system that no other
machine can write to. Readers do not ask for the lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shlex
import socket
import tempfile
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
"""Types, as the kernel names them, that one machine alone mounts for writing."""
MAX_LOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock."""

    host: str
    boot: str | None
    """Of the running system; None where it has no boot id."""
    pid_space: str | None
    """Process ids mean something inside one container only."""
    pid: int
    started: int
    """Of the process, in clock ticks since the boot; 0 where the system does not tell."""
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
    """Hold the lock file `lock` while the block runs; it is gone afterwards, however the block ends.

    Raises UserError that names the owner when somebody else writes, and with a remedy where nothing can be written.
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
    """The owner of a lock, alive or not; None if there is no lock. Raises UserError for a damaged one."""
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
    """Make the lock file, or take over a dead owner's."""
    handle, name = tempfile.mkstemp(prefix=".lock.", suffix=".partial", dir=lock.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(record)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # colleagues shall be able to read who it is
        while not (_is_placed(temporary, lock, record) or _is_taken_over(temporary, lock)):
            pass  # the owner ended between the two looks
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
    """Replace a dead owner's lock; False when it went away meanwhile. Raises UserError while the owner may live."""
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
        # Of two processes that find the same dead owner, one waits here and then sees that the file is another one.
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
    """The file `lock`, opened. Raises UserError for anything but a file: a link, a folder, or what could block."""
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
    here = (owner.host, owner.boot, owner.pid_space) == (socket.gethostname(), _boot(), _pid_space())
    if here:
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
    """Whether a file is on a file system that no other machine can write to; False if that cannot be determined."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    resolved, kind, longest = os.path.realpath(path.parent), "", -1
    for words in map(str.split, mounts):
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[4])
        is_above = resolved == point or resolved.startswith(point.rstrip(os.sep) + os.sep)
        if is_above and len(point) >= longest:  # of mounts at one point, the last hides the others
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
    """Start of a running process in clock ticks since the boot (0: the system does not tell); None for no process."""
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
