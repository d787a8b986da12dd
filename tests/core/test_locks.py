"""One writer per workspace: real processes, living and killed, other hosts, and two who see the same dead owner."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import PROJECT

from utils.core import locks
from utils.core.errors import UserError

HOLD = (
    "import sys, pathlib, time\n"
    "from utils.core import locks\n"
    "with locks.writer_lock(pathlib.Path(sys.argv[1]), 'build-ensemble'):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(120)\n"
)


@pytest.fixture
def lock(tmp_path) -> Path:
    return tmp_path / "ensembles" / ".lock"


@pytest.fixture
def holder(lock):
    """A real process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def leave(lock: Path, **changed) -> str:
    """A lock file of this process with some facts changed."""
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(json.dumps(asdict(replace(locks.this_process("stack"), **changed))))
    return lock.read_text()


def take(lock: Path) -> dict:
    with locks.writer_lock(lock, "discover"):
        return json.loads(lock.read_text())


def test_the_lock_says_who_writes_and_goes_however_the_block_ends(lock):
    record = take(lock)
    assert record["host"] == socket.gethostname()
    assert (record["pid"], record["command"]) == (os.getpid(), "discover")
    assert record["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert record["started"] > 0
    with pytest.raises(KeyboardInterrupt), locks.writer_lock(lock, "discover"):
        raise KeyboardInterrupt
    assert list(lock.parent.iterdir()) == []


def test_a_second_command_is_refused_by_name_of_the_first_and_takes_over_when_that_is_killed(
    holder, lock, tmp_path, orchestrator
):
    before = lock.read_text()
    done = orchestrator("discover", workspace=tmp_path)
    assert done.returncode == 1
    assert f"being written by `build-ensemble`, process {holder.pid} on host {socket.gethostname()}" in done.stderr
    assert str(lock.parent) in done.stderr
    assert lock.read_text() == before
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    done = orchestrator("discover", workspace=tmp_path)
    assert f"process {holder.pid} on host {socket.gethostname()}" in done.stderr
    assert "no longer runs; taken over" in done.stderr
    assert "Split the images first" in done.stderr  # it went on to what is wrong with an empty workspace
    assert not lock.exists()


def test_a_killed_process_that_nobody_has_waited_for_is_dead(holder, lock):
    os.kill(holder.pid, signal.SIGKILL)
    while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        pass
    assert take(lock)["pid"] == os.getpid()


@pytest.mark.parametrize("changed", [{"started": 1}, {"boot": "another"}, {"pid": 2**22 + 1}])
def test_what_is_certainly_dead_is_taken_over(lock, changed, heard):
    leave(lock, **changed)
    assert take(lock)["command"] == "discover"
    assert "left by `stack`" in heard.text
    assert not lock.exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"host": "elsewhere", "pid": 2**22 + 1},
        {"host": "elsewhere", "boot": "another"},
        {"pid_space": "pid:[1]", "pid": 2**22 + 1},  # another container of this host
    ],
)
def test_what_cannot_be_seen_from_here_is_never_taken_over(lock, changed):
    before = leave(lock, **changed)
    host = changed.get("host", socket.gethostname())
    with pytest.raises(UserError) as caught:
        take(lock)
    owner = json.loads(before)
    for words in (f"process {owner['pid']} on host {host}", "`stack`", f"since {owner['since']}", f"rm {lock}"):
        assert words in str(caught.value)
    assert lock.read_text() == before
    assert list(lock.parent.iterdir()) == [lock]


def test_the_same_process_is_refused_as_well(lock):
    with locks.writer_lock(lock, "pipeline"), pytest.raises(UserError, match="`pipeline`"):
        take(lock)


