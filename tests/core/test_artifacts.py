"""Files appear whole or not at all; what is damaged is named."""

from __future__ import annotations

import errno
import gc
import json
import os
import stat
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

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
    path = tmp_path / "deep" / "array.npy"
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
    artifacts.write_text(tmp_path / "ours", "x")
    (tmp_path / "other").write_text("x")
    ours, other = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "other"))
    assert ours == other


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


def test_pickled_objects_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object))
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="without pickled objects"):
        artifacts.open_array(tmp_path / "x.npy", remedy="")
    with pytest.raises(UserError, match="without pickled objects"):
        artifacts.read_arrays(tmp_path / "x.npz", remedy="")


def npz(path, header, data=bytes(8), method=zipfile.ZIP_STORED, name="a.npy"):
    """An archive of one array with this header."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data)
    return path


def header(shape, dtype="<f8"):
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (header("(1000000000000, 13)"), r"declares float64 of shape \(1000000000000, 13\); 8 bytes are there"),
        (header("(0, 100000000000000000000000)"), "8 bytes are there"),
        (header("(1000000000000,)", "<U0"), "8 bytes are there"),
        (header("(-1,)"), r"shape \(-1,\)"),
        ("{[]: 1}\n", "unhashable"),
        ("(" * 9000 + "\n", "cannot be read"),
        ("'''\n", "EOF in multi-line string"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_asked_for(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("memory was asked for"))
    with pytest.raises(UserError, match=words):
        artifacts.read_arrays(npz(tmp_path / "x.npz", text), remedy="")


def test_an_archive_that_promises_more_than_it_holds_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(4_000_000))  # deflate makes a thousandth of it
    assert artifacts.read_arrays(path, remedy="")["a"].shape == (4_000_000,)
    raw = bytearray(path.read_bytes())
    for place in (22, raw.rindex(b"PK\x01\x02") + 24):  # the length of the content, where an archive says it
        raw[place : place + 4] = (2**31).to_bytes(4, "little")
    (tmp_path / "y.npz").write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.npy promises more bytes than its part of the file can hold"):
        artifacts.read_arrays(tmp_path / "y.npz", remedy="")
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 10_000)
    with pytest.raises(UserError, match=r"0\.0 GB, more than half of this machine"):
        artifacts.read_arrays(path, remedy="")


def test_a_flipped_bit_another_file_and_another_compression_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.arange(100.0))
    raw = bytearray(path.read_bytes())
    raw[600] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="Bad CRC-32"):
        artifacts.read_arrays(path, remedy="")
    with pytest.raises(UserError, match=r"it holds README\.txt"):
        artifacts.read_arrays(npz(path, header("(1,)"), name="README.txt"), remedy="")
    with pytest.raises(UserError, match="compressed by method 14"):
        artifacts.read_arrays(npz(path, header("(1,)"), method=zipfile.ZIP_LZMA), remedy="")


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


def test_nothing_is_written_when_nothing_was_learned(tmp_path):
    FileDigests(tmp_path / "digests.json").save()
    assert not (tmp_path / "digests.json").exists()


def test_digest_of_does_not_depend_on_the_order_of_keys():
    assert artifacts.digest_of({"a": 1, "b": [2]}) == artifacts.digest_of({"b": [2], "a": 1})
    assert artifacts.digest_of({"a": 1}) != artifacts.digest_of({"a": 2})


@pytest.mark.parametrize(("content", "words"), [("[1]", "it holds a list"), ('{"a": 1}', "it has no 'members'")])
def test_a_record_of_another_form_is_damage(tmp_path, content, words):
    path = tmp_path / "record.json"
    path.write_text(content)
    message = rf"record.json: damaged, {words}; expected a record of this project. Make it again"
    with pytest.raises(UserError, match=message):
        artifacts.read_record(path, remedy="Make it again", form={"members": list})


def test_a_key_that_a_record_lacks_is_named_with_the_file_at_any_depth(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"a": [{"b": 1}]}')
    found = artifacts.read_record(path, remedy="Make it again")
    assert found["a"][0]["b"] == 1
    assert found.get("c") is None
    with pytest.raises(UserError, match=r"record.json: damaged, it has no 'c'; .* Make it again"):
        found["a"][0]["c"]
    assert artifacts.read_record(tmp_path / "none.json", remedy="Make it again") is None


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
