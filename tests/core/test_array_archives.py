"""Archives of arrays of any origin: what lies about its size, or is damaged, is refused before memory is allocated."""

from __future__ import annotations

import os
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from utils.core import array_archives, artifacts
from utils.core.errors import UserError


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


def entries(*sizes):
    """An archive of parts of these (bytes in memory, bytes in the file), of which only the directory is looked at."""
    found = []
    for number, (size, compressed) in enumerate(sizes):
        entry = zipfile.ZipInfo(f"{number}.npy")
        entry.file_size, entry.compress_size = size, compressed
        found.append(entry)
    return SimpleNamespace(infolist=lambda: found)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([(60, 60), (40, 40)], None),
        ([(60, 60), (41, 41)], "its parts are longer than the file"),
        ([(1032, 1)], None),
        ([(1033, 1)], "0.npy promises more bytes than its part of the file can hold"),
        ([(1032, 1), (2064, 2), (1904, 90)], None),
        ([(1032, 1), (2064, 2), (1905, 90)], "its arrays take 0.0 GB, more than half of this machine's 0.0 GB"),
    ],
)
def test_sizes_are_refused_from_the_first_impossible_byte_on(monkeypatch, sizes, words):
    monkeypatch.setattr(array_archives, "physical_memory", lambda: 10_000)
    archive = entries(*sizes)
    if words is None:
        assert list(array_archives.checked_entries(archive, 100)) == [str(number) for number in range(len(sizes))]
        return
    with pytest.raises(ValueError, match=words):
        array_archives.checked_entries(archive, 100)


def test_the_memory_of_a_machine_is_that_of_its_pages(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.get)
    assert array_archives.physical_memory() == 4_096_000


def test_two_arrays_of_one_name_are_refused():
    archive = entries((8, 8), (8, 8))
    archive.infolist()[1].filename = "0.npy"
    with pytest.raises(ValueError, match="two of its arrays have one name"):
        array_archives.checked_entries(archive, 100)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_of_the_two_formats_of_plain_headers_are_read(tmp_path, version):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a.npy", "w") as file:
        np.lib.format.write_array(file, np.arange(3), version=version)
    if version < (3, 0):
        assert artifacts.read_arrays(path, remedy="")["a"].tolist() == [0, 1, 2]
        return
    with pytest.raises(UserError, match=r"a\.npy has the format version \(3, 0\)"):
        artifacts.read_arrays(path, remedy="")


def test_headers_are_read_without_the_arrays(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    artifacts.write_arrays(
        path, {"a": np.zeros((2, 3), dtype=np.float32), "none": np.empty((0, 4)), "one": np.ones(())}
    )
    assert {name: array.shape for name, array in artifacts.read_arrays(path, remedy="").items()} == {
        "a": (2, 3),
        "none": (0, 4),
        "one": (),
    }
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("an array was read"))
    headers = artifacts.array_headers(path, remedy="")
    assert {name: (header.shape, header.dtype, header.size) for name, header in headers.items()} == {
        "a": ((2, 3), np.dtype(np.float32), 6),
        "none": ((0, 4), np.dtype(np.float64), 0),
        "one": ((), np.dtype(np.float64), 1),
    }


def test_only_the_arrays_that_a_check_names_are_read(tmp_path):
    path = tmp_path / "x.npz"
    artifacts.write_arrays(path, {"a": np.arange(3), "b": np.arange(4)})
    found = artifacts.read_arrays(path, remedy="", check=lambda headers: [*headers][1:])
    assert {name: array.tolist() for name, array in found.items()} == {"b": [0, 1, 2, 3]}


def test_no_pickle_is_loaded_even_where_the_header_was_not_looked_at(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with zipfile.ZipFile(tmp_path / "x.npz") as archive, pytest.raises(ValueError, match="allow_pickle=False"):
        array_archives.read_entry(archive, archive.infolist()[0])


def test_texts_without_characters_count_a_byte_each(tmp_path):
    found = artifacts.read_arrays(npz(tmp_path / "x.npz", header("(8,)", "<U0")), remedy="")
    assert found["a"].tolist() == [""] * 8


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