@pytest.mark.parametrize("meanwhile", ["replaced", "rewritten", "removed"])
def test_of_two_who_see_the_same_dead_owner_one_wins(lock, monkeypatch, meanwhile):
    """The other process is quicker between our look at the owner and our turn to replace the file."""
    leave(lock, started=1)
    real = fcntl.flock

    def late(file, operation):
        monkeypatch.setattr(fcntl, "flock", real)
        if meanwhile == "replaced":
            lock.unlink()
        if meanwhile == "removed":
            lock.unlink()
        else:
            leave(lock, command="evaluate")
        return real(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    if meanwhile == "removed":
        assert take(lock)["command"] == "discover"
        return
    with pytest.raises(UserError, match="`evaluate`"):
        take(lock)
    assert json.loads(lock.read_text())["command"] == "evaluate"


def test_a_dead_owner_s_file_is_held_for_writing_meanwhile(lock, monkeypatch):
    """On some network file systems, an exclusive lock needs a file that is open for writing."""
    held = []
    monkeypatch.setattr(
        fcntl, "flock", lambda file, kind: held.append((fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE, kind))
    )
    leave(lock, started=1)
    take(lock)
    assert held == [(os.O_RDWR, fcntl.LOCK_EX)]


def test_the_owner_is_on_the_disk_before_the_lock_is_there(lock, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append((os.fstat(number).st_size, lock.exists())))
    with locks.writer_lock(lock, "discover"):
        assert sizes == [(lock.stat().st_size, False)]


def test_where_there_are_no_hard_links_the_lock_still_excludes(lock, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with locks.writer_lock(lock, "pipeline"), pytest.raises(UserError, match="`pipeline`"):
        take(lock)
    assert not lock.exists()


def test_a_damaged_lock_is_named_with_the_command_that_removes_it(lock):
    lock.parent.mkdir()
    lock.write_text("{")
    with pytest.raises(UserError, match=rf"{lock}: damaged.*rm {lock}"):
        take(lock)


def as_link(lock: Path) -> None:
    lock.symlink_to(lock.parent / "nowhere")


def as_link_to_a_record(lock: Path) -> None:
    leave(lock, started=1)
    lock.symlink_to(lock.rename(lock.parent / "record"))


def as_device(lock: Path) -> None:
    lock.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [as_link, as_link_to_a_record, as_device, os.mkfifo, Path.mkdir])
def test_what_is_no_file_is_named_and_blocks_nobody(lock, make):
    lock.parent.mkdir()
    make(lock)
    with pytest.raises(UserError, match=rf"{lock}: damaged, it is a .*expected a regular file.*rm (-r )?{lock}"):
        take(lock)
    with pytest.raises(UserError, match="damaged"):
        locks.owner_of(lock)


@pytest.mark.parametrize("is_link", [False, True])
def test_a_folder_is_removed_and_of_a_link_to_one_the_link(lock, is_link):
    lock.parent.mkdir()
    lock.symlink_to(lock.parent) if is_link else lock.mkdir()
    with pytest.raises(UserError, match=rf": {'rm' if is_link else 'rm -r'} {lock}$"):
        take(lock)


@pytest.mark.parametrize(
    "changed",
    [{"pid": "1"}, {"pid": True}, {"pid": None}, {"started": 1.5}, {"host": 3}, {"since": None}, {"boot": []}],
)
def test_a_record_of_another_form_is_never_taken_for_a_dead_owner_s(lock, changed):
    before = leave(lock, **changed)
    with pytest.raises(UserError, match=rf"{lock}: damaged"):
        take(lock)
    assert lock.read_text() == before


def test_another_boot_proves_death_only_where_no_other_machine_can_write(lock):
    """Cloned machines have one name, so the lock may be that of a living process of the other one."""
    owner = replace(locks.this_process("stack"), boot="another")
    assert locks.is_dead(owner, lock)
    assert not locks.is_dead(owner, Path("/proc/self/lock"))
    assert not locks.is_dead(replace(owner, host="elsewhere"), lock)


def test_a_lock_that_became_another_s_is_left_to_it(lock, heard):
    with locks.writer_lock(lock, "discover"):
        lock.unlink()
        leave(lock, host="elsewhere")
    assert json.loads(lock.read_text())["host"] == "elsewhere"
    assert "removed or taken by another process" in heard.text


def test_a_lock_that_somebody_removed_is_told_and_ends_nothing(lock, heard):
    with locks.writer_lock(lock, "discover"):
        lock.unlink()
    assert f"{lock}: removed or taken by another process" in heard.text
    assert list(lock.parent.iterdir()) == []


def test_a_workspace_that_cannot_be_written_is_named_with_the_option_to_add(tmp_path):
    (tmp_path / "ensembles").write_text("a file")
    with pytest.raises(UserError, match=rf"{tmp_path}/ensembles/.lock: cannot be written .*--output DIR"):
        take(tmp_path / "ensembles" / ".lock")


@pytest.fixture
def without_proc(tmp_path, monkeypatch):
    """A system without /proc."""
    monkeypatch.setattr(locks, "Path", lambda name: tmp_path / "none" / name.lstrip("/"))
    monkeypatch.setattr(os, "readlink", lambda path: os.stat(tmp_path / "none"))


def test_without_proc_a_lock_is_dead_only_when_its_process_is_gone(lock, without_proc, monkeypatch):
    owner = locks.this_process("stack")
    assert (owner.boot, owner.pid_space, owner.started) == (None, None, 0)
    assert not locks.is_dead(owner, lock)
    assert locks.is_dead(replace(owner, pid=2**22 + 1), lock)
    assert not locks.is_dead(replace(owner, boot="another"), lock)  # the file system is unknown
    monkeypatch.setattr(os, "kill", refuse_signals)
    assert not locks.is_dead(owner, lock)  # another user's process


def refuse_signals(pid, number):
    assert number == 0
    raise PermissionError


MOUNTS = """\
21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 0:5 / /home rw shared:1 - nfs4 server:/home rw
23 22 8:2 / /home/with\\040space rw - xfs /dev/sdb1 rw
24 21 0:6 / /data rw - ext4 /dev/sdc1 rw
25 24 0:7 / /data rw - cifs //server/data rw
"""


@pytest.mark.parametrize(
    ("folder", "is_local"),
    [
        ("/", True),
        ("/homes", True),
        ("/home", False),
        ("/home/x", False),
        ("/home/with space/x", True),
        ("/data", False),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(tmp_path, monkeypatch, folder, is_local):
    (tmp_path / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(locks, "Path", lambda name: {"/proc/self/mountinfo": tmp_path / "mountinfo"}[name])
    assert locks._is_local(Path(folder, ".lock")) == is_local


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES])
def test_a_lock_that_cannot_be_linked_is_an_error_of_writing(lock, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match="cannot be written"):
        take(lock)
    assert list(lock.parent.iterdir()) == []


def test_other_users_may_read_who_writes(lock):
    before = os.umask(0o026)
    try:
        with locks.writer_lock(lock, "discover"):
            assert lock.stat().st_mode & 0o777 == 0o640
    finally:
        assert os.umask(before) == 0o026


def test_a_record_is_read_up_to_its_limit(lock):
    leave(lock, host="elsewhere", command="x" * 60_000)
    assert locks.owner_of(lock).command == "x" * 60_000
    leave(lock, host="elsewhere", command="x" * 70_000)
    with pytest.raises(UserError, match="damaged"):
        locks.owner_of(lock)


@pytest.mark.parametrize("text", ["[]", "{}", '{"host": "a"}', "[" * 60_000])
def test_a_record_of_something_else_is_damaged(lock, text):
    lock.parent.mkdir()
    lock.write_text(text)
    with pytest.raises(UserError, match=rf"{lock}: damaged"):
        locks.owner_of(lock)


def test_no_lock_has_no_owner(lock):
    assert locks.owner_of(lock) is None
    lock.parent.write_text("a file")
    assert locks.owner_of(lock) is None
