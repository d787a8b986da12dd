"""Files appear whole or not at all; what is damaged is named."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import pickle
import stat
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from utils.core import artifacts
from utils.core.artifacts import FileDigests
from utils.core.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "record.json"
    artifacts.write_json(path, {"a": 1})

    def fail_half_way():
        with artifacts.replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_the_file_is_invisible_under_its_name_until_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "er" / "array.npy"
    with artifacts.replacing(path) as temporary:
        np.save(temporary, np.arange(3))
        assert not path.exists()
    assert np.load(path).tolist() == [0, 1, 2]


@pytest.mark.parametrize("way", ["set aside", "not offered", "unknown here"])
def test_a_sparse_file_is_given_its_room_and_keeps_its_content(tmp_path, monkeypatch, way):
    path, shape = tmp_path / "a.npy", (700, 1000)  # more than two blocks of the slow way
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    assert path.stat().st_blocks * 512 < 10_000
    if way == "not offered":
        monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    elif way == "unknown here":
        monkeypatch.delattr(os, "posix_fallocate")
    size = path.stat().st_size
    artifacts.preallocate(path, array.offset)
    assert path.stat().st_blocks * 512 >= path.stat().st_size == size
    array[:] = 1
    array.flush()
    assert np.array_equal(np.load(path), np.ones(shape, dtype=np.float32))


def test_without_preallocation_the_last_byte_is_written_too(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.touch()
    os.truncate(path, 8193)
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(artifacts, "BLOCK", 8192)
    artifacts.preallocate(path, 0)
    assert path.stat().st_blocks * 512 >= path.stat().st_size == 8193


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_room_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    array = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.float32, shape=(9, 9))
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        artifacts.preallocate(tmp_path / "a.npy", array.offset)


def test_written_files_have_the_permissions_of_any_other_file(tmp_path):
    before = os.umask(0o026)
    try:
        artifacts.write_text(tmp_path / "ours", "x")
        assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o640
    finally:
        assert os.umask(before) == 0o026


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_leaves_nothing_open(tmp_path, monkeypatch):
    path, synchronised = tmp_path / "r.json", []
    monkeypatch.setattr(
        os, "fsync", lambda number: synchronised.append((os.readlink(f"/dev/fd/{number}"), path.exists()))
    )
    before = len(os.listdir("/dev/fd"))
    artifacts.write_json(path, {})
    assert len(os.listdir("/dev/fd")) == before
    ((name, existed),) = synchronised
    assert name.endswith(".partial.json")
    assert not existed


def test_a_signal_that_arrives_as_the_temporary_file_is_created_leaves_none(tmp_path, monkeypatch):
    create = os.open

    def created(*arguments, **options):
        os.close(create(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", created)
    with pytest.raises(KeyboardInterrupt):
        artifacts.write_json(tmp_path / "r.json", {})
    assert os.listdir(tmp_path) == []


def test_an_error_about_another_file_is_not_one_of_writing(tmp_path):
    def read_another():
        with artifacts.replacing(tmp_path / "x.txt"):
            (tmp_path / "missing.txt").read_text()

    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        read_another()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_an_error_of_writing_names_the_file(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(UserError, match=r"x\.txt: cannot be written"):
        artifacts.write_text(tmp_path / "x.txt", "x")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_where_no_folder_can_be_or_behind_a_link(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/x\.txt: cannot be written"):
        artifacts.write_text(tmp_path / "file" / "x.txt", "x")
    monkeypatch.setenv("DBT_BASE_DIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"link: a symbolic link to"):
        artifacts.write_text(tmp_path / "link" / "x.txt", "x")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_objects_are_never_written_as_pickles(tmp_path, ending):
    path, objects = tmp_path / f"x.{ending}", np.array([{}], dtype=object)
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        artifacts.write_array(path, objects) if ending == "npy" else artifacts.write_arrays(path, {"a": objects})
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_killed_writers_of_this_file_alone_are_removed(tmp_path):
    names = ["a.npy", ".a.12345678.partial.npy", ".a[1].12345678.partial.npy", ".a.1234567.partial.npy", "a[1].npy"]
    for name in names:
        (tmp_path / name).touch()
    artifacts.remove_temporary_files(tmp_path / "a.npy")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(set(names) - {names[1]})
    artifacts.remove_temporary_files(tmp_path / "a[1].npy")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(set(names) - set(names[1:3]))


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_linked_or_copied(tmp_path, monkeypatch, links):
    source, path = tmp_path / "source", tmp_path / "deep" / "path"
    source.write_bytes(b"content")
    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    artifacts.link_file(source, path)
    assert path.read_bytes() == b"content"
    assert os.path.samefile(source, path) == links


def test_equal_checkpoints_give_equal_bytes_and_replace_what_killed_writers_left(tmp_path):
    (tmp_path / ".1.12345678.partial.pth").touch()
    weights, extra = {"w": torch.eye(2)}, {"b": [1, None], "a": "x"}
    artifacts.write_checkpoint(tmp_path / "1.pth", weights, extra)
    artifacts.write_checkpoint(tmp_path / "2.pth", weights, dict(reversed(extra.items())))
    assert (tmp_path / "1.pth").read_bytes() == (tmp_path / "2.pth").read_bytes()
    found = torch.load(tmp_path / "1.pth", weights_only=True)
    assert torch.equal(found["model_state_dict"]["w"], torch.eye(2))
    assert found["extra"] == extra
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.write_checkpoint(tmp_path / "1.pth", weights, {"loss": float("nan")})


def test_records_are_sorted_and_refuse_nan(tmp_path):
    artifacts.write_json(tmp_path / "r.json", {"b": 1, "a": "é"})
    assert (tmp_path / "r.json").read_text() == '{\n "a": "é",\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.write_json(tmp_path / "r.json", {"a": float("nan")})
    assert artifacts.read_json(tmp_path / "r.json", remedy="x") == {"b": 1, "a": "é"}
    assert artifacts.read_json(tmp_path / "none.json", remedy="x") is None


def test_equal_arrays_give_equal_bytes(tmp_path):
    arrays = {"b/0": np.arange(5), "a": np.array(["x", "yy"])}
    artifacts.write_arrays(tmp_path / "1.npz", arrays)
    artifacts.write_arrays(tmp_path / "2.npz", dict(reversed(arrays.items())))
    artifacts.write_tensors(tmp_path / "1.safetensors", {"w": np.eye(2), "v": np.ones(1)})
    artifacts.write_tensors(tmp_path / "2.safetensors", {"v": np.ones(1), "w": np.eye(2)})
    for ending in ("npz", "safetensors"):
        assert (tmp_path / f"1.{ending}").read_bytes() == (tmp_path / f"2.{ending}").read_bytes()
    assert artifacts.read_arrays(tmp_path / "1.npz", remedy="x")["b/0"].tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(artifacts.read_tensors(tmp_path / "1.safetensors", remedy="x")["w"], np.eye(2))


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (artifacts.read_json, "x.json"),
        (artifacts.open_array, "x.npy"),
        (artifacts.read_arrays, "x.npz"),
        (artifacts.read_tensors, "x.safetensors"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"{", b"PK\x03\x04junk", b"\x93NUMPY\x01", b"\xff" * 40])
def test_damaged_files_are_named_with_the_remedy(tmp_path, read, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: .*Mend it so"):
        read(tmp_path / name, remedy="Mend it so")


def test_a_folder_is_no_array(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read, .*a folder; expected a regular file"):
        artifacts.open_array(tmp_path, remedy="")


def test_pickled_objects_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object))
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="without pickled objects"):
        artifacts.open_array(tmp_path / "x.npy", remedy="")
    with pytest.raises(UserError, match="without pickled objects"):
        artifacts.read_arrays(tmp_path / "x.npz", remedy="")


def test_digests_are_remembered_while_the_file_is_the_same(tmp_path):
    file, memory = tmp_path / "weights", tmp_path / "digests.json"
    file.write_bytes(b"one")
    digests = FileDigests(memory)
    first = digests.of(file)
    digests.keep(first, {"size": "tiny"})
    digests.save()
    again = FileDigests(memory)
    assert (again.of(file), again.facts(first)) == (first, {"size": "tiny"})
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(b"two")
    os.utime(file, ns=(times[0], times[1] + 1))
    assert again.of(file) != first
    replaced = tmp_path / "other"
    replaced.write_bytes(b"six")
    os.utime(replaced, ns=(times[0], times[1] + 1))  # equal size and time, another file
    replaced.replace(file)
    assert again.of(file) == FileDigests(tmp_path / "fresh.json").of(file)


def unreadable(*_, **__):
    pytest.fail("a file was read")


def test_a_file_of_a_known_digest_is_not_read_again(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    digests = FileDigests(tmp_path / "digests.json")
    assert digests.is_unchanged(file) is None
    assert digests.is_intact(file)
    first = digests.of(file)
    assert first == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(artifacts, "open_regular", unreadable)
    assert digests.of(file) == first
    assert digests.is_unchanged(file) is True
    assert digests.is_intact(file)
    file.write_bytes(b"three")
    assert digests.is_unchanged(file) is False
    assert not digests.is_intact(file)
    file.unlink()
    assert not digests.is_intact(file)
    digests.save()
    assert first in (tmp_path / "digests.json").read_text()


def test_what_is_learned_is_written_once(tmp_path):
    path = tmp_path / "digests.json"
    digests = FileDigests(path)
    digests.keep("a", [1])
    assert (digests.facts("a"), digests.facts("b")) == ([1], None)
    digests.save()
    path.unlink()
    digests.save()
    assert not path.exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record | {"facts": {"a": [2]}},
        lambda record: record | {"facts_sha256": ""},
        lambda record: record | {"facts": {"a": ["\ud800"]}},
    ],
)
def test_damaged_facts_are_forgotten_and_digests_kept(tmp_path, monkeypatch, spoil):
    path, file = tmp_path / "digests.json", tmp_path / "weights"
    file.write_bytes(b"one")
    digests = FileDigests(path)
    first = digests.of(file)
    digests.keep("a", [1])
    digests.save()
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    again = FileDigests(path)
    assert again.facts("a") is None
    again.save()
    assert json.loads(path.read_text())["facts"] == {}
    monkeypatch.setattr(artifacts, "open_regular", unreadable)
    assert again.of(file) == first


def test_entries_of_another_form_are_taken_again(tmp_path):
    path, file = tmp_path / "digests.json", tmp_path / "weights"
    file.write_bytes(b"one")
    status = file.stat()
    state = [status.st_size, status.st_mtime_ns, status.st_ino]
    for entry in (state, [*state, "0", "1"], "abcd"):
        path.write_text(json.dumps({"files": {str(file): entry}, "facts": {}}))
        assert FileDigests(path).of(file) == hashlib.sha256(b"one").hexdigest()


def test_nothing_is_written_when_nothing_was_learned(tmp_path):
    FileDigests(tmp_path / "digests.json").save()
    assert not (tmp_path / "digests.json").exists()


def test_digest_of_does_not_depend_on_the_order_of_keys():
    assert artifacts.digest_of({"a": 1, "b": [2]}) == artifacts.digest_of({"b": [2], "a": 1})
    assert artifacts.digest_of({"a": 1}) != artifacts.digest_of({"a": 2})
    assert artifacts.digest_of({"b": [1], "é": None}) == hashlib.sha256('{"b": [1], "é": null}'.encode()).hexdigest()
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.digest_of(float("inf"))


@pytest.mark.parametrize(("content", "words"), [("[1]", "it holds a list"), ('{"a": 1}', "it has no 'members'")])
def test_a_record_of_another_form_is_damage(tmp_path, content, words):
    path = tmp_path / "record.json"
    path.write_text(content)
    message = rf"record.json: damaged, {words}; expected a record of this project. Make it again"
    with pytest.raises(UserError, match=message):
        artifacts.read_record(path, remedy="Make it again", form={"members": list})


def test_a_record_of_nothing_is_damage(tmp_path):
    (tmp_path / "record.json").write_text("null")
    with pytest.raises(UserError, match=r"record.json: damaged, it holds null; expected a record .* Make it again"):
        artifacts.read_record(tmp_path / "record.json", remedy="Make it again")


def test_a_key_that_a_record_lacks_is_named_with_the_file_at_any_depth(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"a": [{"b": 1}]}')
    found = artifacts.read_record(path, remedy="Make it again")
    assert found["a"][0]["b"] == 1
    assert found.get("c") is None
    with pytest.raises(UserError, match=r"record.json: damaged, it has no 'c'; .* Make it again"):
        found["a"][0]["c"]
    assert artifacts.read_record(tmp_path / "none.json", remedy="Make it again") is None


def test_a_record_reaches_another_process_as_plain_values(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"a": [{"b": 1}]}')
    copy = pickle.loads(pickle.dumps(artifacts.read_record(path, remedy="Make it again")))
    assert copy == {"a": [{"b": 1}]}
    assert (type(copy), type(copy["a"][0])) == (dict, dict)


def test_arrays_are_opened_by_several_threads(tmp_path):
    """Where a collection runs Python code, and so lets another thread on, while a header is read (gh-106905)."""
    path = tmp_path / "x.npy"
    artifacts.write_array(path, np.arange(3))
    kept, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(noticed := lambda *_: sum(range(50)))
    gc.set_threshold(5)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: artifacts.open_array(path, remedy="").sum(), range(2000)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*kept)
        gc.callbacks.remove(noticed)
    assert set(found) == {3}
