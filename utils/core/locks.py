"""One writer per workspace: a lock file that says who writes, and that outlives no process.

The file appears with its content in one step. Its owner is known by host name, boot, process id and the process's
start time, so that an id which the system has given away again does not pass for the owner. What a dead process of this
host left behind is taken over; what another host left never is, since nobody here can tell whether it lives. Readers
do not ask for the lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from utils.core.errors import UserError, cannot_write

logger = logging.getLogger("disease_pipeline")

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # file systems without hard links


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
    """The owner of a lock, alive or not; None if there is no lock. Raises UserError for a damaged file."""
    try:
        with lock.open(encoding="utf-8") as file:
            return _read(lock, file)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_dead(owner: LockOwner) -> bool:
    """Whether the owner has certainly ended; False if that cannot be determined from this host."""
    if owner.host != socket.gethostname():
        return False
    if owner.boot != _boot():
        return True
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
    if not is_dead(owner):
        raise UserError(_refusal(lock, owner))
    try:
        file = lock.open("r+", encoding="utf-8")
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


def _read(lock: Path, file: IO[str]) -> LockOwner:
    try:
        return LockOwner(**json.loads(file.read()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{lock}: damaged, {error}; expected the record of a writer. When no command is writing into this "
            f"workspace: rm {shlex.quote(str(lock))}"
        ) from error


def _refusal(lock: Path, owner: LockOwner) -> str:
    here = owner.host == socket.gethostname() and owner.pid_space == _pid_space()
    if here:
        return f"{lock.parent}: being written by {owner}; expected no other writer. Wait until it ends, then try again"
    return (
        f"{lock.parent}: being written by {owner}, which cannot be seen from here ({socket.gethostname()}); expected "
        f"no other writer. Wait until it ends; if that host is known to be dead: rm {shlex.quote(str(lock))}"
    )


def _release(lock: Path, record: str) -> None:
    """Remove the lock; warn if another process has removed or taken it."""
    try:
        is_ours = lock.read_text(encoding="utf-8") == record
    except FileNotFoundError:
        is_ours = False
    if is_ours:
        lock.unlink(missing_ok=True)
    else:
        logger.warning("%s: removed or taken by another process while this command wrote", lock)


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
